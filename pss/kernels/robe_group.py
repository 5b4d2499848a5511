"""What the lookup of one group of features needs: for the reference (`pss.methods.robe`) and, packed, for kernels."""

from typing import NamedTuple

from pss.hashing import HashConstants

_MOST_LOCATIONS = 1 << 31  # of M, in a kernel: a location is 31 bits and a sign


class RobeGroup(NamedTuple):
    """Features of one embedding_dim and pooling, and how their ids read M: see `pss.methods.robe`."""

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


def count_chunks(group: RobeGroup) -> int:
    """Chunks of a row."""
    return -(-group.embedding_dim // group.block_size)


def count_rows_per_block(group: RobeGroup) -> int:
    """Whole rows that a block of the flattened table holds; 1 where a row has blocks of its own, or several."""
    return max(1, group.block_size // group.embedding_dim) if group.is_flattened else 1


def has_kernel(group: RobeGroup) -> bool:
    """Whether the kernels know this lookup: blocks that do not wrap around; of a flattened table, only such that hold
    several whole rows or are parts of one."""
    dim, size = group.embedding_dim, group.block_size
    is_even = dim % size == 0 or size % dim == 0
    return not group.is_circular and group.memory_size <= _MOST_LOCATIONS and (is_even or not group.is_flattened)


def pack(group: RobeGroup) -> list[int]:
    """The group as one list of signed 64-bit integers, the form in which an operator of PyTorch can take it.

    embedding_dim, block_size, memory_size, features, chunks, tiers; is_mean, is_flattened, has private rows, is signed;
    of the locations' hash, then the signs', if any: multiplier, table keys (features), chunk keys (chunks, or one if
    flattened); starts (tiers), slots (tiers), bounds (tiers - 1, features); private bounds and starts (features), or
    nothing.
    """
    features, flags = len(group.location.table_keys), (group.is_mean, group.is_flattened, bool(group.private_starts))
    packed = [group.embedding_dim, group.block_size, group.memory_size, features, count_chunks(group)]
    packed += [len(group.starts), *map(int, flags), len(group.signs)]
    for constants in (group.location, *group.signs):
        packed += [constants.multiplier, *constants.table_keys, *constants.chunk_keys]
    packed += [*group.starts, *group.slots, *(bound for bounds in group.bounds for bound in bounds)]
    return [*packed, *group.private_bounds, *group.private_starts]


def unpack(packed: list[int]) -> RobeGroup:
    """The group that `pack` packed; a hash's family is one that computes the same."""
    numbers = iter(packed)

    def take(count: int) -> list[int]:
        return [next(numbers) for _ in range(count)]

    embedding_dim, block_size, memory_size, features, chunks, tiers = take(6)
    is_mean, is_flattened, has_private_rows, signed = take(4)

    def take_hash() -> HashConstants:
        (multiplier,) = take(1)
        family = "affine" if multiplier else "independent"
        return HashConstants(family, multiplier, take(features), take(1 if is_flattened else chunks))

    location, signs = take_hash(), [take_hash() for _ in range(signed)]
    starts, slots, bounds = take(tiers), take(tiers), [take(features) for _ in range(tiers - 1)]
    return RobeGroup(
        embedding_dim=embedding_dim,
        block_size=block_size,
        memory_size=memory_size,
        starts=starts,
        slots=slots,
        bounds=bounds,
        private_bounds=take(features * has_private_rows),
        private_starts=take(features * has_private_rows),
        is_mean=bool(is_mean),
        is_flattened=bool(is_flattened),
        is_circular=False,
        location=location,
        signs=signs,
    )
