"""Plots of a projection: steps over GPUs and batch sizes, where time goes, totals, predictions beside measurements.

A ROBE compression has one colour and symbol in all of them, sharded tables are grey circles; in the plots of
predictions colours tell the origin of a figure instead.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from recsys.cost.fit import FOLDS, Prediction
from recsys.cost.projection import FULL, ONE_GPU, Point, Projection, name_setup
from recsys.report.escape import escape_plotly
from recsys.report.numbers import three_digits
from recsys.report.page import Figure, Plot
from recsys.report.palette import BASELINE, BASELINE_COLOUR, COLOURS, ORIGIN_COLOURS, SYMBOLS, choose_style
from recsys.report.plots import axis, figure, rounded

_STEP_AXIS = axis("projected step, ms (log)", type="log", dtick="D2")
_HEIGHT = 480
Choice = tuple[str, ...]


def build_plots(projection: Projection) -> list[Plot]:
    """Return the plots that have something to show."""
    choices, projected, validation = _choices(projection), ("projected",), projection.validation
    plots = [
        _plot("held_out", "Steps on this machine, predicted and measured",
              "Every mark is a step that the fit had not seen. On the line it is right; thin lines: ± 15 %.",
              ("measured", "emulated"),
              {f"left out by {fold}": _predictions(validation.of_fold(fold)) for fold in FOLDS} if validation else {}),
        _plot("gpus", "A step over the number of GPUs",
              "Circles: sharded tables, where they fit. The level of a ROBE setup at one GPU is drawn through.",
              projected, {names: _over_gpus(projection, points) for names, points in choices.items()}),
        _plot("parts", "Where the time of a step goes",
              "Computing below, communication that nothing hides above. What does not fit is missing.",
              projected, {names: _parts(points) for names, points in choices.items()}),
        _plot("batch", "A step over the global batch size",
              "Where lines cross, the other side becomes faster. Solid: on all GPUs; dotted: ROBE on one GPU.",
              projected, _over_batch(projection)),
        _plot("totals", "Hours and dollars to the target",
              "Published epochs times the projected step; nothing where none are published. Up and right is worse.",
              projected, {names: _totals(projection, points) for names, points in choices.items()}),
        _plot("published", "Published steps, and the model's",
              "On the line the model would be right; below it, it promises a faster step than was published.",
              ("published", "projected"), {"": _published(projection)}),
    ]  # fmt: skip
    return [plot for plot in plots if plot.figures]


def _plot(name: str, title: str, caption: str, tags: Sequence[str], figures: Mapping[Any, Figure]) -> Plot:
    shown = {names: drawn for names, drawn in figures.items() if drawn["data"]}
    return Plot(name, title, caption, shown, _HEIGHT, is_wide=True, tags=tags)


def _choices(projection: Projection) -> dict[Choice, list[Point]]:
    """Return the points of every model, batch size and network; a single node belongs to every network."""
    choices: dict[Choice, list[Point]] = {}
    for point in projection.points:
        for network in projection.scenario.networks:
            if point.cost and point.place.network_gbit in (None, network):
                names = (point.model.name, f"batch {point.global_batch_size:,}", f"{network:g} Gbit/s a GPU")
                choices.setdefault(names, []).append(point)
    return choices


def _line(
    projection: Projection, compression: float, name: str, x: Sequence, y: Sequence[float], **more: Any
) -> Figure:
    compressions = list(projection.scenario.compressions)
    style = BASELINE if compression == FULL else choose_style(compressions.index(compression))
    symbol = "circle" if compression == FULL else SYMBOLS[1 + compressions.index(compression) % (len(SYMBOLS) - 1)]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": escape_plotly(name),
        "x": [rounded(value) for value in x],
        "y": [rounded(value) for value in y],
        "line": {"color": style.colour, "width": 2, "dash": more.pop("dash", "solid")},
        "marker": {"color": style.colour, "symbol": symbol, "size": 8},
        **more,
    }


def _over_gpus(projection: Projection, points: Sequence[Point]) -> Figure:
    data, most = [], max(projection.scenario.gpus)
    for compression in (FULL, *projection.scenario.compressions):
        costs = [
            (p.place.gpus, p.cost) for p in points if p.compression == compression and p.cost and p.place != ONE_GPU
        ]
        if costs:
            hover = [f"{three_digits(c.computing_ms)} + {three_digits(c.exposed_comm_ms)} ms" for _, c in costs]
            data.append(
                _line(projection, compression, name_setup(compression, 2), [gpus for gpus, _ in costs],
                      [cost.step_ms for _, cost in costs], customdata=hover,
                      hovertemplate="%{y:.3g} ms = %{customdata} on %{x} GPUs")
            )  # fmt: skip
    for point in points:
        if point.place == ONE_GPU and point.cost:
            y = [point.cost.step_ms] * 2
            data.append(_line(projection, point.compression, point.setup, [1, most], y, dash="dot"))
    ticks = [2**i for i in range(13)]
    return figure(data, axis("GPUs (log)", type="log", tickvals=ticks), _STEP_AXIS)


def _parts(points: Sequence[Point]) -> Figure:
    """Return stacked bars: one a setup, groups by place."""
    costs = [(point, point.cost) for point in points if point.cost]
    places = [f"{p.place.gpus:,} GPU{'s' * (p.place.gpus > 1)}" for p, _ in costs]
    labels = [places, ["sharded" if p.compression == FULL else f"{p.compression:,.0f}×" for p, _ in costs]]
    kinds = {name: False for _, cost in costs for name in cost.compute_ms}
    kinds |= {name: True for _, cost in costs for name in cost.comm_ms}
    colours = (BASELINE_COLOUR, *COLOURS)
    data = [
        {
            "type": "bar",
            "name": f"{part}{' (communication)' * is_comm}",
            "x": labels,
            "y": [rounded({**cost.compute_ms, **cost.comm_ms}.get(part, 0.0)) for _, cost in costs],
            "marker": {"color": colours[i % len(colours)], "pattern": {"shape": "/" if is_comm else "", "size": 6}},
            "hovertemplate": f"{part}: %{{y:.3g}} ms",
        }
        for i, (part, is_comm) in enumerate(kinds.items())
    ]
    return figure(data, axis("", tickfont={"size": 10}), axis("projected step, ms"), barmode="stack", bargap=0.25)


def _over_batch(projection: Projection) -> dict[Choice, Figure]:
    """Return for every model and place both sides over the batch size, where sharded tables fit."""
    scenario, figures = projection.scenario, {}
    for model in scenario.models:
        for place in scenario.places():
            if not (sharded := scenario.steps_over_batch(model, FULL, place)):
                continue
            lines = [(FULL, place, sharded)]
            for compression in scenario.compressions:
                lines += [(compression, p, scenario.steps_over_batch(model, compression, p)) for p in (place, ONE_GPU)]
            data = [
                _line(projection, compression, name_setup(compression, where.gpus), list(steps), list(steps.values()),
                      mode="lines", hovertemplate="%{y:.3g} ms at %{x}", dash="dot" if where == ONE_GPU else "solid")
                for compression, where, steps in lines if steps
            ]  # fmt: skip
            x = axis("global batch size (log)", type="log", dtick="D2")
            figures[model.name, str(place)] = figure(data, x, _STEP_AXIS)
    return figures


def _totals(projection: Projection, points: Sequence[Point]) -> Figure:
    data = []
    for compression in (FULL, *projection.scenario.compressions):
        reached = [(p.place, p.totals) for p in points if p.compression == compression and p.totals]
        if reached:
            label = "sharded" if compression == FULL else f"ROBE {compression:,.0f}×"
            data.append(
                _line(projection, compression, label, [t.hours for _, t in reached], [t.dollars for _, t in reached],
                      customdata=[f"{place}: {t.kwh:.3g} kWh, {t.epochs:g} epochs" for place, t in reached],
                      text=[str(place.gpus) for place, _ in reached], mode="lines+markers+text",
                      textposition="top center", hovertemplate="%{customdata}<br>%{x:.3g} h, $%{y:.3g}")
            )  # fmt: skip
    x = axis("projected hours to the target (log)", type="log", dtick="D2")
    return figure(data, x, axis("projected US $ (log); marks: GPUs", type="log", dtick="D2"))


def _marks(
    name: str, colour: str, symbol: str, x: Sequence[float], y: Sequence[float], labels: Sequence[str]
) -> Figure:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": escape_plotly(name),
        "x": [rounded(value) for value in x],
        "y": [rounded(value) for value in y],
        "marker": {"color": colour, "symbol": symbol, "size": 9},
        "customdata": [escape_plotly(label) for label in labels],
        "hovertemplate": "%{customdata}<br>%{x:.3g} ms, the model's %{y:.3g}",
    }


def _published(projection: Projection) -> Figure:
    checks = [check for check in projection.checks if check.unit == "ms"]
    data = []
    for i, source in enumerate(dict.fromkeys(check.source for check in checks)):
        of_source = [check for check in checks if check.source == source]
        x, y = [check.published for check in of_source], [check.projected for check in of_source]
        labels = [check.label for check in of_source]
        data.append(_marks(source, ORIGIN_COLOURS["projected"], SYMBOLS[i], x, y, labels))
    x = axis("published step, ms (log)", type="log", dtick="D2")
    return figure([*data, *_diagonals(data, {"equal": 1.0})], x, _STEP_AXIS)


def _predictions(predictions: Sequence[Prediction]) -> Figure:
    """Return predicted over measured, by kind of setup and origin."""
    kinds = list(dict.fromkeys(p.step.kind for p in predictions))
    data = []
    for kind, origin in dict.fromkeys((p.step.kind, p.step.origin) for p in predictions):
        found = [p for p in predictions if (p.step.kind, p.step.origin) == (kind, origin)]
        labels = [f"{p.step.label}, {p.step.where}, batch {p.step.global_batch_size:,}: {p.error:+.0%}" for p in found]
        name, symbol = f"{kind.replace('_', '-')}, {origin}", SYMBOLS[kinds.index(kind)]
        x, y = [p.step.step_ms for p in found], [p.predicted_ms for p in found]
        data.append(_marks(name, ORIGIN_COLOURS[origin], symbol, x, y, labels))
    diagonals = _diagonals(data, {"equal": 1.0, "+ 15 %": 1.15, "− 15 %": 0.85})
    x = axis("step measured, ms (log)", type="log", dtick="D2")
    return figure([*data, *diagonals], x, axis("step predicted, ms (log)", type="log", dtick="D2"))


def _diagonals(data: Sequence[Figure], factors: Mapping[str, float]) -> list[Figure]:
    values = [value for trace in data for value in (*trace["x"], *trace["y"])]
    if not values:
        return []
    ends = [min(values), max(values)]
    return [
        {"type": "scatter", "mode": "lines", "name": name, "x": ends, "y": [factor * end for end in ends]}
        | {"hoverinfo": "skip", "showlegend": factor == 1}
        | {"line": {"color": BASELINE_COLOUR, "width": 1.5 if factor == 1 else 0.8, "dash": "dash"}}
        for name, factor in factors.items()
    ]
