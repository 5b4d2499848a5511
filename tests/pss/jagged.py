"""Inputs and oracles for the tests of parameter-shared embeddings."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor


def table(
    name: str,
    num_embeddings: int,
    embedding_dim: int,
    feature_names: Sequence[str] | None = None,
    pooling: PoolingType = PoolingType.SUM,
) -> EmbeddingBagConfig:
    """A table's config; its feature has the table's name unless others are given."""
    return EmbeddingBagConfig(
        name=name,
        num_embeddings=num_embeddings,
        embedding_dim=embedding_dim,
        feature_names=list(feature_names or [name]),
        pooling=pooling,
    )


def random_kjt(
    keys: Sequence[str],
    batch: int,
    *,
    max_id: int = 10,
    max_length: int = 4,
    weighted: bool = False,
    seed: int = 0,
    ids_dtype: torch.dtype = torch.int64,
    lengths_dtype: torch.dtype = torch.int64,
) -> KeyedJaggedTensor:
    """`batch` bags of 0 to max_length ids in [0, max_id) for every key; max_length = 0 means one id per bag."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, max_length + 1, (len(keys) * batch,), generator=generator)
    if max_length == 0:
        lengths = torch.ones_like(lengths)
    ids = torch.randint(0, max_id, (int(lengths.sum()),), generator=generator)
    weights = torch.rand(len(ids), generator=generator) + 0.5 if weighted else None
    return KeyedJaggedTensor(
        keys=list(keys), values=ids.to(ids_dtype), lengths=lengths.to(lengths_dtype), weights=weights, stride=batch
    )


def pooled_by_cell(module: Any, cell: Callable[[Any, int, int, int], float], features: KeyedJaggedTensor) -> Tensor:
    """What forward must give, (B, ΣD) float64: every bag summed up number by number out of `cell`."""
    columns = []
    by_name = features.to_dict()
    for index, config in enumerate(module.embedding_bag_configs()):
        for name in config.feature_names:
            ids, offsets = by_name[name].values().tolist(), by_name[name].offsets().tolist()
            weights = by_name[name].weights().tolist() if module.is_weighted() else [1.0] * len(ids)
            for col in range(config.embedding_dim):
                column = []
                for start, stop in pairwise(offsets):
                    total = sum(weights[k] * cell(module, index, ids[k], col) for k in range(start, stop))
                    is_mean = config.pooling == PoolingType.MEAN and stop > start
                    column.append(total / (stop - start) if is_mean else total)
                columns.append(column)
    return torch.tensor(columns, dtype=torch.float64).t()


def materialise(module: Any, cell: Callable[[Any, int, int, int], float], index: int) -> Tensor:
    """Table `index` written out through `cell`: (num_embeddings, embedding_dim) float32."""
    config = module.embedding_bag_configs()[index]
    rows, cols = range(config.num_embeddings), range(config.embedding_dim)
    return torch.tensor([[cell(module, index, row, col) for col in cols] for row in rows])
