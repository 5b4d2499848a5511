"""What a model is, and the frame that our own stand on: embed -> interact -> logit.

    e_f = pooled rows of feature f's table (B, D);   u_f = pooled rows of its first-order table (B, 1)
    logit = [Σ_f u_f + Σ_s w_s x_s] + terms of x and e_1, …, e_F, as the model has it          x (B, S): dense features

The bracket is the first-order part, which some models have. Both kinds of table are in one collection
(`recsys.embedding.tables.build_tables`), so one method stores both, the budget of a compression counts both, and
both have the embeddings' optimizer: u is no part of the dense parameters. The weights w are: they are few.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Self

import torch
from pydantic import BaseModel, Field, field_validator
from torch import nn
from torchrec.modules.embedding_modules import EmbeddingBagCollectionInterface, get_embedding_names_by_table
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from configs.schema import Section
from recsys.embedding.tables import is_first_order


class Model(ABC):
    """What the registry knows of a model."""

    Options: ClassVar[type[BaseModel]]
    """Its keys in [model.<architecture>]."""
    FIRST_ORDER: ClassVar[bool] = False
    """Whether it reads a first-order table for every sparse feature."""
    PHASES: ClassVar[Mapping[str, str]]
    """Names of its submodules -> phases of a step, see `recsys.runs.phases`."""

    @classmethod
    @abstractmethod
    def build(
        cls,
        embedding: EmbeddingBagCollectionInterface,
        *,
        num_dense: int,
        embedding_dim: int,
        options: Any,
        device: torch.device,
    ) -> nn.Module:
        """Return the module around the embedding.

        Its forward takes dense features (B, S) float32 and a KeyedJaggedTensor of B bags of F features, and returns
        logits (B, 1) float32. Raises ValueError where the model cannot stand on such data.
        """


class Sizes(NamedTuple):
    """What the layers of a model are sized by."""

    num_features: int
    """F, sparse features."""
    num_dense: int
    """S, dense features."""
    embedding_dim: int
    """D."""

    @property
    def num_inputs(self) -> int:
        """F·D + S, the width of `join_inputs`."""
        return self.num_features * self.embedding_dim + self.num_dense


class SparseFeatures(nn.Module):
    """Looks up the sparse features: of each a vector, and a number where the model has first-order terms.

    Columns are found by their names: a sharded collection returns its tables in an order of its own. Of a first-order
    table that is stored wider (`baselines.sharded`) the first column counts.
    Raises ValueError where the collection has first-order tables and the model none, or the other way round.
    """

    def __init__(self, embedding: EmbeddingBagCollectionInterface, *, first_order: bool) -> None:
        super().__init__()
        self.embedding_bag_collection = embedding
        tables = embedding.embedding_bag_configs()
        self._vectors: list[str] = []
        self._numbers: list[str] = []
        for table, names in zip(tables, get_embedding_names_by_table(tables), strict=True):
            (self._numbers if is_first_order(table) else self._vectors).extend(names)
        self.num_features = len(self._vectors)
        if len(self._numbers) != (self.num_features if first_order else 0):
            raise ValueError(
                f"{self.num_features} features and {len(self._numbers)} first-order tables, but the model reads "
                f"{self.num_features if first_order else 'none'}: build_tables(..., first_order={first_order})"
            )

    def forward(self, features: KeyedJaggedTensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return e (B, F, D) and u (B, F), float32, of B bags of F features; u is (B, 0) without first_order."""
        columns = self.embedding_bag_collection(features).to_dict()
        vectors = torch.stack([columns[name] for name in self._vectors], dim=1)
        if not self._numbers:
            return vectors, vectors.new_empty(len(vectors), 0)
        return vectors, torch.cat([columns[name][:, :1] for name in self._numbers], dim=1)


