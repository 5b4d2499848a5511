"""Bound against measured on log-log axes: one self-contained page, nothing fetched."""

import json
import math
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from pss.theory.sketch_error import Point, find_slope

_TEMPLATE = "page.html.j2"
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1")  # Okabe & Ito without yellow
_SYMBOLS = ("circle", "square", "diamond", "cross", "triangle-up", "triangle-down", "star")
_INK, _LINE, _QUIET = "#1d2024", "#e3e4e0", "#646a72"
_TITLES = {"macro": "Macro: the table as a whole", "micro": "Micro: single rows"}

HEADINGS = (
    "sketch", "k", "|M|", "compression", "macro ε", "bound", "subspace ε", "micro ε", "bound"
)  # fmt: skip
DEFINITIONS = (
    ("k, |M|", "rows of M = S E, and numbers in it: k·d. For robe |M| = k·d + Z − 1, Z = 8."),
    ("macro ε", "‖MᵀM − EᵀE‖ / σ_max(E)²: the least ε with |⟨Mx, My⟩ − ⟨Ex, Ey⟩| ≤ ε σ_max(E)² ‖x‖‖y‖ for all x, y."),
    ("subspace ε", "the least ε with ≤ ε‖Ex‖‖Ey‖ instead, which is what the macro bound promises; at least macro ε."),
    ("micro ε", "the largest ‖(Se_i)ᵀM − E[i]‖ / ‖E[i]‖ over the rows of importance ‖E[i]‖/σ_max(E) above ρ."),
    ("measured", "at confidence 1 − δ: an order statistic over independent sketches, below which a further one stays."),
    ("bound", "the least of the inequalities that hold for the sketch, for every table of this shape. None for the "
     "unsigned ones, whose collisions add up, and none for robe's macro error: its M is not k × d."),
    ("slope", "of log ε on log k by least squares; theory says −1/2, steeper where k is not far above d."),
)  # fmt: skip


