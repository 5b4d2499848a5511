"""The plots of a comparison: quality over training, and what an arm costs in time and memory.

An arm has one style in all of them. Every trace names the place of its arm in `meta`, so that the page can hide and
show it everywhere at once. Where the time of a step goes: `recsys.compare.time_plots`.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from recsys.compare.comparison import Comparison
from recsys.compare.table import choose_styles
from recsys.compare.time_plots import time_plots
from recsys.report.curves import Point, Position
from recsys.report.escape import escape_plotly
from recsys.report.frame import Arm, Measured
from recsys.report.numbers import format_bytes, format_count, format_ratio, format_seconds
from recsys.report.page import Figure, Plot
from recsys.report.palette import BASELINE_COLOUR, Style
from recsys.report.plots import axis, figure, label_rows, rounded
from recsys.runs.metrics import QUALITY, TRAIN_LOG_LOSS

_LINE_POINTS = 300
_OVER = {
    "time": ("training time", "One point an evaluation. Evaluation and checkpoints do not count as training time."),
    "samples": ("training samples", "The same evaluations by the training rows seen."),
}


def build_plots(comparison: Comparison) -> list[Plot]:
    """Return every plot that the runs have figures for, in the order of the page."""
    metrics = [name for name, metric in QUALITY.items() if metric.is_plotted]
    plots = [_quality(comparison, metric, over) for metric in metrics for over in _OVER]
    plots += [_training_loss(comparison), _step_time(comparison), _memory(comparison), *_size_plots(comparison)]
    plots += time_plots(comparison)
    return [plot for plot in plots if any(figure["data"] for figure in plot.figures.values())]


def find_splits(comparison: Comparison) -> list[str]:
    """Return the held-out splits that were evaluated, the one that chooses the best evaluation first."""
    curves = {split: [c for arm in comparison.arms for c in arm.curves(f"{split}_auc")] for split in _SPLITS}
    return sorted((split for split in _SPLITS if any(curves[split])), key=lambda split: split != comparison.split)


_SPLITS = ("validation", "test")


def _styled(comparison: Comparison) -> Iterator[tuple[int, Arm, Style]]:
    """Yield the arms with their places and styles."""
    yield from zip(range(len(comparison.arms)), comparison.arms, choose_styles(comparison), strict=True)


def _trace(kind: str, place: int, arm: Arm, **more: Any) -> Figure:
    return {"type": kind, "name": escape_plotly(arm.label), "meta": {"arm": place}, **more}


def _quality(comparison: Comparison, metric: str, over: str) -> Plot:
    against, caption = _OVER[over]
    name = QUALITY[metric].title
    return Plot(
        id=f"{metric.replace('_', '-')}-{over}",
        title=f"{name[0].upper()}{name[1:]} against {against}",
        caption=caption,
        figures={split: _quality_figure(comparison, split, metric, over) for split in find_splits(comparison)},
    )


def _quality_figure(comparison: Comparison, split: str, metric: str, over: str) -> Figure:
    data: list[Figure] = []
    for place, arm, style in _styled(comparison):
        column = f"{split}_{metric}"
        if len(arm) > 1:
            data += [_line(points, over, place, arm, style, faint=True) for points in arm.curves(column)]
        data.append(_line(arm.mean_curve(column), over, place, arm, style))
    drawn = [trace for trace in data if trace["x"]]
    x = axis("training time, s") if over == "time" else axis("training samples", tickformat="~s")
    y = axis(f"{split} {QUALITY[metric].axis_title}")
    levels = _find_levels(comparison, split, metric)
    values = [value for trace in drawn for value in trace["y"]] + [level for level, _, _ in levels]
    if values:
        margin = 0.08 * (max(values) - min(values)) or 0.01
        y["range"] = [min(values) - margin, max(values) + margin]
    return figure(drawn, {**x, "rangemode": "tozero"}, y, **_draw_levels(levels))


def _line(
    points: Sequence[Point], over: str, place: int, arm: Arm, style: Style, faint: bool = False, symbols: bool = True
) -> Figure:
    measured = [f"{format_seconds(p.time_s)} · {format_count(p.samples)} samples · epoch {p.epoch:.2f}" for p in points]
    return _trace(
        "scatter",
        place,
        arm,
        mode="lines+markers" if symbols and not faint else "lines",
        showlegend=not faint,
        x=[rounded(p.time_s if over == "time" else p.samples) for p in points],
        y=[rounded(p.value) for p in points],
        line={"color": style.colour, "dash": style.dash, "width": 1 if faint else 2},
        marker={"color": style.colour, "symbol": style.symbol, "size": 6},
        opacity=0.35 if faint else 1,
        customdata=[] if faint else measured,
        hoverinfo="skip" if faint else "all",
        hovertemplate=None if faint else "%{y:.4f}<br>%{customdata}",
    )


def _find_levels(comparison: Comparison, split: str, metric: str) -> list[tuple[float, str, str]]:
    """Return target and best possible where they apply: value, name and dash."""
    levels: list[tuple[float, str, str]] = []
    if metric == "auc" and comparison.target and comparison.target.split == split:
        levels.append((comparison.target.auc, f"target {comparison.target.auc:.4f}", "dash"))
    if (value := getattr(comparison.best_possible, metric, None)) is not None:
        levels.append((value, f"best possible {value:.4f}" + (" (test rows)" if split != "test" else ""), "dot"))
    return levels


def _draw_levels(levels: Sequence[tuple[float, str, str]]) -> Figure:
    """Return horizontal lines over the whole width, named at their left end, where curves are far from them."""
    return {
        "shapes": [
            {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": y, "y1": y, "layer": "below"}
            | {"line": {"color": BASELINE_COLOUR, "width": 1, "dash": dash}}
            for y, _, dash in levels
        ],
        "annotations": [
            {"xref": "paper", "x": 0.01, "xanchor": "left", "y": y, "yanchor": "bottom", "showarrow": False}
            | {"text": text, "font": {"size": 11}}
            for y, text, _ in levels
        ],
    }


def _training_loss(comparison: Comparison) -> Plot:
    data = []
    for place, arm, style in _styled(comparison):
        for n, run in enumerate(comparison.runs_of(arm)):
            line = _line(_thinned(run.curve(TRAIN_LOG_LOSS)), "samples", place, arm, style, symbols=False)
            data.append(line | {"showlegend": n == 0, "line": line["line"] | {"width": 1.5}})
    x = axis("training samples", tickformat="~s", rangemode="tozero")
    return Plot(
        id="training-loss",
        title="Training log loss",
        caption=f"Means over the steps between two records, thinned to {_LINE_POINTS} points a run by averaging.",
        figures={"": figure([trace for trace in data if trace["x"]], x, axis("training log loss, nats"))},
        is_wide=True,
    )


def _thinned(points: Sequence[Point]) -> list[Point]:
    """Return means of consecutive points, so that at most _LINE_POINTS are left."""
    size = -(-len(points) // _LINE_POINTS)
    table = np.array([[p.time_s, p.samples, p.epoch, p.value] for p in points])
    return [Point(*map(float, table[i : i + size].mean(0))) for i in range(0, len(points), size or 1)]


def _step_time(comparison: Comparison) -> Plot:
    data = []
    for place, arm, style in _styled(comparison):
        ratio = comparison.ratios(arm).step_time
        over = f"<br>{format_ratio(ratio)} of the baseline" if ratio else ""
        for what, column, more in (("step", "step_ms", over), ("loading", "data_ms", "")):
            p50, p95 = arm.mean(f"{column}.p50"), arm.mean(f"{column}.p95")
            if p50 and p95:
                data.append(_step_bar(p50, p95, what, more) | _trace("bar", place, arm, y=[place]))
                data[-1]["name"] += f": {what}"
                data[-1]["marker"]["color"] = style.colour
    rows, height = label_rows([arm.label for arm in comparison.arms])
    return Plot(
        id="step-time",
        title="Time of a step",
        caption="Solid: forward, backward and update, p50 with a whisker to p95. Pale: loading of a batch, beside it.",
        figures={"": figure(data, axis("ms", rangemode="tozero"), rows, bargap=0.3)},
        height=height,
    )


def _step_bar(p50: Measured, p95: Measured, what: str, more: str) -> Figure:
    whisker = {"type": "data", "symmetric": False, "array": [max(0.0, rounded(p95.mean - p50.mean))]}
    return {
        "orientation": "h",
        "offsetgroup": what,
        "x": [rounded(p50.mean)],
        "error_x": whisker | {"arrayminus": [0], "thickness": 1.2, "width": 4, "color": "#8a8f98"},
        "marker": {"opacity": 1 if what == "step" else 0.35},
        "hovertemplate": f"{what}: p50 {p50.mean:.3g} ms, p95 {p95.mean:.3g} ms{more}",
    }


def _memory(comparison: Comparison) -> Plot:
    data, values = [], []
    for place, arm, style in _styled(comparison):
        parts, states = arm.fact("bytes_per_rank.embedding"), arm.fact("bytes_per_rank.embedding_optimizer")
        totals = [sum(pair) for pair in zip(parts, states, strict=False)]
        values += totals
        largest = totals.index(max(totals))
        hover = [
            f"rank {rank}: {format_bytes(total)}, of it optimizer {format_bytes(state)}"
            for rank, (total, state) in enumerate(zip(totals, states, strict=False))
        ]
        data.append(
            _trace(
                "scatter",
                place,
                arm,
                mode="markers+text",
                x=totals,
                y=[place] * len(totals),
                text=[format_bytes(total) if rank == largest else "" for rank, total in enumerate(totals)],
                textposition="top center",
                textfont={"size": 11},
                cliponaxis=False,
                marker={"color": style.colour, "symbol": style.symbol, "size": 10, "opacity": 0.8},
                customdata=hover,
                hovertemplate="%{customdata}",
            )
        )
    rows, height = label_rows([arm.label for arm in comparison.arms])
    return Plot(
        id="memory",
        title="Embedding memory per rank",
        caption="Parameters and optimizer state of the embeddings; one mark a rank, marks of equal ranks coincide.",
        figures={"": figure(data, _bytes_axis(values), rows)},
        height=height,
    )


def _bytes_axis(values: Iterable[int]) -> Figure:
    """Return a logarithmic axis where sizes differ by more than 20 times; marks at powers of two either way."""
    low, high = max(1, min(values)), max(1, *values)
    if high / low <= 20:
        step = 2 ** max(0, math.ceil(math.log2(high / 4)))
        ticks = [i * step for i in range(int(high * 1.1 // step) + 1)]
        return axis("bytes per rank", tickvals=ticks, ticktext=[_tick(t) for t in ticks], range=[0, 1.12 * high])
    first, last = math.floor(math.log2(low)), math.ceil(math.log2(high))
    ticks = [2**power for power in range(first, last + 1, math.ceil((last - first) / 4))]
    around = 0.1 * (math.log10(high) - math.log10(low))
    shown = [math.log10(low) - around, math.log10(high) + around]
    labels = {"tickvals": ticks, "ticktext": [_tick(t) for t in ticks]}
    return axis("bytes per rank, log scale", type="log", range=shown, **labels)


def _tick(size: int) -> str:
    number, unit = format_bytes(size).split(" ")
    return f"{number.rstrip('0').rstrip('.') if '.' in number else number} {unit}"


def _size_plots(comparison: Comparison) -> list[Plot]:
    """Return Fig. 1 of the PSS paper from measured runs: size against step time, epochs and time to the target."""
    steps, epochs, times = [], [], []
    for arm in comparison.arms:
        place, trained, taken = _position(comparison, arm), arm.mean("epochs"), arm.mean("train_time_s")
        steps.append((p50.mean if (p50 := arm.mean("step_ms.p50")) else None, True))
        epochs.append((place.epochs, True) if place else (trained.mean or None if trained else None, False))
        times.append((place.time_s, True) if place else (taken.mean or None if taken else None, False))
    panels = [("step", "Size against time of a step", "step p50, ms", steps, "By the embedding parameters stored.")]
    if comparison.target:
        caption = "Open triangles: trained this far without reaching it."
        panels += [
            ("epochs", "Size against epochs to target", "epochs to target", epochs, caption),
            ("time", "Size against time to target", "training time to target, s", times, caption),
        ]
    return [
        Plot(f"size-{name}", title, caption, {"": _size_figure(comparison, unit, values)}, height=300)
        for name, title, unit, values, caption in panels
    ]


def _position(comparison: Comparison, arm: Arm) -> Position | None:
    reached = comparison.time_to_target(arm)
    return reached and reached.observed


def _size_figure(comparison: Comparison, unit: str, values: Sequence[tuple[float | None, bool]]) -> Figure:
    """Return one mark an arm at its embedding parameters. values: each, and whether it is it or a lower bound."""
    data = []
    for (place, arm, style), (value, is_reached) in zip(_styled(comparison), values, strict=True):
        if value is None:
            continue
        parameters = arm.fact("parameters.embedding")
        marker = {"color": style.colour, "symbol": style.symbol if is_reached else "triangle-up-open", "size": 11}
        more = "" if is_reached else ", target not reached"
        hover = f"{format_count(parameters)} parameters<br>%{{y:.4g}}{more}"
        data.append(
            _trace("scatter", place, arm, mode="markers", marker=marker, x=[parameters], y=[rounded(value)])
            | {"hovertemplate": hover}
        )
    x = axis("embedding parameters, log scale", type="log", tickformat="~s", dtick=1)
    return figure(data, x, axis(unit, rangemode="tozero"))
