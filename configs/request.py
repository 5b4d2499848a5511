"""What a method is asked to build, besides its own options: the same for every method of a comparison."""

from collections.abc import Sequence
from dataclasses import dataclass, field

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


def refuse_compression(method: str, asked: float, nearest: float) -> ValueError:
    """The error to raise where a method cannot store as little as was asked: it names the nearest it can."""
    return ValueError(
        f"embedding.compression = {asked:g}: {method} reaches {nearest:.6g} at most on these tables; "
        f"set embedding.compression={_round_down(nearest):.6g} or less"
    )


def _round_down(value: float) -> float:
    """Four significant digits, never above the value."""
    unit = 10.0 ** (len(str(int(value))) - 5)
    return int(value / unit) * unit
