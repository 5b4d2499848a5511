"""Where the steps of a profiled window went, as a picture: bars of the parts, a bar a rank, and of the phases."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from recsys.runs.window_timing import WindowTiming

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COMPUTING, _EXPOSED, _WAITING, _OTHER = "#0072b2", "#d55e00", "#e69f00", "#b0b4b9"
PARTS = (
    ("computing", "compute_ms", _COMPUTING),
    ("exposed transfer", "exposed_transfer_ms", _EXPOSED),
    ("exposed waiting", "exposed_wait_ms", _WAITING),
    ("other", "other_ms", _OTHER),
)
"""Name, field of `RankTiming`, colour; they sum to the step."""


def draw_window(window: WindowTiming) -> "Figure":
    """Bars of ms a step."""
    from matplotlib.figure import Figure  # takes half a second, which runs without windows need not spend

    phases, computing, exposed = (window.phases(field) for field in ("ms", "compute_ms", "exposed_comm_ms"))
    figure = Figure(figsize=(9, 1.8 + 0.35 * len(window.ranks) + 0.2 * len(phases)), layout="constrained")
    by_rank, by_phase = figure.subplots(2, 1, height_ratios=[len(window.ranks) + 1.5, 0.6 * len(phases) + 1])
    ranks = [f"rank {rank}" for rank in range(len(window.ranks))]
    _stack(by_rank, ranks, ((name, [getattr(r, field) for r in window.ranks], c) for name, field, c in PARTS))
    by_rank.set_xlabel("ms a step")
    by_rank.legend(ncols=len(PARTS), loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
    rest = [ms - exposed[name] - computing[name] for name, ms in phases.items()]
    parts = ((computing.values(), _COMPUTING), (exposed.values(), _EXPOSED), (rest, _OTHER))
    _stack(by_phase, list(phases), (("", list(widths), colour) for widths, colour in parts))
    by_phase.set_xlabel("ms a step, mean over ranks: computing, exposed communication, other")
    return figure


def _stack(axes: "Axes", names: Sequence[str], parts: Iterable[tuple[str, Sequence[float], str]]) -> None:
    """One bar a name, from the top. parts: label, width of every bar, colour."""
    left = [0.0] * len(names)
    for label, widths, colour in parts:
        axes.barh(names, widths, left=left, color=colour, label=label)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
