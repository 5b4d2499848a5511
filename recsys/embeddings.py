"""The embedding methods, and what each of them offers: THE registry.

A method is a module with `Options` (its keys in [embedding.<method>]), `placement` ("replicate": a copy on every rank,
under DDP; "shard": divided over the ranks by TorchRec), `build` (a drop-in for TorchRec's `EmbeddingBagCollection`)
and `cell` (the paper's formula for one number of the table it stands for: the oracle of the contract test).
Adding one: its file in `pss/` or `baselines/`, and a line in METHODS.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollectionInterface

from baselines import full, sharded
from configs.schema import EmbeddingSection, Section
from pss import robe


class EmbeddingMethod(Protocol):
    @property
    def Options(self) -> type[Section]: ...

    @property
    def placement(self) -> str: ...

    def build(
        self,
        tables: list[EmbeddingBagConfig],
        *,
        compression: float,
        options: Any,
        init_scale: float,
        seed: int,
        device: torch.device,
        is_weighted: bool = False,
    ) -> EmbeddingBagCollectionInterface:
        """KeyedJaggedTensor of the tables' features -> KeyedTensor (B, ΣD) of pooled embeddings."""
        ...

    def cell(self, module: Any, table: int, row: int, col: int) -> float: ...


METHODS: dict[str, EmbeddingMethod] = {"full": full, "robe": robe, "sharded": sharded}


def build_tables(
    feature_names: Sequence[str], num_embeddings: Sequence[int], embedding_dim: int
) -> list[EmbeddingBagConfig]:
    """One sum-pooled table per feature, named t_<feature>."""
    return [
        EmbeddingBagConfig(name=f"t_{name}", embedding_dim=embedding_dim, num_embeddings=rows, feature_names=[name])
        for name, rows in zip(feature_names, num_embeddings, strict=True)
    ]


def build_embedding(
    section: EmbeddingSection, tables: list[EmbeddingBagConfig], *, seed: int, device: torch.device
) -> EmbeddingBagCollectionInterface:
    """Raises ValueError where the method cannot hold these tables at the asked compression."""
    return METHODS[section.method].build(
        tables,
        compression=section.compression,
        options=section.options,
        init_scale=section.init_scale,
        seed=seed,
        device=device,
    )


def count_full_parameters(tables: Sequence[EmbeddingBagConfig]) -> int:
    return sum(table.num_embeddings * table.embedding_dim for table in tables)


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
