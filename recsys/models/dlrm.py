"""DLRM (Naumov et al. 2019, "Deep Learning Recommendation Model for Personalization and Recommendation Systems") on
TorchRec's modules: bottom MLP, interaction, top MLP.

    x_0 = bottom(dense) (B, D);  x_f = embedding of feature f (B, D), f ≤ F;  logit = top(interaction)

    dot:         [x_0, ⟨x_i, x_j⟩ for all i < j]                                                  the paper's, section 2
    projection:  [x_0, Y Z], Y (B, F_1, D) and Z (B, D, F_2) from two MLPs of [x_0, …, x_F]        `DLRM_Projection`
    dcn:         x ← y ∘ (W V x + b) + x, L times, from x = y = [x_0, …, x_F] (B, N), N = (F + 1) D     `DLRM_DCN`

dcn is the low-rank cross network of DCN-V2 (Wang et al. 2021; W (N, r), V (r, N)) inside DLRM, MLPerf's
model since 2023 (L = 3, r = 512, D = 128); DCN itself, with a deep part beside the cross network, is
`recsys.models.dcn`. No first-order tables. Takes any drop-in for `EmbeddingBagCollection`; knows nothing of ranks or of
how embeddings are stored.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torchrec.models import dlrm
from torchrec.modules.embedding_modules import EmbeddingBagCollectionInterface

from configs.schema import Section
from recsys.models.frame import Model, check_layers


class Options(Section):
    """The options of DLRM."""

    bottom_mlp: tuple[int, ...] = (64,)
    """Hidden layers over the dense features; a last layer of embedding_dim follows."""
    top_mlp: tuple[int, ...] = (64, 32)
    """Hidden layers over the interactions, at least one; a last layer of one logit follows."""
    interaction: Literal["dot", "projection", "dcn"] = "dot"
    """dot = all pairs; projection = products of two projections; dcn = a low-rank cross network."""
    projection_mlp: tuple[int, ...] = ()
    """projection: hidden layers of each of the two MLPs."""
    projection_rows: tuple[int, int] = (8, 8)
    """projection: F_1 and F_2, the MLPs' last layers are that times embedding_dim."""
    cross_layers: int = Field(default=3, ge=1)
    """dcn: L, layers of the cross network."""
    cross_rank: int = Field(default=64, ge=1)
    """dcn: r, rank of its matrices."""

    @field_validator("bottom_mlp", "top_mlp", "projection_mlp", "projection_rows")
    @classmethod
    def _layers_have_units(cls, sizes: tuple[int, ...]) -> tuple[int, ...]:
        return check_layers(sizes)

    @field_validator("top_mlp")
    @classmethod
    def _has_a_hidden_layer(cls, top_mlp: tuple[int, ...]) -> tuple[int, ...]:
        if not top_mlp:
            raise ValueError("[]: TorchRec's DLRM needs at least one hidden layer")
        return top_mlp


class DLRM(Model):
    """TorchRec's DLRM, with the interaction that the options choose."""

    Options = Options
    PHASES: ClassVar[Mapping[str, str]] = {
        "dense_arch": "bottom_mlp",
        "sparse_arch": "embedding_lookup",
        "inter_arch": "interaction",
        "over_arch": "top_mlp",
    }

    @classmethod
    def build(
        cls,
        embedding: EmbeddingBagCollectionInterface,
        *,
        num_dense: int,
        embedding_dim: int,
        options: Options,
        device: torch.device,
    ) -> dlrm.DLRM:
        """Return TorchRec's module: dense_features (B, S) float32, a KJT of B bags -> logits (B, 1) float32.

        Raises ValueError for data without dense features: x_0 is made of them.
        """
        if num_dense == 0:
            raise ValueError(
                "model.architecture = 'dlrm' needs dense features, and the data has none: take another model"
            )
        shared = {
            "embedding_bag_collection": embedding,
            "dense_in_features": num_dense,
            "dense_arch_layer_sizes": [*options.bottom_mlp, embedding_dim],
            "over_arch_layer_sizes": [*options.top_mlp, 1],
            "dense_device": device,
        }
        if options.interaction == "dot":
            model = dlrm.DLRM(**shared)
        elif options.interaction == "projection":
            first, second = ([*options.projection_mlp, rows * embedding_dim] for rows in options.projection_rows)
            model = dlrm.DLRM_Projection(
                **shared, interaction_branch1_layer_sizes=first, interaction_branch2_layer_sizes=second
            )
        else:
            model = dlrm.DLRM_DCN(**shared, dcn_num_layers=options.cross_layers, dcn_low_rank_dim=options.cross_rank)
        # TorchRec makes its cross network and its indices of pairs on the CPU.
        model.get_submodule("inter_arch").to(device)
        return model
