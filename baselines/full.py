"""Full tables on every rank: TorchRec's unsharded `EmbeddingBagCollection`, the oracle of everything else.

E_t[i] for every row i of every table t, nothing shared, dense gradients. It is three times slower than the fused,
sharded baseline (`baselines.sharded`): compare quality with it, not speed.

Both kinds of full table start from `initial_rows`, a pure function of (seed, table, row): a shard of any layout makes
its own part and equals the unsharded start bit for bit.
"""

import numpy as np
import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from pss.method import CompressionRefused, EmbeddingMethod, EmbeddingRequest, MethodOptions

INITIAL_BLOCK_ROWS = 65_536


class Options(MethodOptions):
    """Full tables have no options."""


def check_uncompressed(method: str, request: EmbeddingRequest) -> None:
    """Raise CompressionRefused for any compression but 1."""
    if request.compression != 1.0:
        raise CompressionRefused(f"{method}, whose tables are stored whole,", request.compression, 1.0)


def build(tables: list[EmbeddingBagConfig], options: Options, request: EmbeddingRequest) -> EmbeddingBagCollection:
    """Return tables of (num_embeddings, embedding_dim) float32. Raises CompressionRefused for a compression but 1."""
    check_uncompressed("full", request)
    module = EmbeddingBagCollection(tables, is_weighted=request.is_weighted, device=request.device)
    with torch.no_grad():
        for index, table in enumerate(tables):
            weight = module.embedding_bags[table.name].weight
            assert isinstance(weight, torch.Tensor)
            fill_initial_rows(weight, table=index, seed=request.seed, init_scale=request.init_scale)
    return module


def cell(module: EmbeddingBagCollection, table: int, row: int, col: int) -> float:
    """Return E_t[row, col]."""
    weight = module.embedding_bags[module.embedding_bag_configs()[table].name].weight
    assert isinstance(weight, torch.Tensor)
    return weight[row, col].item()


def fill_initial_rows(
    weight: torch.Tensor, *, table: int, seed: int, init_scale: float, row_offset: int = 0, col_offset: int = 0,
    embedding_dim: int | None = None,
) -> None:  # fmt: skip
    """Fill `weight` (rows, cols), the part of a table at (row_offset, col_offset), uniform in ± init_scale.

    Whole blocks of INITIAL_BLOCK_ROWS rows are drawn from generators seeded by (seed, table, block), so the memory
    needed is one block and the values do not depend on the sharding. embedding_dim: columns of the whole table.
    """
    rows, cols = weight.shape
    dim = embedding_dim or cols
    for block in range(row_offset // INITIAL_BLOCK_ROWS, -(-(row_offset + rows) // INITIAL_BLOCK_ROWS)):
        first = block * INITIAL_BLOCK_ROWS
        start, stop = max(first, row_offset), min(first + INITIAL_BLOCK_ROWS, row_offset + rows)
        # A row is drawn after the rows before it in its block: drawing only as many as needed changes no value.
        state = np.random.SeedSequence((seed, table, block)).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(state >> np.uint64(1)))
        drawn = torch.rand((stop - first, dim), generator=generator).mul_(2 * init_scale).sub_(init_scale)
        part = drawn[start - first :, col_offset : col_offset + cols]
        weight[start - row_offset : stop - row_offset].copy_(part)


METHOD = EmbeddingMethod(
    Options=Options, build=build, cell=cell, max_compression=1.0, stores_every_row=True, has_weighted_mean=False
)
