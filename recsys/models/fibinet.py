"""FiBiNET (Huang, Zhang and Zhang 2019, "FiBiNET: Combining Feature Importance and Bilinear feature Interaction for
Click-Through Rate Prediction").

    z_f = mean over d of e_fd;   a = relu(W_2 relu(W_1 z)) (B, F);   v_f = a_f e_f    SENET: squeeze, excite, re-weight
    p_fg = (W e_f) ∘ e_g;   q_fg = (W' v_f) ∘ v_g,   f < g                                bilinear interactions (B, D)
    logit = ⟨w, x⟩ + deep part of [p, q, x]                                              combination layer, DNN, output

e_f (B, D) the embedding of sparse feature f, x (B, S) the dense features, W_1 (⌊F / r⌋, F), W_2 (F, ⌊F / r⌋), r the
reduction ratio, at least one row left; W and W' (D, D), one for all pairs ("all"), for every f ("each") or for every
pair ("interaction"). w the first-order weights: a number for every id, in one-dimensional tables beside the others
(`recsys.models.frame`), and one for every dense feature.

Departures: "each" has F − 1 matrices, as the last feature is never on the left; the paper counts F. Whether W' is W the
paper leaves open: here they are two. Dense features enter the first-order term and the deep part as they are and are in
no pair, as in the PSS authors' code (apd10/criteo_deepctr), where W' is W; the paper turns them into ids. It has 3 deep
layers of 400, dropout .5 and D = 10 on Criteo.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import nn

from recsys.models.frame import FIRST_ORDER_PHASES, DeepOptions, InteractionModel, Sizes, build_deep_part

BilinearType = Literal["all", "each", "interaction"]


class Options(DeepOptions):
    """The options of FiBiNET."""

    reduction_ratio: int = Field(default=3, ge=1)
    """r, features / hidden units of SENET."""
    bilinear: BilinearType = "interaction"
    """Matrices of the bilinear interactions: one for all pairs, one for each left feature, one for each pair."""


class Senet(nn.Module):
    """Weights every vector by how much all of them say it matters."""

    def __init__(self, num_fields: int, reduction_ratio: int, device: torch.device) -> None:
        super().__init__()
        hidden = max(1, num_fields // reduction_ratio)
        self.squeeze = nn.Linear(num_fields, hidden, bias=False, device=device)
        self.excite = nn.Linear(hidden, num_fields, bias=False, device=device)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """Return v (B, F, D) float32 of e (B, F, D) float32."""
        weights = torch.relu(self.excite(torch.relu(self.squeeze(vectors.mean(2)))))
        return vectors * weights.unsqueeze(2)


class Bilinear(nn.Module):
    """Multiplies the vectors of every pair. `weight` (1, F − 1 or the pairs; D, D): W of all, of f or of the pair."""

    left: torch.Tensor
    right: torch.Tensor

    def __init__(self, num_fields: int, embedding_dim: int, kind: BilinearType, device: torch.device) -> None:
        super().__init__()
        self.kind = kind
        left, right = torch.triu_indices(num_fields, num_fields, offset=1, device=device)
        self.register_buffer("left", left, persistent=False)
        self.register_buffer("right", right, persistent=False)
        matrices = {"all": 1, "each": num_fields - 1, "interaction": len(left)}[kind]
        bound = (6 / (2 * embedding_dim)) ** 0.5  # Xavier's, of one matrix
        weight = torch.empty(matrices, embedding_dim, embedding_dim, device=device)
        self.weight = nn.Parameter(nn.init.uniform_(weight, -bound, bound))

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """Return (W v_f) ∘ v_g (B, F (F − 1) / 2, D) float32 of v (B, F, D) float32.

        The pairs stand in the order (1, 2), (1, 3), …, (2, 3), …
        """
        if self.kind == "interaction":
            projected = _apply_each(self.weight, vectors.index_select(1, self.left))
        else:
            on_the_left = vectors[:, :-1]
            projected = _apply_each(self.weight.expand(on_the_left.size(1), -1, -1), on_the_left)
            projected = projected.index_select(1, self.left)
        return projected * vectors.index_select(1, self.right)


def _apply_each(matrices: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Return the products (B, n, D) of matrices (n, D, D) with their vectors (B, n, D), all float32."""
    return torch.einsum("nij,bnj->bni", matrices, vectors)


class BilinearOfBoth(nn.Module):
    """Computes the bilinear interactions of the vectors as they are, and as SENET weights them."""

    def __init__(self, num_fields: int, embedding_dim: int, options: Options, device: torch.device) -> None:
        super().__init__()
        self.senet = Senet(num_fields, options.reduction_ratio, device)
        self.original = Bilinear(num_fields, embedding_dim, options.bilinear, device)
        self.reweighted = Bilinear(num_fields, embedding_dim, options.bilinear, device)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """Return [p, q] (B, F (F − 1) D) float32 of e (B, F, D) float32."""
        pairs = [self.original(vectors), self.reweighted(self.senet(vectors))]
        return torch.cat(pairs, dim=1).flatten(1)


class FiBiNET(InteractionModel):
    """A deep part over the bilinear interactions of all pairs."""

    Options = Options
    FIRST_ORDER = True
    PHASES = FIRST_ORDER_PHASES

    def add_layers(self, sizes: Sizes, options: Options, device: torch.device) -> None:
        num_fields, num_dense, embedding_dim = sizes
        if num_fields < 2:
            raise ValueError(f"model.architecture = 'fibinet' needs two sparse features, and the data has {num_fields}")
        self.interaction = BilinearOfBoth(num_fields, embedding_dim, options, device)
        self.top_mlp = build_deep_part(num_fields * (num_fields - 1) * embedding_dim + num_dense, options, device)

    def terms(self, dense_features: torch.Tensor, vectors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.top_mlp(torch.cat([self.interaction(vectors), dense_features], dim=1)),)
