"""Sizes at which embedding kernels are measured, the two grids of them, and batches of a size.

`models`: the sizes of recommendation models; the whole grid, or what can be measured in ten minutes: every axis through
the middle of the grid (B = 10240, d = 64, Z = 16, 10 MB, one id a bag, uniform), and corners where kernels differ most.
`paper`: those of Table 2 of the PSS paper, one table and one id a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import gcd
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

Ids = Literal["uniform", "zipf"]

FEATURES = 26
ZIPF_EXPONENT = 1.05
_STRIDE = 0x9E3779B1  # odd and near 2^32 / golden ratio: neighbours in rank lie far apart in the table
PAPER_ROWS = tuple(millions * 1_000_000 for millions in (4, 8, 16, 32, 64, 128, 256))
PAPER_COMPRESSIONS = (10, 100, 1_000, 10_000)
PAPER_BLOCK_SIZES = (1, 4, 16, 32)
PAPER_DIM, PAPER_BATCH_SIZE, PAPER_BLOCK_SIZE, PAPER_COMPRESSION = 128, 10_240, 32, 100


@dataclass(frozen=True)
class KernelSize:
    """Describe one lookup: `features` tables of `rows` rows in all, and the array M in their place.

    ids_per_bag: 1 = exactly one in each bag; more = their mean, every length from 0 to twice the mean being as likely.
    Raises ValueError naming what cannot be.
    """

    embedding_dim: int
    block_size: int
    memory_bytes: int
    batch_size: int
    ids_per_bag: int = 1
    ids: Ids = "uniform"
    features: int = FEATURES
    rows: int = 10_000_000

    def __post_init__(self) -> None:
        for name in ("embedding_dim", "block_size", "batch_size", "ids_per_bag", "features"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.memory_size < self.block_size:
            raise ValueError(
                f"M of {format_mb(self.memory_bytes)} is {self.memory_size} elements, fewer than one block of "
                f"Z = {self.block_size}"
            )
        if self.rows < self.features:
            raise ValueError(f"rows must be at least one for each of {self.features} features, not {self.rows}")
        if self.ids not in get_args(Ids):
            raise ValueError(f"ids {self.ids!r} are unknown: known are {list(get_args(Ids))}")

    @property
    def memory_size(self) -> int:
        """Return |M|, in elements of four bytes."""
        return self.memory_bytes // 4

    @property
    def rows_per_table(self) -> int:
        """Return the rows of one table; a remainder of `rows` over `features` is dropped."""
        return self.rows // self.features

    @property
    def full_bytes(self) -> int:
        """Return the bytes of the full tables in float32."""
        return 4 * self.features * self.rows_per_table * self.embedding_dim

    @property
    def output_bytes(self) -> int:
        """Return the bytes of the pooled output (B, F·d) in float32."""
        return 4 * self.batch_size * self.features * self.embedding_dim

    @property
    def expected_ids(self) -> int:
        """Return V, the ids that a batch holds on average."""
        return self.batch_size * self.features * self.ids_per_bag

    @property
    def compression(self) -> float:
        """Return the bytes of the full tables over those of M."""
        return self.full_bytes / self.memory_bytes

    @property
    def label(self) -> str:
        """Return the size in one line, as tables and plots name it."""
        bags = "one id a bag" if self.ids_per_bag == 1 else f"~{self.ids_per_bag} ids a bag"
        ids = "uniform" if self.ids == "uniform" else f"Zipf {ZIPF_EXPONENT}"
        memory = format_mb(self.memory_bytes)
        return f"d {self.embedding_dim} · Z {self.block_size} · M {memory} · B {self.batch_size:,} · {bags} · {ids}"


def format_mb(size: float) -> str:
    """Return bytes in units of 10^6 or 10^9: 10_000_000 -> '10 MB'."""
    return f"{size / 1e6:,.3g} MB" if size < 1e9 else f"{size / 1e9:,.3g} GB"


@dataclass(frozen=True)
class Axes:
    """Hold the values of a full grid, whose sizes are every combination of them."""

    embedding_dims: Sequence[int] = (16, 64, 128)
    block_sizes: Sequence[int] = (1, 8, 16, 32)
    memory_mb: Sequence[float] = (1, 10, 100)
    batch_sizes: Sequence[int] = (2_048, 10_240)
    ids_per_bag: Sequence[int] = (1, 10)
    ids: Sequence[Ids] = ("uniform", "zipf")

    def sizes(self, rows: int, features: int = FEATURES) -> list[KernelSize]:
        """Return every combination as a size. Raises ValueError for one that cannot be."""
        return [
            KernelSize(dim, block_size, round(mb * 1e6), batch_size, per_bag, ids, features, rows)
            for dim, ids, per_bag, batch_size, block_size, mb in product(
                self.embedding_dims, self.ids, self.ids_per_bag, self.batch_sizes, self.block_sizes, self.memory_mb
            )
        ]


def reduced_sizes(rows: int, features: int = FEATURES) -> list[KernelSize]:
    """Return every axis of the grid through its middle, and corners where kernels differ most."""
    middle = KernelSize(64, 16, 10_000_000, 10_240, features=features, rows=rows)
    mb = 1_000_000
    wide = [replace(middle, block_size=z, memory_bytes=m * mb) for z in (8, 16, 32) for m in (1, 10, 100)]
    changes: list[dict[str, int | str]] = [
        {"block_size": 1},
        {"block_size": 1, "memory_bytes": mb},
        {"ids": "zipf"},
        {"ids": "zipf", "block_size": 32, "memory_bytes": 100 * mb},
        {"batch_size": 2_048},
        {"batch_size": 2_048, "memory_bytes": 100 * mb},
        {"batch_size": 2_048, "ids_per_bag": 10},
        {"batch_size": 2_048, "ids_per_bag": 10, "ids": "zipf", "memory_bytes": mb},
        {"embedding_dim": 128, "block_size": 8},
        {"embedding_dim": 128},
        {"embedding_dim": 128, "memory_bytes": 100 * mb},
        {"embedding_dim": 16, "block_size": 8},
        {"embedding_dim": 16, "block_size": 32, "memory_bytes": mb},
    ]
    return wide + [replace(middle, **change) for change in changes]  # pyright: ignore[reportArgumentType]


def paper_sizes(rows: Sequence[int] = PAPER_ROWS) -> list[KernelSize]:
    """Return the sizes of Table 2: compression at one Z, and Z at one compression, over n.

    The paper does not say at which Z its (a) to (c) were measured: their row of 100x is that of Z = 16 and 32 in (d) to
    (f), and it recommends 32.
    """
    pairs = [(compression, PAPER_BLOCK_SIZE) for compression in PAPER_COMPRESSIONS]
    pairs += [(PAPER_COMPRESSION, z) for z in PAPER_BLOCK_SIZES if z != PAPER_BLOCK_SIZE]
    return [
        KernelSize(PAPER_DIM, z, 4 * n * PAPER_DIM // compression, PAPER_BATCH_SIZE, features=1, rows=n)
        for n in rows
        for compression, z in pairs
    ]


@dataclass(frozen=True)
class KernelBatch:
    """Hold the bags of a batch in the order of KeyedJaggedTensor, all of one feature after another.

    features: with offsets and lengths at hand; ids (V,) int64 within their tables; table_ids (V,) int64 within one
    table of all rows; offsets (features · B + 1,) int64; distinct: rows of the tables that occur.
    """

    features: KeyedJaggedTensor
    ids: Tensor
    table_ids: Tensor
    offsets: Tensor
    distinct: int


def build_batches(size: KernelSize, count: int, device: torch.device, seed: int = 0) -> list[KernelBatch]:
    """Return `count` batches of different ids, a function of (size, seed) alone."""
    generator = np.random.default_rng(seed)
    draw = _build_draw(size)
    return [_build_batch(size, draw, generator, device) for _ in range(count)]


def _build_draw(size: KernelSize):
    """Return a function from uniforms in [0, 1) to ids in [0, rows of a table).

    zipf: p(rank k) ∝ k^−1.05, ranks spread over the table, as ids of real data are not numbered by frequency.
    """
    rows = size.rows_per_table
    if size.ids == "uniform":
        return lambda uniforms: (uniforms * rows).astype(np.int64)
    cumulative = np.cumsum(np.arange(1, rows + 1, dtype=np.float64) ** -ZIPF_EXPONENT)
    stride = next(step for step in range(_STRIDE % rows or 1, 2 * rows + 2) if gcd(step, rows) == 1)

    def draw(uniforms: np.ndarray) -> np.ndarray:
        ranks = np.searchsorted(cumulative, uniforms * cumulative[-1], side="right").clip(max=rows - 1)
        return ranks * stride % rows

    return draw


def _build_batch(size: KernelSize, draw, generator: np.random.Generator, device: torch.device) -> KernelBatch:
    bags = size.features * size.batch_size
    lengths = np.ones(bags, np.int64)
    if size.ids_per_bag > 1:
        lengths = generator.integers(0, 2 * size.ids_per_bag + 1, bags)
    ids = draw(generator.random(int(lengths.sum())))
    per_feature = lengths.reshape(size.features, -1).sum(1)
    table_ids = ids + np.repeat(np.arange(size.features) * size.rows_per_table, per_feature)
    distinct = len(np.unique(table_ids))
    keys = [f"f{i}" for i in range(size.features)]
    features = KeyedJaggedTensor(keys, torch.from_numpy(ids), lengths=torch.from_numpy(lengths)).to(device).sync()
    offsets = features.offsets()  # materialised here, not within somebody's first forward
    return KernelBatch(features, features.values(), torch.from_numpy(table_ids).to(device), offsets, distinct)
