"""A sweep over networks, from the options of its command to what is printed and written."""

import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from configs.schema import Sharding
from launch.netlab.trials import Sweep, Trial, measure_trial, save_trial
from recsys.cost.crossover import CrossoverFile, Link
from recsys.cost.crossover_report import build_page
from recsys.report.page import Page
from recsys.runs.environment import describe_environment
from recsys.runs.run_directory import write_atomically

VERSION = 1
_RATES_MBIT, _DELAYS_US = (100.0, 1000.0, 10_000.0), (50.0, 1000.0)
_NETWORKS = ((10_000, 50), (1000, 50), (1000, 1000), (100, 1000))
_OWN_KEYS = {
    "training.global_batch_size": "--batch",
    "embedding.compression": "--compression",
    "parallelism.sharding": "--sharding",
    "parallelism.world_size": "--hosts",
}


def build_sweep(
    *,
    links: Sequence[Link],
    batch_sizes: Sequence[int],
    compressions: Sequence[float],
    shardings: Sequence[str],
    overrides: Sequence[str],
    **settings: Any,
) -> Sweep:
    """Return what is measured, of all checked options. Raises ValueError naming the option and the value."""
    for text in overrides:
        if option := _OWN_KEYS.get(text.partition("=")[0].strip()):
            raise ValueError(f"{text}: the sweep sets this itself, use {option}")
    for sharding in shardings:
        if sharding not in get_args(Sharding):
            raise ValueError(f"--sharding {sharding}: unknown; known: {', '.join(get_args(Sharding))}")
    return Sweep(
        links=list(links),
        batch_sizes=list(batch_sizes),
        compressions=list(compressions),
        shardings=list(shardings),
        overrides=list(overrides),
        **settings,
    )


def choose_links(
    rates_mbit: Sequence[float] | None,
    delays_us: Sequence[float] | None,
    pairs: Sequence[tuple[float, float]] | None,
) -> list[Link]:
    """Return the pairs, or every rate with every delay, or the default networks where nothing is chosen."""
    if pairs:
        if rates_mbit or delays_us:
            raise ValueError("--network: pairs take the place of --rate-mbit and --delay-us")
    elif rates_mbit or delays_us:
        pairs = list(itertools.product(rates_mbit or _RATES_MBIT, delays_us or _DELAYS_US))
    return [Link(rate_mbit=rate, delay_us=delay) for rate, delay in pairs or _NETWORKS]


def measure_trials(trials: Sequence[Trial], measured: dict[Trial, dict[str, Any]], directory: Path) -> None:
    """Measure trials, each added to `measured` and kept in the directory as soon as it is there."""
    with _progress(sum(trial.weight for trial in trials)) as (describe, advance):
        for trial in trials:
            describe(trial.label)
            measured[trial] = measure_trial(trial)
            save_trial(trial, measured[trial], directory)
            advance(trial.weight)


@contextmanager
def _progress(total: float) -> Iterator[tuple[Callable[[str], None], Callable[[float], None]]]:
    """Show a bar on stderr, or lines where that is no terminal; yield what names the trial, and what moves the bar."""
    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("left:"))
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=total)

        def describe(what: str) -> None:
            """Show what is measured now."""
            progress.update(bar, description=what)
            if not console.is_terminal:
                console.print(what, soft_wrap=True)

        yield describe, lambda weight: progress.advance(bar, weight)


def write_crossover(
    measured: Sequence[dict[str, Any]], num_trials: int, hosts: int, output: Path
) -> tuple[dict[str, Any], Page | None]:
    """Write crossover.json and, where a trial was measured, the page; return the document and the page."""
    environment = describe_environment(torch.device("cpu"), hosts)
    del environment["threads_per_rank"], environment["omp_wait_policy"]  # of this process; those of ranks are in trials
    document = {
        "version": VERSION,
        "status": "finished" if len(measured) == num_trials else f"{len(measured)} of {num_trials} trials",
        "environment": environment,
        "cells": [trial for pair in measured for trial in pair["cells"]],
    }
    write_atomically(output / "crossover.json", json.dumps(document, indent=2, allow_nan=False))
    if not measured:
        return document, None
    page = build_page(CrossoverFile.model_validate(document))
    page.write(output / "crossover.html")
    print(f"page: {output / 'crossover.html'}, figures: {output / 'crossover.json'}", file=sys.stderr)
    return document, page
