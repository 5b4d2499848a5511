"""xDeepFM (Lian et al. 2018, "xDeepFM: Combining Explicit and Implicit Feature Interactions for Recommender Systems").

    X^0 = [e_1, …, e_F] (B, F, D);   H_0 = F
    X^k_h = Σ_{i ≤ H_{k−1}} Σ_{j ≤ F} W^k_hij (X^{k−1}_i ∘ X^0_j),  h ≤ H_k      eq. 6: compressed interaction network
    p^k_h = Σ_d X^k_hd                                                          eq. 7
    logit = ⟨w, x⟩ + ⟨w_cin, [p^1, …, p^K]⟩ + deep part of [e_1, …, e_F, x]       eq. 9

e_f (B, D) the embedding of sparse feature f, x (B, S) the dense features, w the first-order weights: a number for every
id, in one-dimensional tables beside the others (`recsys.models.frame`), and one for every dense feature.
Feature maps are linear: the paper finds no activation to be the best, and pools all of them (no split).

Departures: dense features enter the first-order term and the deep part as they are and no feature map, as in the PSS
authors' code (apd10/criteo_deepctr); the paper turns them into ids. It has 3 layers of 200 feature maps, 2 deep ones of
400 and D = 10 on Criteo; that code 3 deep ones.
"""

import torch
from pydantic import field_validator
from torch import nn

from recsys.models.frame import (
    FIRST_ORDER_PHASES,
    DeepOptions,
    InteractionModel,
    Sizes,
    build_deep_part,
    check_layers,
    join_inputs,
)


class Options(DeepOptions):
    """The options of xDeepFM."""

    feature_maps: tuple[int, ...] = (32, 32)
    """H_1, …, H_K: feature maps of every layer of the compressed interaction network."""

    @field_validator("feature_maps")
    @classmethod
    def _layers_have_maps(cls, feature_maps: tuple[int, ...]) -> tuple[int, ...]:
        if not feature_maps:
            raise ValueError("[]: the network needs at least one layer")
        return check_layers(feature_maps)


class CompressedInteractionNetwork(nn.Module):
    """Computes all feature maps, summed over D. `weights[k]`: W^{k+1} as (H_{k+1}, H_k · F), i before j."""

    def __init__(self, num_fields: int, feature_maps: tuple[int, ...], device: torch.device) -> None:
        super().__init__()
        sizes = zip((num_fields, *feature_maps), feature_maps, strict=False)
        self.weights = nn.ParameterList(
            nn.init.xavier_uniform_(torch.empty(size, previous * num_fields, device=device)) for previous, size in sizes
        )

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """Return [p^1, …, p^K] (B, ΣH_k) float32 of X^0 (B, F, D) float32."""
        fields = vectors.transpose(1, 2).contiguous()  # (B, D, F): the sums over i and j are one matrix product
        maps, pooled = fields, []
        for weight in self.weights:
            products = maps.unsqueeze(3) * fields.unsqueeze(2)  # (B, D, H_{k-1}, F)
            maps = nn.functional.linear(products.flatten(2), weight)
            pooled.append(maps.sum(1))
        return torch.cat(pooled, dim=1)


class XDeepFM(InteractionModel):
    """Compressed interaction network and deep part over the same embeddings."""

    Options = Options
    FIRST_ORDER = True
    PHASES = FIRST_ORDER_PHASES

    def add_layers(self, sizes: Sizes, options: Options, device: torch.device) -> None:
        self.interaction = nn.Sequential(
            CompressedInteractionNetwork(sizes.num_features, options.feature_maps, device),
            nn.Linear(sum(options.feature_maps), 1, bias=False, device=device),
        )
        self.top_mlp = build_deep_part(sizes.num_inputs, options, device)

    def terms(self, dense_features: torch.Tensor, vectors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        deep = self.top_mlp(join_inputs(dense_features, vectors))
        return self.interaction(vectors), deep
