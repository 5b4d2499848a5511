"""Methods whose tables all read one array M of shared parameters, and how its gradient comes back.

A subclass says which elements of `memory` an id reads; the array, its start and the form of its gradient are here.

Gradient (Algorithm 1 of the PSS paper): "dense" is an array like M; "sparse" is the coalesced pair of the slots that
the batch touched and the sum of gradients of each (unique + segment sum). Both are the same numbers. "auto" takes the
sparse form where fewer than `SPARSE_BELOW` · |M| elements are read by a batch, repeated ones included.
"""

from typing import ClassVar, Literal, get_args

import torch
from pydantic import Field
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from configs.schema import Section
from pss.chunks import sends_sparse_gradient
from pss.collection import ComputedEmbeddingBagCollection
from pss.hashing import mix64

Gradient = Literal["dense", "sparse", "auto"]


class SharedArrayOptions(Section):
    """Keys that every method on one shared array has."""

    EXECUTION_ONLY: ClassVar[frozenset[str]] = frozenset({"gradient"})
    """Options that say how, not what is computed: a checkpoint may be continued under other values of them."""

    gradient: Gradient = Field(default="auto")
    """Form of the shared array's gradient: dense = all of it, sparse = the slots a batch touches (Algorithm 1 of the
    PSS paper), auto = sparse where a batch reads less than 1/40 of the array, which is where it is faster."""


class SharedArrayEmbeddingBagCollection(ComputedEmbeddingBagCollection):
    """Owns `memory` (|M|,) fp32, the one parameter.

    `memory` starts uniform in ± init_scale from a CPU generator seeded with `seed`: the same bits on every rank,
    device and process, whatever the global random state, which is left alone. Hashes are made of Python integers that
    follow from `seed`; there are no buffers. The state dict holds `memory` and, under `_extra_state`, the options and
    the tables; loading one whose options or tables differ raises ValueError and names the differences.

    A subclass calls `_allocate` at the end of its constructor.
    """

    def __init__(
        self, tables: list[EmbeddingBagConfig], is_weighted: bool, *, gradient: str, seed: int, init_scale: float
    ) -> None:
        super().__init__(tables, is_weighted)
        if not init_scale >= 0:
            raise ValueError(f"init_scale must be at least 0, not {init_scale}")
        if gradient not in get_args(Gradient):
            raise ValueError(f"gradient {gradient!r} is unknown: known are {list(get_args(Gradient))}")
        self.gradient, self.seed, self.init_scale = gradient, seed, init_scale

    def _allocate(self, memory_size: int, device: torch.device | None) -> None:
        self.memory_size = memory_size
        self.memory = nn.Parameter(torch.empty(memory_size, dtype=torch.float32, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """memory = U(-init_scale, init_scale), the same for the same seed; nothing on the meta device."""
        if self.memory.device.type == "meta":
            return
        generator = torch.Generator("cpu").manual_seed(mix64(self.seed) >> 1)
        drawn = torch.empty(self.memory_size, dtype=torch.float32, device="cpu")
        drawn.uniform_(-self.init_scale, self.init_scale, generator=generator)
        with torch.no_grad():
            self.memory.copy_(drawn)

    def settle_gradient(self, batch_size: int) -> None:
        """Replaces "auto" by what it means for batches of that many rows, one id a bag. Under DDP all ranks must send
        the same form, so it is decided once and not by each batch."""
        if self.gradient == "auto":
            elements = batch_size * self.elements_per_row()
            self.gradient = "sparse" if sends_sparse_gradient("auto", elements, self.memory_size) else "dense"

    def elements_per_row(self) -> int:
        """Elements of `memory` that one id of every feature reads together."""
        return sum(self._embedding_dims)

    def extra_repr(self) -> str:
        options = ", ".join(f"{key}={value!r}" for key, value in self._options().items())
        return f"{len(self.embedding_bag_configs())} tables, {options}, compression={self.compression:.1f}"
