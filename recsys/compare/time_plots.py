"""Where the time of a step goes, as plotly figures, from the profiled windows of runs.

A stacked bar is a step: of an arm, mean over its ranks, or of one rank. A part, and a phase, has one colour in all
figures; what runs backward is hatched in the colour of its forward phase. Arms that were not profiled are left out.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from recsys.compare.comparison import Comparison
from recsys.report.escape import escape_plotly
from recsys.report.frame import Arm
from recsys.report.numbers import format_share, three_digits
from recsys.report.page import Figure, Plot
from recsys.report.plots import axis, figure, label_rows, rounded
from recsys.runs.phases import FORWARD, GRADIENT_ALL_REDUCE, OPTIMIZER, OTHER
from recsys.runs.window_timing import PhaseTiming, RankTiming

_LETTERS = 40
_OTHER_COLOUR = "#a9adb3"
_PHASE_COLOURS = {
    "input_distribution": "#ddcc77",
    "bottom_mlp": "#88ccee",
    "embedding_lookup": "#44aa99",
    "output_distribution": "#cc6677",
    "interaction": "#999933",
    "top_mlp": "#4477aa",
    GRADIENT_ALL_REDUCE: "#aa4499",
    OPTIMIZER: "#6a6f78",
    OTHER: _OTHER_COLOUR,
}
_MORE_COLOURS = ("#228833", "#ee8866", "#bbcc33", "#99ddff")
"""Of Tol's colour-blind safe sets, those above too; for phases that a model has of its own."""


@dataclass(frozen=True)
class _Row:
    """Hold one stacked bar of a plot. arm: its place among the compared ones."""

    arm: int
    label: str
    timing: RankTiming


@dataclass(frozen=True)
class _Segment:
    """Describe a part of every stacked bar. hover: what is said of it beside its name, ms and share."""

    name: str
    colour: str
    ms: Callable[[RankTiming], float]
    hatched: bool = False
    hover: Callable[[RankTiming], str] = lambda _: ""


_PARTS = (
    _Segment("computing", "#0072b2", lambda t: t.compute_ms),
    _Segment("exposed transfer", "#d55e00", lambda t: t.exposed_transfer_ms),
    _Segment("exposed waiting", "#f4b183", lambda t: t.exposed_wait_ms),
    _Segment("other", _OTHER_COLOUR, lambda t: t.other_ms),
)


def time_plots(comparison: Comparison) -> list[Plot]:
    """Return the step by its parts, by its phases, and by its parts on every rank; none where nothing was profiled."""
    profiled = [(place, arm, arm.profiled) for place, arm in enumerate(comparison.arms) if arm.profiled]
    if not profiled:
        return []
    arms = [_Row(place, arm.label, steps.mean) for place, arm, steps in profiled]
    ranks = [_Row(i, f"{arm.label}, rank {n}", t) for i, arm, steps in profiled for n, t in enumerate(steps.ranks)]
    phases = _phase_segments(dict.fromkeys(phase for row in arms for phase in row.timing.phases))
    outside = _steps_outside([(place, arm) for place, arm, _ in profiled])
    captions = (
        "Means over ranks and windows. Triangle: p50 of the steps outside of windows.",
        "In the order of a step. Hatched: the backward pass, in the colour of its forward phase.",
        "The same parts, one bar a rank, mean over windows: a rank that others wait for waits less itself.",
    )
    return [
        _plot("time-parts", "A step by its parts", captions[0], arms, _PARTS, outside),
        _plot("time-phases", "A step by its phases", captions[1], arms, phases),
        _plot("time-ranks", "A step on every rank", captions[2], ranks, _PARTS),
    ]


def _plot(
    name: str, title: str, caption: str, rows: Sequence[_Row], segments: Sequence[_Segment], more: Sequence[Figure] = ()
) -> Plot:
    labels, height = label_rows([row.label for row in rows], _LETTERS)
    bars = [trace for segment in segments for trace in _bars(rows, segment)]
    looks = {
        "barmode": "stack",
        "bargap": 0.25,
        "showlegend": True,
        "legend": {"orientation": "h", "y": 1, "yanchor": "bottom", "x": 0, "traceorder": "normal"},
        "uniformtext": {"mode": "hide", "minsize": 9},
    }
    x = axis("ms of a profiled step", rangemode="tozero")
    legend_lines = len(segments) // 5
    drawn = figure([*bars, *more], x, labels, **looks)
    return Plot(name, title, caption, {"": drawn}, height + 20 * legend_lines, is_wide=True)


