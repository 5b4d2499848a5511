"""The table of methods as one self-contained page: AUC against compression, and the figures below."""

from collections.abc import Sequence
from pathlib import Path

from recsys.report.escape import escape_plotly
from recsys.report.page import Figure, as_script_data, write_page
from recsys.report.palette import BASELINE_COLOUR
from recsys.report.plots import axis, figure, rounded
from recsys.studies.method_rows import MethodRow, MethodTable
from recsys.studies.method_table import COLUMNS, UNFAIR, describe_failures, describe_subject, describe_tuning

_TEMPLATE = "method_page.html.j2"
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1")
_SYMBOLS = ("circle", "square", "diamond", "cross", "triangle-up")
_ASIDE = 1.1
"""Points are drawn up to this factor beside their compression, each method at another place: bars do not cover."""
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")


def write_method_page(table: MethodTable, path: Path) -> None:
    """The page, in one piece: data, styles and plotly.js are inside it, and nothing is fetched."""
    write_page(
        path,
        _TEMPLATE,
        subject=describe_subject(table),
        tuning=describe_tuning(table),
        table=table,
        columns=COLUMNS,
        unfair=UNFAIR,
        failures=describe_failures(table),
        environment=table.environment,
        figures=as_script_data(auc_figure(table)),
    )


def auc_figure(table: MethodTable) -> Figure:
    """Test AUC against the compression obtained, ± the standard deviation; full tables are a level, not a point."""
    names = list(dict.fromkeys(row.name for row in table.measured if row is not table.baseline))
    traces = [
        _trace(name, i, _ASIDE ** (2 * i / max(1, len(names) - 1) - 1), [r for r in table.measured if r.name == name])
        for i, name in enumerate(names)
    ]
    x = axis("compression obtained", type="log", tickvals=[1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000])
    return figure(traces, x, axis("test AUC"), **_draw_baseline(table.baseline))


def _trace(name: str, index: int, aside: float, rows: Sequence[MethodRow]) -> Figure:
    again, colour = divmod(index, len(_COLOURS))
    found = [(row, auc) for row in rows if row.arm and (auc := row.arm.at_best("test_auc", True))]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": escape_plotly(name),
        "x": [rounded(aside * (row.obtained or row.compression)) for row, _ in found],
        "y": [rounded(auc.mean) for _, auc in found],
        "error_y": {"type": "data", "array": [auc.plus_minus for _, auc in found], "thickness": 1.2, "width": 4},
        "line": {"color": _COLOURS[colour], "dash": _DASHES[again % len(_DASHES)], "width": 2},
        "marker": {"color": _COLOURS[colour], "symbol": _SYMBOLS[again % len(_SYMBOLS)], "size": 8},
        "customdata": [
            f"{row.obtained:.4g}×: {auc.mean:.4f}<br>learning rate {row.learning_rate:g}, {auc.n} seeds"
            for row, auc in found
        ],
        "hovertemplate": "%{customdata}",
    }


def _draw_baseline(row: MethodRow | None) -> Figure:
    if row is None or row.arm is None or (auc := row.arm.at_best("test_auc", True)) is None:
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
