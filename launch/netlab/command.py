"""Sharded tables against ROBE over emulated networks: where does each side make the faster step?

Ranks run as hosts, each in a network namespace, with links of chosen rate and delay. Over every network and at every
batch size the same steps are timed, all setups of several ranks in turns in one job: tables sharded table-wise and
row-wise, and ROBE data-parallel at several compressions. ROBE in one process, with the threads of all ranks together,
needs no network: it is timed right before, each time anew, for a machine drifts. This machine's plain loopback is
measured too. Everything over other networks is emulated, and called so.

A cell, one network at one batch size, is kept as soon as it is measured: the same command again measures what is
missing or was measured with other settings. Written are crossover.json and a page, crossover.html. Linux and root.
"""

import argparse
import itertools
import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from configs.load import ConfigError
from configs.schema import Sharding
from launch.cli import EXIT_INTERRUPTED, EXIT_MISTAKE
from launch.netlab.emulated_network import describe_obstacle
from launch.netlab.netlab_cells import Sweep, Task, build_tasks, measure_cell, read_cell, write_cell
from recsys.cost.crossover import CrossoverFile, Link
from recsys.cost.crossover_report import build_page
from recsys.report.page import print_page
from recsys.report.terminal import open_console
from recsys.runs.run_dir import describe_environment, write_atomically

EXIT_FAILED = 1
VERSION = 1
_RATES_MBIT, _DELAYS_US = (100.0, 1000.0, 10_000.0), (50.0, 1000.0)
_NETWORKS = ((10_000, 50), (1000, 50), (1000, 1000), (100, 1000))
_OWN_KEYS = {
    "training.global_batch_size": "--batch",
    "embedding.compression": "--compression",
    "parallelism.sharding": "--sharding",
    "parallelism.world_size": "--hosts",
}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m launch.netlab",
        description=__doc__,
        epilog="examples:\n"
        "  python -m launch.netlab                                    four networks, three batch sizes\n"
        "  python -m launch.netlab --rate-mbit 100,1000,10000 --delay-us 50,1000\n"
        "                                                             every rate with every delay\n"
        "  python -m launch.netlab --network 1000:1000,25:20000 --batch 2048 --compression 1000\n"
        "  python -m launch.netlab --hosts 3 --batch 1536 --output runs/three\n"
        "  python -m launch.netlab model.embedding_dim=64 data.synthetic.scale=0.03\n\n"
        "The network is measured before each cell, and what was found is printed beside what was asked for. Relay and\n"
        "ranks share this machine's cores: at 10 Gbit/s the relay alone can take one of them.\n"
        "Exit status: 1 = a rank failed, 2 = a mistake was found before anything ran, 130 = interrupted.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    networks = parser.add_argument_group("networks; default: 10000:50,1000:50,1000:1000,100:1000")
    networks.add_argument("--rate-mbit", metavar="N,...", help="Mbit/s of a host's link, each way; with every delay")
    networks.add_argument("--delay-us", metavar="N,...", help="one-way µs between hosts; with every rate")
    networks.add_argument("--network", metavar="RATE:DELAY,...", help="these pairs instead")
    networks.add_argument("--hosts", type=int, default=2, metavar="N", help="one rank on each (default: %(default)s)")
    what = parser.add_argument_group("what is measured")
    what.add_argument("--batch", default="512,2048,8192", metavar="N,...", help="global (default: %(default)s)")
    what.add_argument("--compression", default="100,1000,10000", metavar="N,...", help="default: %(default)s")
    what.add_argument("--sharding", default="table_wise,row_wise", metavar="NAME,...", help="default: %(default)s")
    what.add_argument(
        "--config-family", default="configs/demo", metavar="PATH",
        help="directory of sharded.toml, robe.toml and robe_single.toml (default: %(default)s)",
    )  # fmt: skip
    what.add_argument("--rounds", type=int, default=4, metavar="N", help="default: %(default)s")
    what.add_argument("--steps", type=int, default=5, metavar="N", help="of a setup in a round (default: %(default)s)")
    parser.add_argument("--output", default="runs/netlab", metavar="DIR", help="default: %(default)s")
    parser.add_argument("--json", metavar="FILE", help="crossover.json also under this name")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="laid over the config of every setup")
    return parser.parse_args(arguments)


def build_sweep(asked: argparse.Namespace) -> Sweep:
    """Raises ValueError naming the option and the value."""
    for override in asked.overrides:
        if option := _OWN_KEYS.get(override.partition("=")[0].strip()):
            raise ValueError(f"{override}: the sweep sets this itself, use {option}")
    shardings = asked.sharding.split(",")
    for sharding in shardings:
        if sharding not in get_args(Sharding):
            raise ValueError(f"--sharding {sharding}: unknown; known: {', '.join(get_args(Sharding))}")
    for option, least in (("hosts", 2), ("rounds", 1), ("steps", 1)):
        if getattr(asked, option) < least:
            raise ValueError(f"--{option} {getattr(asked, option)}: must be at least {least}")
    return Sweep(
        links=_read_links(asked),
        batch_sizes=[int(n) for n in _read_numbers("--batch", asked.batch, 1, 1 << 24, int)],
        compressions=_read_numbers("--compression", asked.compression, 1, 1e9),
        shardings=shardings,
        family=asked.config_family,
        hosts=asked.hosts,
        rounds=asked.rounds,
        steps=asked.steps,
        overrides=asked.overrides,
    )


