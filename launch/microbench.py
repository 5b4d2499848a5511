"""Embedding kernels against each other: Table 2 of the PSS paper as a measurement, beside full tables.

ROBE in its forms (fused updates, dense and sparse gradients, plain PyTorch), FBGEMM's table-batched embeddings,
nn.EmbeddingBag and TorchRec's EmbeddingBagCollection look up and train on the same ids, interleaved in one process.
Written are results.json, after every size, and a page with plots, index.html.

Grid "bars" is the sizes that our claims of speed are about, each claim with its verdict; of it a selection that takes
about eight minutes on two cores, or all with --full, or what the options choose. Grid "paper" is Table 2: one table of
4 to 256 million rows, printed beside the paper's figures. What does not fit the memory is left out with a line.
"""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich import box
from rich.console import Console, Group
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from launch.cli import EXIT_INTERRUPTED, EXIT_MISTAKE
from pss.kernels import robe_bags
from recsys.bench.kernel_bench import GRIDS, KernelBench, KernelReport, KernelSettings, choose_rows, to_json
from recsys.bench.kernel_grid import PAPER_ROWS, Axes, KernelSize, format_mb, paper_sizes, reduced_sizes
from recsys.bench.kernel_page import write_kernel_page
from recsys.bench.kernel_table import (
    build_rows,
    columns_of,
    describe_context,
    describe_missed,
    describe_outcome,
    paper_blocks,
)
from recsys.bench.kernel_timing import BATCHES, Measurement
from recsys.runs.hardware import available_bytes, cache_bytes, huge_page_share, last_cache_bytes
from recsys.runs.ranks import choose_device
from recsys.runs.run_dir import describe_environment, write_atomically
from recsys.train.heap import keep_freed_memory

_WIDTH = 120
_BUDGET = 0.85
"""Share of the available memory that tables, arrays and temporaries may take."""
_AXES = ("d", "z", "m", "batch", "ids_per_bag", "ids")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m launch.microbench",
        description=__doc__,
        epilog="examples:\n"
        "  python -m launch.microbench                                the bars, in about eight minutes\n"
        "  python -m launch.microbench --d 64 --z 16 32 --m 1 10 100 --threads 1\n"
        "                                                             every combination of these, B = 10240\n"
        "  python -m launch.microbench --grid paper --n 4 8 16        Table 2, first three columns\n"
        "  python -m launch.microbench --full --output runs/all       the whole grid: hours\n"
        "  python -m launch.microbench --device cuda --json gpu.json\n\n"
        "A ratio is of medians from the same rounds. Figures of a machine that does something else meanwhile are\n"
        "worth little: look at the quartiles.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--grid", choices=tuple(GRIDS), default="bars", help="default: %(default)s")
    parser.add_argument("--full", action="store_true", help="every size of the grid bars instead of a selection")
    sizes = parser.add_argument_group("sizes of the grid bars, each one or several; every combination is measured")
    sizes.add_argument("--d", type=int, nargs="+", metavar="N", help="embedding_dim (default: 64)")
    sizes.add_argument(
        "--z", type=int, nargs="+", metavar="N", help="block_size; above d, tables flattened (default: 16)"
    )
    sizes.add_argument("--m", type=float, nargs="+", metavar="MB", help="M in 10^6 bytes (default: 10)")
    sizes.add_argument("--batch", type=int, nargs="+", metavar="N", help="samples (default: 10240)")
    sizes.add_argument(
        "--ids-per-bag", type=int, nargs="+", metavar="N", help="1 = exactly one, else mean (default: 1)"
    )
    sizes.add_argument("--ids", nargs="+", metavar="uniform|zipf", help="how ids are drawn (default: uniform)")
    sizes.add_argument("--rows", type=int, default=10_000_000, metavar="N", help="of all full tables together")
    sizes.add_argument("--features", type=int, default=26, metavar="N", help="tables (default: %(default)s)")
    sizes = parser.add_argument_group("sizes of the grid paper")
    sizes.add_argument("--n", type=float, nargs="+", metavar="MILLIONS", help="rows of the table (default: 4 to 256)")
    how = parser.add_argument_group("measuring")
    how.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default: %(default)s")
    how.add_argument("--threads", type=int, nargs="+", metavar="N", help="default: 1 and all cores; paper: all cores")
    how.add_argument("--rounds", type=int, default=9, metavar="N", help="at most, of each size (default: %(default)s)")
    how.add_argument("--seconds", type=float, default=18.0, metavar="S", help="of a size, then no further round begins")
    parser.add_argument("--output", default="runs/microbench", metavar="DIR", help="default: %(default)s")
    parser.add_argument("--json", metavar="FILE", help="results.json also under this name")
    return parser.parse_args(arguments)


