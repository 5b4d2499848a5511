"""Plots of a projection: steps over GPUs and batch sizes, where time goes, totals, predictions beside what was found.

A ROBE compression has one colour and symbol in all of them, sharded tables are grey circles; in the plots of
predictions colours tell the origin of a figure instead.
"""

from collections.abc import Sequence
from typing import Any

from recsys.cost.cost_fit import FOLDS, Prediction
from recsys.cost.projection import FULL, Point, Projector, batch_grid, name_setup
from recsys.cost.projection_table import ProjectionReport, describe_place, models_of
from recsys.report.escape import escape_plotly
from recsys.report.numbers import three_digits
from recsys.report.page import Figure
from recsys.report.palette import BASELINE_COLOUR
from recsys.report.plots import axis, figure, rounded

ORIGIN_COLOURS = {"measured": "#009e73", "emulated": "#e69f00", "published": "#7a7f87", "projected": "#0072b2"}
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_SYMBOLS = ("square", "diamond", "triangle-up", "cross", "star", "pentagon")


def build_plots(report: ProjectionReport) -> list[dict[str, Any]]:
    """id, title, caption, what the figures are, and figures by the name of the choice that shows them."""
    plots = [
        ("gpus", "A step over the number of GPUs", "projected",
         "Circles: sharded tables, where they fit. The level of a ROBE setup at one GPU is drawn through.",
         steps_over_gpus(report)),
        ("parts", "Where the time of a step goes", "projected",
         "Computing below, communication that nothing hides above. What does not fit is missing.",
         parts_of_steps(report)),
        ("batch", "A step over the global batch size", "projected",
         "Where lines cross, the other side becomes faster. Solid: on all GPUs; dotted: ROBE on one GPU.",
         steps_over_batch(report)),
        ("totals", "Hours and dollars to the target", "projected",
         "Epochs as published times the projected step; nothing where no epochs are published. Up and right is worse.",
         totals_figures(report)),
        ("published", "Published steps, and the model's", "published and projected",
         "On the line the model would be right; below it, it promises a faster step than was published.",
         {"": published_figure(report)}),
    ]  # fmt: skip
    if report.validation and report.validation.predictions:
        caption = (
            "Every mark is a step that the fit had not seen. On the line the prediction is right; thin lines: ± 15 %."
        )
        title = "Steps on this machine, predicted and found"
        plots.insert(0, ("held_out", title, "measured and emulated", caption, held_out_figures(report)))
    return [
        {"id": name, "title": title, "origin": origin, "caption": caption, "figures": figures}
        for name, title, origin, caption, figures in plots
        if any(drawn["data"] for drawn in figures.values())
    ]


def _style(report: ProjectionReport, compression: float) -> tuple[str, str]:
    if compression == FULL:
        return BASELINE_COLOUR, "circle"
    i = list(report.scenario.compressions).index(compression)
    return _COLOURS[i % len(_COLOURS)], _SYMBOLS[i % len(_SYMBOLS)]


def _line(
    report: ProjectionReport, compression: float, name: str, x: Sequence[float], y: Sequence[float], **more: Any
) -> Figure:
    colour, symbol = _style(report, compression)
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": escape_plotly(name),
        "x": [rounded(value) for value in x],
        "y": [rounded(value) for value in y],
        "line": {"color": colour, "width": 2, **more.pop("line", {})},
        "marker": {"color": colour, "symbol": symbol, "size": 8},
        **more,
    }


def _choices(report: ProjectionReport) -> list[tuple[str, list[Point]]]:
    """(name, points) of every model, batch size and network; a single node belongs to every network."""
    found = []
    for model in models_of(report.points):
        for batch_size in report.scenario.batch_sizes:
            for network in report.scenario.networks:
                points = [
                    p
                    for p in report.points
                    if p.model is model and p.global_batch_size == batch_size and p.network_gbit in (None, network)
                ]
                if any(p.cost for p in points):
                    found.append((f"{model.name}, batch {batch_size:,}, {network:g} Gbit/s a GPU", points))
    return found


