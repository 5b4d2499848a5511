"""Batches for kernels: the same ids in the form that each competitor takes, made before anything is timed."""

from dataclasses import dataclass
from math import gcd

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys.bench.kernel_grid import ZIPF_EXPONENT, KernelSize

_STRIDE = 0x9E3779B1  # odd and near 2^32 / golden ratio: neighbours in rank lie far apart in the table


@dataclass(frozen=True)
class KernelBatch:
    """Bags in the order of KeyedJaggedTensor, all of one feature after another.

    features: with offsets and lengths at hand; ids (V,) int64 within their tables; table_ids (V,) int64 within one
    table of all rows; offsets (features · B + 1,) int64; distinct: rows of the tables that occur.
    """

    features: KeyedJaggedTensor
    ids: Tensor
    table_ids: Tensor
    offsets: Tensor
    distinct: int


def build_batches(size: KernelSize, count: int, device: torch.device, seed: int = 0) -> list[KernelBatch]:
    """Different ids in each, a function of (size, seed) alone."""
    generator = np.random.default_rng(seed)
    draw = _build_draw(size)
    return [_build_batch(size, draw, generator, device) for _ in range(count)]


def _build_draw(size: KernelSize):
    """A function from uniforms in [0, 1) to ids in [0, rows of a table).

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