def choose_sizes(asked: argparse.Namespace, budget_bytes: float) -> list[KernelSize]:
    """The grid asked for. Raises ValueError for one that cannot be."""
    chosen = {name: value for name in _AXES if (value := getattr(asked, name)) is not None}
    if asked.grid == "paper":
        if chosen or asked.full:
            names = [f"--{name.replace('_', '-')}" for name in chosen] + ["--full"] * asked.full
            raise ValueError(f"{', '.join(names)}: the grid paper is that of the paper, only --n chooses from it")
        rows = PAPER_ROWS if asked.n is None else [round(millions * 1e6) for millions in asked.n]
        return paper_sizes(rows)
    if asked.n is not None:
        raise ValueError("--n is of the grid paper: --rows sets the rows of the full tables")
    axes = Axes()
    if chosen and not asked.full:
        axes = Axes((64,), (16,), (10,), (10_240,), (1,), ("uniform",))
    names = ("embedding_dims", "block_sizes", "memory_mb", "batch_sizes", "ids_per_bag", "ids")
    axes = Axes(
        **vars(axes) | {name: chosen[option] for name, option in zip(names, _AXES, strict=True) if option in chosen}
    )
    dims = axes.embedding_dims if chosen or asked.full else (128,)
    rows = choose_rows(asked.rows, max(dims), budget_bytes, asked.features)
    if not chosen and not asked.full:
        return reduced_sizes(rows, asked.features)
    return axes.sizes(rows, asked.features)


def build_report(
    asked: argparse.Namespace, device: torch.device, sizes: Sequence[KernelSize], heap: bool
) -> KernelReport:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    default = [cores] if asked.grid == "paper" or device.type != "cpu" else sorted({1, cores})
    threads = sorted(set(asked.threads or default))
    settings = KernelSettings(device, threads, asked.rounds, asked.seconds)
    environment = describe_environment(device, 1) | {
        "caches": {name: format_mb(size) for name, size in cache_bytes().items()},
        "threads": threads,
        "freed_memory_is_kept": heap,
        "kernels": "built" if robe_bags.is_available(device.type) else "none: plain PyTorch only",
    }
    del environment["world_size"], environment["threads_per_rank"]
    return KernelReport(GRIDS[asked.grid], settings, environment, _notes(asked, device, sizes, heap))


