"""The columns of a generated row: which ids and integers occur, how often, and which occur together.

Every column turns a 32-bit uniform number into a value by its quantile function, tabulated in fixed point. Two
groupings tie columns of one row to each other: columns of one `missing_group` are blank by the same uniform number, and
columns of one `copies` group take a shared uniform number instead of their own with probability `copy_rate`, since
several columns of the real data are nearly functions of one another.

The constants were fitted on 80,000 rows of the Criteo Kaggle training set, its head; how, is said above each table.
"""

from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from recsys.data import exact
from recsys.data.criteo_tsv import CARDINALITIES, DENSE_NAMES, FEATURE_NAMES

MISSING_ID = 0
MISSING_INTEGER = -1

BIN_BITS = 12
POSITION_BITS = 32 - BIN_BITS
FRACTION_BITS = 16
COPY_BITS = 10  # the lowest bits of a column's own uniform decide whether it copies: far below the width of a bin


class IdColumn(NamedTuple):
    """Rank r of an id (0 = most frequent of n) has p(r) = ∫ over [r, r+1) of a density ∝ (x + shift)^−exponent.

    A Zipf–Mandelbrot law in continuous form: its quantile function is closed, so a table of any size costs nothing.
    """

    exponent: float
    shift: float
    missing: float = 0.0
    missing_group: str = ""
    copies: str = ""
    copy_rate: float = 0.0

    def quantiles(self, num_ids: int) -> np.ndarray:
        """Return x at 2^BIN_BITS + 1 equally spaced probabilities, float64 in [0, num_ids]."""
        u = np.arange(2**BIN_BITS + 1) / 2**BIN_BITS
        start, end = self._antiderivative(num_ids)
        return exact.power(start + u * (end - start), 1 / (1 - self.exponent)) - self.shift

    def rank_of_probability(self, num_ids: int, probability: float) -> float:
        """Return the rank whose id has this probability, within [1, num_ids]."""
        start, end = self._antiderivative(num_ids)
        density = np.array([abs((1 - self.exponent) / (end - start)) / probability])
        return float(np.clip(exact.power(density, 1 / self.exponent)[0] - self.shift, 1, num_ids))

    def _antiderivative(self, num_ids: int) -> np.ndarray:
        """Return (x + shift)^(1 − exponent) at x = 0 and x = num_ids."""
        return exact.power(np.array([self.shift, num_ids + self.shift]), 1 - self.exponent)


class IntegerColumn(NamedTuple):
    """⌊e^(log_mean + log_sd·z)⌋ with z standard normal, within ±3.72 (probability 10⁻⁴ on either side)."""

    log_mean: float
    log_sd: float
    missing: float
    missing_group: str

    def quantiles(self) -> np.ndarray:
        """Return the value at 2^BIN_BITS + 1 equally spaced probabilities, float64."""
        return exact.exp(self.log_mean + self.log_sd * normal_quantiles())


# Exponent and shift give the real number of distinct ids and the real Σ p² in 80,000 rows (but Σ p² and the share of
# the most frequent id for C6 and C25, which no such law fits); the blank rates are the real ones. C3, C4, C12, C16, C21
# and C24 are nearly bijective there; C2, C15, C18 and C7, C10, C11, C13 are close.
KAGGLE_ID_COLUMNS = (
    IdColumn(1.96, 0.96),
    IdColumn(2.58, 18.3, copies="B", copy_rate=0.9),
    IdColumn(1.04, 1.93, 0.039, "categories a", "A", 0.98),
    IdColumn(1.14, 2.56, 0.039, "categories a", "A", 0.98),
    IdColumn(2.52, 0.96),
    IdColumn(2.28, 1.14, 0.137, "categories b"),
    IdColumn(1.70, 174.0, copies="C", copy_rate=0.9),
    IdColumn(2.26, 0.96),
    IdColumn(1.50, 0.06),
    IdColumn(1.18, 0.36, copies="C", copy_rate=0.7),
    IdColumn(2.22, 174.0, copies="C", copy_rate=0.9),
    IdColumn(1.04, 1.93, 0.039, "categories a", "A", 0.98),
    IdColumn(2.16, 131.0, copies="C", copy_rate=0.9),
    IdColumn(1.16, 0.13),
    IdColumn(1.98, 114.0, copies="B", copy_rate=0.9),
    IdColumn(1.10, 3.39, 0.039, "categories a", "A", 0.98),
    IdColumn(0.92, 0.18),
    IdColumn(2.04, 37.0, copies="B", copy_rate=0.9),
    IdColumn(1.32, 0.08, 0.414, "categories c"),
    IdColumn(1.86, 1.93, 0.414, "categories c"),
    IdColumn(1.06, 2.23, 0.039, "categories a", "A", 0.98),
    IdColumn(1.96, 0.63, 0.817, "categories d"),
    IdColumn(0.94, 0.06),
    IdColumn(1.26, 2.56, 0.039, "categories a", "A", 0.98),
    IdColumn(5.90, 12.8, 0.414, "categories c"),
    IdColumn(1.24, 3.39, 0.414, "categories c"),
)

