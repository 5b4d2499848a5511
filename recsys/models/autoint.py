"""AutoInt (Song et al. 2019, "AutoInt: Automatic Feature Interaction Learning via Self-Attentive Neural Networks").

    e_1, …, e_M (B, D): embeddings of the F sparse features, and x_s v_s for every dense one, v_s (D); M = F + S  eq. 4
    ψ^h(m, k) = ⟨W_Q^h e_m, W_K^h e_k⟩;  α^h_m = softmax over k of ψ^h(m, k);  ẽ^h_m = Σ_k α^h_mk W_V^h e_k   eq. 5, 6
    e_m ← relu([ẽ^1_m, …, ẽ^H_m] + W_Res e_m)                                    eq. 7, 8: one interacting layer
    logit = ⟨w, [e_1, …, e_M] after the last layer⟩ + deep part of [e_1, …, e_M] before the first       eq. 9

W_Q^h, W_K^h, W_V^h (d', D of the layer), W_Res (H·d', D of the layer). Scores are not divided by √d', there is no
projection after the heads and no normalisation, unlike in `nn.MultiheadAttention`. No first-order tables.

With a deep part this is the paper's AutoInt+, as in the PSS authors' code (apd10/criteo_deepctr: 3 layers of 400, dense
features in the deep part alone); `top_mlp = []` is the paper's AutoInt: 3 layers, 2 heads, d' = 32, D = 16.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch import nn

from recsys.models.frame import DeepOptions, InteractionModel, Sizes, build_deep_part


class Options(DeepOptions):
    """The options of AutoInt."""

    top_mlp: tuple[int, ...] = (64, 32)
    """Hidden layers of the deep part; a last layer of one logit follows. [] = no deep part."""
    attention_layers: int = Field(default=3, ge=1)
    """Interacting layers."""
    heads: int = Field(default=2, ge=1)
    """H, attention heads of a layer."""
    head_dim: int = Field(default=16, ge=1)
    """d', dimension of a head; a layer's output has heads * head_dim numbers for every feature."""


class DenseFields(nn.Module):
    """Gives every dense feature a vector, x_s v_s."""

    def __init__(self, num_dense: int, embedding_dim: int, device: torch.device) -> None:
        super().__init__()
        self.vectors = nn.Parameter(nn.init.normal_(torch.empty(num_dense, embedding_dim, device=device), std=0.01))

    def forward(self, dense_features: torch.Tensor) -> torch.Tensor:
        """Return x_s v_s (B, S, D) float32 of x (B, S) float32."""
        return dense_features.unsqueeze(2) * self.vectors


class InteractingLayer(nn.Module):
    """Lets every feature attend to all of them."""

    def __init__(self, num_inputs: int, heads: int, head_dim: int, device: torch.device) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.residual = (
            nn.Linear(num_inputs, heads * head_dim, bias=False, device=device) for _ in range(4)
        )

    def forward(self, fields: torch.Tensor) -> torch.Tensor:
        """Return e after this layer (B, M, H·d') float32 of e before it (B, M, inputs) float32."""
        query, key, value = (
            project(fields).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, heads, M, head_dim)
            for project in (self.query, self.key, self.value)
        )
        attended = nn.functional.scaled_dot_product_attention(query, key, value, scale=1.0)
        return torch.relu(attended.transpose(1, 2).flatten(2) + self.residual(fields))


class AutoInt(InteractionModel):
    """Interacting layers over all features, and a deep part beside them unless top_mlp = []."""

    Options = Options
    PHASES: ClassVar[Mapping[str, str]] = {**InteractionModel.PHASES, "dense_fields": "bottom_mlp"}

    def add_layers(self, sizes: Sizes, options: Options, device: torch.device) -> None:
        num_features, num_dense, embedding_dim = sizes
        self.dense_fields = DenseFields(num_dense, embedding_dim, device) if num_dense else None
        num_fields, width = num_features + num_dense, options.heads * options.head_dim
        layers = [
            InteractingLayer(embedding_dim if layer == 0 else width, options.heads, options.head_dim, device)
            for layer in range(options.attention_layers)
        ]
        last = nn.Linear(num_fields * width, 1, bias=not options.top_mlp, device=device)
        self.interaction = nn.Sequential(*layers, nn.Flatten(), last)
        self.top_mlp = build_deep_part(num_fields * embedding_dim, options, device) if options.top_mlp else None

    def terms(self, dense_features: torch.Tensor, vectors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        fields = vectors
        if self.dense_fields is not None:
            fields = torch.cat([fields, self.dense_fields(dense_features)], dim=1)
        attended = self.interaction(fields)
        return (attended,) if self.top_mlp is None else (attended, self.top_mlp(fields.flatten(1)))
