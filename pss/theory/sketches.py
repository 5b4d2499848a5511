"""The matrices S (k, n) of the PSS paper's section 2.1, written out: the plain reference of what methods hash.

All entries have mean 0 and variance 1/k, so that E[SᵀS] = I, but for "hashing-unsigned", which is biased.

- gaussian: N(0, 1/k).
- achlioptas: √(3/k) times 0 with probability 2/3, +1 and -1 with 1/6 each (Achlioptas 2003).
- sparse: s entries ± 1/√s a column, one in each of s blocks of k/s rows (Kane and Nelson 2014, the block construction).
- hashing: one entry ± 1 a column, s = 1: the hashing trick with signs (count sketch).
- hashing-unsigned: one entry 1 a column: the hashing trick as it is used for embeddings.
"""

from collections.abc import Callable

import numpy as np
from scipy import sparse

Columns = np.ndarray | sparse.csc_array


def draw_gaussian(size: int, columns: int, rng: np.random.Generator, nonzeros: int) -> Columns:
    """Return independent N(0, 1/k)."""
    return rng.standard_normal((size, columns), dtype=np.float32) * np.float32(size**-0.5)


def draw_achlioptas(size: int, columns: int, rng: np.random.Generator, nonzeros: int) -> Columns:
    """Return √(3/k) · {0 with 2/3, ±1 with 1/6 each}."""
    values = np.zeros(6, dtype=np.float32)
    values[:2] = (3 / size) ** 0.5, -((3 / size) ** 0.5)
    return values[rng.integers(6, size=(size, columns), dtype=np.uint8)]


def draw_sparse(size: int, columns: int, rng: np.random.Generator, nonzeros: int) -> Columns:
    """Return columns of some ±1/√s, one in each of s blocks of rows."""
    if size % nonzeros:
        raise ValueError(f"{nonzeros} non-zeros a column need k to be a multiple of {nonzeros}, not {size}")
    block = size // nonzeros
    places = rng.integers(block, size=(columns, nonzeros)) + block * np.arange(nonzeros)
    signs = 2 * rng.integers(2, size=(columns, nonzeros)) - 1
    starts = np.arange(columns + 1) * nonzeros
    values = (signs * nonzeros**-0.5).astype(np.float32).ravel()
    return sparse.csc_array((values, places.ravel(), starts), shape=(size, columns))


def draw_hashing(size: int, columns: int, rng: np.random.Generator, nonzeros: int) -> Columns:
    """Return columns of one ±1."""
    return draw_sparse(size, columns, rng, nonzeros=1)


def draw_hashing_unsigned(size: int, columns: int, rng: np.random.Generator, nonzeros: int) -> Columns:
    """Return columns of one 1."""
    return abs(draw_sparse(size, columns, rng, nonzeros=1))


EXPLICIT: dict[str, Callable[[int, int, np.random.Generator, int], Columns]] = {
    "gaussian": draw_gaussian,
    "achlioptas": draw_achlioptas,
    "sparse": draw_sparse,
    "hashing": draw_hashing,
    "hashing-unsigned": draw_hashing_unsigned,
}
"""name -> draws (k, columns) entries of S, float32, as an array or in sparse columns; `nonzeros` is s of "sparse"."""