# Mean and deviation of ln(integer) give the real median and 90th percentile; the blank rates are the real ones.
INTEGER_COLUMNS = (
    IntegerColumn(0.6, 1.3, 0.445, "integers a"),
    IntegerColumn(1.6, 2.4, 0.0, ""),
    IntegerColumn(2.2, 1.4, 0.191, "integers b"),
    IntegerColumn(1.7, 1.0, 0.194, "integers c"),
    IntegerColumn(7.5, 2.5, 0.048, "integers d"),
    IntegerColumn(3.6, 1.8, 0.252, "integers e"),
    IntegerColumn(1.3, 1.6, 0.047, "integers f"),
    IntegerColumn(2.1, 1.1, 0.001, "integers g"),
    IntegerColumn(3.7, 1.6, 0.047, "integers f"),
    IntegerColumn(0.3, 0.6, 0.445, "integers a"),
    IntegerColumn(0.7, 0.9, 0.047, "integers f"),
    IntegerColumn(-0.6, 1.3, 0.772, "integers h"),
    IntegerColumn(1.8, 1.1, 0.194, "integers c"),
)


def id_columns(cardinalities: str) -> tuple[IdColumn, ...]:
    """Return the 26 columns for one of `criteo_tsv.CARDINALITIES`.

    Only the Kaggle set was at hand to fit, so the i-th largest table of another set behaves as Kaggle's i-th largest.
    """
    by_size = sorted(range(len(FEATURE_NAMES)), key=CARDINALITIES["criteo_kaggle"].__getitem__)
    sizes = CARDINALITIES[cardinalities]
    columns = dict(zip(sorted(range(len(sizes)), key=sizes.__getitem__), by_size, strict=True))
    return tuple(KAGGLE_ID_COLUMNS[columns[i]] for i in range(len(sizes)))


def normal_quantiles() -> np.ndarray:
    """Return z at 2^BIN_BITS + 1 equally spaced probabilities, cut off at 10⁻⁴ and rounded to 6 digits.

    The standard library's inverse uses log; rounding removes what a platform's log could add, since none of these
    numbers lies near the middle between two roundings.
    """
    inverse = NormalDist().inv_cdf
    probabilities = np.clip(np.arange(2**BIN_BITS + 1) / 2**BIN_BITS, 1e-4, 1 - 1e-4)
    return np.array([round(inverse(p), 6) for p in probabilities.tolist()])


class Columns:
    """Draws the integers and ids of rows from their hashes, each row by itself."""

    def __init__(self, columns: Sequence[IdColumn], num_ids: Sequence[int], seed: int) -> None:
        self.columns = tuple(columns)
        self.num_ids = tuple(num_ids)
        copies = sorted({c.copies for c in columns if c.copies})
        blanks = sorted({c.missing_group for c in (*columns, *INTEGER_COLUMNS) if c.missing_group})
        streams = [*FEATURE_NAMES, *DENSE_NAMES, *copies, *blanks]
        self._stream = {name: i for i, name in enumerate(streams)}
        self._keys = exact.random_keys(seed, "columns", -(-len(streams) // 2))
        self._ids = _FixedPoint(
            np.stack([c.quantiles(n) for c, n in zip(columns, num_ids, strict=True)]), np.array(num_ids)
        )
        self._integers = _FixedPoint(np.stack([c.quantiles() for c in INTEGER_COLUMNS]))

    def draw(self, row_hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the integers (13, n) int64 and ids (26, n) int64 of (n,) uint64 row hashes.

        A missing integer is −1; ids count from 1 by falling frequency, a missing one is 0.
        """
        uniforms = exact.halves(exact.draw(row_hashes, self._keys))
        num_ids, num_integers = len(FEATURE_NAMES), len(DENSE_NAMES)
        own = uniforms[:num_ids]
        for column, u in zip(self.columns, own, strict=True):
            if column.copies:
                copied = (u & (2**COPY_BITS - 1)) < int(column.copy_rate * 2**COPY_BITS)
                np.copyto(u, uniforms[self._stream[column.copies]], where=copied)
        ids = self._ids.values(own) + 1
        integers = self._integers.values(uniforms[num_ids : num_ids + num_integers])
        for values, columns, blank in ((ids, self.columns, MISSING_ID), (integers, INTEGER_COLUMNS, MISSING_INTEGER)):
            for column, row in zip(columns, values, strict=True):
                if column.missing:
                    row[uniforms[self._stream[column.missing_group]] < int(column.missing * 2**32)] = blank
        return integers, ids


class _FixedPoint:
    """The quantile functions of C columns, tabulated at 2^BIN_BITS steps, linear in between, in 64-bit integers."""

    def __init__(self, quantiles: np.ndarray, limits: np.ndarray | None = None) -> None:
        """Tabulate quantiles (C, 2^BIN_BITS + 1) float64. Values stay below limits (C,), the last quantiles."""
        table = np.rint(quantiles * 2**FRACTION_BITS).astype(np.int64)
        if limits is not None:
            end = limits[:, None] << FRACTION_BITS
            table = np.clip(table, 0, end - 1)
            table[:, :1], table[:, -1:] = 0, end
        self._start = np.ascontiguousarray(table[:, :-1])
        self._step = np.diff(table, axis=1)
        assert self._step.max() < 1 << (63 - POSITION_BITS), "a step times a position overflows 64 bits"

    def values(self, uniforms: np.ndarray) -> np.ndarray:
        """Return the integer part of each quantile, (C, n) int64, of (C, n) 32-bit uniforms, int64."""
        out = np.empty_like(uniforms)
        for start, step, u, value in zip(self._start, self._step, uniforms, out, strict=True):
            bins = u >> POSITION_BITS
            step.take(bins, out=value)
            value *= u & (2**POSITION_BITS - 1)
            value >>= POSITION_BITS
            value += start.take(bins)
            value >>= FRACTION_BITS
        return out