class FirstOrder(nn.Module):
    """Sums Σ_f u_f + Σ_s w_s x_s; no bias: the deep part has one."""

    def __init__(self, num_dense: int, device: torch.device) -> None:
        super().__init__()
        self.dense = nn.Linear(num_dense, 1, bias=False, device=device) if num_dense else None

    def forward(self, dense_features: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Return (B, 1) float32 of x (B, S) and u (B, F), float32."""
        total = numbers.sum(1, keepdim=True)
        return total if self.dense is None else total + self.dense(dense_features)


class InteractionModel(Model, nn.Module):
    """A model on the frame: it adds its layers, and says which terms of the logit they compute."""

    PHASES: ClassVar[Mapping[str, str]] = {
        "sparse_features": "embedding_lookup",
        "interaction": "interaction",
        "top_mlp": "top_mlp",
    }

    def __init__(
        self,
        embedding: EmbeddingBagCollectionInterface,
        *,
        num_dense: int,
        embedding_dim: int,
        options: Any,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.sparse_features = SparseFeatures(embedding, first_order=self.FIRST_ORDER)
        self.first_order = FirstOrder(num_dense, device) if self.FIRST_ORDER else None
        self.add_layers(Sizes(self.sparse_features.num_features, num_dense, embedding_dim), options, device)

    @classmethod
    def build(
        cls,
        embedding: EmbeddingBagCollectionInterface,
        *,
        num_dense: int,
        embedding_dim: int,
        options: Any,
        device: torch.device,
    ) -> Self:
        return cls(embedding, num_dense=num_dense, embedding_dim=embedding_dim, options=options, device=device)

    @abstractmethod
    def add_layers(self, sizes: Sizes, options: Any, device: torch.device) -> None:
        """Make the layers, always in the same order: their start depends on the seed and on what was drawn before."""

    @abstractmethod
    def terms(self, dense_features: torch.Tensor, vectors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the terms of the logit, each (B, 1) float32, of x (B, S) and e (B, F, D), float32."""

    def forward(self, dense_features: torch.Tensor, sparse_features: KeyedJaggedTensor) -> torch.Tensor:
        """Return logits (B, 1) float32 of dense_features (B, S) float32 and sparse_features, a KJT of B bags."""
        vectors, numbers = self.sparse_features(sparse_features)  # embed
        terms = self.terms(dense_features, vectors)  # interact
        if self.first_order is not None:
            terms = (self.first_order(dense_features, numbers), *terms)
        logits = terms[0]
        for term in terms[1:]:  # from the first on: another order would round otherwise
            logits = logits + term
        return logits


FIRST_ORDER_PHASES = {**InteractionModel.PHASES, "first_order": "interaction"}
"""`Model.PHASES` of a model on the frame with a first-order part."""


def join_inputs(dense_features: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Return [e_1, …, e_F, x] (B, F·D + S) of x (B, S) and e (B, F, D), all float32."""
    return torch.cat([vectors.flatten(1), dense_features], dim=1)


class DeepOptions(Section):
    """The options of every model with a deep part."""

    top_mlp: tuple[int, ...] = (64, 32)
    """Hidden layers of the deep part; a last layer of one logit follows."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the hidden units that is dropped at random in a training step."""

    @field_validator("top_mlp")
    @classmethod
    def _layers_have_units(cls, top_mlp: tuple[int, ...]) -> tuple[int, ...]:
        return check_layers(top_mlp)


def check_layers(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Return the sizes. Raises ValueError where one is below 1."""
    if any(size < 1 for size in sizes):
        raise ValueError(f"{list(sizes)}: every layer needs at least one unit")
    return sizes


def build_deep_part(num_inputs: int, options: DeepOptions, device: torch.device) -> nn.Sequential:
    """Return the deep part, an MLP from inputs (B, num_inputs) to a term of the logit (B, 1).

        h_0 = inputs;   h_k = dropout(relu(W_k h_{k−1} + b_k));   logit = W h_K + b

    b is the bias of the whole model. Layers start as PyTorch's `nn.Linear` does; no batch normalisation. What is
    dropped follows run.seed, rank and step (`recsys.train.assemble.TrainStep`).
    """
    layers: list[nn.Module] = []
    for size in options.top_mlp:
        layers += [nn.Linear(num_inputs, size, device=device), nn.ReLU()]
        if options.dropout:
            layers.append(nn.Dropout(options.dropout))
        num_inputs = size
    return nn.Sequential(*layers, nn.Linear(num_inputs, 1, device=device))
