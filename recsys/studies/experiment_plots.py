"""An experiment's plots: AUC over training, and Fig. 1 of the PSS paper from measured runs."""

from collections.abc import Callable, Sequence

from recsys.report.curves import mean_curve
from recsys.report.escape import escape_plotly
from recsys.report.page import Figure
from recsys.report.palette import BASELINE_COLOUR
from recsys.report.plots import axis, figure, rounded
from recsys.studies.experiment import Experiment
from recsys.studies.experiment_figures import GroupFigures

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
OVERS = {"time_s": "training time, s", "epoch": "epochs", "samples": "training samples"}
_HELD = "energy proxy: GiB-seconds of embeddings held"
TRADE: dict[str, Callable[[GroupFigures], float | None]] = {
    "time per iteration": lambda group: group.step_ms,
    "epochs to the target": lambda group: group.epochs_to_target,
    "total time to the target (A × B)": lambda group: group.seconds_to_target,
    "energy proxy: core-seconds to the target": lambda group: _core_seconds(group),
    _HELD: lambda group: _gib_seconds(group),
}
"""Lines of Fig. 1, each over that of the full tables; the last in a panel of its own, since it falls with the size. On
one thread core-seconds are the total time again."""


def draw_curves(experiment: Experiment, groups: Sequence[GroupFigures]) -> dict[str, dict[str, Figure]]:
    """Panel (setting and model) -> what it is over -> means over seeds, single seeds faint."""
    panels: dict[str, list[GroupFigures]] = {}
    for group in groups:
        title = " · ".join(part for part in (group.setting, group.architecture) if part)
        panels.setdefault(title, []).append(group)
    return {
        title: {label: _draw_panel(experiment, own, over, label) for over, label in OVERS.items()}
        for title, own in panels.items()
    }


def _draw_panel(experiment: Experiment, groups: Sequence[GroupFigures], over: str, label: str) -> Figure:
    shown = [group for group in groups if group.runs]
    data = [trace for group in shown for trace in _draw_group(experiment, group, over)]
    values = [y for trace in data for y in trace["y"]]
    target = shown[0].target if shown else None
    y = axis("test AUC")
    if values:
        best, worst = max([*values, target or 0.0]), min(values)
        ends = min(max(trace["y"]) for trace in data)  # of every curve its best is seen, not where it began
        y["range"] = [max(worst, min(best - 0.12, ends - 0.03)) - 0.004, best + 0.006]
    levels = [(target, f"target {target:.4f}")] if target else []
    if shown and (bound := shown[0].runs[0].row["best_possible_auc"]):
        levels.append((bound, f"best possible {bound:.4f}"))
    return figure(data, axis(label, rangemode="tozero"), y, **_draw_levels(levels))


def _draw_group(experiment: Experiment, group: GroupFigures, over: str) -> list[Figure]:
    colour, dash = _style(experiment, group)
    method = experiment.find_method(group.method)
    name = method.title if group.is_baseline else f"{method.title} {group.compression:,g}×"
    curves = [run.curve() for run in group.runs]
    common = {"type": "scatter", "name": escape_plotly(name), "legendgroup": name, "meta": {"group": name}}

    def trace(points, width: float, **more) -> Figure:
        x = [rounded(getattr(point, over)) for point in points]
        y = [rounded(point.value) for point in points]
        return common | {"x": x, "y": y, "line": {"color": colour, "dash": dash, "width": width}} | more

    mean = trace(mean_curve(curves), 2, mode="lines+markers", marker={"color": colour, "size": 5})
    mean["hovertemplate"] = "%{x:.4g}: %{y:.4f}<extra>" + escape_plotly(f"{name}, mean of {len(curves)}") + "</extra>"
    if len(curves) == 1:
        return [mean]
    faint = {"mode": "lines", "opacity": 0.3, "showlegend": False, "hoverinfo": "skip"}
    return [*(trace(curve, 1, **faint) for curve in curves), mean]


def _style(experiment: Experiment, group: GroupFigures) -> tuple[str, str]:
    """Colour by compression, dash by method."""
    if group.is_baseline:
        return BASELINE_COLOUR, "solid"
    compressions = sorted({c for method in experiment.methods[1:] for c in method.compressions})
    place = [method.name for method in experiment.methods[1:]].index(group.method)
    colour = compressions.index(group.compression) if group.compression in compressions else 0
    return _COLOURS[colour % len(_COLOURS)], _DASHES[place % len(_DASHES)]


def _draw_levels(levels: Sequence[tuple[float, str]]) -> Figure:
    line = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "layer": "below"}
    note = {"xref": "paper", "x": 0.99, "xanchor": "right", "yanchor": "bottom", "showarrow": False}
    dash = {"color": BASELINE_COLOUR, "width": 1, "dash": "dash"}
    return {
        "shapes": [line | {"y0": y, "y1": y, "line": dash} for y, _ in levels],
        "annotations": [note | {"y": y, "text": text, "font": {"size": 11}} for y, text in levels],
    }


def draw_trade(experiment: Experiment, groups: Sequence[GroupFigures]) -> dict[str, Figure]:
    """Panel (method, setting, model) -> Fig. 1: over embedding parameters, relative to full tables; where the target
    was not reached by every run, lines that need it have no point."""
    found = {}
    for baseline in (group for group in groups if group.is_baseline and group.runs):
        for method in experiment.methods[1:]:
            own = [g for g in groups if (g.setting, g.architecture) == (baseline.setting, baseline.architecture)]
            shown = [g for g in own if g.method == method.name and g.runs]
            if shown:
                title = " · ".join(p for p in (method.title, baseline.setting, baseline.architecture) if p)
                found[title] = _draw_trade_panel([*reversed(shown), baseline], baseline)
    return found


def _draw_trade_panel(groups: Sequence[GroupFigures], baseline: GroupFigures) -> Figure:
    data = []
    for (name, value), colour in zip(TRADE.items(), _COLOURS, strict=False):
        base = value(baseline)
        points = [(group.parameters, found / base) for group in groups if base and (found := value(group)) is not None]
        data.append(
            {
                "type": "scatter", "mode": "lines+markers", "name": name,
                "x": [x for x, _ in points], "y": [rounded(y) for _, y in points],
                "line": {"color": colour, "dash": "dot" if "proxy" in name else "solid"},
                "yaxis": "y2" if name == _HELD else "y",
                "hovertemplate": "%{x:.3s} parameters: %{y:.3g}×<extra>" + name + "</extra>",
            }
        )  # fmt: skip
    return figure(
        data,
        axis("embedding parameters", type="log", tickformat="~s", anchor="y2"),
        axis("over full tables", rangemode="tozero", ticksuffix="×", domain=[0.4, 1]),
        yaxis2=axis("over full tables", type="log", dtick=1, tickformat="~g", ticksuffix="×", domain=[0, 0.32]),
    )


def _core_seconds(group: GroupFigures) -> float | None:
    seconds = group.seconds_to_target
    return None if seconds is None else seconds * group.runs[0].row["threads"]


def _gib_seconds(group: GroupFigures) -> float | None:
    seconds, held = group.seconds_to_target, group.held_gib
    return None if seconds is None or held is None else seconds * held
