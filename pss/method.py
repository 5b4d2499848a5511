"""What an embedding method is: its options, what it is asked to build, and the entry that a registry keeps of it.

A method's file holds a docstring with the formula, the paper and every departure from it; `Options`, its options, each
written once: field, default, text; the lookup, with shapes; `cell`, the formula for one number in plain Python; and
`METHOD`, which puts them together.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollectionInterface

Placement = Literal["replicate", "shard"]


class MethodOptions(BaseModel):
    """The options of a method: keys of a config file and keywords of its class. Unknown ones are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    EXECUTION_ONLY: ClassVar[frozenset[str]] = frozenset()
    """Options that say how, not what is computed: a checkpoint may be continued under other values of them."""

    @property
    def needs_id_counts(self) -> bool:
        """Return whether `EmbeddingRequest.id_counts` must be given."""
        return False

    def check_world_size(self, world_size: int) -> None:
        """Raise ValueError where these options do not go with that many ranks."""


SomeOptions = TypeVar("SomeOptions", bound=MethodOptions)


def parse_options(kind: type[SomeOptions], values: Mapping[str, Any]) -> SomeOptions:
    """Return the options that these keywords give; lists may stand for tuples.

    Raises TypeError for a keyword that is no option, ValueError for a value out of range: it names the option and what
    is allowed.
    """
    if unknown := sorted(values.keys() - kind.model_fields.keys()):
        raise TypeError(f"{unknown[0]!r} is no option; known: {', '.join(kind.model_fields)}")
    try:
        return kind.model_validate(dict(values), strict=False)
    except ValidationError as error:
        raise ValueError("; ".join(map(_describe_error, error.errors()))) from None


def _describe_error(error: Any) -> str:
    name, value, context = ".".join(map(str, error["loc"])), error["input"], error.get("ctx", {})
    match error["type"]:
        case "greater_than_equal":
            return f"{name} must be at least {context['ge']:g}, not {value}"
        case "greater_than":
            return f"{name} must be above {context['gt']:g}, not {value}"
        case "less_than_equal":
            return f"{name} must be at most {context['le']:g}, not {value}"
        case "less_than":
            return f"{name} must be below {context['lt']:g}, not {value}"
        case "literal_error":
            return f"{name} {value!r} is unknown: known are {context['expected']}"
        case "value_error":
            return str(context["error"])
    return f"{name} = {value!r}: {error['msg'][0].lower()}{error['msg'][1:]}"


@dataclass(frozen=True, kw_only=True)
class EmbeddingRequest:
    """What a method is asked to build, besides its own options: the same for every method of a comparison."""

    compression: float = 1.0
    """Bytes of the full tables in fp32 / bytes stored, at least 1. A promise: what is built stores no more."""
    init_scale: float = 0.01
    """Full tables start uniform in ± init_scale. A method starts so that the tables it stands for have that spread,
    init_scale / √3, or its file says why not."""
    seed: int = 0
    """Of initial values and hash functions."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    is_weighted: bool = False
    """Whether ids have weights."""
    id_counts: Sequence[np.ndarray] | None = None
    """For every table how often each id occurs in the training rows, (num_embeddings,) int64, where the options say
    `needs_id_counts`; None otherwise."""


class CompressionRefused(ValueError):
    """A method cannot store as little as was asked: on these tables `reached` is the highest compression that it can.

    nearest: the highest to ask for instead.
    """

    def __init__(self, method: str, asked: float, reached: float) -> None:
        digits = 3 - math.floor(math.log10(reached))  # four digits, never above what is reached
        self.nearest = max(1.0, math.floor(reached * 10**digits) / 10**digits)
        super().__init__(
            f"embedding.compression = {asked:g}: {method} reaches {reached:.6g} at most on these tables; "
            f"set embedding.compression={self.nearest:g} or less"
        )


@dataclass(kw_only=True)
class EmbeddingMethod:
    """A method as registries know it."""

    Options: type[MethodOptions]
    build: Callable[[list[EmbeddingBagConfig], Any, EmbeddingRequest], EmbeddingBagCollectionInterface]
    """(tables, options, request) -> a module that takes a KeyedJaggedTensor of the tables' features and returns the
    KeyedTensor (B, Σ embedding_dim) of pooled embeddings. Raises ValueError where the method cannot stand for these
    tables within the asked budget."""
    cell: Callable[[Any, int, int, int], float]
    """(module, table, row, col) -> that number of the table by the method's formula, in plain Python: the oracle of
    its tests."""
    placement: Placement = "replicate"
    """replicate = a copy on every rank, shard = divided over the ranks by TorchRec."""
    max_compression: float = math.inf
    """The highest compression it reaches, whatever the tables. Contract tests ask for no more."""
    stores_every_row: bool = False
    """Something is stored for every row of a table, so that memory limits its rows."""
    has_weighted_mean: bool = True
    """Weighted bags may be pooled by their mean; otherwise that raises NotImplementedError, as in TorchRec."""