def _read_links(asked: argparse.Namespace) -> list[Link]:
    if asked.network is None and asked.rate_mbit is None and asked.delay_us is None:
        return [Link(rate_mbit=rate, delay_us=delay) for rate, delay in _NETWORKS]
    if asked.network is None:
        rates = _read_rates(asked.rate_mbit) if asked.rate_mbit else _RATES_MBIT
        delays = _read_delays(asked.delay_us) if asked.delay_us else _DELAYS_US
        return [Link(rate_mbit=rate, delay_us=delay) for rate, delay in itertools.product(rates, delays)]
    if asked.rate_mbit or asked.delay_us:
        raise ValueError(f"--network {asked.network}: pairs take the place of --rate-mbit and --delay-us")
    links = []
    for pair in asked.network.split(","):
        rate, colon, delay = pair.partition(":")
        if not colon:
            raise ValueError(f"--network {pair}: must look like RATE:DELAY, such as 1000:50")
        (rate_mbit,), (delay_us,) = _read_rates(rate, "--network"), _read_delays(delay, "--network")
        links.append(Link(rate_mbit=rate_mbit, delay_us=delay_us))
    return links


def _read_rates(text: str, option: str = "--rate-mbit") -> list[float]:
    return _read_numbers(option, text, 0.1, 100_000)


def _read_delays(text: str, option: str = "--delay-us") -> list[float]:
    return _read_numbers(option, text, 0, 1e6)


def _read_numbers(
    option: str, text: str, least: float, most: float, kind: Callable[[str], float] = float
) -> list[float]:
    """'1,2' -> [1, 2], each once."""
    numbers = []
    for part in text.split(","):
        try:
            number = kind(part)
        except ValueError:
            raise ValueError(f"{option} {part!r}: not {'a whole' if kind is int else 'a'} number") from None
        if not least <= number <= most:
            raise ValueError(f"{option} {part}: must be from {least:,g} to {most:,g}")
        numbers.append(number)
    return list(dict.fromkeys(numbers))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints and writes. What was measured is kept and shown whatever ends it."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    asked = parse_arguments(arguments)
    output = Path(asked.output)
    try:
        if obstacle := describe_obstacle():
            raise ValueError(obstacle)
        tasks = build_tasks(build_sweep(asked))
        cells = {task: cell for task in tasks if (cell := read_cell(task, output / "cells"))}
        output.mkdir(parents=True, exist_ok=True)
    except (ValueError, ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_MISTAKE)
    if cells:
        print(f"{len(cells)} of {len(tasks)} cells are there already", file=sys.stderr)
    status = 0
    try:
        _measure([task for task in tasks if task not in cells], cells, output / "cells")
    except RuntimeError as error:  # a rank failed, or the network could not be made
        print(f"error: {error}", file=sys.stderr)
        status = EXIT_FAILED
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        status = EXIT_INTERRUPTED
    _write([cells[task] for task in tasks if task in cells], len(tasks), asked)
    sys.exit(status)


def _measure(tasks: Sequence[Task], cells: dict[Task, dict[str, Any]], directory: Path) -> None:
    """Adds the cell of every task as soon as it is measured and kept."""
    with _progress(sum(task.weight for task in tasks)) as (describe, advance):
        for task in tasks:
            describe(task.label)
            cells[task] = measure_cell(task)
            write_cell(task, cells[task], directory)
            advance(task.weight)


@contextmanager
def _progress(total: float) -> Iterator[tuple[Callable[[str], None], Callable[[float], None]]]:
    """A bar on stderr, or a line a cell where that is no terminal; yields what says what is done, and what moves it."""
    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("left:"))
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=total)

        def describe(what: str) -> None:
            progress.update(bar, description=what)
            if not console.is_terminal:
                console.print(what, soft_wrap=True)

        yield describe, lambda weight: progress.advance(bar, weight)


def _write(measured: Sequence[dict[str, Any]], asked_cells: int, asked: argparse.Namespace) -> None:
    environment = describe_environment(torch.device("cpu"), asked.hosts)
    del environment["threads_per_rank"], environment["omp_wait_policy"]  # of this process; those of ranks are in cells
    document = {
        "version": VERSION,
        "status": "finished" if len(measured) == asked_cells else f"{len(measured)} of {asked_cells} cells",
        "environment": environment,
        "cells": [cell for one in measured for cell in one["cells"]],
    }
    output = Path(asked.output)
    for path in (output / "crossover.json", asked.json and Path(asked.json)):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(document, indent=2, allow_nan=False))
    if measured:
        page = build_page(CrossoverFile.model_validate(document))
        page.write(output / "crossover.html")
        print_page(page, open_console())
        print(f"page: {output / 'crossover.html'}, figures: {output / 'crossover.json'}", file=sys.stderr)
