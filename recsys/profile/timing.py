"""Where the time of a training step goes, on each rank.

Per rank and step, C = union of collective spans, K = union of compute spans (`recsys.profile.trace`):

    computing |K|    communication |C|    exposed |C ∖ K|    overlap |C ∩ K|    other = step − |C ∪ K|
    step = computing + exposed + other

A collective lasts until the slowest rank has joined it, so its span is not yet network. For one that all ranks took
part in, the m-th of its kind within the step:

    wait_r = max over ranks of start − start_r          transfer = max over ranks of end − max over ranks of start

A rank waits where it is in a collective that not all have joined and in none that they have: communication = waiting +
transfer, and exposed waiting is the part of it beside which nothing computes. Definitions of computing, exposed and
overlap as in HolisticTraceAnalysis; of waiting as in Böhme et al. 2010, "late sender" for collectives.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from recsys.profile.intervals import intersect, length, subtract, union
from recsys.profile.trace import Collective, RankTrace
from recsys.runs.window_timing import CollectiveTiming, PhaseTiming, RankTiming


@dataclass(frozen=True)
class Joined:
    """One rank's part in a collective: when the last rank had joined it, and when the last had left it; µs."""

    collective: Collective
    all_started: float
    all_ended: float


def join(by_rank: Sequence[Sequence[tuple[int, Collective]]]) -> list[tuple[list[Joined], int]]:
    """by_rank: of every rank its collectives with the step they began in, in order, all on one clock. Returns for every
    rank its collectives matched with the others', and how many could not be."""
    found: dict[tuple, dict[int, list[Collective]]] = defaultdict(lambda: defaultdict(list))
    for rank, collectives in enumerate(by_rank):
        for step, collective in collectives:
            found[step, collective.kind, collective.group][rank].append(collective)
    joined: list[tuple[list[Joined], int]] = []
    for collectives in by_rank:
        parts: list[Joined] = []
        unmatched = 0
        seen: dict[tuple, int] = defaultdict(int)
        for step, own in collectives:
            key = (step, own.kind, own.group)
            position = seen[key]
            seen[key] += 1
            peers = found[key].values()
            if len({len(theirs) for theirs in peers}) > 1:
                unmatched += 1
                parts.append(Joined(own, own.start, own.end))
                continue
            same = [theirs[position] for theirs in peers]
            parts.append(Joined(own, max(c.start for c in same), max(c.end for c in same)))
        joined.append((parts, unmatched))
    return joined


def collectives_by_step(trace: RankTrace) -> list[tuple[int, Collective]]:
    """Those that begin within a step, with its number."""
    steps = np.searchsorted(trace.steps[:, 0], [c.start for c in trace.collectives], side="right") - 1
    pairs = zip(steps.tolist(), trace.collectives, strict=True)
    return [(step, c) for step, c in pairs if step >= 0 and c.start < trace.steps[step, 1]]


def time_rank(
    trace: RankTrace,
    joined: Sequence[Joined],
    unmatched: int = 0,
    wall_ms: float | None = None,
    blocked_ms: float | None = None,
) -> RankTiming:
    """The parts of the steps of a trace. joined: its collectives, on its own clock."""
    num_steps = len(trace.steps)
    steps = union(trace.steps)

    def per_step(spans: np.ndarray) -> float:
        return 1e-3 * length(spans) / num_steps

    compute = intersect(trace.compute, steps)
    comm = intersect(union([(j.collective.start, j.collective.end) for j in joined]), steps)
    transfer = union([(max(j.collective.start, j.all_started), j.collective.end) for j in joined])
    waits = subtract(comm, transfer)
    exposed = subtract(comm, compute)
    return RankTiming(
        step_ms=per_step(steps),
        compute_ms=per_step(compute),
        comm_ms=per_step(comm),
        exposed_comm_ms=per_step(exposed),
        overlap_ms=per_step(intersect(comm, compute)),
        wait_ms=per_step(waits),
        exposed_wait_ms=per_step(subtract(waits, compute)),
        other_ms=per_step(subtract(subtract(steps, compute), comm)),
        data_loading_ms=per_step(trace.data_loading),
        wall_ms=wall_ms,
        blocked_ms=blocked_ms,
        unmatched=unmatched,
        phases={
            name: PhaseTiming(per_step(spans), per_step(intersect(spans, compute)), per_step(intersect(spans, exposed)))
            for name, spans in trace.phases.items()
        },
        collectives=_time_collectives(joined, num_steps),
    )


def _time_collectives(joined: Sequence[Joined], num_steps: int) -> dict[str, CollectiveTiming]:
    by_kind: dict[str, list[Joined]] = defaultdict(list)
    for part in joined:
        by_kind[part.collective.kind].append(part)
    return {
        kind: CollectiveTiming(
            count=len(parts) / num_steps,
            bytes=sum(p.collective.bytes for p in parts) / num_steps,
            ms=1e-3 * sum(p.collective.end - p.collective.start for p in parts) / num_steps,
            wait_ms=1e-3 * sum(p.all_started - p.collective.start for p in parts) / num_steps,
            transfer_ms=1e-3 * sum(p.all_ended - p.all_started for p in parts) / num_steps,
        )
        for kind, parts in sorted(by_kind.items())
    }
