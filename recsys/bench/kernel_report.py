"""The kernel benchmark as tables, words and one page: every ratio beside the alternative it is of.

A figure is the median over rounds, in small print its quartiles. A ratio is of medians from the same rounds.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from recsys.bench.byte_bound import Operation
from recsys.bench.competitors import (
    COMPETITORS,
    DENSE_SGD,
    EMBEDDING_BAG,
    FUSED_SGD,
    PLAIN_DENSE,
    PLAIN_SGD,
    PLAIN_SPARSE,
    SPARSE_SGD,
    TBE_SGD,
)
from recsys.bench.kernel_bench import MODELS, Grid, KernelReport
from recsys.bench.kernel_sizes import PAPER_ROWS, KernelSize
from recsys.bench.kernel_timing import Measurement, Timing
from recsys.bench.table2 import DOUBTS, HARDWARE, TABLE2, Block
from recsys.report.escape import escape_plotly
from recsys.report.numbers import MISSING, format_quartiles, plural, three_digits
from recsys.report.page import Lines, Page, Pairs, Plot, Section, Terms, meanings_of
from recsys.report.palette import BASELINE_COLOUR, choose_style
from recsys.report.plots import Figure, axis, figure, rounded
from recsys.report.table import Cell, Column, Table

_LEAST_POINTS = 2


@dataclass(frozen=True)
class Row:
    """Hold a competitor at a size and thread count, a row of the tables.

    fewest: the measurement of the same size at the fewest threads.
    """

    name: str
    measurement: Measurement
    fewest: Measurement


def build_rows(report: KernelReport, measurements: Sequence[Measurement]) -> list[Row]:
    """Return a row for every competitor that was measured. measurements: of one size or of all."""
    fewest = {m.size: m for m in sorted(measurements, key=lambda m: -m.threads)}
    return [
        Row(name, measurement, fewest[measurement.size])
        for measurement in measurements
        for name in report.grid.competitors
        if name in measurement.timings
    ]


def _timing(timing: Timing | None) -> Cell:
    return Cell.of(timing and timing.median, three_digits, format_quartiles(*timing.quartiles) if timing else "")


def _number(value: float | None) -> Cell:
    return Cell.of(value, three_digits)


def _time_of(operation: Operation) -> Callable[[Row], Cell]:
    return lambda row: _timing(row.measurement.timing(row.name, operation))


def _bound_of(operation: Operation) -> Callable[[Row], Cell]:
    return lambda row: _number(row.measurement.over_bound(row.name, operation))


def _against(name: str, operation: Operation) -> Callable[[Row], Cell]:
    return lambda row: _number(row.measurement.ratio(row.name, operation, name))


def _over_fill(row: Row) -> Cell:
    own = row.measurement.timing(row.name, "forward")
    return _number(own.median / row.measurement.fill.median if own else None)


def _over_fewest(operation: Operation) -> Callable[[Row], Cell]:
    def cell(row: Row) -> Cell:
        own, other = row.measurement.timing(row.name, operation), row.fewest.timing(row.name, operation)
        is_more = row.measurement.threads > row.fewest.threads
        return _number(own.median / other.median if own and other and is_more else None)

    return cell


_BOUND = "Over the byte bound: bytes that the operation must move / the bandwidth of a copy in the same rounds."
_SPREAD = "ms, median over rounds; small: first and third quartile."
_FORWARD: list[Column[Row]] = [
    Column("lookup", "See the lookups.", lambda row: Cell(COMPETITORS[row.name].label)),
    Column("forward ms", f"Bags of a batch, no gradient asked for. {_SPREAD}", _time_of("forward")),
    Column("fwd/fill", "Over a plain fill of a new array like the output.", _over_fill),
    Column("fwd/bound", _BOUND, _bound_of("forward")),
]


def columns_of(grid: Grid) -> list[Column[Row]]:
    """Return the figures of a grid: steps of training, or for the paper's backward passes alone."""
    if grid is MODELS:
        return [
            *_FORWARD,
            Column("step ms", f"Forward, backward from a given gradient, update. {_SPREAD}", _time_of("step")),
            Column("step/bound", _BOUND, _bound_of("step")),
            Column("step/TBE", "Step over that of TBE fused SGD.", _against(TBE_SGD, "step")),
            Column("step/bag", "Step over that of nn.EmbeddingBag.", _against(EMBEDDING_BAG, "step")),
            Column("step/plain", "Step over that of ROBE plain PyTorch.", _against(PLAIN_SGD, "step")),
            Column("step/least", "Step over its own at the least threads measured.", _over_fewest("step")),
        ]
    meaning = f"From a given gradient of the output; within it the update where the lookup's is fused. {_SPREAD}"
    return [
        *_FORWARD,
        Column("backward ms", meaning, _time_of("backward")),
        Column("bwd/bound", _BOUND, _bound_of("backward")),
        Column("bwd/TBE", "Backward over that of TBE fused SGD.", _against(TBE_SGD, "backward")),
        Column("bwd/bag", "Backward over that of nn.EmbeddingBag.", _against(EMBEDDING_BAG, "backward")),
        Column("bwd/least", "Backward over its own at the least threads measured.", _over_fewest("backward")),
    ]


