"""The embedding methods, and what each of them offers: THE registry.

A method is a module with `Options` (its keys in [embedding.<method>]), `placement` ("replicate": a copy on every rank,
under DDP; "shard": divided over the ranks by TorchRec), `build` (a drop-in for TorchRec's `EmbeddingBagCollection`)
and `cell` (the paper's formula for one number of the table it stands for: the oracle of the contract test).
Adding one: its file in `pss/` or `baselines/`, and a line in METHODS.

What a method's module may have besides, for those that change while they train or are smaller afterwards:

- `end_step(step, total_steps)`: called after every optimizer step, on every rank; step counts from 1. Collective. Ranks
  must come out equal: decide on values they share.
- `stored_bytes()`: bytes of what is kept to look up, where that is not parameters and persistent buffers.
- `settle_gradient(batch_size)` and `gradient`: see `pss.shared_array`.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollectionInterface

from baselines import full, sharded
from configs.request import EmbeddingRequest
from configs.schema import EmbeddingSection, Section
from pss import robe


class EmbeddingMethod(Protocol):
    @property
    def Options(self) -> type[Section]: ...

    @property
    def placement(self) -> str: ...

    def build(
        self, tables: list[EmbeddingBagConfig], options: Any, request: EmbeddingRequest
    ) -> EmbeddingBagCollectionInterface:
        """KeyedJaggedTensor of the tables' features -> KeyedTensor (B, ΣD) of pooled embeddings.

        Raises ValueError where the method cannot stand for these tables within the asked budget."""
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
    request = EmbeddingRequest(compression=section.compression, init_scale=section.init_scale, seed=seed, device=device)
    return METHODS[section.method].build(tables, section.options, request)


def count_full_parameters(tables: Sequence[EmbeddingBagConfig]) -> int:
    return sum(table.num_embeddings * table.embedding_dim for table in tables)


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def stored_bytes(module: Any) -> int:
    """Bytes of what must be kept to look up: parameters and persistent buffers, unless the module says otherwise."""
    if hasattr(module, "stored_bytes"):
        return module.stored_bytes()
    return sum(tensor.numel() * tensor.element_size() for tensor in state_tensors(module).values())


def state_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name."""
    return {name: value for name, value in module.state_dict().items() if isinstance(value, torch.Tensor)}
