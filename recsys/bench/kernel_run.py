"""The benchmark of kernels from what is asked for to what is printed and written."""

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pss.kernels import robe_bags
from recsys.bench.kernel_bench import GRIDS, KernelBench, KernelReport, KernelSettings, choose_rows, to_json
from recsys.bench.kernel_report import (
    build_paper_tables,
    build_size_tables,
    describe_context,
    describe_ratios,
    write_kernel_page,
)
from recsys.bench.kernel_sizes import PAPER_ROWS, Axes, KernelSize, format_mb, paper_sizes, reduced_sizes
from recsys.bench.kernel_timing import BATCHES
from recsys.runs.environment import (
    available_bytes,
    cache_bytes,
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
    """What is measured, and how: the options of `launch.microbench` by their names; None = its own default."""

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


def choose_sizes(asked: KernelRequest, budget_bytes: float) -> list[KernelSize]:
    """The grid asked for. Raises ValueError for one that cannot be."""
    chosen = {name: value for name in AXES if (value := getattr(asked, name)) is not None}
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
        **vars(axes) | {name: chosen[option] for name, option in zip(names, AXES, strict=True) if option in chosen}
    )
    dims = axes.embedding_dims if chosen or asked.full else (128,)
    rows = choose_rows(asked.rows, max(dims), budget_bytes, asked.features)
    if not chosen and not asked.full:
        return reduced_sizes(rows, asked.features)
    return axes.sizes(rows, asked.features)


def build_report(asked: KernelRequest, device: torch.device, sizes: Sequence[KernelSize], heap: bool) -> KernelReport:
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


def _notes(asked: KernelRequest, device: torch.device, sizes: Sequence[KernelSize], heap: bool) -> list[str]:
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


class KernelRun:
    """One run of the benchmark into a directory. Raises ValueError and OSError for what cannot be."""

    def __init__(self, asked: KernelRequest, output: Path) -> None:
        heap, self.output = keep_freed_memory(), output
        device = choose_device(asked.device)
        budget_bytes = _BUDGET * available_bytes(device)
        self.sizes = choose_sizes(asked, budget_bytes)
        self.report = build_report(asked, device, self.sizes, heap)
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
        return json.dumps(to_json(self.report), indent=2, allow_nan=False)

    def _write_json(self) -> None:
        write_atomically(self.output / "results.json", self.format_json())


def open_console(quiet: bool) -> Console:
    """Return where tables are printed: stdout, or nowhere."""
    return Console(highlight=False, width=_WIDTH, quiet=quiet)


def _add_huge_pages(report: KernelReport) -> None:
    """What the process held of its tables, outputs and gradients, it still holds."""
    share = report.environment["huge_page_share"] = huge_page_share()
    if share is not None and report.settings.device.type == "cpu":
        report.notes.append(
            f"{share:.0%} of the memory is in huge pages, which full tables gain more from than a small array "
            "(THP_MEM_ALLOC_ENABLE=0 turns them off)."
        )


@contextmanager
def _progress(sizes: int) -> Iterator:
    """A bar over sizes on stderr; yields what to call after each."""
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