def steps_over_gpus(report: ProjectionReport) -> dict[str, Figure]:
    figures = {}
    for name, points in _choices(report):
        data = []
        for compression in (FULL, *report.scenario.compressions):
            found = [p for p in points if p.compression == compression and p.cost and p.gpus > 1]
            costs = [p.cost for p in found if p.cost]
            label = name_setup(compression, 2)
            hover = [f"{three_digits(c.computing_ms)} + {three_digits(c.exposed_comm_ms)} ms" for c in costs]
            gpus = [p.gpus for p in found]
            data.append(_line(report, compression, label, gpus, [c.step_ms for c in costs], customdata=hover,
                              hovertemplate="%{y:.3g} ms = %{customdata} on %{x} GPUs"))  # fmt: skip
        most = max(report.scenario.gpus)
        for point in points:
            if point.gpus == 1 and point.cost:
                y = [point.cost.step_ms] * 2
                data.append(_line(report, point.compression, point.setup, [1, most], y, line={"dash": "dot"}))
        x = axis("GPUs (log)", type="log", tickvals=[1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096])
        figures[name] = figure([t for t in data if t["x"]], x, axis("projected step, ms (log)", type="log", dtick="D2"))
    return figures


def parts_of_steps(report: ProjectionReport) -> dict[str, Figure]:
    """Stacked bars: one a setup, groups by place."""
    figures = {}
    for name, points in _choices(report):
        found = [p for p in points if p.cost]
        labels = [[describe_place(p.gpus, None) for p in found], [_short(p) for p in found]]
        parts = list(dict.fromkeys(part for p in found if p.cost for part in (*p.cost.compute_ms, *p.cost.comm_ms)))
        data = []
        for i, part in enumerate(parts):
            y = [rounded({**p.cost.compute_ms, **p.cost.comm_ms}.get(part, 0.0)) for p in found if p.cost]
            is_comm = any(p.cost and part in p.cost.comm_ms for p in found)
            pattern = {"pattern": {"shape": "/", "size": 6}} if is_comm else {}
            colour = (BASELINE_COLOUR, *_COLOURS, "#8c6bb1")[i % 8]
            data.append(
                {"type": "bar", "name": f"{part}{' (communication)' * is_comm}", "x": labels, "y": y}
                | {"marker": {"color": colour, **pattern}, "hovertemplate": f"{part}: %{{y:.3g}} ms"}
            )
        x = axis("", tickfont={"size": 10})
        figures[name] = figure(data, x, axis("projected step, ms"), barmode="stack", bargap=0.25)
    return figures


def _short(point: Point) -> str:
    return "sharded" if point.compression == FULL else f"{point.compression:,.0f}×"


def steps_over_batch(report: ProjectionReport) -> dict[str, Figure]:
    """For every model and place: both sides over batch_grid(), the tables placed as for the first batch size."""
    projector = Projector(report.scenario)
    figures = {}
    for model in report.scenario.models:
        for gpus, network in projector.places():
            if any(p.refusal and p.compression == FULL for p in report.points
                   if (p.model, p.gpus, p.network_gbit) == (model, gpus, network)):  # fmt: skip
                continue
            lines = [(FULL, gpus), *((c, owner) for c in report.scenario.compressions for owner in (gpus, 1))]
            data = []
            for compression, owner in lines:
                step = projector.step_over_batch(model, compression, gpus, network, owner)
                found = [(size, ms) for size in batch_grid() if size >= gpus and (ms := step(size)) is not None]
                sizes, times = [size for size, _ in found], [ms for _, ms in found]
                name, dash = name_setup(compression, owner), {"dash": "solid" if owner > 1 else "dot"}
                hover = "%{y:.3g} ms at %{x}"
                data.append(
                    _line(report, compression, name, sizes, times, mode="lines", hovertemplate=hover, line=dash)
                )
            x = axis("global batch size (log)", type="log", dtick="D2")
            title = f"{model.name}, {describe_place(gpus, network)}"
            figures[title] = figure(
                [t for t in data if t["x"]], x, axis("projected step, ms (log)", type="log", dtick="D2")
            )
    return figures


