"""Numbers as people read them: three digits and a unit."""

import math


def format_count(value: float) -> str:
    """53_900_000 -> '53.9 M', three digits from a thousand on."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:
            return f"{three_digits(value / size)} {letter}"
    return f"{value:.0f}"


def format_bytes(value: float) -> str:
    """3_565_158 -> '3.40 MiB'"""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if value >= 0.9995 * 1024**power:
            return f"{three_digits(value / 1024**power)} {unit}"
    return f"{value:.0f} B"


def format_seconds(value: float) -> str:
    """Seconds up to two minutes, then minutes or hours with what is left."""
    if value < 119.95:
        return f"{three_digits(value)} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def format_epochs(value: float) -> str:
    """1 -> '1 epoch', 1.7499 -> '1.75 epochs'"""
    text = f"{value:.3g}"
    return f"{text} epoch" if text == "1" else f"{text} epochs"


def format_ratio(value: float) -> str:
    """0.7132 -> '0.71×', 0.00204 -> '0.0020×', 1000.2 -> '1,000×'"""
    if value >= 99.95:
        return f"{value:,.0f}×"
    if value <= 0:
        return f"{value:g}×"
    return f"{value:.{max(1 - math.floor(math.log10(value)), 1 if value >= 10 else 2)}f}×"


def format_share(value: float) -> str:
    """0.314 -> '31 %', 0.0042 -> '0.4 %'"""
    return f"{100 * value:.{1 if 0 < value < 0.0095 else 0}f} %"


def three_digits(value: float) -> str:
    if value >= 99.95:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
