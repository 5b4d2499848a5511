"""Where the steps of a profiled window went, as a picture: bars of the parts, a bar a rank, and of the phases."""

from matplotlib.figure import Figure

from recsys.timing import WindowTiming

PARTS = (
    ("computing", "compute_ms", "#0072b2"),
    ("exposed transfer", "exposed_transfer_ms", "#d55e00"),
    ("exposed waiting", "exposed_wait_ms", "#e69f00"),
    ("other", "other_ms", "#b0b4b9"),
)
"""Name, field, colour; they sum to the step. Transfer is exposed communication less waiting."""


def draw_window(window: WindowTiming) -> Figure:
    """Bars of ms a step."""
    figure = Figure(figsize=(9, 1.8 + 0.35 * len(window.ranks) + 0.2 * len(window.phases())), layout="constrained")
    by_rank, by_phase = figure.subplots(2, 1, height_ratios=[len(window.ranks) + 1.5, 0.6 * len(window.phases()) + 1])
    names = [f"rank {rank}" for rank in range(len(window.ranks))]
    left = [0.0] * len(names)
    for name, field, colour in PARTS:
        widths = [_part(rank, field) for rank in window.ranks]
        by_rank.barh(names, widths, left=left, color=colour, label=name)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    by_rank.invert_yaxis()
    by_rank.set_xlabel("ms a step")
    by_rank.legend(ncols=len(PARTS), loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
    phases, exposed = window.phases(), window.phases("exposed_comm_ms")
    computing = window.phases("compute_ms")
    rest = {name: ms - exposed[name] - computing[name] for name, ms in phases.items()}
    order = list(phases)
    start = [0.0] * len(order)
    for values, colour in ((computing, "#0072b2"), (exposed, "#d55e00"), (rest, "#b0b4b9")):
        widths = [values[name] for name in order]
        by_phase.barh(order, widths, left=start, color=colour)
        start = [before + width for before, width in zip(start, widths, strict=True)]
    by_phase.invert_yaxis()
    by_phase.set_xlabel("ms a step, mean over ranks: computing, exposed communication, other")
    for axes in (by_rank, by_phase):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _part(rank: object, field: str) -> float:
    if field == "exposed_transfer_ms":
        return _part(rank, "exposed_comm_ms") - _part(rank, "exposed_wait_ms")
    return getattr(rank, field)