def build_size_tables(report: KernelReport, measurements: Sequence[Measurement]) -> Iterator[Table]:
    """Yield a table for every thread count at which one size was measured, lookups downwards."""
    for measurement in measurements:
        rows = [row for row in build_rows(report, measurements) if row.measurement is measurement]
        title = (
            f"{_size_label(measurement.size)} · {plural(measurement.threads, 'thread')} "
            f"({measurement.rounds} rounds, copy {measurement.copy_gb_per_s:.1f} GB/s)"
        )
        table = Table.of(rows, columns_of(report.grid), title=title, is_compact=True)
        shown = [i for i in range(len(table.columns)) if any(row[i].text != MISSING for row in table.rows)]
        yield table.take(shown)


def build_all_table(report: KernelReport) -> Table:
    """Return every figure in one table, sizes and thread counts set apart."""
    columns: list[Column[Row]] = [
        *columns_of(report.grid),
        Column("threads", "", lambda row: row.measurement.threads),
        Column("size", "", lambda row: _size_label(row.measurement.size), align="left"),
    ]
    rows = build_rows(report, report.measurements)
    return Table.of(rows, columns, section=lambda row: (row.measurement.size, row.measurement.threads))


@dataclass(frozen=True)
class PaperLine:
    """Hold a row of Table 2 over PAPER_ROWS: ours, plain PyTorch's or the paper's.

    ms: one for each of PAPER_ROWS, None where nothing was measured.
    """

    key: int
    whose: str
    ms: tuple[float | None, ...]


def find_paper_lines(report: KernelReport, block: Block, threads: int) -> list[PaperLine]:
    """Return for every row of a block of Table 2 a line of ours, of plain PyTorch and of the paper."""
    ours, plain, operation = {
        "forward": (FUSED_SGD, PLAIN_DENSE, "forward"),
        "dense": (DENSE_SGD, PLAIN_DENSE, "backward"),
        "sparse": (SPARSE_SGD, PLAIN_SPARSE, "backward"),
    }[block.timed]
    lines: list[PaperLine] = []
    for key, printed in block.ms.items():
        here = {m.size.rows: m for m in report.measurements if m.threads == threads and block.holds(m.size, key)}
        for whose, name in (("ours", ours), ("plain", plain)):
            timings = [m.timing(name, operation) if (m := here.get(n)) else None for n in PAPER_ROWS]
            if any(timings):
                lines.append(PaperLine(key, whose, tuple(t.median if t else None for t in timings)))
        lines.append(PaperLine(key, "paper", printed))
    return lines


