"""DCN (Wang et al. 2017, "Deep & Cross Network for Ad Click Predictions") on TorchRec's cross network.

    x_0 = [e_1, …, e_F, x] (B, N), N = F·D + S                  eq. 2: all embeddings and the dense features x (B, S)
    x_{l+1} = x_0 ⟨x_l, w_l⟩ + b_l + x_l, w_l and b_l (N)        eq. 3: `VectorCrossNet`, L cross layers
    logit = ⟨x_L, w⟩ + deep part of x_0                         eq. 4 and 5

The paper's last layer reads [x_L, h], h the last hidden layer of the deep part: that is the sum of two linear layers,
of which the deep part holds one, with a bias (`recsys.models.frame`). No first-order tables.

Departures: no batch normalisation. The paper has 6 cross layers and 2 deep ones of 1024 on Criteo; the PSS authors'
code (apd10/criteo_deepctr) one cross layer and 4 deep ones of 1024.
"""

import torch
from pydantic import Field
from torch import nn
from torchrec.modules.crossnet import VectorCrossNet

from recsys.models.frame import DeepOptions, InteractionModel, Sizes, build_deep_part, join_inputs


class Options(DeepOptions):
    cross_layers: int = Field(default=3, ge=1)
    """L, layers of the cross network: interactions up to degree L + 1."""


class DCN(InteractionModel):
    """Cross network and deep part side by side over the same inputs."""

    Options = Options

    def add_layers(self, sizes: Sizes, options: Options, device: torch.device) -> None:
        cross = VectorCrossNet(sizes.num_inputs, options.cross_layers).to(device)
        self.interaction = nn.Sequential(cross, nn.Linear(sizes.num_inputs, 1, bias=False, device=device))
        self.top_mlp = build_deep_part(sizes.num_inputs, options, device)

    def terms(self, dense_features: torch.Tensor, vectors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        inputs = join_inputs(dense_features, vectors)
        return self.interaction(inputs), self.top_mlp(inputs)
