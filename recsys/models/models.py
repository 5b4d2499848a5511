"""The models, and how one is put together: THE registry. Adding one: its file, and a line in MODELS."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import nn
from torchrec.modules.embedding_modules import EmbeddingBagCollectionInterface

from configs.schema import ModelSection, Section
from recsys.models import autoint, dcn, deepfm, dlrm, fibinet, xdeepfm


class Architecture(Protocol):
    @property
    def Options(self) -> type[Section]: ...

    @property
    def FIRST_ORDER(self) -> bool:
        """Whether the model has a first-order table for every sparse feature, see `recsys.models.sparse_features`."""
        ...

    @property
    def PHASES(self) -> Mapping[str, str]:
        """Names of the model's submodules -> phases of a step, see `recsys.runs.phases`."""
        ...

    def build(
        self,
        embedding: EmbeddingBagCollectionInterface,
        *,
        num_dense: int,
        embedding_dim: int,
        options: Any,
        device: torch.device,
    ) -> nn.Module:
        """A module with forward(dense_features (B, num_dense), sparse_features KJT) -> logits (B, 1)."""
        ...


MODELS: dict[str, Architecture] = {
    "autoint": autoint,
    "dcn": dcn,
    "deepfm": deepfm,
    "dlrm": dlrm,
    "fibinet": fibinet,
    "xdeepfm": xdeepfm,
}


def build_model(
    section: ModelSection,
    embedding: EmbeddingBagCollectionInterface,
    *,
    num_dense: int,
    seed: int,
    device: torch.device,
) -> nn.Module:
    """The model around the embedding. Its dense weights depend on the seed alone: equal on all ranks and methods."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        return MODELS[section.architecture].build(
            embedding, num_dense=num_dense, embedding_dim=section.embedding_dim, options=section.options, device=device
        )