def find_paper_blocks(report: KernelReport) -> list[tuple[int, Block, list[PaperLine]]]:
    """Return (threads, block, lines) of all that was measured; nothing for another grid."""
    if report.grid is MODELS:
        return []
    counts = sorted({m.threads for m in report.measurements})
    return [(threads, block, find_paper_lines(report, block, threads)) for threads in counts for block in TABLE2]


def build_paper_tables(report: KernelReport) -> Iterator[Table]:
    """Yield the parts of Table 2, what was measured above what the paper printed."""
    for threads, block, lines in find_paper_blocks(report):
        rows = []
        for line in lines:
            is_paper = line.whose == "paper"
            text, emphasis = ((lambda ms: f"{ms:.2f}"), "quiet") if is_paper else (three_digits, "")
            cells = [Cell.of(ms, text, emphasis=emphasis) for ms in line.ms]
            rows.append([Cell(f"{block.row_label(line.key)} {line.whose}", emphasis=emphasis), *cells])
        ends = [i + 1 for i, line in enumerate(lines) if line.whose == "paper"]
        headings = ["n", *(f"{n // 1_000_000} M" for n in PAPER_ROWS)]
        yield Table(headings, rows, f"{block.title}, ms, {plural(threads, 'thread')}", sections=ends)


def describe_subject(report: KernelReport) -> str:
    """Return what was measured where, in one sentence."""
    environment, settings = report.environment, report.settings
    where = environment["device"] if settings.device.type == "cuda" else environment["cpu"]
    threads = " and ".join(map(str, settings.threads))
    sizes = len({m.size for m in report.measurements})
    return (
        f"{sizes} sizes on {where}, {environment['cpu_cores']} cores, {threads} thread{'s' * (threads != '1')}; commit "
        f"{(environment['commit'] or 'unknown')[:10]}{' with changes' * environment['uncommitted_changes']}, "
        f"{environment['started'][:10]}."
    )


def describe_ratios(report: KernelReport) -> list[str]:
    """Return the span of ROBE's fused step over each alternative's, and what more threads bring, in lines."""
    lines = []
    if report.grid is MODELS:
        for name in (TBE_SGD, EMBEDDING_BAG, PLAIN_SGD):
            ratios = [r for m in report.measurements if (r := m.ratio(FUSED_SGD, "step", name)) is not None]
            if ratios:
                lines.append(
                    f"A step of {COMPETITORS[FUSED_SGD].label} takes {min(ratios):.2f} to {max(ratios):.2f} of one of "
                    f"{COMPETITORS[name].label}, {median(ratios):.2f} in the median over {len(ratios)} measurements."
                )
    counts = sorted({m.threads for m in report.measurements})
    if len(counts) > 1:
        operation = report.grid.operations[-1]
        rows = [row for row in build_rows(report, report.measurements) if row.measurement.threads == counts[-1]]
        parts = []
        for name in report.grid.competitors:
            values = [_over_fewest(operation)(row).value for row in rows if row.name == name]
            numbers = [value for value in values if isinstance(value, float)]
            if numbers:
                parts.append(f"{COMPETITORS[name].label} {median(numbers):.2f}")
        lines.append(f"{counts[-1]} threads over {counts[0]}, {operation}, median over sizes: {', '.join(parts)}.")
    return lines


def describe_context(report: KernelReport) -> list[str]:
    """Return how to read the figures, in lines."""
    lines = [
        "Every competitor is timed in every round, in an order drawn anew, on the same ids, after a pass that is not "
        "timed; a ratio is of medians.",
        *report.notes,
    ]
    if report.grid is not MODELS:
        lines.append(f"The paper's figures: {HARDWARE}; {DOUBTS}.")
    return [*lines, *(f"Skipped: {line}." for line in report.skipped)]


