"""Plots as plotly figures in plain dictionaries: what all of them share, and those of quality over training.

A setup has one colour, dash and symbol in all of them. Every trace names its setup in `meta`, so the page can hide and
show it everywhere at once. Colours of text and grid are the page's: they follow the reader's light or dark theme.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from recsys.report.comparison import Comparison, Setup
from recsys.report.curves import Point
from recsys.report.numbers import format_count, format_seconds
from recsys.report.page import Figure, Plot
from recsys.report.palette import BASELINE, BASELINE_COLOUR, Style, choose_style
from recsys.runs.metrics import TRAIN_LOG_LOSS

_LINE_POINTS = 300


def choose_styles(comparison: Comparison) -> list[Style]:
    """Return one style a setup: grey for the baseline, then colours, then the same colours with another dash."""
    others = itertools.count()
    return [BASELINE if setup.is_baseline else choose_style(next(others)) for setup in comparison.setups]


def quality_plots(comparison: Comparison, styles: Sequence[Style]) -> list[Plot]:
    """AUC and log loss over time and samples, and the training loss."""
    splits = find_splits(comparison)
    metrics, overs = ("auc", "log_loss"), ("time", "samples")
    plots = [_quality(comparison, styles, splits, metric, over) for metric in metrics for over in overs]
    return [*plots, _training_loss(comparison, styles)]


def find_splits(comparison: Comparison) -> list[str]:
    """The held-out splits that were evaluated, the selecting one first."""
    selecting = comparison.baseline.summary.selected_on
    found = [s for s in ("validation", "test") if any(run.curve(f"quality/{s}_auc") for run in comparison.runs)]
    return sorted(found, key=lambda split: split != selecting)


def axis(title: str, **more: Any) -> Figure:
    return {"title": {"text": title, "standoff": 8}, "automargin": True, **more}


def figure(data: list[Figure], x: Figure, y: Figure, **layout: Any) -> Figure:
    return {"data": data, "layout": {"xaxis": x, "yaxis": y, **layout}}


def escape(text: str) -> str:
    """Plotly reads a few tags in labels: names must not be taken for them."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def label_rows(labels: Sequence[str], letters: int = 24) -> tuple[Figure, int]:
    """A y axis with one row a label, from the top, and the height of the plot; longer labels lose their middle."""
    row_height = 44 if len(labels) <= 8 else 30 if len(labels) <= 24 else 20
    short = [name if len(name) <= letters else f"{name[: letters // 2]}…{name[-letters // 2 :]}" for name in labels]
    rows = axis("", tickvals=list(range(len(labels))), ticktext=[escape(n) for n in short], showgrid=False)
    rows |= {"range": [len(labels) - 0.5, -0.5], "zeroline": False, "ticks": ""}
    return rows, 90 + row_height * max(2, len(labels))


def _quality(comparison: Comparison, styles: Sequence[Style], splits: Sequence[str], metric: str, over: str) -> Plot:
    name = {"auc": "AUC", "log_loss": "Log loss"}[metric]
    against = {"time": "training time", "samples": "training samples"}[over]
    return Plot(
        id=f"{metric.replace('_', '-')}-{over}",
        title=f"{name} against {against}",
        caption={
            "time": "One point an evaluation. Evaluation and checkpoints do not count as training time.",
            "samples": "The same evaluations by the training rows seen.",
        }[over],
        figures={split: _quality_figure(comparison, styles, split, metric, over) for split in splits},
    )


def _quality_figure(comparison: Comparison, styles: Sequence[Style], split: str, metric: str, over: str) -> Figure:
    data: list[Figure] = []
    for i, (setup, style) in enumerate(zip(comparison.setups, styles, strict=True)):
        if len(setup.runs) > 1:
            single = [run.curve(f"quality/{split}_{metric}") for run in setup.runs]
            data += [_line(points, over, i, setup, style, faint=True) for points in single]
        data.append(_line(setup.mean_curve(metric, split), over, i, setup, style))
    drawn = [trace for trace in data if trace["x"]]
    x = axis("training time, s") if over == "time" else axis("training samples", tickformat="~s")
    y = axis(f"{split} {'AUC' if metric == 'auc' else 'log loss, nats'}")
    levels = _find_levels(comparison, split, metric)
    values = [value for trace in drawn for value in trace["y"]] + [level for level, _, _ in levels]
    if values:
        margin = 0.08 * (max(values) - min(values)) or 0.01
        y["range"] = [min(values) - margin, max(values) + margin]
    return figure(drawn, {**x, "rangemode": "tozero"}, y, **_draw_levels(levels))


def _line(
    points: Sequence[Point],
    over: str,
    index: int,
    setup: Setup,
    style: Style,
    faint: bool = False,
    symbols: bool = True,
) -> Figure:
    measured = [
        format_seconds(p.time_s) + f" · {format_count(p.samples)} samples · epoch {p.epoch:.2f}" for p in points
    ]
    return {
        "type": "scatter",
        "mode": "lines+markers" if symbols and not faint else "lines",
        "name": escape(setup.label),
        "meta": {"setup": index},
        "showlegend": not faint,
        "x": [rounded(p.time_s if over == "time" else p.samples) for p in points],
        "y": [rounded(p.value) for p in points],
        "line": {"color": style.colour, "dash": style.dash, "width": 1 if faint else 2},
        "marker": {"color": style.colour, "symbol": style.symbol, "size": 6},
        "opacity": 0.35 if faint else 1,
        "customdata": [] if faint else measured,
        "hoverinfo": "skip" if faint else "all",
        "hovertemplate": None if faint else "%{y:.4f}<br>%{customdata}",
    }


def rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _find_levels(comparison: Comparison, split: str, metric: str) -> list[tuple[float, str, str]]:
    """Target and best possible where they apply: value, name and dash."""
    levels: list[tuple[float, str, str]] = []
    if metric == "auc" and comparison.target and comparison.target.split == split:
        levels.append((comparison.target.auc, f"target {comparison.target.auc:.4f}", "dash"))
    if (best := comparison.best_possible) is not None:
        value = best.auc if metric == "auc" else best.log_loss
        levels.append((value, f"best possible {value:.4f}" + (" (test rows)" if split != "test" else ""), "dot"))
    return levels


def _draw_levels(levels: Sequence[tuple[float, str, str]]) -> Figure:
    """Horizontal lines over the whole width, named at their left end, where curves are far from them."""
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


def _training_loss(comparison: Comparison, styles: Sequence[Style]) -> Plot:
    data = []
    for i, (setup, style) in enumerate(zip(comparison.setups, styles, strict=True)):
        for n, run in enumerate(setup.runs):
            points = _thinned(run.curve(TRAIN_LOG_LOSS))
            line = _line(points, "samples", i, setup, style, symbols=False)
            data.append(line | {"showlegend": n == 0, "line": line["line"] | {"width": 1.5}})
    return Plot(
        id="training-loss",
        title="Training log loss",
        caption=f"Means over the steps between two records, thinned to {_LINE_POINTS} points a run by averaging.",
        figures={
            "": figure(
                [trace for trace in data if trace["x"]],
                axis("training samples", tickformat="~s", rangemode="tozero"),
                axis("training log loss, nats"),
            )
        },
    )


def _thinned(points: Sequence[Point]) -> list[Point]:
    """Means of consecutive points, so that at most _LINE_POINTS are left."""
    size = -(-len(points) // _LINE_POINTS)
    table = np.array([[p.time_s, p.samples, p.epoch, p.value] for p in points])
    return [Point(*map(float, table[i : i + size].mean(0))) for i in range(0, len(points), size or 1)]
