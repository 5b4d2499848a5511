"""One rank's profile as spans on the time line: steps, computing, collectives, phases.

Read from the file that `torch.profiler` writes, so what a trace viewer shows is what was counted. All times are in µs
on this rank's clock, as unions of intervals (`recsys.profile.intervals`).

On a CPU computing is what the step's threads spend in operators that do not themselves wait for or start a collective,
and a collective is the span of its gloo worker. On CUDA both are kernels: NCCL's, and all others; copies and fills are
neither, as in HolisticTraceAnalysis. Gaps between operators, Python's among them, are nobody's: "other".
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from recsys.profile.intervals import EMPTY, subtract, union
from recsys.profile.trace_phases import HostPhases, device_phases
from recsys.profile.trace_spans import (
    ENQUEUES,
    WAITS,
    Collective,
    Span,
    gloo_collective,
    is_nccl,
    load_spans,
    nccl_collective,
)
from recsys.runs.phases import DATA_LOADING, GRADIENT_ALL_REDUCE, MARK, OPTIMIZER, OTHER, STEP


@dataclass(frozen=True)
class RankTrace:
    """steps: (n, 2). phases: "forward/…", "backward/…" and others by name; with "other" they fill the steps."""

    steps: np.ndarray
    compute: np.ndarray
    collectives: Sequence[Collective]
    phases: Mapping[str, np.ndarray]
    data_loading: np.ndarray


def read_trace(path: Path) -> RankTrace:
    """Raises ValueError naming the file where it holds no marked step."""
    spans = load_spans(path)
    marks = [span for span in spans if span.name == MARK + STEP and span.category == "user_annotation"]
    if not marks:
        raise ValueError(f"{path} holds no step: it was not recorded by recsys.profile.profile_window")
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