def build_page(report: KernelReport) -> Page:
    """Return the page: ratios, plots, Table 2 beside what was measured, every figure, and how to read them."""
    ratios = describe_ratios(report)
    table = build_all_table(report)
    paper = [Section("Table 2 of the paper", list(build_paper_tables(report)))] if report.grid is not MODELS else []
    meanings = [(COMPETITORS[name].label, f"{COMPETITORS[name].meaning}.") for name in report.grid.competitors]
    state = "" if report.status == "finished" else f" · {report.status}: partial figures"
    return Page(
        "Embedding kernels beside full tables",
        ratios[0] if ratios else "Nothing was measured.",
        [
            Section("", [describe_subject(report), Lines(ratios[1:]), *build_plots(report)]),
            *paper,
            Section("Every figure", [table]),
            Section("How to read it", [Lines(describe_context(report)), meanings_of(table)]),
            Section("Lookups", [Terms(meanings)]),
            Section("Environment", [Pairs({key: _plain(value) for key, value in report.environment.items()})]),
        ],
        kicker=f"pss-bench · grid {report.grid.name}{state}",
        origin="Every figure on this page was measured in one run, but those marked as the paper's.",
    )


def write_kernel_page(report: KernelReport, path: Path) -> None:
    """Write the page, one file that fetches nothing."""
    build_page(report).write(path)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {each}" for key, each in value.items())
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def build_plots(report: KernelReport) -> list[Plot]:
    """Return the plots for which there are figures."""
    last = report.grid.operations[-1]
    bounds = {
        f"{operation}, {plural(threads, 'thread')}": bound_figure(report, operation, threads)
        for operation in dict.fromkeys((last, *report.grid.operations))
        for threads in sorted({m.threads for m in report.measurements})
    }
    drawn = [
        (
            "ratio",
            "A step against FBGEMM's, over the size of M",
            "Forward, backward and SGD of ROBE fused, over TBE's fused SGD on full tables; dotted: ROBE in plain "
            "PyTorch. 1 is as fast as TBE; lower is faster.",
            ratio_figures(report) if report.grid is MODELS else {},
        ),
        (
            "paper",
            "Table 2 of the paper, over n",
            "Solid: our kernels here. Dotted: the paper's, on its GPU.",
            {} if report.grid is MODELS else paper_figures(report),
        ),
        (
            "bound",
            "Time against the byte bound",
            "One mark a size. The line is the bound itself: bytes that must move, at the speed of a copy measured in "
            "the same rounds. Hovering tells the size.",
            bounds,
        ),
    ]
    return [
        Plot(name, title, caption, figures, height=520)
        for name, title, caption, figures in drawn
        if any(each["data"] for each in figures.values())
    ]


def ratio_figures(report: KernelReport) -> dict[str, Figure]:
    """Return a figure for every thread count, d, B and ids with two sizes of M at some Z: a line for each Z."""
    alike: dict[tuple[Any, ...], list[Measurement]] = {}
    for m in report.measurements:
        size = m.size
        key = (m.threads, size.embedding_dim, size.batch_size, size.ids_per_bag, size.ids)
        alike.setdefault(key, []).append(m)
    figures = {}
    for (threads, dim, batch_size, ids_per_bag, ids), measurements in alike.items():
        drawn = _ratio_figure(measurements)
        if any(len(trace["x"]) >= _LEAST_POINTS for trace in drawn["data"]):
            bags = "" if ids_per_bag == 1 else f", ~{ids_per_bag} ids a bag"
            figures[f"{plural(threads, 'thread')}, d {dim}, B {batch_size:,}{bags}, {ids}"] = drawn
    return figures


