"""FiBiNET (Huang, Zhang and Zhang 2019, "FiBiNET: Combining Feature Importance and Bilinear feature Interaction for
Click-Through Rate Prediction").

    z_f = mean over d of e_fd;   a = relu(W_2 relu(W_1 z)) (B, F);   v_f = a_f e_f    SENET: squeeze, excite, re-weight
    p_fg = (W e_f) ∘ e_g;   q_fg = (W' v_f) ∘ v_g,   f < g                                bilinear interactions (B, D)
    logit = ⟨w, x⟩ + deep part of [p, q, x]                                              combination layer, DNN, output

e_f (B, D) the embedding of sparse feature f, x (B, S) the dense features, W_1 (⌊F / r⌋, F), W_2 (F, ⌊F / r⌋), r the
reduction ratio, at least one row left; W and W' (D, D), one for all pairs ("all"), for every f ("each") or for every
pair ("interaction"). w the first-order weights: a number for every id, in one-dimensional tables beside the others
(`recsys.models.sparse_features`), and one for every dense feature.

Departures: "each" has F − 1 matrices, as the last feature is never on the left; the paper counts F. Whether W' is W the
paper leaves open: here they are two. Dense features enter the first-order term and the deep part as they are and are in
no pair, as in the PSS authors' code (apd10/criteo_deepctr), where W' is W; the paper turns them into ids. It has 3 deep
layers of 400, dropout .5 and D = 10 on Criteo.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import nn
from torchrec.modules.embedding_modules import EmbeddingBagCollectionInterface
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys.models.deep_part import DeepOptions, build_deep_part
from recsys.models.sparse_features import FirstOrder, SparseFeatures

FIRST_ORDER = True

PHASES = {
    "sparse_features": "embedding_lookup",
    "first_order": "interaction",
    "interaction": "interaction",
    "top_mlp": "top_mlp",
}

BilinearType = Literal["all", "each", "interaction"]


class Options(DeepOptions):
    reduction_ratio: int = Field(default=3, ge=1)
    """r, features / hidden units of SENET."""
    bilinear: BilinearType = "interaction"
    """Matrices of the bilinear interactions: one for all pairs, one for each left feature, one for each pair."""


class Senet(nn.Module):
    """e (B, F, D) -> v (B, F, D), every vector weighted by how much all of them say it matters."""

    def __init__(self, num_fields: int, reduction_ratio: int, device: torch.device) -> None:
        super().__init__()
        hidden = max(1, num_fields // reduction_ratio)
        self.squeeze = nn.Linear(num_fields, hidden, bias=False, device=device)
        self.excite = nn.Linear(hidden, num_fields, bias=False, device=device)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        weights = torch.relu(self.excite(torch.relu(self.squeeze(vectors.mean(2)))))
        return vectors * weights.unsqueeze(2)


class Bilinear(nn.Module):
    """v (B, F, D) -> (W v_f) ∘ v_g (B, F (F − 1) / 2, D) in the order (1, 2), (1, 3), …, (2, 3), …

    `weight` (1, F − 1 or the pairs; D, D): W of all, of f or of the pair."""

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
        if self.kind == "interaction":
            projected = _apply_each(self.weight, vectors.index_select(1, self.left))
        else:
            on_the_left = vectors[:, :-1]
            projected = _apply_each(self.weight.expand(on_the_left.size(1), -1, -1), on_the_left)
            projected = projected.index_select(1, self.left)
        return projected * vectors.index_select(1, self.right)


def _apply_each(matrices: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """(n, D, D), (B, n, D) -> the products of every matrix with its vector, (B, n, D)."""
    return torch.einsum("nij,bnj->bni", matrices, vectors)


class BilinearOfBoth(nn.Module):
    """e (B, F, D) -> [p, q] (B, F (F − 1) D)."""

    def __init__(self, num_fields: int, embedding_dim: int, options: Options, device: torch.device) -> None:
        super().__init__()
        self.senet = Senet(num_fields, options.reduction_ratio, device)
        self.original = Bilinear(num_fields, embedding_dim, options.bilinear, device)
        self.reweighted = Bilinear(num_fields, embedding_dim, options.bilinear, device)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        pairs = [self.original(vectors), self.reweighted(self.senet(vectors))]
        return torch.cat(pairs, dim=1).flatten(1)


class FiBiNET(nn.Module):
    def __init__(
        self,
        embedding: EmbeddingBagCollectionInterface,
        *,
        num_dense: int,
        embedding_dim: int,
        options: Options,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.sparse_features = SparseFeatures(embedding, first_order=FIRST_ORDER)
        num_fields = self.sparse_features.num_features
        if num_fields < 2:
            raise ValueError(f"model.architecture = 'fibinet' needs two sparse features, and the data has {num_fields}")
        self.first_order = FirstOrder(num_dense, device)
        self.interaction = BilinearOfBoth(num_fields, embedding_dim, options, device)
        self.top_mlp = build_deep_part(num_fields * (num_fields - 1) * embedding_dim + num_dense, options, device)

    def forward(self, dense_features: torch.Tensor, sparse_features: KeyedJaggedTensor) -> torch.Tensor:
        """dense_features (B, S) float32, sparse_features KJT of B bags -> logits (B, 1) float32."""
        vectors, numbers = self.sparse_features(sparse_features)
        deep = self.top_mlp(torch.cat([self.interaction(vectors), dense_features], dim=1))
        return self.first_order(dense_features, numbers) + deep


build = FiBiNET
