"""One rank's profile as spans on the time line: steps, computing, collectives, phases.

Read from the file that `torch.profiler` writes, so what a trace viewer shows is what was counted. All times are in µs
on this rank's clock, as unions of intervals (`recsys.profile.intervals`).

On a CPU computing is what the step's threads spend in operators that do not themselves wait for or start a collective,
and a collective is the span of its gloo worker. On CUDA both are kernels: NCCL's, and all others; copies and fills are
neither, as in HolisticTraceAnalysis. Gaps between operators, Python's among them, are nobody's: "other".
"""

import bisect
import gzip
import itertools
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from recsys.profile.intervals import EMPTY, intersect, subtract, union
from recsys.runs.phases import DATA_LOADING, GRADIENT_ALL_REDUCE, MARK, OPTIMIZER, OTHER, STEP, phase_of_mark

ENQUEUES = ("c10d::", "_c10d_functional::")
"""Operators that start a collective; who waits for it has no operator of its own."""
WAITS = re.compile(r"_(Req|Wait)(Backward)?$")
"""TorchRec's autograd functions around a collective: they start it, or wait for it."""
_ITEM_BYTES = {
    "float": 4, "double": 8, "long int": 8, "int": 4, "short int": 2, "c10::Half": 2, "c10::BFloat16": 2, "bool": 1,
    "signed char": 1, "unsigned char": 1, "Float": 4, "Double": 8, "Long": 8, "Int": 4, "Half": 2, "BFloat16": 2,
    "Bool": 1, "Byte": 1, "Char": 1,
}  # fmt: skip


class Span(NamedTuple):
    """One event of a profile that lasts; start and end in µs."""

    start: float
    end: float
    name: str
    thread: int
    category: str
    arguments: Mapping[str, Any]

    @property
    def sequence(self) -> int | None:
        """The number of the autograd node: that a forward operator makes next, or that a backward one belongs to."""
        return self.arguments.get("Sequence number")


class Collective(NamedTuple):
    """kind: as the backend calls it, all_to_all, all_reduce ... group: its process group where the profile names it.
    start and end: µs. bytes: what this rank puts in, its own share included."""

    kind: str
    group: str
    start: float
    end: float
    bytes: int


def load_spans(path: Path) -> list[Span]:
    """Return every span of a profile, those that begin first and enclose others first."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt") as file:
        trace = json.load(file)
    base = trace.get("baseTimeNanoseconds", 0) / 1e3
    spans = [
        Span(base + e["ts"], base + e["ts"] + e["dur"], e["name"], e["tid"], e["cat"], e.get("args", {}))
        for e in trace["traceEvents"]
        if e.get("ph") == "X" and "cat" in e
    ]
    return sorted(spans, key=lambda span: (span.start, -span.end))


def gloo_collective(span: Span) -> Collective:
    dims, types = span.arguments.get("Input Dims") or [[]], span.arguments.get("Input type") or [""]
    return Collective(span.name.removeprefix("gloo:"), "", span.start, span.end, _count_bytes(dims[0], types[0]))


def _count_bytes(dims: Any, item_type: str) -> int:
    if dims and isinstance(dims[0], list):
        return sum(_count_bytes(inner, item_type) for inner in dims)
    return math.prod(dims) * _ITEM_BYTES.get(item_type, 0)


def is_nccl(kernel: Span) -> bool:
    return kernel.name.startswith("nccl")


def nccl_collective(span: Span) -> Collective:
    """The kernel carries the collective's name, group and size (PyTorch from 2.4 on)."""
    arguments = span.arguments
    kind = str(arguments.get("Collective name") or span.name).removeprefix("_").replace("allreduce", "all_reduce")
    kind = kind.replace("all_to_allv", "all_to_all").replace("alltoall", "all_to_all").replace("_base", "")
    size = int(arguments.get("In msg nelems") or 0) * _ITEM_BYTES.get(str(arguments.get("dtype")), 0)
    return Collective(kind, str(arguments.get("Process Group Name") or ""), span.start, span.end, size)


@dataclass(frozen=True)
class RankTrace:
    """steps: (n, 2). phases: "forward/…", "backward/…" and others by name; with "other" they fill the steps."""

    steps: np.ndarray
    compute: np.ndarray
    collectives: Sequence[Collective]
    phases: Mapping[str, np.ndarray]
    data_loading: np.ndarray


def read_trace(path: Path) -> RankTrace:
    """Return the steps of a profile and what they consist of. Raises ValueError where it holds no marked step."""
    spans = load_spans(path)
    marks = [span for span in spans if span.name == MARK + STEP and span.category == "user_annotation"]
    if not marks:
        raise ValueError(f"{path} holds no step: it was not recorded by recsys.profile.window")
    steps = np.array([[span.start, span.end] for span in marks])
    loading = [(span.start, span.end) for span in spans if span.name == MARK + DATA_LOADING]
    host = HostPhases(spans, marks[0].thread)
    kernels = [span for span in spans if span.category == "kernel"]
    if kernels:
        collectives = [nccl_collective(span) for span in kernels if is_nccl(span)]
        compute = union([(span.start, span.end) for span in kernels if not is_nccl(span)])
        phases = device_phases(spans, kernels, compute, steps, host)
    else:
        collectives = [gloo_collective(span) for span in spans if span.name.startswith("gloo:")]
        compute = _host_compute(spans, host.threads)
        phases = host.fill(steps, collectives)
    labelled = union(np.concatenate([EMPTY, *phases.values()]))
    phases = {**phases, OTHER: subtract(union(steps), labelled)}
    phases = {name: phases[name] for name in sorted(phases, key=_place)}
    return RankTrace(steps, compute, sorted(collectives, key=lambda c: c.start), phases, union(loading))


def _place(phase: str) -> int:
    """In a step: forward before backward, each in the order of the trace, then what follows."""
    last = (GRADIENT_ALL_REDUCE, OPTIMIZER, OTHER)
    return 2 + last.index(phase) if phase in last else int(phase.startswith("backward/"))


def _host_compute(spans: Iterable[Span], threads: set[int]) -> np.ndarray:
    """Union of the operators that neither are, nor enclose, the start of a collective or the wait for one."""
    found: list[tuple[float, float]] = []
    open_by_thread: dict[int, list[list]] = defaultdict(list)  # [span, whether it counts]

    def close(stack: list[list], until: float) -> None:
        while stack and stack[-1][0].end <= until:
            span, counts = stack.pop()
            if counts:
                found.append((span.start, span.end))
            elif stack:
                stack[-1][1] = False

    for span in spans:
        if span.category == "cpu_op" and span.thread in threads:
            close(open_by_thread[span.thread], span.start)
            communicates = span.name.startswith(ENQUEUES) or bool(WAITS.search(span.name))
            open_by_thread[span.thread].append([span, not communicates])
    for stack in open_by_thread.values():
        close(stack, math.inf)
    return union(found)


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
