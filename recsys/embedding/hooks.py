"""What training asks of an embedding module, whoever wrote the module: see `pss.collection.EmbeddingHooks`."""

from typing import Any

from torch import nn

from pss.collection import EmbeddingHooks, count_state_bytes


class _PlainHooks(EmbeddingHooks):
    """The hooks of a module that has none, as TorchRec's own: it needs nothing, and keeps all of its state."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def stored_bytes(self) -> int:
        return count_state_bytes(self._module)

    def fit(self, tables: Any, id_counts: Any = None) -> float:
        raise ValueError(f"{type(self._module).__name__} cannot be fitted to trained tables")


def hooks_of(module: nn.Module) -> EmbeddingHooks:
    """Return the hooks of an embedding module."""
    return module if isinstance(module, EmbeddingHooks) else _PlainHooks(module)


def find_hooks(model: nn.Module) -> dict[str, EmbeddingHooks]:
    """Return the parts of a model that have hooks of their own, by their names in it."""
    return {name: module for name, module in model.named_modules() if isinstance(module, EmbeddingHooks)}
