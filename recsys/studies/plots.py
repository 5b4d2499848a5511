"""The plots of a study: AUC over training, AUC against compression, and Fig. 1 of the PSS paper from measured runs."""

from collections.abc import Callable, Sequence

from recsys.report.curves import Point
from recsys.report.escape import escape_plotly
from recsys.report.page import Figure
from recsys.report.palette import BASELINE, BASELINE_COLOUR, COLOURS, DASHES, Style, choose_style
from recsys.report.plots import axis, figure, rounded
from recsys.studies.arms import StudyArm
from recsys.studies.spec import Study

OVERS = {"time_s": "training time, s", "epoch": "epochs", "samples": "training samples"}
_ASIDE = 1.1
"""Points are drawn up to this factor beside their compression, each method at another place: bars do not cover."""
_HELD = "energy proxy: GiB-seconds of embeddings held"
TRADE: dict[str, Callable[[StudyArm], float | None]] = {
    "time per iteration": lambda arm: arm.step_ms,
    "epochs to the target": lambda arm: arm.epochs_to_target,
    "total time to the target (A × B)": lambda arm: arm.seconds_to_target,
    "energy proxy: core-seconds to the target": lambda arm: _times(arm.seconds_to_target, lambda: arm.threads),
    _HELD: lambda arm: _times(arm.seconds_to_target, lambda: arm.held_gib or 0.0),
}
"""Lines of Fig. 1, each over that of the full tables; the last in a panel of its own, since it falls with the size. On
one thread core-seconds are the total time again."""


def _times(seconds: float | None, factor: Callable[[], float]) -> float | None:
    return None if seconds is None else seconds * factor()


def draw_curves(study: Study, arms: Sequence[StudyArm]) -> dict[tuple[str, str], Figure]:
    """Return for each panel (setting and model) and each x axis the means over seeds, single seeds faint."""
    panels: dict[str, list[StudyArm]] = {}
    for arm in arms:
        title = " · ".join(part for part in (arm.setting, arm.architecture) if part)
        panels.setdefault(title, []).append(arm)
    return {
        (title, label): _draw_panel(study, own, over, label)
        for title, own in panels.items()
        for over, label in OVERS.items()
    }


def _draw_panel(study: Study, arms: Sequence[StudyArm], over: str, label: str) -> Figure:
    shown = [arm for arm in arms if len(arm.runs)]
    data = [trace for arm in shown for trace in _draw_arm(study, arm, over)]
    values = [y for trace in data for y in trace["y"]]
    target = shown[0].target.auc if shown and shown[0].target else None
    y = axis("test AUC")
    if values:
        best, worst = max([*values, target or 0.0]), min(values)
        ends = min(max(trace["y"]) for trace in data)  # of every curve its best is seen, not where it began
        y["range"] = [max(worst, min(best - 0.12, ends - 0.03)) - 0.004, best + 0.006]
    levels = [(target, f"target {target:.4f}")] if target else []
    if shown and (bound := next(iter(shown[0].runs.values("best_possible.auc")), None)):
        levels.append((bound, f"best possible {bound:.4f}"))
    return figure(data, axis(label, rangemode="tozero"), y, **_draw_levels(levels))


def _draw_arm(study: Study, arm: StudyArm, over: str) -> list[Figure]:
    style, title = _choose_style(study, arm), study.find_method(arm.method).title
    name = title if arm.is_baseline else f"{title} {arm.compression:,g}×"
    curves = arm.runs.curves("test_auc")
    common = {"type": "scatter", "name": escape_plotly(name), "legendgroup": name}

    def trace(points: Sequence[Point], width: float, **more: object) -> Figure:
        """Return one line of the arm."""
        x = [rounded(getattr(point, over)) for point in points]
        y = [rounded(point.value) for point in points]
        return common | {"x": x, "y": y, "line": {"color": style.colour, "dash": style.dash, "width": width}} | more

    mean = trace(arm.runs.mean_curve("test_auc"), 2, mode="lines+markers", marker={"color": style.colour, "size": 5})
    extra = escape_plotly(f"{name}, mean of {len(curves)}")
    mean["hovertemplate"] = "%{x:.4g}: %{y:.4f}<extra>" + extra + "</extra>"
    if len(curves) == 1:
        return [mean]
    faint = {"mode": "lines", "opacity": 0.3, "showlegend": False, "hoverinfo": "skip"}
    return [*(trace(curve, 1, **faint) for curve in curves), mean]


def _choose_style(study: Study, arm: StudyArm) -> Style:
    """Return the style of an arm: colour by compression, dash by method."""
    if arm.is_baseline:
        return BASELINE
    compressions = sorted({c for method in study.methods[1:] for c in method.compressions})
    place = [method.name for method in study.methods[1:]].index(arm.method)
    colour = compressions.index(arm.compression) if arm.compression in compressions else 0
    return Style(COLOURS[colour % len(COLOURS)], DASHES[place % len(DASHES)])


