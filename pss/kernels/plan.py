"""What the lookup of one group of features needs: for the reference (`pss.methods.robe`) and, packed, for kernels.

An operator of PyTorch takes a plan as one list of integers. Its layout is written here alone: `pack` and the readers in
Python go by the names of `Number` and `Array`, and C++ gets the same names from `write_cpp_layout` when it is built.
"""

import zlib
from enum import IntEnum, auto
from itertools import accumulate, chain
from typing import NamedTuple

from pss.hashing import HashConstants

_MOST_LOCATIONS = 1 << 31  # of M, in a kernel: a location is 31 bits and a sign


class RobePlan(NamedTuple):
    """How the ids of some features of one embedding_dim and pooling read M: see `pss.methods.robe`."""

    embedding_dim: int
    block_size: int
    memory_size: int
    starts: list[int]  # of every tier: locations are in [start, start + slots)
    slots: list[int]
    bounds: list[list[int]]  # [tier from 1 on][feature]: first row in it
    private_bounds: list[int]  # of each feature: rows from 1 to it are private; empty if there are none
    private_starts: list[int]
    is_mean: bool
    is_flattened: bool
    is_circular: bool
    location: HashConstants
    signs: list[HashConstants]  # one, or none if not signed


class Number(IntEnum):
    """Places of the numbers at the head of a packed plan."""

    LAYOUT = 0  # which layout it is: `LAYOUT`
    EMBEDDING_DIM = auto()
    BLOCK_SIZE = auto()
    MEMORY_SIZE = auto()
    FEATURES = auto()
    CHUNKS = auto()
    TIERS = auto()
    IS_MEAN = auto()
    IS_FLATTENED = auto()
    LOCATION_MULTIPLIER = auto()  # 0 of the independent hash
    SIGN_MULTIPLIER = auto()


class Array(IntEnum):
    """The arrays of a packed plan, in this order. Where each ends comes after the numbers; the first begins there."""

    LOCATION_TABLE_KEYS = 0  # (features,)
    LOCATION_CHUNK_KEYS = auto()  # (chunks,), or one if flattened
    SIGN_TABLE_KEYS = auto()  # likewise; empty if not signed
    SIGN_CHUNK_KEYS = auto()
    STARTS = auto()  # (tiers,)
    SLOTS = auto()  # (tiers,)
    BOUNDS = auto()  # (tiers - 1, features)
    PRIVATE_BOUNDS = auto()  # (features,), or empty
    PRIVATE_STARTS = auto()


def identify_layout(*kinds: type[IntEnum]) -> int:
    """Return a number that tells this order of names from any other."""
    places = [f"{name}={place}" for kind in kinds for name, place in kind.__members__.items()]
    return zlib.crc32(" ".join(places).encode())


LAYOUT = identify_layout(Number, Array)
"""A kernel that was built for another layout refuses the plan."""


