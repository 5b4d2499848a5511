"""Which phase of the step a rank was at when: on its threads, and on its device."""

import bisect
import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from recsys.profile.intervals import intersect, subtract, union
from recsys.profile.trace_spans import ENQUEUES, Collective, Span, is_nccl
from recsys.runs.phases import DATA_LOADING, GRADIENT_ALL_REDUCE, OPTIMIZER, OTHER, STEP, phase_of_mark

_NODE, _ACCUMULATE = "autograd::engine::evaluate_function: ", "torch::autograd::AccumulateGrad"


class HostPhases:
    """What each thread of the step was at when: the innermost mark, or the phase whose gradient it computed."""

    def __init__(self, spans: Sequence[Span], main: int) -> None:
        nodes = [span for span in spans if span.category == "cpu_op" and span.name.startswith(_NODE)]
        self.threads = {main, *(node.thread for node in nodes)}
        marks = [(s, phase) for s in spans if s.category == "user_annotation" and (phase := phase_of_mark(s.name))]
        named: dict[int, list[tuple[float, float, str]]] = defaultdict(list)
        for span, phase in marks:
            if phase not in (STEP, DATA_LOADING) and span.thread in self.threads:
                named[span.thread].append((span.start, span.end, phase if phase == OPTIMIZER else f"forward/{phase}"))
        self._segments = {thread: _innermost(found) for thread, found in named.items()}
        forward = self._forward_of(spans, main)
        enqueues = [span for span in spans if span.category == "cpu_op" and span.name.startswith(ENQUEUES)]
        self._nodes = _label_nodes(nodes, forward, enqueues)
        for thread, found in self._nodes.items():
            self._segments[thread] = sorted([*self._segments.get(thread, []), *found])

    def _forward_of(self, spans: Sequence[Span], main: int) -> dict[int, str]:
        """Number of an autograd node -> phase that made it. The operator that makes node s is the last to show s."""
        return {
            span.sequence: self.at(main, span.start)
            for span in spans
            if span.category == "cpu_op" and span.thread == main and span.sequence is not None
            and not span.name.startswith(_NODE) and "Backward" not in span.name
        }  # fmt: skip

    def at(self, thread: int, time: float) -> str:
        segments = self._segments.get(thread, [])
        index = bisect.bisect_right(segments, time, key=lambda segment: segment[0]) - 1
        return segments[index][2] if index >= 0 and time < segments[index][1] else OTHER

    def fill(self, steps: np.ndarray, collectives: Sequence[Collective]) -> dict[str, np.ndarray]:
        """The phases' time on the host, within the steps: a gap in the backward pass goes to the phase before it. What
        DDP waits for after the last gradient is the gradients' all-reduce."""
        found: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for segments in self._segments.values():
            for start, end, phase in segments:
                found[phase].append((start, end))
        for start, end in steps:
            nodes = sorted(node for nodes in self._nodes.values() for node in nodes if start <= node[0] < end)
            for (_, left, phase), (right, _, _) in itertools.pairwise(nodes):
                found[phase].append((left, right))
            if nodes:
                found[_tail_phase(nodes[-1], collectives)].append((nodes[-1][1], self._next_mark(nodes[-1][1], end)))
        inside = union(steps)
        return {phase: intersect(union(spans), inside) for phase, spans in found.items() if phase != OTHER}

    def _next_mark(self, time: float, end: float) -> float:
        later = (s[0] for segments in self._segments.values() for s in segments if s[0] >= time)
        return min([*later, end])


def _label_nodes(
    nodes: Sequence[Span], forward: Mapping[int, str], enqueues: Sequence[Span]
) -> dict[int, list[tuple[float, float, str]]]:
    """By thread, the autograd nodes with the phase of their gradient. A node that adds up a parameter's gradient has no
    number: it goes with the node before it, unless it starts a collective."""
    starts = sorted((span.thread, span.start) for span in enqueues)
    labelled: dict[int, list[tuple[float, float, str]]] = defaultdict(list)
    before: dict[int, str] = {}
    for node in nodes:
        if node.name == _NODE + _ACCUMULATE:
            phase = before.get(node.thread, OTHER)
            index = bisect.bisect_left(starts, (node.thread, node.start))
            if index < len(starts) and starts[index] < (node.thread, node.end):
                phase = GRADIENT_ALL_REDUCE
        else:
            found = forward.get(node.sequence, OTHER) if node.sequence is not None else OTHER
            phase = f"backward/{found.removeprefix('forward/')}" if found != OTHER else OTHER
            before[node.thread] = phase
        labelled[node.thread].append((node.start, node.end, phase))
    return labelled


def _tail_phase(last: tuple[float, float, str], collectives: Iterable[Collective]) -> str:
    """Of the time between the last node and what follows the backward pass."""
    waited = any(c.start < last[1] + 1.0 and c.end > last[1] for c in collectives)
    return GRADIENT_ALL_REDUCE if waited else last[2]


def _innermost(spans: Iterable[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """Nested spans -> disjoint segments in order: at each time the innermost span."""
    segments: list[tuple[float, float, str]] = []
    open_spans: list[tuple[float, str]] = []
    time = -math.inf

    def emit(until: float) -> None:
        nonlocal time
        if open_spans and until > time:
            segments.append((time, until, open_spans[-1][1]))
        time = max(time, until)

    for start, end, name in sorted(spans, key=lambda span: (span[0], -span[1])):
        while open_spans and open_spans[-1][0] <= start:
            emit(open_spans[-1][0])
            open_spans.pop()
        emit(start)
        open_spans.append((end, name))
    while open_spans:
        emit(open_spans[-1][0])
        open_spans.pop()
    return segments


def device_phases(
    spans: Sequence[Span], kernels: Sequence[Span], compute: np.ndarray, steps: np.ndarray, host: HostPhases
) -> dict[str, np.ndarray]:
    """The device's time within the steps: a kernel belongs to the phase that launched it, communication where nothing
    computes beside it; a gap to the kernel that ends it."""
    launches = {
        span.arguments["correlation"]: span
        for span in spans
        if span.category in ("cuda_runtime", "cuda_driver") and "correlation" in span.arguments
    }
    pieces: list[tuple[float, float, str]] = []
    for kernel in kernels:
        launch = launches.get(kernel.arguments.get("correlation"))
        phase = host.at(launch.thread, launch.start) if launch else OTHER
        if not is_nccl(kernel):
            pieces.append((kernel.start, kernel.end, phase))
            continue
        own = GRADIENT_ALL_REDUCE if "AllReduce" in kernel.name and phase.startswith("backward") else phase
        exposed = subtract(np.array([[kernel.start, kernel.end]]), compute)
        pieces += [(start, end, own) for start, end in exposed.tolist()]
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for first, last in steps.tolist():
        time = first
        for _, end, phase in sorted(piece for piece in pieces if first <= piece[0] < last):
            found[phase].append((time, max(time, min(end, last))))
            time = max(time, min(end, last))
    return {phase: union(spans) for phase, spans in found.items() if phase != OTHER}
