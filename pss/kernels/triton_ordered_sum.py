"""The gradient of M summed up in a fixed order, so that it repeats to the bit; and only where the batch reads M.

    sum[e] = Σ over the chunks that reach e of  factor · gradient[place + e - location],  location in (e - Z, e]

Every chunk that the batch reads becomes an entry. Sorted by location, stably, the entries that reach some element are
one run of the list, which its program adds up from first to last. An entry takes 24 bytes or more, sorting most of the
time, and an element that many ids read is the work of one program: this is the slower way.
"""

# pyright: reportGeneralTypeIssues=false
# Of kernels and what they call pyright knows only that they cannot be called from Python.

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pss.kernels.triton_locate import find_places, find_units, load_ids, load_weights, locate
from pss.kernels.triton_lookup import Lookup, launch

_ENTRIES = 16  # that a program of `sum_entries` takes at a time
_FEWEST_ELEMENTS = 16  # that it sums up: below, it would read less than a line of the gradient


class Entries(NamedTuple):
    """Chunks that a batch reads, sorted by location. After the last come some at |M|, past every element, as many as
    the batch has ids of features that the plan does not read: only the device knows their number."""

    locations: Tensor  # (entries,) int32 or int64, in this order
    order: Tensor  # (entries,) int64: which of the following it is
    places: Tensor  # (entries,) int64 in the order of the output: of its first element in the gradient
    factors: Tensor  # (entries,) float32: weight · sign, over the number of ids for mean


def sort_entries(lookup: Lookup) -> Entries:
    """Sort all chunks that the batch reads."""
    ids, device, group = lookup.batch.ids, lookup.batch.ids.device, lookup.group
    most = ids.numel() * lookup.most_copies * lookup.num_chunks
    dtype = torch.int32 if group.memory_size < 1 << 31 else torch.int64
    locations = torch.full((most,), group.memory_size, dtype=dtype, device=device)
    places = torch.zeros(most, dtype=torch.int64, device=device)
    factors = torch.zeros(most, dtype=torch.float32, device=device)
    lookup.launch(_list_entries, locations, places, factors, _count_ids_before(lookup), has_lanes=False)
    locations, order = torch.sort(locations, stable=True)
    return Entries(locations, order, places, factors)


def _count_ids_before(lookup: Lookup) -> Tensor:
    """Return for every bag in the order of the output, the ids of the bags before it: (bags,) int64."""
    offsets, batch_size = lookup.batch.offsets, lookup.batch.batch_size
    bags = lookup.plan.positions * batch_size + torch.arange(batch_size, device=offsets.device).unsqueeze(1)
    lengths = (offsets[1:][bags] - offsets[bags]).long().flatten()
    return lengths.cumsum(0) - lengths


def find_slots(entries: Entries, lookup: Lookup) -> Tensor:
    """Return the elements of M that the entries read, each once, rising: (n,) int64. Waits for n."""
    locations, group = entries.locations.long(), lookup.group
    column = entries.places[entries.order] % group.embedding_dim
    widths = (group.embedding_dim - column).clamp(max=group.block_size)
    ends = (locations + widths).clamp_(max=group.memory_size)
    if not ends.numel():
        return ends
    covered, _ = ends.cummax(0)  # where the entries so far end
    first = torch.maximum(locations, torch.cat([locations[:1], covered[:-1]]))  # that none before reaches
    counts = (ends - first).clamp_(min=0)
    shift = (first - (counts.cumsum(0) - counts)).repeat_interleave(counts)
    return shift + torch.arange(shift.numel(), device=shift.device)


def sum_entries(entries: Entries, gradient: Tensor, lookup: Lookup, slots: Tensor | None = None) -> Tensor:
    """Return the sums of these elements of M, (n,) float32, or of all, (|M|,)."""
    size = lookup.group.memory_size if slots is None else slots.numel()
    sums = torch.empty(size, dtype=torch.float32, device=gradient.device)
    tile = max(_FEWEST_ELEMENTS, lookup.lanes)
    first = torch.arange(0, size, tile, device=gradient.device)
    last = (first + tile - 1).clamp_(max=size - 1)
    if slots is not None:
        first, last = slots[first], slots[last]
    begins = torch.searchsorted(entries.locations, (first - lookup.longest_chunk + 1).to(entries.locations.dtype))
    ends = torch.searchsorted(entries.locations, last.to(entries.locations.dtype), right=True)
    arguments = (sums, slots, size, gradient, entries, begins, ends, lookup.plan)
    launch(_sum_entries, len(first), *arguments, ENTRIES=_ENTRIES, ELEMENTS=tile)
    return sums


@triton.jit
def _list_entries(locations, places, factors, ids_before, batch, plan, UNITS: tl.constexpr):
    bag, chunk, feature, begin, length, _ = find_units(batch, plan, plan.num_chunks, UNITS)
    first = tl.load(ids_before + bag)
    for k in range(tl.max(length, 0)):
        location, sign = locate(plan, feature, chunk, load_ids(batch, begin, length, k))
        factor = sign * load_weights(batch, begin, length, k)
        if plan.is_mean:
            factor /= tl.maximum(length, 1).to(tl.float32)
        entry = (first + k) * plan.num_chunks + chunk
        tl.store(locations + entry, location, mask=k < length)
        tl.store(places + entry, find_places(plan, bag, chunk), mask=k < length)
        tl.store(factors + entry, factor, mask=k < length)


@triton.jit(do_not_specialize=["size"])
def _sum_entries(
    sums, slots, size, gradient, entries, begins, ends, plan, ENTRIES: tl.constexpr, ELEMENTS: tl.constexpr
):
    """A program's entries are [begins, ends) of it: those that reach an element from its first to its last."""
    e = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    slot = e
    if slots is not None:
        slot = tl.load(slots + tl.minimum(e, size - 1))
    end = tl.load(ends + tl.program_id(0))
    sum_ = tl.full([ENTRIES, ELEMENTS], 0.0, tl.float32)
    for begin in range(tl.load(begins + tl.program_id(0)), end, ENTRIES):
        x = begin + tl.arange(0, ENTRIES)
        nearest = tl.minimum(x, end - 1)
        source = tl.load(entries.order + nearest)
        place = tl.load(entries.places + source)
        factor = tl.load(entries.factors + source)
        location = tl.load(entries.locations + nearest).to(tl.int64)
        offset = slot[None, :] - location[:, None]
        column = (place % plan.embedding_dim)[:, None] + offset
        mask = (offset >= 0) & (offset < plan.block_size) & (column < plan.embedding_dim) & (x < end)[:, None]
        addend = factor[:, None] * tl.load(gradient + place[:, None] + offset, mask=mask, other=0.0)
        sum_ += tl.where(mask, addend, 0.0)  # factors may be infinite
    tl.store(sums + e, tl.sum(sum_, 0), mask=e < size)
