"""The kernel benchmark as one self-contained page: ratios over M, times against the byte bound, and every figure."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recsys.bench.kernel_bars import bars_of
from recsys.bench.kernel_bench import BARS, KernelReport
from recsys.bench.kernel_cases import COMPETITORS, FUSED_SGD, PLAIN_SGD, TBE_SGD
from recsys.bench.kernel_grid import KernelSize
from recsys.bench.kernel_table import (
    build_rows,
    columns_of,
    describe_context,
    describe_missed,
    describe_outcome,
    describe_subject,
    format_ms,
    paper_blocks,
)
from recsys.bench.kernel_timing import Measurement
from recsys.bench.paper_table2 import PAPER_ROWS
from recsys.report.escape import escape_plotly
from recsys.report.page import Figure, as_script_data, write_page
from recsys.report.palette import BASELINE_COLOUR
from recsys.report.plots import axis, figure, rounded

_TEMPLATE = "kernel_page.html.j2"
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#7a7f87", "#1b9e77")
_SYMBOLS = ("circle", "square", "diamond", "cross", "triangle-up", "triangle-down", "x", "star", "pentagon")
_LEAST_POINTS = 2


def write_kernel_page(report: KernelReport, path: Path) -> None:
    """The page, in one piece: data, styles and plotly.js are inside it, and nothing is fetched."""
    write_page(
        path,
        _TEMPLATE,
        report=report,
        is_bars=report.grid is BARS,
        competitors={name: COMPETITORS[name] for name in report.grid.competitors},
        subject=describe_subject(report),
        outcome=describe_outcome(report),
        missed_lines=describe_missed(report),
        context=describe_context(report),
        columns=columns_of(report.grid),
        rows=build_rows(report, report.measurements),
        blocks=paper_blocks(report),
        paper_rows=PAPER_ROWS,
        environment=report.environment,
        figures=as_script_data(build_plots(report)),
    )


def build_plots(report: KernelReport) -> list[dict[str, Any]]:
    """id, title, caption, and figures by the name of the choice that shows them."""
    last = report.grid.operations[-1]
    ratios = ratio_figures(report) if report.grid is BARS else {}
    papers = {} if report.grid is BARS else paper_figures(report)
    bounds = {
        f"{operation}, {_threads(threads)}": bound_figure(report, operation, threads)
        for operation in dict.fromkeys((last, *report.grid.operations))
        for threads in sorted({m.threads for m in report.measurements})
    }
    plots = [
        {
            "id": "ratio",
            "title": "A step against FBGEMM's, over the size of M",
            "caption": "Forward, backward and SGD of ROBE fused, over TBE's fused SGD on full tables; dotted: ROBE in "
            "plain PyTorch. Level lines: the bars of these sizes. 1 is as fast as TBE; lower is faster.",
            "figures": ratios,
        },
        {
            "id": "paper",
            "title": "Table 2 of the paper, over n",
            "caption": "Solid: our kernels here. Dotted: the paper's, on its GPU.",
            "figures": papers,
        },
        {
            "id": "bound",
            "title": "Time against the byte bound",
            "caption": "One mark a size. The line is the bound itself: bytes that must move, at the speed of a copy "
            "measured in the same rounds. Hovering tells the size.",
            "figures": bounds,
        },
    ]
    return [plot for plot in plots if any(drawn["data"] for drawn in plot["figures"].values())]


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"


def ratio_figures(report: KernelReport) -> dict[str, Figure]:
    """For every choice of thread count, d, B and ids with at least two sizes of M at some Z: a line for each Z."""
    groups: dict[tuple[Any, ...], list[Measurement]] = {}
    for m in report.measurements:
        size = m.size
        key = (m.threads, size.embedding_dim, size.batch_size, size.ids_per_bag, size.ids)
        groups.setdefault(key, []).append(m)
    figures = {}
    for (threads, dim, batch_size, ids_per_bag, ids), found in groups.items():
        drawn = _ratio_figure(found)
        if any(len(trace["x"]) >= _LEAST_POINTS for trace in drawn["data"]):
            bags = "" if ids_per_bag == 1 else f", ~{ids_per_bag} ids a bag"
            figures[f"{_threads(threads)}, d {dim}, B {batch_size:,}{bags}, {ids}"] = drawn
    return figures


def _ratio_figure(measurements: Sequence[Measurement]) -> Figure:
    data = []
    for i, block_size in enumerate(sorted({m.size.block_size for m in measurements})):
        found = sorted((m for m in measurements if m.size.block_size == block_size), key=lambda m: m.size.memory_bytes)
        style = {"color": _COLOURS[i % len(_COLOURS)]}
        for name, dash in ((FUSED_SGD, "solid"), (PLAIN_SGD, "dot")):
            points = [(m, ratio) for m in found if (ratio := m.ratio(name, "step", TBE_SGD)) is not None]
            data.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "name": f"Z = {block_size}" + (", plain PyTorch" if name == PLAIN_SGD else ""),
                    "x": [m.size.memory_bytes / 1e6 for m, _ in points],
                    "y": [rounded(ratio) for _, ratio in points],
                    "line": style | {"dash": dash, "width": 2 if name == FUSED_SGD else 1.2},
                    "marker": style | {"symbol": _SYMBOLS[i % len(_SYMBOLS)], "size": 9 if name == FUSED_SGD else 5},
                    "hovertemplate": "%{y:.2f} × TBE at %{x} MB",
                }
            )
    bars = {bar.most for m in measurements for bar in bars_of(m.size) if bar.against == TBE_SGD}
    x = axis("M, MB of float32 (log)", type="log", tickvals=[1, 3, 10, 30, 100, 300, 1000])
    y = axis("step × TBE fused SGD (log)", type="log", tickvals=[0.1, 0.2, 0.3, 0.5, 1, 2, 3, 5, 10])
    return figure([trace for trace in data if trace["x"]], x, y, **_levels([*sorted(bars), 1.0]))


def _levels(values: Sequence[float]) -> Figure:
    line = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "layer": "below"}
    note = {"xref": "paper", "x": 1, "xanchor": "right", "yref": "y", "yanchor": "bottom", "showarrow": False}
    return {
        "shapes": [
            line
            | {"y0": v, "y1": v, "line": {"color": BASELINE_COLOUR, "width": 1.2, "dash": "dash" if v < 1 else "solid"}}
            for v in values
        ],
        "annotations": [
            note | {"y": math.log10(v), "text": "TBE" if v == 1 else f"bar {v:g}", "font": {"size": 11}} for v in values
        ],
    }


def bound_figure(report: KernelReport, operation: Any, threads: int) -> Figure:
    """Milliseconds against those of the bound, a mark for every competitor and size, both logarithmic."""
    data, ends = [], []
    for i, name in enumerate(report.grid.competitors):
        found = [
            (m, m.bound_ms(name, operation), timing.median)
            for m in report.measurements
            if m.threads == threads and (timing := m.timings.get(name, {}).get(operation))
        ]
        ends += [ms for _, bound, median in found for ms in (bound, median)]
        colour = _COLOURS[i % len(_COLOURS)]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": escape_plotly(COMPETITORS[name].label),
                "x": [rounded(bound) for _, bound, _ in found],
                "y": [rounded(median) for _, _, median in found],
                "marker": {"color": colour, "symbol": _SYMBOLS[i % len(_SYMBOLS)], "size": 9, "opacity": 0.8},
                "customdata": [
                    f"{_size_label(m.size)}<br>{format_ms(median)} ms, {median / bound:.1f} × bound"
                    for m, bound, median in found
                ],
                "hovertemplate": "%{customdata}",
            }
        )
    data = [trace for trace in data if trace["x"]]
    if ends:
        span = [min(ends), max(ends)]
        line = {"type": "scatter", "mode": "lines", "name": "byte bound", "x": span, "y": span, "hoverinfo": "skip"}
        data.append(line | {"line": {"color": BASELINE_COLOUR, "width": 1.5, "dash": "dash"}})
    x = axis("byte bound, ms (log)", type="log", dtick="D2")
    return figure(data, x, axis(f"{operation}, ms (log)", type="log", dtick="D2"))


def _size_label(size: KernelSize) -> str:
    rows = f" · n {size.rows / 1e6:g} M · {size.compression:,.0f}x" if size.features == 1 else ""
    return escape_plotly(size.label) + rows


def paper_figures(report: KernelReport) -> dict[str, Figure]:
    """For every thread count and block of Table 2 what was measured and what the paper printed, over n."""
    figures = {}
    for threads, block, lines in paper_blocks(report):
        cells = dict(lines)
        data = []
        for i, (key, printed) in enumerate(block.rows.items()):
            label, colour = block.row_label(key), {"color": _COLOURS[i]}
            ours = cells.get(f"{label} ours", [])
            series = {
                label: ([float(ms) if ms[0].isdigit() else None for ms in ours], "solid"),
                f"{label}, paper": (list(printed), "dot"),
            }
            data += [
                {"type": "scatter", "mode": "lines+markers", "name": name, "x": [n / 1e6 for n in PAPER_ROWS]}
                | {"y": values, "line": colour | {"dash": dash, "width": 2}, "hovertemplate": "%{y} ms at %{x} M rows"}
                | {"marker": colour | {"symbol": _SYMBOLS[i], "size": 8 if dash == "solid" else 5}}
                for name, (values, dash) in series.items()
                if values
            ]
        x = axis("n, millions of rows (log)", type="log", tickvals=[n / 1e6 for n in PAPER_ROWS])
        figures[f"{block.title}, {_threads(threads)}"] = figure(data, x, axis("ms (log)", type="log", dtick="D2"))
    return figures
