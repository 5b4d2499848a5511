"""The kernel benchmark in rows and words: columns, the paper's table beside what was measured, how to read it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from recsys.bench.kernel_bars import describe_verdicts, judge
from recsys.bench.kernel_bench import BARS, Grid, KernelReport
from recsys.bench.kernel_bound import Operation
from recsys.bench.kernel_cases import (
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
from recsys.bench.kernel_timing import Measurement, Timing
from recsys.bench.paper_table2 import DOUBTS, HARDWARE, PAPER_ROWS, TABLE2, Block
from recsys.report.numbers import MISSING
from recsys.report.table import Cell


@dataclass(frozen=True)
class Row:
    """A competitor at a size and thread count. fewest: the same size at the fewest threads measured."""

    name: str
    measurement: Measurement
    fewest: Measurement
    is_judged: bool


@dataclass(frozen=True)
class KernelColumn:
    """A figure of every row. meaning says how it is measured."""

    heading: str
    meaning: str
    cell: Callable[[Row], Cell]


def build_rows(report: KernelReport, measurements: Sequence[Measurement]) -> list[Row]:
    """measurements: of one size or of all."""
    fewest = {m.size: m for m in sorted(measurements, key=lambda m: -m.threads)}
    is_judged = report.settings.device.type == "cpu" and report.grid is BARS
    return [
        Row(name, measurement, fewest[measurement.size], is_judged)
        for measurement in measurements
        for name in report.grid.competitors
        if name in measurement.timings
    ]


def columns_of(grid: Grid) -> list[KernelColumn]:
    return _BARS_COLUMNS if grid is BARS else _PAPER_COLUMNS


def format_ms(ms: float) -> str:
    return f"{ms:.0f}" if ms >= 99.5 else f"{ms:.1f}" if ms >= 9.95 else f"{ms:.2f}"


def _timing(timing: Timing | None) -> Cell:
    if timing is None:
        return Cell(MISSING)
    low, high = timing.quartiles
    return Cell(format_ms(timing.median), f"{_short(low)}–{_short(high)}", timing.median)


def _digits(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def _short(ms: float) -> str:
    return f"{ms:.0f}" if ms >= 9.95 else f"{ms:.1f}" if ms >= 0.95 else f"{ms:.2f}"


def _number(value: float | None) -> Cell:
    return Cell(MISSING) if value is None else Cell(_digits(value), "", value)


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


def _bars(row: Row) -> Cell:
    verdicts = judge(row.measurement) if row.is_judged and row.name == FUSED_SGD else []
    if not verdicts:
        return Cell("")
    lines = [f"{'✓' if v.is_met else '✗'} {v.bar.label}" for v in verdicts]
    return Cell("\n".join(lines), "", max(v.margin for v in verdicts))


_BOUND = "Over the byte bound: bytes that the operation must move / the bandwidth of a copy in the same rounds."
_SPREAD = "ms, median over rounds; small: first and third quartile."
_LOOKUP = KernelColumn("lookup", "See below.", lambda row: Cell(COMPETITORS[row.name].label, "", row.name))
_FORWARD = KernelColumn("forward ms", f"Bags of a batch, no gradient asked for. {_SPREAD}", _time_of("forward"))
_FORWARD_BOUND = KernelColumn("fwd × bound", _BOUND, _bound_of("forward"))
_BARS_COLUMNS = [
    _LOOKUP,
    _FORWARD,
    KernelColumn("fwd × fill", "Over a plain fill of a new array like the output.", _over_fill),
    _FORWARD_BOUND,
    KernelColumn("step ms", f"Forward, backward from a given gradient, update. {_SPREAD}", _time_of("step")),
    KernelColumn("step × bound", _BOUND, _bound_of("step")),
    KernelColumn("step × TBE", "Step over that of TBE fused SGD.", _against(TBE_SGD, "step")),
    KernelColumn("step × bag", "Step over that of nn.EmbeddingBag.", _against(EMBEDDING_BAG, "step")),
    KernelColumn("step × plain", "Step over that of ROBE plain PyTorch.", _against(PLAIN_SGD, "step")),
    KernelColumn("step × least", "Step over its own at the least threads measured.", _over_fewest("step")),
    KernelColumn(
        "bars", "Most that the step of ROBE fused SGD may take over the named one's; ✓ met, ✗ not met.", _bars
    ),
]
_PAPER_COLUMNS = [
    _LOOKUP,
    _FORWARD,
    KernelColumn("fwd × fill", "Over a plain fill of a new array like the output.", _over_fill),
    _FORWARD_BOUND,
    KernelColumn(
        "backward ms",
        f"From a given gradient of the output; within it the update where the lookup's is fused. {_SPREAD}",
        _time_of("backward"),
    ),
    KernelColumn("bwd × bound", _BOUND, _bound_of("backward")),
    KernelColumn("bwd × TBE", "Backward over that of TBE fused SGD.", _against(TBE_SGD, "backward")),
    KernelColumn("bwd × bag", "Backward over that of nn.EmbeddingBag.", _against(EMBEDDING_BAG, "backward")),
    KernelColumn("bwd × least", "Backward over its own at the least threads measured.", _over_fewest("backward")),
]

PaperLine = tuple[str, list[str]]


def paper_lines(report: KernelReport, block: Block, threads: int) -> list[PaperLine]:
    """For every row of a block of Table 2 a line of ours, of plain PyTorch and of the paper; cells over PAPER_ROWS."""
    ours, plain, operation = {
        "forward": (FUSED_SGD, PLAIN_DENSE, "forward"),
        "dense": (DENSE_SGD, PLAIN_DENSE, "backward"),
        "sparse": (SPARSE_SGD, PLAIN_SPARSE, "backward"),
    }[block.timed]
    lines: list[PaperLine] = []
    for key, printed in block.rows.items():
        here = {m.size.rows: m for m in report.measurements if m.threads == threads and block.holds(m.size, key)}
        for label, name in (("ours", ours), ("plain", plain)):
            found = [m.timing(name, operation) if (m := here.get(n)) else None for n in PAPER_ROWS]
            if any(found):
                lines.append(
                    (f"{block.row_label(key)} {label}", [format_ms(t.median) if t else MISSING for t in found])
                )
        lines.append((f"{block.row_label(key)} paper", [f"{ms:.2f}" for ms in printed]))
    return lines


def paper_blocks(report: KernelReport) -> list[tuple[int, Block, list[PaperLine]]]:
    """(threads, block, lines) of all that was measured; nothing for another grid."""
    if report.grid is BARS:
        return []
    counts = sorted({m.threads for m in report.measurements})
    return [(threads, block, paper_lines(report, block, threads)) for threads in counts for block in TABLE2]


def describe_subject(report: KernelReport) -> str:
    environment, settings = report.environment, report.settings
    where = environment["device"] if settings.device.type == "cuda" else environment["cpu"]
    threads = " and ".join(map(str, settings.threads))
    sizes = len({m.size for m in report.measurements})
    return (
        f"{sizes} sizes on {where}, {environment['cpu_cores']} cores, {threads} thread{'s' * (threads != '1')}; commit "
        f"{(environment['commit'] or 'unknown')[:10]}{' with changes' * environment['uncommitted_changes']}, "
        f"{environment['started'][:10]}."
    )


def describe_scaling(report: KernelReport) -> list[str]:
    """What more threads bring to each competitor, in the median over sizes."""
    counts = sorted({m.threads for m in report.measurements})
    if len(counts) < 2:
        return []
    operation = report.grid.operations[-1]
    rows = [row for row in build_rows(report, report.measurements) if row.measurement.threads == counts[-1]]
    parts = []
    for name in report.grid.competitors:
        cells = [_over_fewest(operation)(row).value for row in rows if row.name == name]
        found = [value for value in cells if isinstance(value, float)]
        if found:
            parts.append(f"{COMPETITORS[name].label} {median(found):.2f}")
    return [f"{counts[-1]} threads over {counts[0]}, {operation}, median over sizes: {', '.join(parts)}."]


def describe_outcome(report: KernelReport) -> list[str]:
    """What came out, in lines: how many bars were met, and what more threads bring."""
    bars = [describe_verdicts(report.verdicts)] if report.verdicts and report.grid is BARS else []
    return bars + describe_scaling(report)


def describe_missed(report: KernelReport) -> list[str]:
    """Every bar that was not met, the farthest from it first."""
    missed = [v for v in report.verdicts if not v.is_met] if report.grid is BARS else []
    return [
        f"not met: {v.ratio:.3f} {v.bar.label}, {v.measurement.size.label}, "
        f"{v.measurement.threads} thread{'s' * (v.measurement.threads > 1)}"
        for v in sorted(missed, key=lambda v: -v.margin)
    ]


def describe_context(report: KernelReport) -> list[str]:
    """How to read the figures, in lines."""
    lines = [
        "Every competitor is timed in every round, in an order drawn anew, on the same ids, after a pass that is not "
        "timed; a ratio is of medians.",
        *report.notes,
    ]
    if report.grid is not BARS:
        lines.append(f"The paper's figures: {HARDWARE}; {DOUBTS}.")
    return [*lines, *(f"Skipped: {line}." for line in report.skipped)]
