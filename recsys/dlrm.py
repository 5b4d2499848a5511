"""DLRM (Naumov et al. 2019) on TorchRec's module: bottom MLP, pairwise dot interaction, top MLP.

    x_0 = bottom(dense) (B, D);  x_f = embedding of feature f (B, D);  logit = top([x_0, ⟨x_i, x_j⟩ for all i < j])

Takes any drop-in for `EmbeddingBagCollection`; knows nothing of ranks or of how embeddings are stored.
"""

import torch
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_modules import EmbeddingBagCollectionInterface

from configs.schema import Section

PHASES = {
    "dense_arch": "bottom_mlp",
    "sparse_arch": "embedding_lookup",
    "inter_arch": "interaction",
    "over_arch": "top_mlp",
}


class Options(Section):
    bottom_mlp: tuple[int, ...] = (64,)
    """Hidden layers over the dense features; a last layer of embedding_dim follows."""
    top_mlp: tuple[int, ...] = (64, 32)
    """Hidden layers over the interactions; a last layer of one logit follows."""


def build(
    embedding: EmbeddingBagCollectionInterface,
    *,
    num_dense: int,
    embedding_dim: int,
    options: Options,
    device: torch.device,
) -> DLRM:
    """forward(dense_features (B, num_dense) float32, sparse_features KJT of B bags) -> logits (B, 1) float32."""
    return DLRM(
        embedding_bag_collection=embedding,  # type: ignore[arg-type]  # typed as the class, used as the interface
        dense_in_features=num_dense,
        dense_arch_layer_sizes=[*options.bottom_mlp, embedding_dim],
        over_arch_layer_sizes=[*options.top_mlp, 1],
        dense_device=device,
    )
