"""Where the ids of a batch read M, on the GPU: the address map of `pss.methods.robe.robe_rows` in Triton.

A kernel's tile has a row per unit, one chunk of one bag, and a lane per element of a chunk. Units count in the order of
the output, so that neighbours write to neighbouring places:

    unit = (b · features + f) · chunks + j

A unit hashes its ids itself. The chunks of an id thus repeat the first half of its hash, two multiplications in
registers; in exchange no address is ever stored, any number of chunks fills a tile, and a long row is spread over many
threads. `batch` and `plan` are the KernelBatch and KernelPlan of triton_lookup.

Loads of one number per unit are not masked: what would be out of bounds reads the last instead. A mask that serves such
a load and a tile's makes Triton 3.7.1 fail for some shapes ("'tt.load' op failed to verify that mask type matches").
"""

# pyright: reportGeneralTypeIssues=false
# Of kernels and what they call pyright knows only that they cannot be called from Python.

import triton
import triton.language as tl

from pss.hashing import AffineHash

PRIME = tl.constexpr(AffineHash.PRIME)


@triton.jit
def find_units(batch, plan, CHUNKS: tl.constexpr, UNITS: tl.constexpr):
    """Find this program's units: each chunk of a bag is one, or, with CHUNKS = 1, each bag.

    Returns, each (UNITS,): bag in the order of the output, chunk and feature, int64; the first place of the bag's ids
    and how many they are, int64; and whether there is such a unit: past the last they are like it, but without ids.
    """
    unit = tl.program_id(0).to(tl.int64) * UNITS + tl.arange(0, UNITS)
    units = tl.full([UNITS], CHUNKS * plan.num_features, tl.int64) * batch.batch_size
    is_unit = unit < units
    unit = tl.minimum(unit, units - 1)
    bag = unit // CHUNKS
    row = bag // plan.num_features
    feature = bag - row * plan.num_features
    place = tl.load(plan.positions + feature) * batch.batch_size + row
    begin = tl.load(batch.offsets + place).to(tl.int64)
    length = tl.load(batch.offsets + place + 1).to(tl.int64) - begin
    return bag, unit - bag * CHUNKS, feature, begin, tl.where(is_unit, length, 0), is_unit


@triton.jit
def find_places(plan, bag, chunk):
    """Return of each unit's chunk the first element's place in the output or its gradient: (UNITS,) int64."""
    return bag * plan.embedding_dim + chunk * plan.block_size


@triton.jit
def find_elements(plan, chunk, is_unit, LANES: tl.constexpr):
    """Return the lanes that are elements of each unit's chunk: a mask (UNITS, LANES), or (UNITS, 1) where all are,
    which lets the compiler use vectors."""
    if plan.embedding_dim % plan.block_size == 0 and plan.block_size == LANES:
        return is_unit[:, None]
    else:
        lane = tl.arange(0, LANES)[None, :]
        column = (chunk * plan.block_size)[:, None] + lane
        return is_unit[:, None] & (lane < plan.block_size) & (column < plan.embedding_dim)


@triton.jit
def load_ids(batch, begin, length, k):
    """Return the k-th id of each bag, int64; past the last, some id."""
    return tl.load(batch.ids + _find_id(begin, length, k)).to(tl.int64)


@triton.jit
def load_weights(batch, begin, length, k):
    """Return the weight of the k-th id of each bag, float32; 1 if the batch has none; past the last, some weight."""
    weights = tl.full(begin.shape, 1.0, tl.float32)
    if batch.weights is not None:
        weights = tl.load(batch.weights + _find_id(begin, length, k))
    return weights


@triton.jit
def _find_id(begin, length, k):
    return tl.minimum(begin + k, tl.maximum(begin + length - 1, 0))


@triton.jit
def locate(plan, feature, chunk, ids):
    """Return for each unit of M its chunk's first element (UNITS,) int64, and the sign ±1 (UNITS,) float32."""
    block = ids * plan.num_chunks + chunk if plan.is_flattened else ids
    start, slots = tl.load(plan.starts), tl.load(plan.slots)
    if plan.rows_per_block > 1:
        row = ids % plan.rows_per_block
        row = tl.where(row < 0, row + plan.rows_per_block, row)
        block = (ids - row) // plan.rows_per_block
        start += row * plan.embedding_dim
    for tier in tl.static_range(1, plan.num_tiers):
        is_there = ids >= tl.load(plan.bounds + (tier - 1) * plan.num_features + feature)
        start = tl.where(is_there, tl.load(plan.starts + tier), start)
        slots = tl.where(is_there, tl.load(plan.slots + tier), slots)
    location = start + _hash(plan.location, feature, chunk, block, slots.to(tl.uint32), plan.is_affine)
    if plan.has_private_rows:
        own = tl.load(plan.private_starts + feature) + ids * plan.embedding_dim + chunk * plan.block_size
        is_private = (ids >= 1) & (ids < tl.load(plan.private_bounds + feature))
        location = tl.where(is_private, own, location)
    sign = tl.full(ids.shape, 1.0, tl.float32)
    if plan.sign is not None:
        sign = 1.0 - 2.0 * _hash(plan.sign, feature, chunk, block, 2, plan.is_affine).to(tl.float32)
    return location, sign


@triton.jit
def _hash(tables, feature, chunk, block, slots, IS_AFFINE: tl.constexpr):
    """Hash as `pss.hashing.locate` for slots ≤ 2^31: (UNITS,) int64 in [0, slots)."""
    table_key, chunk_key = tl.load(tables.table_keys + feature), tl.load(tables.chunk_keys + chunk)
    if IS_AFFINE:
        remainder = block % PRIME  # with the sign of block, as in C
        remainder = tl.where(remainder < 0, remainder + PRIME, remainder)
        total = (remainder * tl.load(tables.multiplier) + table_key) % PRIME + chunk_key  # factors are below 2^31
        total = tl.where(total >= PRIME, total - PRIME, total)
        location = total.to(tl.uint32) % slots
    else:
        word = _mix64((block + table_key).to(tl.uint64)) * chunk_key.to(tl.uint64)
        location = tl.umulhi((word >> 32).to(tl.uint32), tl.full(word.shape, 0, tl.uint32) + slots)
    return location.to(tl.int64)


@triton.jit
def _mix64(x):
    """Apply `pss.hashing.mix64` on uint64."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)