def _draw_levels(levels: Sequence[tuple[float, str]]) -> Figure:
    line = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "layer": "below"}
    note = {"xref": "paper", "x": 0.99, "xanchor": "right", "yanchor": "bottom", "showarrow": False}
    dash = {"color": BASELINE_COLOUR, "width": 1, "dash": "dash"}
    return {
        "shapes": [line | {"y0": y, "y1": y, "line": dash} for y, _ in levels],
        "annotations": [note | {"y": y, "text": text, "font": {"size": 11}} for y, text in levels],
    }


def draw_trade(study: Study, arms: Sequence[StudyArm]) -> dict[str, Figure]:
    """Return for each panel (method, setting, model) Fig. 1: over embedding parameters, relative to full tables.

    Where the target was not reached by every run, lines that need it have no point.
    """
    panels = {}
    for baseline in (arm for arm in arms if arm.is_baseline and len(arm.runs)):
        for method in study.methods[1:]:
            own = [arm for arm in arms if (arm.setting, arm.architecture) == (baseline.setting, baseline.architecture)]
            if shown := [arm for arm in own if arm.method == method.name and len(arm.runs)]:
                title = " · ".join(p for p in (method.title, baseline.setting, baseline.architecture) if p)
                panels[title] = _draw_trade_panel([*reversed(shown), baseline], baseline)
    return panels


def _draw_trade_panel(arms: Sequence[StudyArm], baseline: StudyArm) -> Figure:
    data = []
    for (name, value), colour in zip(TRADE.items(), COLOURS, strict=False):
        base = value(baseline)
        points = [(arm.parameters, own / base) for arm in arms if base and (own := value(arm)) is not None]
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


def draw_sizes(arms: Sequence[StudyArm]) -> dict[str, Figure]:
    """Return for each setting and model test AUC against the actual compression, ± the standard deviation.

    Full tables are a level, not a point.
    """
    panels = {}
    for baseline in (arm for arm in arms if arm.is_baseline):
        where = (baseline.setting, baseline.architecture)
        own = [arm for arm in arms if (arm.setting, arm.architecture) == where and arm.auc]
        names = list(dict.fromkeys(arm.method for arm in own if not arm.is_baseline))
        traces = [
            _draw_method(
                name, choose_style(place), _ASIDE ** (2 * place / max(1, len(names) - 1) - 1),
                [arm for arm in own if arm.method == name],
            )
            for place, name in enumerate(names)
        ]  # fmt: skip
        ticks = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000]
        x = axis("actual compression", type="log", tickvals=ticks)
        title = " · ".join(part for part in where if part)
        panels[title] = figure(traces, x, axis("test AUC"), **_draw_baseline(baseline))
    return panels


def _draw_method(name: str, style: Style, aside: float, arms: Sequence[StudyArm]) -> Figure:
    measured = [(arm, arm.auc) for arm in arms if arm.auc]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": escape_plotly(name),
        "x": [rounded(aside * (arm.actual_compression or arm.compression)) for arm, _ in measured],
        "y": [rounded(auc.mean) for _, auc in measured],
        "error_y": {"type": "data", "array": [auc.plus_minus for _, auc in measured], "thickness": 1.2, "width": 4},
        "line": {"color": style.colour, "dash": style.dash, "width": 2},
        "marker": {"color": style.colour, "symbol": style.symbol, "size": 8},
        "customdata": [
            f"{arm.actual_compression:.4g}×: {auc.mean:.4f}<br>learning rate {arm.learning_rate:g}, {auc.n} seeds"
            for arm, auc in measured
        ],
        "hovertemplate": "%{customdata}",
    }


def _draw_baseline(baseline: StudyArm) -> Figure:
    if (auc := baseline.auc) is None:
        return {}
    level = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": auc.mean, "y1": auc.mean, "layer": "below"}
    band = level | {"type": "rect", "y0": auc.mean - (auc.plus_minus or 0), "y1": auc.mean + (auc.plus_minus or 0)}
    note = {"xref": "paper", "x": 0.99, "xanchor": "right", "y": auc.mean, "yanchor": "bottom", "showarrow": False}
    return {
        "shapes": [
            band | {"fillcolor": BASELINE_COLOUR, "opacity": 0.15, "line": {"width": 0}},
            level | {"line": {"color": BASELINE_COLOUR, "width": 1.5, "dash": "dash"}},
        ],
        "annotations": [note | {"text": f"full tables {auc.mean:.4f}", "font": {"size": 12}}],
    }
