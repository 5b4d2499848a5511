"""The models by the names that configs choose them by: THE registry. Adding one: its file, and a line in MODELS."""

import torch
from torch import nn
from torchrec.modules.embedding_modules import EmbeddingBagCollectionInterface

from configs.schema import ModelSection
from recsys.models.autoint import AutoInt
from recsys.models.dcn import DCN
from recsys.models.deepfm import DeepFM
from recsys.models.dlrm import DLRM
from recsys.models.fibinet import FiBiNET
from recsys.models.frame import Model
from recsys.models.xdeepfm import XDeepFM

MODELS: dict[str, type[Model]] = {
    "autoint": AutoInt,
    "dcn": DCN,
    "deepfm": DeepFM,
    "dlrm": DLRM,
    "fibinet": FiBiNET,
    "xdeepfm": XDeepFM,
}


def build_model(
    section: ModelSection,
    embedding: EmbeddingBagCollectionInterface,
    *,
    num_dense: int,
    seed: int,
    device: torch.device,
) -> nn.Module:
    """Return the model around the embedding.

    Its dense weights depend on the seed alone: they are equal on all ranks and for all methods.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        return MODELS[section.architecture].build(
            embedding, num_dense=num_dense, embedding_dim=section.embedding_dim, options=section.options, device=device
        )
