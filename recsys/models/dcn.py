"""DCN (Wang et al. 2017, "Deep & Cross Network for Ad Click Predictions") on TorchRec's cross network.

    x_0 = [e_1, …, e_F, x] (B, N), N = F·D + S                  eq. 2: all embeddings and the dense features x (B, S)
    x_{l+1} = x_0 ⟨x_l, w_l⟩ + b_l + x_l, w_l and b_l (N)        eq. 3: `VectorCrossNet`, L cross layers
    logit = ⟨x_L, w⟩ + deep part of x_0                         eq. 4 and 5

The paper's last layer reads [x_L, h], h the last hidden layer of the deep part: that is the sum of two linear layers,
of which the deep part holds one, with a bias (`recsys.models.deep_part`). No first-order tables.

Departures: no batch normalisation. The paper has 6 cross layers and 2 deep ones of 1024 on Criteo; the PSS authors'
code (apd10/criteo_deepctr) one cross layer and 4 deep ones of 1024.
"""

import torch
from pydantic import Field
from torch import nn
from torchrec.modules.crossnet import VectorCrossNet
from torchrec.modules.embedding_modules import EmbeddingBagCollectionInterface
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys.models.deep_part import DeepOptions, build_deep_part
from recsys.models.sparse_features import SparseFeatures

FIRST_ORDER = False

PHASES = {"sparse_features": "embedding_lookup", "interaction": "interaction", "top_mlp": "top_mlp"}


class Options(DeepOptions):
    cross_layers: int = Field(default=3, ge=1)
    """L, layers of the cross network: interactions up to degree L + 1."""


class DCN(nn.Module):
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
        num_inputs = self.sparse_features.num_features * embedding_dim + num_dense
        cross = VectorCrossNet(num_inputs, options.cross_layers).to(device)
        self.interaction = nn.Sequential(cross, nn.Linear(num_inputs, 1, bias=False, device=device))
        self.top_mlp = build_deep_part(num_inputs, options, device)

    def forward(self, dense_features: torch.Tensor, sparse_features: KeyedJaggedTensor) -> torch.Tensor:
        """dense_features (B, S) float32, sparse_features KJT of B bags -> logits (B, 1) float32."""
        vectors, _ = self.sparse_features(sparse_features)
        inputs = torch.cat([vectors.flatten(1), dense_features], dim=1)
        return self.interaction(inputs) + self.top_mlp(inputs)


build = DCN
