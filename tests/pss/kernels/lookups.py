"""Lookups of every kind that the kernels know, and what they must give: plain PyTorch in float64."""

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from pss.methods.robe import RobeEmbeddingBagCollection, robe_rows
from tests.pss.jagged import table

KEYS = ["d", "a", "unused", "b", "c"]


def tables_of(dim: int, pooling: PoolingType = PoolingType.SUM) -> list[EmbeddingBagConfig]:
    """One group: a table of two features, a feature of two tables, a table of one row."""
    return [
        table("t", 50, dim, ["a", "b"], pooling),
        table("u", 1, dim, ["c"], pooling),
        table("v", 31, dim, ["d"], pooling),
        table("w", 50, dim, ["a"], pooling),
    ]


COUNTS = [np.arange(rows, 0, -1) for rows in (50, 1, 31, 50)]  # of ids, falling

LOOKUPS: dict[str, tuple[int, dict[str, Any]]] = {  # embedding_dim, arguments
    "Z = 1": (5, {"memory_size": 61, "block_size": 1}),
    "Z = d = 1": (1, {"memory_size": 7, "block_size": 1}),
    "Z = 2": (6, {"memory_size": 61, "block_size": 2}),
    "Z = 4": (12, {"memory_size": 61, "block_size": 4, "signed": True}),
    "Z = 8": (16, {"memory_size": 1009, "block_size": 8}),
    "Z = 16": (64, {"memory_size": 3001, "block_size": 16}),
    "Z = 32": (64, {"memory_size": 65, "block_size": 32, "signed": True}),
    "Z = d = 64": (64, {"memory_size": 64, "block_size": 64}),
    "Z = 128": (256, {"memory_size": 70_001, "block_size": 128}),
    "odd Z": (35, {"memory_size": 997, "block_size": 7, "signed": True}),
    "last chunk shorter": (19, {"memory_size": 997, "block_size": 8}),
    "affine": (16, {"memory_size": 997, "block_size": 4, "hash_family": "affine", "signed": True}),
    "authors, Z > d": (6, {"memory_size": 997, "block_size": 16, "hash_family": "authors"}),
    "flattened, Z = 1": (6, {"memory_size": 997, "block_size": 1, "flattened": True, "signed": True}),
    "flattened, Z < d": (12, {"memory_size": 997, "block_size": 4, "flattened": True}),
    "flattened, affine": (12, {"memory_size": 97, "block_size": 4, "flattened": True, "hash_family": "affine"}),
    "flattened, Z > d": (6, {"memory_size": 997, "block_size": 24, "signed": True}),
    "tiers": (16, {"memory_size": 997, "block_size": 8, "tiers": [(30, 0.5), (10, 0.1)], "id_counts": COUNTS}),
    "private rows": (
        16,
        {"memory_size": 997, "block_size": 8, "private_share": 0.5, "id_counts": COUNTS, "hash_family": "affine"},
    ),
    "tiers and private rows": (
        20,
        {"memory_size": 9973, "block_size": 8, "tiers": [(10, 0.1)], "private_share": 0.2, "id_counts": COUNTS},
    ),
}


def build(name: str, is_weighted: bool = False, pooling: PoolingType = PoolingType.SUM, **more: Any) -> Any:
    dim, arguments = LOOKUPS[name]
    return RobeEmbeddingBagCollection(
        tables_of(dim, pooling), is_weighted, init_scale=1.0, seed=3, **{**arguments, **more}
    )


def random_ids(max_length: int, batch: int, seed: int, *, weighted: bool, ids_dtype: torch.dtype) -> KeyedJaggedTensor:
    """Bags of ids small, negative and of all 63 (or 31) bits, of features in another order than the tables'."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, max_length + 1, (len(KEYS) * batch,), generator=generator)
    if max_length == 0:
        lengths = torch.ones_like(lengths)
    count = int(lengths.sum())
    high = torch.iinfo(ids_dtype).max
    ids = torch.randint(0, 50, (count,), generator=generator)
    wide = torch.randint(-high, high, (count,), generator=generator)
    ids = torch.where(torch.rand(count, generator=generator) < 0.2, wide, ids).to(ids_dtype)
    weights = torch.randn(count, generator=generator) if weighted else None
    return KeyedJaggedTensor(KEYS, ids, weights, lengths=lengths, stride=batch)


def in_float64(
    module: RobeEmbeddingBagCollection, features: KeyedJaggedTensor, gradient: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Output, gradient of memory and of the weights, bag by bag."""
    memory = module.memory.detach().double().requires_grad_()
    weights = features.weights_or_none()
    weights = None if weights is None else weights.detach().double().requires_grad_()
    columns = []
    for index, config in enumerate(module.embedding_bag_configs()):
        place = module._groups[0].tables.index(index)
        for name in config.feature_names:
            key, batch = features.keys().index(name), features.stride()
            offsets = features.offsets()[key * batch : (key + 1) * batch + 1].tolist()
            bags = []
            for start, stop in pairwise(offsets):
                ids = features.values()[start:stop].long()
                rows = robe_rows(memory, ids, torch.full_like(ids, place), module._plan[0])
                if weights is not None:
                    rows = rows * weights[start:stop, None]
                total = rows.sum(0)
                bags.append(total / max(1, stop - start) if config.pooling == PoolingType.MEAN else total)
            columns.append(torch.stack(bags) if bags else memory.new_empty(0, config.embedding_dim))
    output = torch.cat(columns, dim=1)
    if gradient is None:
        return output.detach(), None, None
    output.backward(gradient.double())
    return output.detach(), memory.grad, None if weights is None else weights.grad
