"""DeepFM (Guo et al. 2017, "DeepFM: A Factorization-Machine based Neural Network for CTR Prediction").

    logit = ⟨w, x⟩ + Σ_{f<g} ⟨e_f, e_g⟩ + deep part of [e_1, …, e_F, x]                            eq. 1 to 4

e_f (B, D) the embedding of sparse feature f, x (B, S) the dense features, w the first-order weights: a number for every
id, in one-dimensional tables beside the others (`recsys.models.frame`), and one for every dense feature. The
sum over pairs is computed as ½ Σ_d ((Σ_f e_fd)² − Σ_f e_fd²).

Not TorchRec's `DeepFM` and `FactorizationMachine` (1.8): those flatten all vectors before they sum, so the pairs they
add up are of all F·D numbers, across dimensions too; and `SimpleDeepFMNN` has no first-order terms and a sigmoid.

Departures: dense features enter the first-order term and the deep part as they are and are in no pair, as in the PSS
authors' code (apd10/criteo_deepctr); the paper leaves open how. It has 3 deep layers of 400, dropout .5 and D = 10.
"""

import torch
from torch import nn

from recsys.models.frame import FIRST_ORDER_PHASES, DeepOptions, InteractionModel, Sizes, build_deep_part, join_inputs


class Options(DeepOptions):
    """The options of DeepFM: those of the deep part."""


class PairwiseDots(nn.Module):
    """Computes the second-order term of a factorization machine."""

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """Return Σ_{f<g} ⟨e_f, e_g⟩ (B, 1) float32 of e (B, F, D) float32."""
        of_all_pairs = vectors.sum(1).square() - vectors.square().sum(1)
        return 0.5 * of_all_pairs.sum(1, keepdim=True)


class DeepFM(InteractionModel):
    """Factorization machine and deep part over the same embeddings."""

    Options = Options
    FIRST_ORDER = True
    PHASES = FIRST_ORDER_PHASES

    def add_layers(self, sizes: Sizes, options: Options, device: torch.device) -> None:
        self.interaction = PairwiseDots()
        self.top_mlp = build_deep_part(sizes.num_inputs, options, device)

    def terms(self, dense_features: torch.Tensor, vectors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        deep = self.top_mlp(join_inputs(dense_features, vectors))
        return self.interaction(vectors), deep
