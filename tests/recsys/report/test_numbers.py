"""Numbers in words: borders between units and between digits, signs, and what is missing."""

import doctest
from dataclasses import dataclass

import pytest

from recsys.report import numbers
from recsys.report.numbers import (
    MISSING,
    format_amount,
    format_bytes,
    format_count,
    format_epochs,
    format_fine_ratio,
    format_interval,
    format_measured,
    format_quartiles,
    format_ratio,
    format_rounded,
    format_seconds,
    format_share,
    format_signed,
    or_missing,
    plural,
    three_digits,
    two_digits,
)


@dataclass
class Mean:
    mean: float
    plus_minus: float | None = None


def test_the_examples_of_the_docstring_hold():
    assert doctest.testmod(numbers).failed == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (three_digits(9.994), "9.99"), (three_digits(9.996), "10.0"), (three_digits(99.96), "100"),
        (two_digits(0.123), "0.12"), (two_digits(0.96), "1.0"), (two_digits(9.94), "9.9"), (two_digits(9.96), "10"),
        (format_rounded(1234), "1,200"), (format_rounded(96_500), "96,000"), (format_rounded(7.4), "7"),
        (format_amount(99.4), "99.4"), (format_amount(0.01234), "0.0123"), (format_amount(12345.6), "12,346"),
        (format_count(0), "0"), (format_count(999.4), "999"), (format_count(1000), "1.00 k"),
        (format_count(53_999), "54.0 k"), (format_count(54_002_864), "54.0 M"),
        (format_bytes(0), "0 B"), (format_bytes(1023), "1023 B"), (format_bytes(1024), "1.00 KiB"),
        (format_bytes(3_565_158), "3.40 MiB"), (format_bytes(117_440_512), "112 MiB"),
        (format_seconds(0.5), "0.50 s"), (format_seconds(99.96), "100 s"), (format_seconds(120), "2 min 00 s"),
        (format_seconds(3661), "1 h 01 min"),
        (format_ratio(1), "1.00×"), (format_ratio(0.713), "0.71×"), (format_ratio(0.00182), "0.0018×"),
        (format_ratio(12.34), "12.3×"), (format_ratio(1000.2), "1,000×"),
        (format_share(0), "0 %"), (format_share(0.0042), "0.4 %"), (format_share(0.0096), "1 %"),
        (format_share(0.314), "31 %"), (format_share(1), "100 %"),
        (format_epochs(1.0004), "1 epoch"), (format_epochs(1.7499), "1.75 epochs"),
        (format_fine_ratio(9.987), "9.99×"), (format_fine_ratio(1003.44), "1,003.4×"),
        (format_signed(-0.00123), "−0.0012"), (format_signed(0.5, 2), "+0.50"),
        (format_interval(-0.0012, 0.0034), "[−0.0012, +0.0034]"),
        (format_quartiles(1.21, 12.4), "1.2–12"),
        (format_measured(Mean(0.75981, 0.00191)), "0.7598 ± 0.0019"), (format_measured(Mean(0.75981), 2), "0.76"),
        (format_measured(None), MISSING), (or_missing(None, format_seconds), MISSING),
        (or_missing(0.0, format_seconds), "0.00 s"),
        (plural(1, "seed"), "1 seed"), (plural(0, "seed"), "0 seeds"), (plural(1200, "row"), "1,200 rows"),
    ],
)  # fmt: skip
def test_numbers_read_as(text, expected):
    assert text == expected