def write_page(points: Sequence[Point], path: Path, *, subject: str, rho: float, delta: float, command: str) -> None:
    """Raise OSError where `path` cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render_page(points, subject=subject, rho=rho, delta=delta, command=command))


def render_page(points: Sequence[Point], *, subject: str, rho: float, delta: float, command: str) -> str:
    """Return the page as HTML."""
    captions = {
        "macro": "Error of all inner products ⟨Ex, Ey⟩, relative to σ_max(E)² ‖x‖‖y‖.",
        "micro": f"Largest relative error of a row of importance above {rho:g}, as it is read back.",
    }
    figures = [
        {"id": kind, "title": _TITLES[kind], "caption": captions[kind], **draw(points, kind, delta)} for kind in _TITLES
    ]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    data = json.dumps(figures, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return environment.get_template(_TEMPLATE).render(
        title="Sketch error: bound against measured",
        subject=subject,
        figures=figures,
        headings=HEADINGS,
        rows=[format_point(point) for point in points],
        definitions=DEFINITIONS,
        command=command,
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        plotly=Markup(get_plotlyjs()),
        data=Markup(data),
    )


def format_point(point: Point) -> list[str]:
    """Return the cells under HEADINGS."""
    measured = point.measured
    return [
        point.sketch,
        f"{point.rows:,}",
        f"{point.parameters:,}",
        f"{point.compression:,.4g}×",
        format_eps(measured.macro),
        format_eps(point.macro.eps),
        format_eps(measured.subspace),
        format_eps(measured.micro),
        format_eps(point.micro.eps),
    ]


def format_eps(value: float) -> str:
    """Return ε to three digits, a dash for one that is not defined."""
    if not math.isfinite(value):
        return "–"
    return f"{value:#.3g}".rstrip(".") if value < 1000 else f"{value:,.0f}"


def draw(points: Sequence[Point], kind: str, delta: float) -> dict[str, Any]:
    """Return the plotly data and layout of one kind of error, "macro" or "micro"."""
    data: list[dict[str, Any]] = []
    sketches = list(dict.fromkeys(point.sketch for point in points))
    for index, sketch in enumerate(sketches):
        data += _lines([point for point in points if point.sketch == sketch], kind, index)
    sizes = sorted({point.rows for point in points})
    return {"data": data, "layout": _layout(sizes, data, delta)}


def _lines(points: Sequence[Point], kind: str, index: int) -> list[dict[str, Any]]:
    """Return measured and promised error of one sketch; no line where nothing is defined."""
    sketch, colour = points[0].sketch, _COLOURS[index % len(_COLOURS)]
    measured = [(p, getattr(p.measured, kind)) for p in points if math.isfinite(getattr(p.measured, kind))]
    promised = [(p, getattr(p, kind)) for p in points if math.isfinite(getattr(p, kind).eps)]
    slope = find_slope([p.rows for p, _ in measured], [error for _, error in measured])
    lines = []
    if measured:
        name = f"{sketch}, measured" + (f" (slope {slope:.2f})".replace("-", "−") if math.isfinite(slope) else "")
        marker = {"symbol": _SYMBOLS[index % len(_SYMBOLS)], "size": 9, "color": colour}
        lines.append(
            _line(name, [p for p, _ in measured], [error for _, error in measured], sketch)
            | {"mode": "lines+markers", "line": {"color": colour, "width": 2}, "marker": marker}
        )
    if promised and measured:
        lines.append(
            _line(f"{sketch}, bound", [p for p, _ in promised], [promise.eps for _, promise in promised], sketch)
            | {"mode": "lines", "line": {"color": colour, "width": 2, "dash": "dash"}}
            | {"text": [f"bound: {promise.bound}" for _, promise in promised]}
        )
    return lines


def _line(name: str, points: Sequence[Point], errors: Sequence[float], group: str) -> dict[str, Any]:
    return {
        "type": "scatter",
        "name": name,
        "legendgroup": group,
        "x": [point.rows for point in points],
        "y": [float(f"{error:.5g}") for error in errors],
        "text": [f"|M| = {point.parameters:,}, {point.compression:,.4g}×" for point in points],
        "hovertemplate": "ε = %{y:.3g} at k = %{x:,}<br>%{text}<extra>%{fullData.name}</extra>",
    }


def _layout(sizes: Sequence[int], data: Sequence[dict[str, Any]], delta: float) -> dict[str, Any]:
    axis = {"type": "log", "gridcolor": _LINE, "linecolor": _LINE, "zeroline": False, "automargin": True}
    values = [value for line in data for value in line["y"] if value > 0]
    limits = [math.log10(min(values)) - 0.15, math.log10(max(values)) + 0.15] if values else [-1.0, 1.0]
    annotations, shapes = [], []
    if limits[0] < 0 < limits[1]:
        shapes = [{"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": 1, "y1": 1, "layer": "below"}]
        shapes[0]["line"] = {"color": _QUIET, "width": 1, "dash": "dot"}
        annotations.append(_note("ε = 1", 0.995, 0.0, "y"))
    if not data:
        annotations.append(_note("Not defined for these sketches, or no row is that important", 0.5, 0.5, "paper"))
    ticks = {"tickvals": sizes, "ticktext": [f"{k:,}" for k in sizes]}
    return {
        "xaxis": axis | {"title": {"text": "k, rows of M = S E, of d numbers each"}} | ticks,
        "yaxis": axis | {"title": {"text": f"ε at confidence {100 * (1 - delta):g} %"}, "range": limits, "dtick": "D2"}
        | {"minor": {"showgrid": False}, "tickformat": "~r"},
        "annotations": annotations,
        "shapes": shapes,
        "legend": {"x": 1.02, "y": 1, "tracegroupgap": 6},
        "margin": {"l": 64, "r": 16, "t": 36, "b": 56},
        "paper_bgcolor": "#ffffff",
        "plot_bgcolor": "#ffffff",
        "font": {"family": "system-ui, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif", "size": 12, "color": _INK},
        "hoverlabel": {"align": "left"},
    }  # fmt: skip


def _note(text: str, x: float, y: float, yref: str) -> dict[str, Any]:
    """Text in a plot; y in the axis' logarithm where yref is "y"."""
    anchors = {"xref": "paper", "yref": yref, "xanchor": "right" if x > 0.5 else "center", "yanchor": "bottom"}
    return {"text": text, "x": x, "y": y, "showarrow": False, "font": {"size": 11, "color": _QUIET}, **anchors}
