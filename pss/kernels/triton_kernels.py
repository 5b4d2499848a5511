"""The Triton kernels of pss.kernels.triton_robe_bags. Units and tiles are those of triton_locate.

M, 1 to 10 MB, is to stay in the L2 cache (50 MB on an H100, 40 MB on an A100), while output and gradient, tens to
hundreds of MB that are touched once, pass by it: hence "evict_last" for M, and "evict_first" or ".cs" for the others.
"""

# pyright: reportGeneralTypeIssues=false
# Of kernels and what they call pyright knows only that they cannot be called from Python.

import triton
import triton.language as tl

from pss.kernels.triton_locate import find_elements, find_places, find_units, load_ids, load_weights, locate


@triton.jit
def pool_bags(out, memory, batch, plan, UNITS: tl.constexpr, LANES: tl.constexpr):
    """Pool bags: out[unit, lane] = Σ over the bag's ids of w · sign · memory[location + lane], over their number for
    mean."""
    bag, chunk, feature, begin, length, is_unit = find_units(batch, plan, plan.num_chunks, UNITS)
    lane = tl.arange(0, LANES)[None, :]
    is_element = find_elements(plan, chunk, is_unit, LANES)
    pooled = tl.full([UNITS, LANES], 0.0, tl.float32)
    for k in range(tl.max(length, 0)):
        location, sign = locate(plan, feature, chunk, load_ids(batch, begin, length, k))
        factor = sign * load_weights(batch, begin, length, k)
        mask = is_element & (k < length)[:, None]
        read = tl.load(memory + location[:, None] + lane, mask=mask, other=0.0, eviction_policy="evict_last")
        pooled += tl.where(mask, factor[:, None] * read, 0.0)  # the weight of another bag may be infinite
    if plan.is_mean:
        pooled /= tl.maximum(length, 1).to(tl.float32)[:, None]
    tl.store(out + find_places(plan, bag, chunk)[:, None] + lane, pooled, mask=is_element, cache_modifier=".cs")


@triton.jit
def add_gradient(memory, gradient, scale, batch, plan, UNITS: tl.constexpr, LANES: tl.constexpr):
    """Add gradients: memory[location + lane] += scale · w · sign · gradient[unit, lane] for each of the bag's ids,
    over their number for mean. Atomic additions, in no order."""
    bag, chunk, feature, begin, length, is_unit = find_units(batch, plan, plan.num_chunks, UNITS)
    lane = tl.arange(0, LANES)[None, :]
    is_element = find_elements(plan, chunk, is_unit, LANES)
    source = gradient + find_places(plan, bag, chunk)[:, None] + lane
    addend = scale * tl.load(source, mask=is_element, other=0.0, eviction_policy="evict_first")
    if plan.is_mean:
        addend /= tl.maximum(length, 1).to(tl.float32)[:, None]
    for k in range(tl.max(length, 0)):
        location, sign = locate(plan, feature, chunk, load_ids(batch, begin, length, k))
        factor = sign * load_weights(batch, begin, length, k)
        mask = is_element & (k < length)[:, None]
        tl.atomic_add(memory + location[:, None] + lane, factor[:, None] * addend, mask=mask, sem="relaxed")


@triton.jit(do_not_specialize=["num_ids"])
def dot_rows(dots, gradient, memory, num_ids, batch, plan, UNITS: tl.constexpr, LANES: tl.constexpr):
    """Derive by weights: dots[copy, id] = gradient of the id's bag · its row, over the number of ids for mean.

    A unit is a bag here and passes over its chunks, so that nothing has to be added up between programs. copy: see
    KernelPlan; an id that several tables read has a derivative from each.
    """
    bag, _, feature, begin, length, _ = find_units(batch, plan, 1, UNITS)
    lane = tl.arange(0, LANES)[None, :]
    out = dots + tl.load(plan.copies + feature) * num_ids + begin
    for k in range(tl.max(length, 0)):
        ids = load_ids(batch, begin, length, k)
        dot = tl.full([UNITS], 0.0, tl.float32)
        for j in range(plan.num_chunks):
            chunk = tl.full([UNITS], 0, tl.int64) + j
            mask = find_elements(plan, chunk, k < length, LANES)
            location, sign = locate(plan, feature, chunk, ids)
            read = tl.load(memory + location[:, None] + lane, mask=mask, other=0.0, eviction_policy="evict_last")
            weighed = tl.load(gradient + find_places(plan, bag, chunk)[:, None] + lane, mask=mask, other=0.0)
            dot += sign * tl.sum(read * weighed, 1)
        if plan.is_mean:
            dot /= tl.maximum(length, 1).to(tl.float32)
        tl.store(out + k, dot, mask=k < length)


@triton.jit
def step_adagrad(memory, squares, sums, size, learning_rate, eps, ELEMENTS: tl.constexpr):
    """Step by Adagrad: squares += sums², memory -= learning_rate · sums / (√squares + eps); nothing is read where a
    sum is zero."""
    e = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    total = tl.load(sums + e, mask=e < size, other=0.0, eviction_policy="evict_first")
    is_touched = total != 0.0
    square = tl.load(squares + e, mask=is_touched, other=1.0) + total * total
    before = tl.load(memory + e, mask=is_touched, other=0.0)
    tl.store(squares + e, square, mask=is_touched)
    tl.store(memory + e, before - learning_rate * total / (tl.sqrt_rn(square) + eps), mask=is_touched)
