"""DeepFM (Guo et al. 2017, "DeepFM: A Factorization-Machine based Neural Network for CTR Prediction").

    logit = ⟨w, x⟩ + Σ_{f<g} ⟨e_f, e_g⟩ + deep part of [e_1, …, e_F, x]                            eq. 1 to 4

e_f (B, D) the embedding of sparse feature f, x (B, S) the dense features, w the first-order weights: a number for every
id, in one-dimensional tables beside the others (`recsys.models.sparse_features`), and one for every dense feature. The
sum over pairs is computed as ½ Σ_d ((Σ_f e_fd)² − Σ_f e_fd²).

Not TorchRec's `DeepFM` and `FactorizationMachine` (1.8): those flatten all vectors before they sum, so the pairs they
add up are of all F·D numbers, across dimensions too; and `SimpleDeepFMNN` has no first-order terms and a sigmoid.

Departures: dense features enter the first-order term and the deep part as they are and are in no pair, as in the PSS
authors' code (apd10/criteo_deepctr); the paper leaves open how. It has 3 deep layers of 400, dropout .5 and D = 10.
"""

import torch
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


class Options(DeepOptions):
    """Keys of [model.deepfm]: those of the deep part."""


class PairwiseDots(nn.Module):
    """The second-order term of a factorization machine: (B, F, D) -> Σ_{f<g} ⟨e_f, e_g⟩ (B, 1)."""

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        of_all_pairs = vectors.sum(1).square() - vectors.square().sum(1)
        return 0.5 * of_all_pairs.sum(1, keepdim=True)


class DeepFM(nn.Module):
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
        self.first_order = FirstOrder(num_dense, device)
        self.interaction = PairwiseDots()
        num_inputs = self.sparse_features.num_features * embedding_dim + num_dense
        self.top_mlp = build_deep_part(num_inputs, options, device)

    def forward(self, dense_features: torch.Tensor, sparse_features: KeyedJaggedTensor) -> torch.Tensor:
        """dense_features (B, S) float32, sparse_features KJT of B bags -> logits (B, 1) float32."""
        vectors, numbers = self.sparse_features(sparse_features)
        deep = self.top_mlp(torch.cat([vectors.flatten(1), dense_features], dim=1))
        return self.first_order(dense_features, numbers) + self.interaction(vectors) + deep


build = DeepFM