def count_chunks(plan: RobePlan) -> int:
    """Return how many chunks a row has."""
    return -(-plan.embedding_dim // plan.block_size)


def count_rows_per_block(plan: RobePlan) -> int:
    """Return how many whole rows a block of the flattened table holds; 1 where a row has blocks of its own."""
    return max(1, plan.block_size // plan.embedding_dim) if plan.is_flattened else 1


def has_kernel(plan: RobePlan) -> bool:
    """Return whether the kernels know this lookup: blocks that do not wrap around; of a flattened table, only such that
    hold several whole rows or are parts of one."""
    dim, size = plan.embedding_dim, plan.block_size
    is_even = dim % size == 0 or size % dim == 0
    return not plan.is_circular and plan.memory_size <= _MOST_LOCATIONS and (is_even or not plan.is_flattened)


def pack(plan: RobePlan) -> list[int]:
    """Return the plan as one list of signed 64-bit integers, the form in which an operator of PyTorch can take it."""
    sign = plan.signs[0] if plan.signs else HashConstants("", 0, [], [])
    numbers = {
        Number.LAYOUT: LAYOUT,
        Number.EMBEDDING_DIM: plan.embedding_dim,
        Number.BLOCK_SIZE: plan.block_size,
        Number.MEMORY_SIZE: plan.memory_size,
        Number.FEATURES: len(plan.location.table_keys),
        Number.CHUNKS: count_chunks(plan),
        Number.TIERS: len(plan.starts),
        Number.IS_MEAN: int(plan.is_mean),
        Number.IS_FLATTENED: int(plan.is_flattened),
        Number.LOCATION_MULTIPLIER: plan.location.multiplier,
        Number.SIGN_MULTIPLIER: sign.multiplier,
    }
    arrays = {
        Array.LOCATION_TABLE_KEYS: plan.location.table_keys,
        Array.LOCATION_CHUNK_KEYS: plan.location.chunk_keys,
        Array.SIGN_TABLE_KEYS: sign.table_keys,
        Array.SIGN_CHUNK_KEYS: sign.chunk_keys,
        Array.STARTS: plan.starts,
        Array.SLOTS: plan.slots,
        Array.BOUNDS: [bound for bounds in plan.bounds for bound in bounds],
        Array.PRIVATE_BOUNDS: plan.private_bounds,
        Array.PRIVATE_STARTS: plan.private_starts,
    }
    in_order = [arrays[array] for array in sorted(Array)]
    ends = [*accumulate(map(len, in_order), initial=len(Number) + len(Array))][1:]
    return [*(numbers[number] for number in sorted(Number)), *ends, *chain.from_iterable(in_order)]


def read_array(packed: list[int], array: Array) -> list[int]:
    """Return that array of a packed plan."""
    begin = packed[len(Number) + array - 1] if array else len(Number) + len(Array)
    return packed[begin : packed[len(Number) + array]]


def unpack(packed: list[int]) -> RobePlan:
    """Return the plan that `pack` packed; a hash's family is one that computes the same.

    Raises ValueError for a plan of another layout.
    """
    if packed[Number.LAYOUT] != LAYOUT:
        raise ValueError("the packed plan has another layout than this kernel was built for")

    def read_hash(multiplier: Number, table_keys: Array, chunk_keys: Array) -> HashConstants:
        family = "affine" if packed[multiplier] else "independent"
        keys = read_array(packed, table_keys), read_array(packed, chunk_keys)
        return HashConstants(family, packed[multiplier], *keys)

    features, bounds = packed[Number.FEATURES], read_array(packed, Array.BOUNDS)
    signs = read_hash(Number.SIGN_MULTIPLIER, Array.SIGN_TABLE_KEYS, Array.SIGN_CHUNK_KEYS)
    return RobePlan(
        embedding_dim=packed[Number.EMBEDDING_DIM],
        block_size=packed[Number.BLOCK_SIZE],
        memory_size=packed[Number.MEMORY_SIZE],
        starts=read_array(packed, Array.STARTS),
        slots=read_array(packed, Array.SLOTS),
        bounds=[bounds[first : first + features] for first in range(0, len(bounds), features)],
        private_bounds=read_array(packed, Array.PRIVATE_BOUNDS),
        private_starts=read_array(packed, Array.PRIVATE_STARTS),
        is_mean=bool(packed[Number.IS_MEAN]),
        is_flattened=bool(packed[Number.IS_FLATTENED]),
        is_circular=False,
        location=read_hash(Number.LOCATION_MULTIPLIER, Array.LOCATION_TABLE_KEYS, Array.LOCATION_CHUNK_KEYS),
        signs=[signs] if signs.table_keys else [],
    )


def write_cpp_layout() -> str:
    """Return the layout as a C++ header: the enums Number and Array with their sizes, and kLayout."""

    def write_enum(kind: type[IntEnum]) -> str:
        names = ("k" + "".join(word.capitalize() for word in name.split("_")) for name in kind.__members__)
        return f"enum {kind.__name__} : int {{ {', '.join(names)}, k{kind.__name__}Count }};"

    lines = ["#pragma once", "namespace pss::layout {", write_enum(Number), write_enum(Array)]
    return "\n".join([*lines, f"constexpr long kId = {LAYOUT};", "}  // namespace pss::layout", ""])
