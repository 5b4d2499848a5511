"""What embeddings hold: parameters as trained, and bytes as stored."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig


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
