"""The benchmark of kernels, from a request to what is printed and written."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pss.kernels import robe_bags
from recsys.bench.kernel_bench import GRIDS, KernelBench, KernelReport, choose_rows, to_json
from recsys.bench.kernel_report import (
    build_paper_tables,
    build_size_tables,
    describe_context,
    describe_ratios,
    write_kernel_page,
)
from recsys.bench.kernel_sizes import PAPER_ROWS, Axes, KernelSize, format_mb, paper_sizes, reduced_sizes
from recsys.bench.kernel_timing import BATCHES, KernelSettings
from recsys.runs.environment import (
    available_bytes,
    cache_bytes,
    count_cores,
    describe_environment,
    huge_page_share,
    last_cache_bytes,
)
from recsys.runs.ranks import choose_device
from recsys.runs.run_directory import write_atomically
from recsys.train.heap import keep_freed_memory

_WIDTH = 120
_BUDGET = 0.85
"""Share of the available memory that tables, arrays and temporaries may take."""
AXES = ("d", "z", "m", "batch", "ids_per_bag", "ids")


@dataclass(frozen=True, kw_only=True)
class KernelRequest:
    """Hold what to measure, and how: the options of `launch.microbench` by their names; None = its own default."""

    grid: str
    full: bool
    d: Sequence[int] | None
    z: Sequence[int] | None
    m: Sequence[float] | None
    batch: Sequence[int] | None
    ids_per_bag: Sequence[int] | None
    ids: Sequence[str] | None
    rows: int
    features: int
    n: Sequence[float] | None
    device: str
    threads: Sequence[int] | None
    rounds: int
    seconds: float


def choose_sizes(request: KernelRequest, budget_bytes: float) -> list[KernelSize]:
    """Return the sizes that the options choose.

    Raises ValueError for options of the other grid and for sizes that cannot be.
    """
    chosen = {name: value for name in AXES if (value := getattr(request, name)) is not None}
    if request.grid == "paper":
        if chosen or request.full:
            names = [f"--{name.replace('_', '-')}" for name in chosen] + ["--full"] * request.full
            raise ValueError(f"{', '.join(names)}: the grid paper is that of the paper, only --n chooses from it")
        rows = PAPER_ROWS if request.n is None else [round(millions * 1e6) for millions in request.n]
        return paper_sizes(rows)
    if request.n is not None:
        raise ValueError("--n is of the grid paper: --rows sets the rows of the full tables")
    axes = Axes()
    if chosen and not request.full:
        axes = Axes((64,), (16,), (10,), (10_240,), (1,), ("uniform",))
    names = ("embedding_dims", "block_sizes", "memory_mb", "batch_sizes", "ids_per_bag", "ids")
    axes = Axes(
        **vars(axes) | {name: chosen[option] for name, option in zip(names, AXES, strict=True) if option in chosen}
    )
    dims = axes.embedding_dims if chosen or request.full else (128,)
    rows = choose_rows(request.rows, max(dims), budget_bytes, request.features)
    if not chosen and not request.full:
        return reduced_sizes(rows, request.features)
    return axes.sizes(rows, request.features)


def build_report(request: KernelRequest, device: torch.device, sizes: Sequence[KernelSize], heap: bool) -> KernelReport:
    """Return a report without measurements, with the settings and environment of this process.

    heap: whether freed memory stays with the process. Raises ValueError for impossible threads or rounds.
    """
    cores = count_cores()
    default = [cores] if request.grid == "paper" or device.type != "cpu" else sorted({1, cores})
    threads = sorted(set(request.threads or default))
    settings = KernelSettings(device, threads, request.rounds, request.seconds)
    environment = describe_environment(device, 1) | {
        "caches": {name: format_mb(size) for name, size in cache_bytes().items()},
        "threads": threads,
        "freed_memory_is_kept": heap,
        "kernels": "built" if robe_bags.is_available(device.type) else "none: plain PyTorch only",
    }
    del environment["world_size"], environment["threads_per_rank"]
    return KernelReport(GRIDS[request.grid], settings, environment, _notes(request, device, sizes, heap))


def _notes(request: KernelRequest, device: torch.device, sizes: Sequence[KernelSize], heap: bool) -> list[str]:
    is_cpu = device.type == "cpu"
    kept = "stays in the heap" if heap else "goes back to the system"
    rows = sizes[0].rows
    fewer = f", fewer than the {request.rows:,} asked for: they take half of the memory" if rows < request.rows else ""
    of_rows = "" if request.grid == "paper" else f"Full tables: {rows:,} rows together{fewer}. "
    return [
        *([f"Freed memory {kept}, for all: an output in fresh pages costs more than the kernels."] * is_cpu),
        f"{of_rows}All full-table lookups share one storage, all forms of ROBE one array M.",
        *(["FBGEMM's CPU wheel (1.8.0) is built without OpenMP: TBE takes one thread at every count."] * is_cpu),
        f"{BATCHES} batches of different ids in turn, made beforehand as KeyedJaggedTensors with their offsets.",
        "The byte bound is of least traffic: parameters that fit the last cache count as being there.",
    ]


class KernelRun:
    """Run the benchmark once, into a directory. Raises ValueError and OSError for what cannot be."""

    def __init__(self, request: KernelRequest, output: Path) -> None:
        heap, self.output = keep_freed_memory(), output
        device = choose_device(request.device)
        budget_bytes = _BUDGET * available_bytes(device)
        self.sizes = choose_sizes(request, budget_bytes)
        self.report = build_report(request, device, self.sizes, heap)
        self.bench = KernelBench(self.report, budget_bytes=budget_bytes, cache_bytes=last_cache_bytes(device))
        output.mkdir(parents=True, exist_ok=True)

    def run(self, console: Console) -> None:
        """Measure every size, print it and keep it; an interruption ends this with what there is."""
        started = time.perf_counter()
        try:
            with _progress(len(self.sizes)) as advance:
                for measured in self.bench.run(self.sizes):
                    advance()
                    self._write_json()
                    for table in build_size_tables(self.report, measured):
                        console.print(table)
            self.report.status = "finished"
        except KeyboardInterrupt:
            self.report.status = "interrupted"
        self.report.environment["minutes"] = round((time.perf_counter() - started) / 60, 1)
        _add_huge_pages(self.report)
        self._write_json()
        if self.report.measurements:
            write_kernel_page(self.report, self.output / "index.html")
        print_outcome(self.report, console)

    def format_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps(to_json(self.report), indent=2, allow_nan=False)

    def _write_json(self) -> None:
        write_atomically(self.output / "results.json", self.format_json())


def open_console(quiet: bool) -> Console:
    """Return where tables are printed: stdout, or nowhere."""
    return Console(highlight=False, width=_WIDTH, quiet=quiet)


def _add_huge_pages(report: KernelReport) -> None:
    """Add the share of memory in huge pages: the process still holds its tables, outputs and gradients."""
    share = report.environment["huge_page_share"] = huge_page_share()
    if share is not None and report.settings.device.type == "cpu":
        report.notes.append(
            f"{share:.0%} of the memory is in huge pages, which full tables gain more from than a small array "
            "(THP_MEM_ALLOC_ENABLE=0 turns them off)."
        )


@contextmanager
def _progress(sizes: int) -> Iterator:
    """Show the progress over sizes on stderr, and yield what to call after each."""
    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("sizes"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left:"))
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("sizes", total=sizes)
        yield lambda: progress.advance(task)


def print_outcome(report: KernelReport, console: Console) -> None:
    """Print Table 2 where it was measured, how to read the figures, and the ratios in words."""
    for table in build_paper_tables(report):
        console.print(table)
    for line in describe_context(report):
        console.print(line, markup=False, soft_wrap=True, style="dim")
    for line in describe_ratios(report):
        console.print(line, markup=False, soft_wrap=True, style="bold")
