"""What the Triton kernels of the ROBE lookup take: the batch and the plan, on the device, and their launch."""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from pss.hashing import HashConstants
from pss.kernels.plan import RobePlan, count_chunks, count_rows_per_block, unpack

_TILE = 512
"""Elements of a program's tile, 4 for each thread of Triton's default of 4 warps, whatever d and Z: units fill it. What
takes time is the way from offset to id to M, reads that wait for each other; what hides it is many warps, and so few
registers. A longer chunk is a tile of its own."""


class HashTables(NamedTuple):
    """`pss.hashing.HashConstants` on the device, int64."""

    multiplier: Tensor  # (1,)
    table_keys: Tensor  # (features,)
    chunk_keys: Tensor  # (chunks,)


class KernelPlan(NamedTuple):
    """`pss.kernels.plan.RobePlan` as a kernel's argument: what shapes the code is a compile-time constant, the
    rest lies on the device as int64, so that another seed does not compile anew."""

    positions: Tensor  # (features,), of each in the batch
    copies: Tensor  # (features,), how many before it have the same position
    location: HashTables
    sign: HashTables | None
    starts: Tensor  # (tiers,)
    slots: Tensor  # (tiers,)
    bounds: Tensor  # (tiers - 1, features)
    private_bounds: Tensor  # (features,), or empty
    private_starts: Tensor
    num_features: Any  # tl.constexpr, as all that follow
    num_chunks: Any
    num_tiers: Any
    embedding_dim: Any
    block_size: Any
    rows_per_block: Any
    is_mean: Any
    is_flattened: Any
    is_affine: Any
    has_private_rows: Any


class KernelBatch(NamedTuple):
    """The jagged ids as a kernel's argument: see pss.kernels.robe_bags."""

    ids: Tensor
    offsets: Tensor
    weights: Tensor | None
    batch_size: int


class Lookup:
    """One batch and one plan, checked as far as that goes without waiting for the device.

    Takes the arguments that all operators share; raises ValueError for those that do not fit together.
    """

    def __init__(
        self,
        ids: Tensor,
        offsets: Tensor,
        weights: Tensor | None,
        batch_size: int,
        features: list[int],
        plan: list[int],
    ) -> None:
        if ids.dtype not in (torch.int32, torch.int64) or offsets.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"ids and offsets must be int32 or int64, not {ids.dtype} and {offsets.dtype}")
        if weights is not None:
            if weights.numel() != ids.numel():
                raise ValueError(f"{weights.numel()} weights for {ids.numel()} ids")
            weights = weights.to(torch.float32).contiguous()
        self.group, self.plan, self.most_copies = _build_plan(tuple(plan), tuple(features), ids.device)
        if min(features) < 0 or (max(features) + 1) * batch_size >= offsets.numel():
            raise ValueError(f"features {features} are not all in a batch of {offsets.numel() - 1} bags")
        self.batch = KernelBatch(ids.contiguous(), offsets.contiguous(), weights, batch_size)
        self.num_chunks = count_chunks(self.group)
        self.num_bags = batch_size * len(features)
        self.shape = (batch_size, len(features) * self.group.embedding_dim)
        self.longest_chunk = min(self.group.block_size, self.group.embedding_dim)
        self.lanes = 1 << (self.longest_chunk - 1).bit_length()

    def check_memory(self, memory: Tensor) -> Tensor:
        """Return memory, or another array of its size, as kernels take it."""
        if memory.dtype != torch.float32 or memory.shape != (self.group.memory_size,):
            raise ValueError(
                f"memory must be float32 of {self.group.memory_size} elements, not {memory.dtype} of {memory.shape}"
            )
        return memory.contiguous()

    def check_updated_memory(self, memory: Tensor) -> Tensor:
        """Return the same where it is written to, so that a copy will not do."""
        if not memory.is_contiguous():
            raise ValueError("memory must be contiguous to be updated in place")
        return self.check_memory(memory)

    def check_gradient(self, gradient: Tensor) -> Tensor:
        """Return the gradient of the output as kernels take it."""
        if gradient.shape != self.shape:
            raise ValueError(f"gradient must be of shape {self.shape}, not {tuple(gradient.shape)}")
        return gradient.to(torch.float32).contiguous()

    def launch(self, kernel: Any, *arguments: Any, has_lanes: bool = True, units_per_bag: int | None = None) -> None:
        """Launch kernel(*arguments, batch, plan, UNITS, LANES) over all units: the chunks of each bag, or as many as
        said.

        A tile without lanes is one of units alone.
        """
        tile = {"UNITS": max(1, _TILE // self.lanes), "LANES": self.lanes} if has_lanes else {"UNITS": _TILE}
        units = self.num_bags * (self.num_chunks if units_per_bag is None else units_per_bag)
        launch(kernel, -(-units // tile["UNITS"]), *arguments, self.batch, self.plan, **tile)


def launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """Launch kernel(*arguments) on the device of the first."""
    if programs > 0:
        with torch.cuda.device_of(arguments[0]):
            kernel[(programs,)](*arguments, **constants)


@cache
def _build_plan(
    plan: tuple[int, ...], features: tuple[int, ...], device: torch.device
) -> tuple[RobePlan, KernelPlan, int]:
    """Return the packed plan and the features' positions in the batch, copied to the device once and kept: no step
    waits for a copy, and CUDA graphs hold the addresses. And how many features have the same position, at most."""
    group = unpack(list(plan))
    if len(features) != len(group.location.table_keys):
        raise ValueError(f"the plan is for {len(group.location.table_keys)} features, not {len(features)}")

    def on_device(numbers: Sequence[Any]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=device)

    def build_hash_tables(constants: HashConstants) -> HashTables:
        chunk_keys = constants.chunk_keys * (count_chunks(group) if group.is_flattened else 1)
        return HashTables(on_device([constants.multiplier]), on_device(constants.table_keys), on_device(chunk_keys))

    copies = [features[:place].count(feature) for place, feature in enumerate(features)]
    kernel_plan = KernelPlan(
        positions=on_device(features),
        copies=on_device(copies),
        location=build_hash_tables(group.location),
        sign=build_hash_tables(group.signs[0]) if group.signs else None,
        starts=on_device(group.starts),
        slots=on_device(group.slots),
        bounds=on_device(group.bounds),
        private_bounds=on_device(group.private_bounds),
        private_starts=on_device(group.private_starts),
        num_features=tl.constexpr(len(features)),
        num_chunks=tl.constexpr(count_chunks(group)),
        num_tiers=tl.constexpr(len(group.starts)),
        embedding_dim=tl.constexpr(group.embedding_dim),
        block_size=tl.constexpr(group.block_size),
        rows_per_block=tl.constexpr(count_rows_per_block(group)),
        is_mean=tl.constexpr(group.is_mean),
        is_flattened=tl.constexpr(group.is_flattened),
        is_affine=tl.constexpr(group.location.multiplier != 0),
        has_private_rows=tl.constexpr(len(group.private_starts) > 0),
    )
    return group, kernel_plan, 1 + max(copies)
