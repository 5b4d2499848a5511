"""The deep part of a model, an MLP from all inputs to a logit, and the options that every model with one has.

    h_0 = x (B, inputs);   h_k = dropout(relu(W_k h_{k−1} + b_k));   logit = W h_K + b (B, 1)

Its bias is the bias of the whole model. Layers start as PyTorch's `nn.Linear` does; no batch normalisation. What is
dropped follows run.seed, rank and step (`recsys.train.assemble.TrainStep`).
"""

import torch
from pydantic import Field, field_validator
from torch import nn

from configs.schema import Section


class DeepOptions(Section):
    top_mlp: tuple[int, ...] = (64, 32)
    """Hidden layers of the deep part; a last layer of one logit follows."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the hidden units that is dropped at random in a training step."""

    @field_validator("top_mlp")
    @classmethod
    def _layers_have_units(cls, top_mlp: tuple[int, ...]) -> tuple[int, ...]:
        return check_layers(top_mlp)


def check_layers(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The sizes. Raises ValueError where one is below 1."""
    if any(size < 1 for size in sizes):
        raise ValueError(f"{list(sizes)}: every layer needs at least one unit")
    return sizes


def build_deep_part(num_inputs: int, options: DeepOptions, device: torch.device) -> nn.Sequential:
    """(B, num_inputs) -> logit (B, 1)."""
    layers: list[nn.Module] = []
    for size in options.top_mlp:
        layers += [nn.Linear(num_inputs, size, device=device), nn.ReLU()]
        if options.dropout:
            layers.append(nn.Dropout(options.dropout))
        num_inputs = size
    return nn.Sequential(*layers, nn.Linear(num_inputs, 1, device=device))
