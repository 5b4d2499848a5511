"""What embeddings hold: parameters as trained, and bytes as stored."""

from collections.abc import Sequence

import torch
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from recsys.embedding.hooks import hooks_of


def count_full_parameters(tables: Sequence[EmbeddingBagConfig]) -> int:
    """Return the numbers that full tables hold."""
    return sum(table.num_embeddings * table.embedding_dim for table in tables)


def count_parameters(module: nn.Module) -> int:
    """Return the numbers that the module trains."""
    return sum(parameter.numel() for parameter in module.parameters())


def stored_bytes(module: nn.Module) -> int:
    """Return the bytes of what must be kept to look up."""
    return hooks_of(module).stored_bytes()


def state_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return parameters and persistent buffers by name."""
    return {name: value for name, value in module.state_dict().items() if isinstance(value, torch.Tensor)}
