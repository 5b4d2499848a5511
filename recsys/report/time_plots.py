"""Where the time of a step goes, as plotly figures and as columns of a table, from the profiled windows of runs.

A stacked bar is a step: of a setup, mean over its ranks, or of one rank. A part, and a phase, has one colour in all
figures; what runs backward is hatched in the colour of its forward phase. Setups that were not profiled are left out.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from recsys.report.comparison import Comparison, Setup, TimeFigures
from recsys.report.numbers import format_bytes, format_ratio, format_share, three_digits
from recsys.report.plots import Figure, Plot, axis, escape, figure, label_rows, rounded
from recsys.report.result_table import MISSING, Cell, Column
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
    """A bar. setup: its place among the compared ones."""

    setup: int
    label: str
    timing: RankTiming


@dataclass(frozen=True)
class _Segment:
    """A part of every bar. hover: what is said of it beside its name, ms and share."""

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
    """The step by its parts, by its phases, and by its parts on every rank; none where nothing was profiled."""
    found = [(i, setup, setup.figures.time) for i, setup in enumerate(comparison.setups) if setup.figures.time]
    if not found:
        return []
    setups = [_Row(i, setup.label, time.mean) for i, setup, time in found]
    ranks = [_Row(i, f"{s.label}, rank {rank}", t) for i, s, time in found for rank, t in enumerate(time.ranks)]
    phases = _phase_segments(dict.fromkeys(phase for row in setups for phase in row.timing.phases))
    outside = _steps_outside([(i, setup) for i, setup, _ in found])
    captions = (
        "Means over ranks and windows. Triangle: p50 of the steps outside of windows.",
        "In the order of a step. Hatched: the backward pass, in the colour of its forward phase.",
        "The same parts, one bar a rank, mean over windows: a rank that others wait for waits less itself.",
    )
    return [
        _plot("time-parts", "A step by its parts", captions[0], setups, _PARTS, outside),
        _plot("time-phases", "A step by its phases", captions[1], setups, phases),
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
    return Plot(name, title, caption, {"": figure([*bars, *more], x, labels, **looks)}, height + 20 * legend_lines)


def _bars(rows: Sequence[_Row], segment: _Segment) -> list[Figure]:
    """The segment of every row that has it, and first its entry in the legend, which no setup takes away."""
    marker: Figure = {"color": segment.colour, "line": {"width": 0}}
    if segment.hatched:
        marker["pattern"] = {"shape": "/", "size": 7, "solidity": 0.2, "bgcolor": segment.colour, "fgcolor": "#ffffff"}
        marker["pattern"] |= {"fgopacity": 0.6}
    shared = {"type": "bar", "orientation": "h", "legendgroup": segment.name, "marker": marker}
    found = []
    for y, row in enumerate(rows):
        if not (ms := segment.ms(row.timing)):
            continue
        share = format_share(ms / row.timing.step_ms)
        said = f"{escape(segment.name)}: {three_digits(ms)} ms, {share} of the step{segment.hover(row.timing)}"
        place = {"name": escape(row.label), "meta": {"setup": row.setup}, "x": [rounded(ms)], "y": [y]}
        inside = {"text": [share], "textposition": "inside", "insidetextanchor": "middle", "textangle": 0}
        found.append(shared | place | inside | {"showlegend": False, "hovertemplate": said})
    return [shared | {"name": escape(segment.name), "meta": {"setup": None}, "x": [None], "y": [0]}, *found]


def _steps_outside(setups: Sequence[tuple[int, Setup]]) -> list[Figure]:
    """One mark a setup, given with its place, above its bar, at the p50 of its steps that were not profiled."""
    marker = {"symbol": "triangle-down", "size": 10, "color": "#000000", "line": {"color": "#ffffff", "width": 1.5}}
    shared = {"type": "scatter", "mode": "markers", "legendgroup": "p50", "marker": marker, "cliponaxis": False}
    found = []
    for y, (place, setup) in enumerate(setups):
        if (p50 := setup.figures.step_ms_p50) is None:
            continue
        said = f"not profiled: p50 {three_digits(p50.mean)} ms"
        where = {"name": escape(setup.label), "meta": {"setup": place}, "x": [rounded(p50.mean)], "y": [y - 0.42]}
        found.append(shared | where | {"showlegend": False, "hovertemplate": said})
    key = shared | {"name": "step that is not profiled, p50", "meta": {"setup": None}, "x": [None], "y": [0]}
    return [key, *found] if found else []


def _phase_segments(names: Iterable[str]) -> list[_Segment]:
    """In the order of a step: forward, backward the other way round, then what follows."""
    found = list(names)
    last = (GRADIENT_ALL_REDUCE, OPTIMIZER, OTHER)
    own = dict.fromkeys(name.rpartition("/")[2] for name in found if name not in last)
    parts = [*FORWARD, *(part for part in own if part not in FORWARD)]
    colours = _PHASE_COLOURS | {
        part: _MORE_COLOURS[i % len(_MORE_COLOURS)] for i, part in enumerate(parts[len(FORWARD) :])
    }
    order = [*(f"forward/{part}" for part in parts), *(f"backward/{part}" for part in reversed(parts)), *last]
    return [_phase_segment(name, colours[name.rpartition("/")[2]]) for name in order if name in found]


def _phase_segment(name: str, colour: str) -> _Segment:
    nothing = PhaseTiming(0.0, 0.0, 0.0)

    def describe(timing: RankTiming) -> str:
        phase = timing.phases.get(name, nothing)
        exposed = three_digits(phase.exposed_comm_ms)
        return f"<br>computing {three_digits(phase.compute_ms)} ms, exposed communication {exposed} ms"

    title = name.replace("/", ": ").replace("_", " ")
    return _Segment(title, colour, lambda t: t.phases.get(name, nothing).ms, name.startswith("backward/"), describe)


def time_columns(comparison: Comparison) -> list[Column]:
    """The figures beneath the plots, and one column for every kind of collective."""
    times = [setup.figures.time for setup in comparison.setups if setup.figures.time]
    kinds = dict.fromkeys(kind for time in times for kind in time.mean.collectives)
    return [*_COLUMNS, *(_kind_column(kind) for kind in kinds)]


def _cell(describe: Callable[[Setup, TimeFigures], Cell]) -> Callable[[Setup], Cell]:
    return lambda setup: describe(setup, setup.figures.time) if setup.figures.time else Cell(MISSING)


def _overhead(_: Setup, time: TimeFigures) -> Cell:
    if time.overhead is None:
        return Cell(MISSING)
    return Cell(format_ratio(time.overhead), f"mean {three_digits(time.mean.step_ms / time.overhead)} ms")


def _clock_error(_: Setup, time: TimeFigures) -> Cell:
    return Cell(f"{time.clock_error_ms:.2f}" if len(time.ranks) > 1 else MISSING)


def _exposed(_: Setup, time: TimeFigures) -> Cell:
    if not time.mean.collectives:
        return Cell("none")
    low, high = format_share(time.exposed_share_lowest), format_share(time.exposed_share_highest)
    return Cell(format_share(time.exposed_share), f"{low} to {high}" if time.windows > 1 else "")


def _waiting(_: Setup, time: TimeFigures) -> Cell:
    exposed = time.mean.exposed_comm_ms
    return Cell(format_share(time.mean.exposed_wait_ms / exposed)) if exposed else Cell(MISSING)


def _overlap(_: Setup, time: TimeFigures) -> Cell:
    if time.overlap_share is None:
        return Cell(MISSING)
    return Cell(format_share(time.overlap_share), f"of {three_digits(time.mean.comm_ms)} ms")


def _kind_column(kind: str) -> Column:
    def describe(_: Setup, time: TimeFigures) -> Cell:
        if (found := time.mean.collectives.get(kind)) is None:
            return Cell("none")
        times = f"waiting {three_digits(found.wait_ms)}, transfer {three_digits(found.transfer_ms)} ms"
        return Cell(f"{format_bytes(found.bytes)} in {found.count:g}", times)

    meaning = "Bytes a rank puts in and number of collectives, a step; sums of their waiting and transfer."
    return Column(kind, "", meaning, _cell(describe))


_COLUMNS = (
    Column("windows", "", "Profiled windows of all runs, and their steps.",
           _cell(lambda _, t: Cell(str(t.windows), f"{t.steps} steps"))),
    Column("profiled step", "ms", "Mean over windows and ranks.",
           _cell(lambda _, t: Cell(three_digits(t.mean.step_ms)))),
    Column("× not profiled", "", "Profiled step over the mean step outside of windows: the profiler's overhead, and "
           "what else the machine did meanwhile; less than 1 is that alone.", _cell(_overhead)),
    Column("exposed communication", "", "Share of the step; below: of the window with least and with most.",
           _cell(_exposed)),
    Column("of it waiting", "", "Share of exposed communication in which not all ranks have joined.", _cell(_waiting)),
    Column("overlap", "", "Share of communication beside which something computes.", _cell(_overlap)),
    Column("clock error", "ms", "How far apart the ranks' clocks may be after alignment, of the worst window: waiting "
           "and transfer are known to this.", _cell(_clock_error)),
)  # fmt: skip
