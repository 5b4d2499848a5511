"""Numbers as people read them: few digits, a unit, and a dash for what is not known.

>>> format_count(53_900_000), format_bytes(3_565_158), format_seconds(7450), format_ratio(0.7132)
('53.9 M', '3.40 MiB', '2 h 04 min', '0.71×')
>>> or_missing(None, format_seconds)
'–'
"""

import math
from collections.abc import Callable
from typing import Protocol

MISSING = "–"


class MeanWithSpread(Protocol):
    """Describe a mean, and ± its spread where that is known."""

    @property
    def mean(self) -> float:
        """Return the mean."""
        ...

    @property
    def plus_minus(self) -> float | None:
        """Return the spread, in the unit of the mean; None where it is not known."""
        ...


def or_missing(value: float | None, text: Callable[[float], str]) -> str:
    """Return text(value), or a dash where there is no value."""
    return MISSING if value is None else text(value)


def plural(count: int, noun: str) -> str:
    """Return a count with its noun: '1 seed', '3 seeds'."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def three_digits(value: float) -> str:
    """Return three digits without a unit, of milliseconds too: 0.5 -> '0.50', 12.34 -> '12.3', 1234 -> '1234'."""
    if value >= 99.95:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def two_digits(value: float) -> str:
    """Return two digits for small print: 0.123 -> '0.12', 1.23 -> '1.2', 12.3 -> '12'."""
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}" if value >= 0.95 else f"{value:.2f}"


def format_rounded(value: float) -> str:
    """Return a whole number rounded to two digits: 1234 -> '1,200'."""
    return f"{float(f'{value:.2g}'):,.0f}"


def format_amount(value: float) -> str:
    """Return hours, kWh or dollars: 0.01234 -> '0.0123', 12345.6 -> '12,346'."""
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.3g}"


def format_count(value: float) -> str:
    """Return a count with three digits from a thousand on: 53_900_000 -> '53.9 M'."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:
            return f"{three_digits(value / size)} {letter}"
    return f"{value:.0f}"


def format_bytes(value: float) -> str:
    """Return bytes in binary units: 3_565_158 -> '3.40 MiB'."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if value >= 0.9995 * 1024**power:
            return f"{three_digits(value / 1024**power)} {unit}"
    return f"{value:.0f} B"


def format_seconds(value: float) -> str:
    """Return seconds up to two minutes, then minutes or hours with what is left."""
    if value < 119.95:
        return f"{three_digits(value)} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def format_epochs(value: float) -> str:
    """Return a number of epochs: 1 -> '1 epoch', 1.7499 -> '1.75 epochs'."""
    text = f"{value:.3g}"
    return f"{text} epoch" if text == "1" else f"{text} epochs"


def format_ratio(value: float) -> str:
    """Return a factor with two digits or more: 0.7132 -> '0.71×', 0.00204 -> '0.0020×', 1000.2 -> '1,000×'."""
    if value >= 99.95:
        return f"{value:,.0f}×"
    if value <= 0:
        return f"{value:g}×"
    return f"{value:.{max(1 - math.floor(math.log10(value)), 1 if value >= 10 else 2)}f}×"


def format_fine_ratio(value: float) -> str:
    """Return a factor with its decimals, to tell near ones apart: 9.987 -> '9.99×', 1003.4 -> '1,003.4×'."""
    return f"{value:,.{2 if value < 99.5 else 1}f}×"


def format_share(value: float) -> str:
    """Return a share in per cent: 0.314 -> '31 %', 0.0042 -> '0.4 %'."""
    return f"{100 * value:.{1 if 0 < value < 0.0095 else 0}f} %"


def format_signed(value: float, digits: int = 4) -> str:
    """Return a difference with its sign, a true minus: -0.0012 -> '−0.0012'."""
    return f"{value:+.{digits}f}".replace("-", "−")


def format_interval(low: float, high: float, digits: int = 4) -> str:
    """Return an interval of differences: '[−0.0012, +0.0034]'."""
    return f"[{format_signed(low, digits)}, {format_signed(high, digits)}]"


def format_quartiles(low: float, high: float) -> str:
    """Return first and third quartile for small print: '1.2–1.4'."""
    return f"{two_digits(low)}–{two_digits(high)}"


def format_measured(value: MeanWithSpread | None, digits: int = 4) -> str:
    """Return '0.7598', or '0.7598 ± 0.0019' where the spread is known, or a dash."""
    if value is None:
        return MISSING
    spread = f" ± {value.plus_minus:.{digits}f}" if value.plus_minus is not None else ""
    return f"{value.mean:.{digits}f}{spread}"
