"""What a method is asked to build, besides its own options: the same for every method of a comparison."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True, kw_only=True)
class EmbeddingRequest:
    """compression: parameters of the full tables / parameters stored, ≥ 1; a promise: what is built stores no more.
    init_scale: full tables start uniform in ± init_scale; a method starts so that the tables it stands for have that
    spread, init_scale / √3, or says why not. seed: of initial values and hash functions. is_weighted: ids have weights.
    id_counts: for every table how often each id occurs in the training rows, (num_embeddings,) int64, where a method
    asks for it (`needs_id_counts`); None otherwise.
    """

    compression: float = 1.0
    init_scale: float = 0.01
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    is_weighted: bool = False
    id_counts: Sequence[np.ndarray] | None = None

    def arguments(self) -> dict[str, Any]:
        """What the constructors of all methods take of it, by their names."""
        names = ("is_weighted", "device", "compression", "seed", "init_scale")
        return {name: getattr(self, name) for name in names}

    def check_reached(self, method: str, reached: float) -> None:
        """Raises CompressionRefused where the smallest that the method can be on these tables is not small enough."""
        if reached < self.compression:
            raise CompressionRefused(method, self.compression, reached)


class CompressionRefused(ValueError):
    """A method cannot store as little as was asked: on these tables `reached` is the highest compression that it can.

    nearest: the highest to ask for instead.
    """

    def __init__(self, method: str, asked: float, reached: float) -> None:
        digits = 3 - math.floor(math.log10(reached))
        self.nearest = max(
            1.0, math.floor(reached * 10**digits) / 10**digits
        )  # four digits, never above what is reached
        super().__init__(
            f"embedding.compression = {asked:g}: {method} reaches {reached:.6g} at most on these tables; "
            f"set embedding.compression={self.nearest:g} or less"
        )