def _ratio_figure(measurements: Sequence[Measurement]) -> Figure:
    data = []
    for i, block_size in enumerate(sorted({m.size.block_size for m in measurements})):
        here = sorted((m for m in measurements if m.size.block_size == block_size), key=lambda m: m.size.memory_bytes)
        style = choose_style(i)
        for name, dash in ((FUSED_SGD, "solid"), (PLAIN_SGD, "dot")):
            points = [(m, ratio) for m in here if (ratio := m.ratio(name, "step", TBE_SGD)) is not None]
            is_ours = name == FUSED_SGD
            data.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "name": f"Z = {block_size}" + ("" if is_ours else ", plain PyTorch"),
                    "x": [m.size.memory_bytes / 1e6 for m, _ in points],
                    "y": [rounded(ratio) for _, ratio in points],
                    "line": {"color": style.colour, "dash": dash, "width": 2 if is_ours else 1.2},
                    "marker": {"color": style.colour, "symbol": style.symbol, "size": 9 if is_ours else 5},
                    "hovertemplate": "%{y:.2f} × TBE at %{x} MB",
                }
            )
    x = axis("M, MB of float32 (log)", type="log", tickvals=[1, 3, 10, 30, 100, 300, 1000])
    y = axis("step × TBE fused SGD (log)", type="log", tickvals=[0.1, 0.2, 0.3, 0.5, 1, 2, 3, 5, 10])
    line = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": 1, "y1": 1, "layer": "below"}
    note = {"xref": "paper", "x": 1, "xanchor": "right", "yref": "y", "y": math.log10(1), "yanchor": "bottom"}
    return figure(
        [trace for trace in data if trace["x"]],
        x,
        y,
        shapes=[line | {"line": {"color": BASELINE_COLOUR, "width": 1.2}}],
        annotations=[note | {"text": "TBE", "showarrow": False, "font": {"size": 11}}],
    )


def bound_figure(report: KernelReport, operation: Operation, threads: int) -> Figure:
    """Return ms against those of the bound, a mark for every competitor and size, both logarithmic."""
    data, ends = [], []
    for i, name in enumerate(report.grid.competitors):
        points = [
            (m, m.bound_ms(name, operation), timing.median)
            for m in report.measurements
            if m.threads == threads and (timing := m.timings.get(name, {}).get(operation))
        ]
        ends += [ms for _, bound, median_ms in points for ms in (bound, median_ms)]
        style = choose_style(i)
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": escape_plotly(COMPETITORS[name].label),
                "x": [rounded(bound) for _, bound, _ in points],
                "y": [rounded(median_ms) for _, _, median_ms in points],
                "marker": {"color": style.colour, "symbol": style.symbol, "size": 9, "opacity": 0.8},
                "customdata": [
                    f"{escape_plotly(_size_label(m.size))}<br>{three_digits(ms)} ms, {ms / bound:.1f} × bound"
                    for m, bound, ms in points
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
    rows = f"n {size.rows / 1e6:g} M · {size.compression:,.0f}x · " if size.features == 1 else ""
    return rows + size.label


def paper_figures(report: KernelReport) -> dict[str, Figure]:
    """Return for every thread count and block of Table 2 what was measured and what the paper printed, over n."""
    figures = {}
    for threads, block, lines in find_paper_blocks(report):
        data = []
        for i, key in enumerate(block.ms):
            style = choose_style(i)
            for line in (line for line in lines if line.key == key and line.whose != "plain"):
                is_ours = line.whose == "ours"
                data.append(
                    {
                        "type": "scatter",
                        "mode": "lines+markers",
                        "name": block.row_label(key) + ("" if is_ours else ", paper"),
                        "x": [n / 1e6 for n in PAPER_ROWS],
                        "y": list(line.ms),
                        "line": {"color": style.colour, "dash": "solid" if is_ours else "dot", "width": 2},
                        "marker": {"color": style.colour, "symbol": style.symbol, "size": 8 if is_ours else 5},
                        "hovertemplate": "%{y} ms at %{x} M rows",
                    }
                )
        x = axis("n, millions of rows (log)", type="log", tickvals=[n / 1e6 for n in PAPER_ROWS])
        figures[f"{block.title}, {plural(threads, 'thread')}"] = figure(
            data, x, axis("ms (log)", type="log", dtick="D2")
        )
    return figures