def _notes(asked: argparse.Namespace, device: torch.device, sizes: Sequence[KernelSize], heap: bool) -> list[str]:
    is_cpu = device.type == "cpu"
    kept = "stays in the heap" if heap else "goes back to the system"
    rows = sizes[0].rows
    fewer = f", fewer than the {asked.rows:,} asked for: they take half of the memory" if rows < asked.rows else ""
    of_rows = "" if asked.grid == "paper" else f"Full tables: {rows:,} rows together{fewer}. "
    return [
        *([f"Freed memory {kept}, for all: an output in fresh pages costs more than the kernels."] * is_cpu),
        f"{of_rows}All full-table lookups share one storage, all forms of ROBE one array M.",
        *(["FBGEMM's CPU wheel (1.8.0) is built without OpenMP: TBE takes one thread at every count."] * is_cpu),
        f"{BATCHES} batches of different ids in turn, made beforehand as KeyedJaggedTensors with their offsets.",
        "The byte bound is of least traffic: parameters that fit the last cache count as being there.",
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints and writes; status 2 for a mistake, 130 where it was interrupted, partial results kept."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    asked = parse_arguments(arguments)
    heap, output = keep_freed_memory(), Path(asked.output)
    try:
        device = choose_device(asked.device)
        budget_bytes = _BUDGET * available_bytes(device)
        sizes = choose_sizes(asked, budget_bytes)
        report = build_report(asked, device, sizes, heap)
        output.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_MISTAKE)
    bench = KernelBench(report, budget_bytes=budget_bytes, cache_bytes=last_cache_bytes(device))
    console = Console(highlight=False, width=_WIDTH)
    started = time.perf_counter()
    try:
        with _progress(len(sizes)) as advance:
            for measured in bench.run(sizes):
                advance()
                _write_json(report, asked)
                if measured:
                    console.print(size_table(report, measured))
        report.status = "finished"
    except KeyboardInterrupt:
        report.status = "interrupted"
    report.environment["minutes"] = round((time.perf_counter() - started) / 60, 1)
    _add_huge_pages(report)
    _write_json(report, asked)
    if report.measurements:
        write_kernel_page(report, output / "index.html")
    print_outcome(report, console)
    print(f"page: {output / 'index.html'}, figures: {output / 'results.json'}", file=sys.stderr)
    if report.status == "interrupted":
        print("interrupted: these are partial results", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


def _add_huge_pages(report: KernelReport) -> None:
    """What the process held of its tables, outputs and gradients, it still holds."""
    share = report.environment["huge_page_share"] = huge_page_share()
    if share is not None and report.settings.device.type == "cpu":
        report.notes.append(
            f"{share:.0%} of the memory is in huge pages, which full tables gain more from than a small array "
            "(THP_MEM_ALLOC_ENABLE=0 turns them off)."
        )


def _write_json(report: KernelReport, asked: argparse.Namespace) -> None:
    text = json.dumps(to_json(report), indent=2, allow_nan=False)
    for path in (Path(asked.output) / "results.json", asked.json and Path(asked.json)):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, text)


@contextmanager
def _progress(sizes: int) -> Iterator:
    """A bar over sizes on stderr; yields what to call after each."""
    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("sizes"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left:"))
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("sizes", total=sizes)
        yield lambda: progress.advance(task)


def size_table(report: KernelReport, measured: Sequence[Measurement]) -> Group:
    """One size: a heading, and a line for each lookup, thread counts one below the other."""
    size, columns = measured[0].size, columns_of(report.grid)
    rows = f"n {size.rows / 1e6:g} M · {size.compression:,.0f}x · " if report.grid.name == "paper" else ""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=0)
    copies = ", ".join(f"{m.copy_gb_per_s:.1f}" for m in measured)
    heading = f"[bold]{rows}{escape(size.label)}[/]  [dim]{measured[0].rounds} rounds, copy {copies} GB/s[/]"
    for column in columns:
        above_below = column.heading.replace(" ", "\n", 1)
        table.add_column(above_below, justify="left" if column.heading in ("lookup", "bars") else "right", no_wrap=True)
    for measurement in measured:
        threads = measurement.threads
        table.add_row(f"[bold]{threads} thread{'s' * (threads > 1)}[/]")
        for row in (row for row in build_rows(report, measured) if row.measurement is measurement):
            cells = [column.cell(row) for column in columns]
            table.add_row(*(_cell(cell.text, cell.detail) for cell in cells))
        table.add_section()
    return Group(heading, table)


def _cell(text: str, detail: str) -> str:
    colour = "[red]" if "✗" in text else ""
    return f"{colour}{escape(text)}" + (f" [dim]{escape(detail)}[/]" if detail else "")


def print_outcome(report: KernelReport, console: Console) -> None:
    for threads, block, lines in paper_blocks(report):
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, title_justify="left", title_style="")
        table.title = f"[bold]{block.title}, ms, {threads} thread{'s' * (threads > 1)}[/]"
        table.add_column("n")
        for n in PAPER_ROWS:
            table.add_column(f"{n // 1_000_000} M", justify="right")
        for label, cells in lines:
            is_paper = label.endswith("paper")
            table.add_row(label, *cells, style="dim" if is_paper else "", end_section=is_paper)
        console.print(table)
    for line in describe_context(report):
        console.print(line, markup=False, soft_wrap=True, style="dim")
    for line in [*describe_missed(report), *describe_outcome(report)]:
        console.print(line, markup=False, soft_wrap=True, style="bold")


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `... | head` is no error
    main()
