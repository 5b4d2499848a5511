"""One array M of shared parameters that the tables of a method all read, and how its gradient comes back.

`SharedArrayEmbeddingBagCollection` owns the array, its start and the form of its gradient; a subclass says which of its
elements an id reads. Rows are read as runs of consecutive elements:

    chunks[..., z] = memory[locations[...] + z]
    grad_memory[l] = sum of grad_chunks[..., z] over all z and locations with locations[...] + z = l

The forward reads through an overlapping view of the array, without a table of addresses. The gradient is dense or
sparse (Algorithm 1 of the PSS paper), the same numbers in two forms; "auto" is sparse where a batch reads less than
`SPARSE_BELOW` · |M| elements. Dense: an array of zeros, into which blocks of addresses that stay in cache are added; on
one CPU thread forward and backward together took 0.6 to 0.8 of the time of `index_select` on a full table of addresses
(B = 2048, 26 features, d = 64, Z = 8 and 16, |M| = 0.5M and 5M). Sparse: a coalesced COO tensor, in two rounds of
unique + segment sum, over whole chunks first, whose locations repeat where ids do, and then over elements.

On a CPU the order of the sums is fixed, so results repeat to the bit; on CUDA `index_add_` is free to reorder them.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pss.collection import ComputedEmbeddingBagCollection
from pss.hashing import mix64
from pss.least_squares import compress
from pss.method import MethodOptions

Gradient = Literal["dense", "sparse", "auto"]

SPARSE_BELOW = 1 / 40
"""gradient = "auto" is sparse where a batch reads fewer elements than this share of the array, repeats included.
Forward, backward and SGD on one CPU thread, uniform locations, V·d = 0.1M to 3.4M elements, Z = 1 to 64: with |M| 20
times as large the sparse form took 1.0 to 2.8 times as long as the dense one, at 50 times 0.5 to 1.7 (median 0.8), at
100 times 0.3 to 0.8; with |M| = V·d, 1.4 to 10 times."""

_CPU_BLOCK_ELEMENTS = 1 << 16  # 512 KiB of addresses at a time: the L2 cache


def read_chunks(memory: Tensor, locations: Tensor, width: int, gradient: str = "dense") -> Tensor:
    """Read chunks: memory (M,) floating, locations (...) int64 in [0, M - width] -> (..., width) of memory's dtype.

    gradient: "dense", "sparse" or "auto", the form of memory's gradient; a sparse one is coalesced. A dense one can be
    differentiated again. TorchScript, torch.compile and torch.export get the formula with explicit addresses, which
    they can trace and fuse, and whose gradient is dense.
    """
    if torch.jit.is_scripting():  # pyright: ignore[reportPrivateImportUsage]
        return _read_addresses(memory, locations, width)
    else:  # not compiled by TorchScript, which has no autograd functions
        if torch.compiler.is_compiling():
            return _read_addresses(memory, locations, width)
        is_sparse = sends_sparse_gradient(gradient, locations.numel() * width, memory.numel())
        return _ReadChunks.apply(memory, locations, width, is_sparse)


def sends_sparse_gradient(gradient: str, elements: int, memory_size: int) -> bool:
    """Return what "dense", "sparse" or "auto" is for a batch that reads so many elements, repeats included."""
    return elements < SPARSE_BELOW * memory_size if gradient == "auto" else gradient == "sparse"


def _read_addresses(memory: Tensor, locations: Tensor, width: int) -> Tensor:
    addresses = locations.unsqueeze(-1) + torch.arange(width, device=locations.device)
    return memory.index_select(0, addresses.reshape(-1)).view(addresses.shape)


class _ReadChunks(torch.autograd.Function):
    """(memory, locations, width, is_sparse) -> chunks. Linear in memory; its adjoint is `_AddChunks`."""

    @staticmethod
    def forward(memory: Tensor, locations: Tensor, width: int, is_sparse: bool) -> Tensor:
        return F.embedding(locations, memory.unfold(0, width, 1))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int, bool], output: Tensor) -> None:
        memory, locations, ctx.width, ctx.is_sparse = inputs
        ctx.memory_size = memory.numel()
        ctx.save_for_backward(locations)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (locations,) = ctx.saved_tensors
        if ctx.is_sparse:
            return sparse_sum(grad_outputs[0], locations, ctx.memory_size), None, None, None
        return _AddChunks.apply(grad_outputs[0], locations, ctx.memory_size), None, None, None


class _AddChunks(torch.autograd.Function):
    """(chunks, locations, memory_size) -> memory (M,): every chunk added at its location."""

    @staticmethod
    def forward(chunks: Tensor, locations: Tensor, memory_size: int) -> Tensor:
        width = chunks.shape[-1]
        memory = chunks.new_zeros(memory_size)
        offsets = torch.arange(width, device=chunks.device)
        rows = max(1, _CPU_BLOCK_ELEMENTS // width) if chunks.device.type == "cpu" else max(1, locations.numel())
        blocks = zip(locations.reshape(-1, 1).split(rows), chunks.reshape(-1, width).split(rows), strict=True)
        for location, chunk in blocks:
            memory.index_add_(0, (location + offsets).view(-1), chunk.reshape(-1))
        return memory

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
        chunks, locations, _ = inputs
        ctx.width = chunks.shape[-1]
        ctx.save_for_backward(locations)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (locations,) = ctx.saved_tensors
        return _ReadChunks.apply(grad_outputs[0], locations, ctx.width, False), None, None


@torch.no_grad()
def sparse_sum(chunks: Tensor, locations: Tensor, memory_size: int) -> Tensor:
    """Sum chunks (..., width) added at locations (...): a coalesced sparse tensor (memory_size,)."""
    width = chunks.shape[-1]
    starts, place = torch.unique(locations.reshape(-1), return_inverse=True)
    summed = chunks.new_zeros(starts.numel(), width).index_add_(0, place, chunks.reshape(-1, width))
    addresses = (starts.unsqueeze(1) + torch.arange(width, device=starts.device)).view(-1)
    values = summed.view(-1)
    if bool((starts.diff() < width).any()):  # runs overlap: their elements are not yet unique
        addresses, place = torch.unique(addresses, return_inverse=True)
        values = values.new_zeros(addresses.numel()).index_add_(0, place, values)
    return torch.sparse_coo_tensor(
        addresses.unsqueeze(0), values, (memory_size,), check_invariants=False, is_coalesced=True
    )


class SharedArrayOptions(MethodOptions):
    """Options that every method on one shared array has."""

    EXECUTION_ONLY = frozenset({"gradient"})

    gradient: Gradient = Field(default="auto")
    """Form of the shared array's gradient: dense = all of it, sparse = the slots a batch touches (Algorithm 1 of the
    PSS paper), auto = sparse where a batch reads less than 1/40 of the array, which is where it is faster."""


class SharedArrayEmbeddingBagCollection(ComputedEmbeddingBagCollection):
    """Owns `memory` (|M|,) fp32, the one parameter.

    `memory` starts uniform in ± init_scale from a CPU generator seeded with `seed`: the same bits on every rank,
    device and process. Hashes are made of Python integers that follow from `seed`. The state dict holds `memory` and,
    under `_extra_state`, what gives it its meaning and the tables; loading one that differs in these raises ValueError
    and names the differences.

    A subclass sets `memory_size` in `_lay_out`.
    """

    OPTIONS = SharedArrayOptions
    SENDS_SPARSE_GRADIENT = True  # by "auto"
    memory_size: int

    def _allocate(self, device: torch.device | None) -> None:
        self.gradient: Gradient = self.options.gradient
        self.memory = nn.Parameter(torch.empty(self.memory_size, dtype=torch.float32, device=device))

    def reset_parameters(self) -> None:
        """Draw memory = U(-init_scale, init_scale), the same for the same seed; nothing on the meta device."""
        if self.memory.device.type == "meta":
            return
        generator = torch.Generator("cpu").manual_seed(mix64(self.seed) >> 1)
        drawn = torch.empty(self.memory_size, dtype=torch.float32, device="cpu")
        drawn.uniform_(-self.init_scale, self.init_scale, generator=generator)
        with torch.no_grad():
            self.memory.copy_(drawn)

    def choose_gradient(self, local_batch_size: int) -> Literal["dense", "sparse"]:
        """Replace "auto" by what it means for batches of that many rows, one id a bag, and return the form."""
        elements = local_batch_size * self.elements_per_row()
        form = "sparse" if sends_sparse_gradient(self.gradient, elements, self.memory_size) else "dense"
        self.gradient = form
        return form

    def elements_per_row(self) -> int:
        """Return how many elements of `memory` one id of every feature reads together."""
        return sum(self._embedding_dims)

    def fit(self, tables: Sequence[Tensor], id_counts: Callable[[], Sequence[np.ndarray]] | None = None) -> float:
        """Fit by least squares, rows weighted by how often their ids occur: see `pss.least_squares.compress`."""
        # An id never seen in training has the row it started with: it matters a little, so that all slots are found.
        weights = None if id_counts is None else [counts + 1e-3 for counts in id_counts()]
        return compress(self, tables, row_weights=weights).relative_error

    def extra_repr(self) -> str:
        identity = ", ".join(f"{key}={value!r}" for key, value in self._identity().items())
        return f"{len(self.embedding_bag_configs())} tables, {identity}, compression={self.compression:.1f}"