def totals_figures(report: ProjectionReport) -> dict[str, Figure]:
    figures = {}
    for name, points in _choices(report):
        data = []
        for compression in (FULL, *report.scenario.compressions):
            found = [(p, p.totals) for p in points if p.compression == compression and p.totals]
            hover = [
                f"{describe_place(p.gpus, p.network_gbit)}: {t.kwh:.3g} kWh, {t.epochs:g} epochs" for p, t in found
            ]
            label = "sharded" if compression == FULL else f"ROBE {compression:,.0f}×"
            gpus = [str(p.gpus) for p, _ in found]
            hours, dollars = [t.hours for _, t in found], [t.dollars for _, t in found]
            data.append(
                _line(report, compression, label, hours, dollars, customdata=hover, text=gpus,
                      mode="lines+markers+text", textposition="top center",
                      hovertemplate="%{customdata}<br>%{x:.3g} h, $%{y:.3g}")
            )  # fmt: skip
        x = axis("projected hours to the target (log)", type="log", dtick="D2")
        y = axis("projected US $ (log); marks: GPUs", type="log", dtick="D2")
        figures[name] = figure([t for t in data if t["x"]], x, y)
    return figures


def published_figure(report: ProjectionReport) -> Figure:
    data = []
    for i, source in enumerate(dict.fromkeys(c.source for c in report.checks if c.unit == "ms")):
        found = [c for c in report.checks if c.source == source and c.unit == "ms"]
        data.append(
            {"type": "scatter", "mode": "markers", "name": escape_plotly(source)}
            | {"x": [rounded(c.published) for c in found], "y": [rounded(c.projected) for c in found]}
            | {"marker": {"color": ORIGIN_COLOURS["projected"], "symbol": _SYMBOLS[i], "size": 11}}
            | {"customdata": [escape_plotly(c.label) for c in found]}
            | {"hovertemplate": "%{customdata}<br>published %{x:.3g} ms, projected %{y:.3g}"}
        )
    values = [value for trace in data for value in (*trace["x"], *trace["y"])]
    data += _diagonal(values, {"equal": 1.0})
    x = axis("published step, ms (log)", type="log", dtick="D2")
    return figure(data, x, axis("projected step, ms (log)", type="log", dtick="D2"))


def held_out_figures(report: ProjectionReport) -> dict[str, Figure]:
    """For each way of leaving out: predicted over found, by kind of setup and origin."""
    assert report.validation is not None
    return {
        f"left out by {fold}": _held_out(found) for fold in FOLDS if (found := report.validation.of_fold(fold))
    }  # fmt: skip


def _held_out(predictions: Sequence[Prediction]) -> Figure:
    data = []
    groups = dict.fromkeys((p.step.kind, p.step.is_emulated) for p in predictions)
    kinds = list(dict.fromkeys(kind for kind, _ in groups))
    for kind, is_emulated in groups:
        found = [p for p in predictions if (p.step.kind, p.step.is_emulated) == (kind, is_emulated)]
        origin = found[0].step.origin
        data.append(
            {"type": "scatter", "mode": "markers", "name": f"{kind.replace('_', '-')}, {origin}"}
            | {"x": [rounded(p.step.step_ms) for p in found], "y": [rounded(p.predicted_ms) for p in found]}
            | {"marker": {"color": ORIGIN_COLOURS[origin], "symbol": _SYMBOLS[kinds.index(kind)], "size": 8}}
            | {"customdata": [_describe_prediction(p) for p in found]}
            | {"hovertemplate": "%{customdata}<br>found %{x:.3g} ms, predicted %{y:.3g}"}
        )  # fmt: skip
    values = [value for trace in data for value in (*trace["x"], *trace["y"])]
    data += _diagonal(values, {"equal": 1.0, "+ 15 %": 1.15, "− 15 %": 0.85})
    x = axis("step found, ms (log)", type="log", dtick="D2")
    return figure(data, x, axis("step predicted, ms (log)", type="log", dtick="D2"))


def _describe_prediction(prediction: Prediction) -> str:
    step = prediction.step
    return f"{escape_plotly(step.label)}, {step.where}, batch {step.global_batch_size:,}: {prediction.error:+.0%}"


def _diagonal(values: Sequence[float], factors: dict[str, float]) -> list[Figure]:
    ends = [min(values), max(values)]
    return [
        {"type": "scatter", "mode": "lines", "name": name, "x": ends, "y": [factor * end for end in ends]}
        | {"hoverinfo": "skip", "showlegend": factor == 1}
        | {"line": {"color": BASELINE_COLOUR, "width": 1.5 if factor == 1 else 0.8, "dash": "dash"}}
        for name, factor in factors.items()
    ]