def _bars(rows: Sequence[_Row], segment: _Segment) -> list[Figure]:
    """Return the segment of every row that has it, after its entry in the legend, which no arm takes away."""
    marker: Figure = {"color": segment.colour, "line": {"width": 0}}
    if segment.hatched:
        marker["pattern"] = {"shape": "/", "size": 7, "solidity": 0.2, "bgcolor": segment.colour, "fgcolor": "#ffffff"}
        marker["pattern"] |= {"fgopacity": 0.6}
    shared = {"type": "bar", "orientation": "h", "legendgroup": segment.name, "marker": marker}
    traces = []
    for y, row in enumerate(rows):
        if not (ms := segment.ms(row.timing)):
            continue
        share = format_share(ms / row.timing.step_ms)
        hover = f"{escape_plotly(segment.name)}: {three_digits(ms)} ms, {share} of the step{segment.hover(row.timing)}"
        place = {"name": escape_plotly(row.label), "meta": {"arm": row.arm}, "x": [rounded(ms)], "y": [y]}
        inside = {"text": [share], "textposition": "inside", "insidetextanchor": "middle", "textangle": 0}
        traces.append(shared | place | inside | {"showlegend": False, "hovertemplate": hover})
    return [shared | {"name": escape_plotly(segment.name), "meta": {"arm": None}, "x": [None], "y": [0]}, *traces]


def _steps_outside(arms: Sequence[tuple[int, Arm]]) -> list[Figure]:
    """Return one mark an arm, given with its place, above its bar: the p50 of its steps not profiled."""
    marker = {"symbol": "triangle-down", "size": 10, "color": "#000000", "line": {"color": "#ffffff", "width": 1.5}}
    shared = {"type": "scatter", "mode": "markers", "legendgroup": "p50", "marker": marker, "cliponaxis": False}
    traces = []
    for y, (place, arm) in enumerate(arms):
        if (p50 := arm.mean("step_ms.p50")) is None:
            continue
        hover = f"not profiled: p50 {three_digits(p50.mean)} ms"
        where = {"name": escape_plotly(arm.label), "meta": {"arm": place}, "x": [rounded(p50.mean)], "y": [y - 0.42]}
        traces.append(shared | where | {"showlegend": False, "hovertemplate": hover})
    key = shared | {"name": "step that is not profiled, p50", "meta": {"arm": None}, "x": [None], "y": [0]}
    return [key, *traces] if traces else []


def _phase_segments(names: Iterable[str]) -> list[_Segment]:
    """Return phases in the order of a step: forward, backward the other way round, then what follows."""
    present = list(names)
    last = (GRADIENT_ALL_REDUCE, OPTIMIZER, OTHER)
    own = dict.fromkeys(name.rpartition("/")[2] for name in present if name not in last)
    parts = [*FORWARD, *(part for part in own if part not in FORWARD)]
    colours = _PHASE_COLOURS | {
        part: _MORE_COLOURS[i % len(_MORE_COLOURS)] for i, part in enumerate(parts[len(FORWARD) :])
    }
    order = [*(f"forward/{part}" for part in parts), *(f"backward/{part}" for part in reversed(parts)), *last]
    return [_phase_segment(name, colours[name.rpartition("/")[2]]) for name in order if name in present]


def _phase_segment(name: str, colour: str) -> _Segment:
    nothing = PhaseTiming(0.0, 0.0, 0.0)

    def describe(timing: RankTiming) -> str:
        phase = timing.phases.get(name, nothing)
        exposed = three_digits(phase.exposed_comm_ms)
        return f"<br>computing {three_digits(phase.compute_ms)} ms, exposed communication {exposed} ms"

    title = name.replace("/", ": ").replace("_", " ")
    return _Segment(title, colour, lambda t: t.phases.get(name, nothing).ms, name.startswith("backward/"), describe)
