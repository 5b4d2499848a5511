"""Run many configs, several at a time, and go on where an earlier attempt stopped.

A cell is one run. A cell that fails is told, and the rest goes on. The same command again makes what is missing: a
finished run of the same config is taken as it is, one with checkpoints goes on from the newest. Runs are made on this
machine, those of one rank in processes that stay and those of several as torchx jobs; or, with --scheduler, all as
torchx jobs on a cluster.
"""

import argparse
import contextlib
import itertools
import re
import signal
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.load import ConfigError, dump_config, flatten, run_name
from configs.schema import RunConfig
from launch.cli import EXIT_INTERRUPTED, EXIT_MISTAKE
from launch.runners.cells import Cell, Runs, find_log, run_dir_of
from launch.runners.local_runs import Jobs, LocalRuns, count_jobs
from launch.runners.torchx_runs import LOCAL, TorchxRuns
from recsys.runs.run_dir import RunDir
from recsys.train.registry import CHOICES

EXIT_FAILURES = 1
_AT_A_TIME = 1000
"""Jobs that a cluster is given at once: its own queue decides which run."""
_NO_MATTER = ("run.dir", "run.overwrite", "data.cache_dir", "checkpoint.", "logging.")
"""Keys, and beginnings of keys, that do not change what a run measures."""


@dataclass(frozen=True)
class Outcome:
    """error: None where run_dir holds a finished run. seconds: None where it did before."""

    cell: Cell
    run_dir: RunDir
    error: str | None
    seconds: float | None


def run_cells(cells: Sequence[Cell], runs: Runs, title: str = "runs") -> list[Outcome]:
    """Makes the runs that are missing; outcomes in the order of the cells.

    Raises ConfigError before anything is run: for a mistake in a config, a finished run of another config under a
    cell's name, and two cells of one name.
    """
    configs = [cell.load() for cell in cells]
    _check_apart(cells, configs)
    missing = [index for index, config in enumerate(configs) if not _is_done(config)]
    if there := len(cells) - len(missing):
        print(f"{title}: {there} of {len(cells)} are there already", file=sys.stderr)
    found = dict(zip(missing, runs.run([cells[i] for i in missing], title), strict=True))
    return [
        Outcome(cell, run_dir_of(config), *(found.get(index) or (None, None)))
        for index, (cell, config) in enumerate(zip(cells, configs, strict=True))
    ]


def _check_apart(cells: Sequence[Cell], configs: Sequence[RunConfig]) -> None:
    seen: dict[Path, Cell] = {}
    for cell, config in zip(cells, configs, strict=True):
        other = seen.setdefault(path := run_dir_of(config).path.resolve(), cell)
        if other is not cell:
            raise ConfigError(f"two runs would be made in {path}: {other} and {cell}")


def _is_done(config: RunConfig) -> bool:
    run_dir = run_dir_of(config)
    if not run_dir.exists() or run_dir.read_summary().status != "finished":
        return False
    there, here = flatten(run_dir.read_config()), flatten(tomllib.loads(dump_config(config, CHOICES)))
    differences = [
        f"  {key}: {there.get(key)!r} there, {here.get(key)!r} asked for"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key) and not key.startswith(_NO_MATTER)
    ]
    if differences and not config.run.overwrite:
        raise ConfigError(
            "\n".join([f"{run_dir.path} holds a finished run of another config:", *differences])
            + "\nset another run.dir, remove that run, or set run.overwrite=true"
        )
    return not differences


def build_cells(
    configs: Sequence[str], overrides: Sequence[str], swept: Sequence[str], seeds: Sequence[int]
) -> list[Cell]:
    """Every config with every combination of the swept values ("section.key=A,B") and every seed."""
    axes = [_parse_swept(text) for text in swept]
    last = [key.rpartition(".")[2] for key, _ in axes]
    short = [name if last.count(name) == 1 else key for name, (key, _) in zip(last, axes, strict=True)]
    cells = []
    for config, values, seed in itertools.product(configs, itertools.product(*(v for _, v in axes)), seeds):
        settings = [f"{key}={value}" for (key, _), value in zip(axes, values, strict=True)]
        named = [f"{name}{_plain(value)}" for name, value in zip(short, values, strict=True)]
        name = "_".join([run_name(config), *named, f"s{seed}"])
        cells.append(Cell(config, (*overrides, *settings, f"run.seed={seed}"), name))
    return cells


def _parse_swept(text: str) -> tuple[str, list[str]]:
    """'a.b=1e9,[2,3]' -> ('a.b', ['1e9', '[2,3]']): commas within brackets do not part values."""
    key, equals, values = text.partition("=")
    if not equals or not values:
        raise ConfigError(f"--set {text}: must look like section.key=A,B")
    return key.strip(), re.findall(r"(?:\[[^\]]*\]|[^,\[\]])+", values)


def _plain(value: str) -> str:
    return re.sub(r"[^\w.]+", "-", value).strip("-")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m launch.sweep",
        description=__doc__,
        epilog="examples:\n"
        "  python -m launch.sweep configs/debug.toml --seeds 0 1 2\n"
        "  python -m launch.sweep configs/debug.toml training.epochs=0.5 --set embedding.compression=10,100\n"
        "  python -m launch.sweep configs/debug.toml configs/demo/base.toml --seeds 0 1 2 \\\n"
        "      --set embedding.compression=10,100 --set optimizer.embedding_learning_rate=1,3,10\n"
        "  python -m launch.sweep configs/criteo_kaggle/robe.toml --seeds 0 1 2 --scheduler slurm \\\n"
        "      --ranks-per-node 8 --job gpu=8 --job memMB=64000\n\n"
        "Every config runs with every combination of values and seeds; a run is called <config>_<key><value>_s<seed>,\n"
        "such as debug_compression10_s0, and lies in run.dir. The keys of a config: python -m launch.train --help.\n"
        "Exit status: 1 = some runs failed, 2 = a mistake was found before any was made, 130 = interrupted.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "items",
        nargs="+",
        metavar="config.toml | section.key=value",
        help="config files, and values laid over all of them",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="section.key=A,B", help="values to sweep; may be given repeatedly"
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0], metavar="N", help="values of run.seed (default: 0)"
    )
    add_runs_options(parser)
    return parser.parse_intermixed_args(arguments)


def add_runs_options(parser: argparse.ArgumentParser) -> None:
    """Where runs are made, and how many at a time: what `open_runs` takes."""
    group = parser.add_argument_group("where runs are made")
    group.add_argument(
        "--jobs", type=int, metavar="N", help="at a time (default: what the cores hold; on a cluster, what it takes)"
    )
    group.add_argument(
        "--scheduler",
        metavar="NAME",
        help="every run is a torchx job there: slurm, kubernetes, ... or local_cwd; its options: .torchxconfig",
    )
    group.add_argument(
        "--ranks-per-node", type=int, metavar="N", help="of jobs with --scheduler (default: all on one node)"
    )
    group.add_argument(
        "--job",
        action="append",
        default=[],
        metavar="OPTION=VALUE",
        help="option of the component with --scheduler, such as memMB=64000 or gpu=8; may be given repeatedly",
    )


def runs_here(asked: argparse.Namespace) -> bool:
    """Whether the runs are made on this machine."""
    return asked.scheduler in (None, LOCAL)


def open_runs(asked: argparse.Namespace, jobs: Jobs) -> contextlib.AbstractContextManager[Runs]:
    """What makes the runs, as the options say. jobs: on this machine. Raises ConfigError."""
    if asked.scheduler is None:
        if asked.job or asked.ranks_per_node is not None:
            raise ConfigError("--job and --ranks-per-node are for jobs: they need --scheduler")
        return LocalRuns(jobs)
    options = dict(item.split("=", 1) for item in asked.job if "=" in item)
    if wrong := [item for item in asked.job if "=" not in item]:
        raise ConfigError(f"--job {wrong[0]}: must look like option=value")
    at_a_time = asked.jobs or (jobs.several if asked.scheduler == LOCAL else _AT_A_TIME)
    return contextlib.nullcontext(TorchxRuns(at_a_time, asked.scheduler, asked.ranks_per_node, options))


def print_failures(outcomes: Sequence[Outcome]) -> int:
    """Lists what failed and where its log is; returns how many."""
    failed = [outcome for outcome in outcomes if outcome.error]
    for outcome in failed:
        print(f"failed: {outcome.cell.name}: {outcome.error}\n  log: {find_log(outcome.run_dir)}", file=sys.stderr)
    return len(failed)


def main(arguments: Sequence[str] | None = None) -> None:
    asked = parse_arguments(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    configs = [item for item in asked.items if "=" not in item]
    overrides = [item for item in asked.items if "=" in item]
    try:
        if not configs:
            raise ConfigError("no config file is given")
        cells = build_cells(configs, overrides, asked.set, asked.seeds)
        with open_runs(asked, count_jobs([cell.load() for cell in cells], asked.jobs)) as runs:
            outcomes = run_cells(cells, runs)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(EXIT_MISTAKE)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    failed = print_failures(outcomes)
    print(f"{len(outcomes) - failed} of {len(outcomes)} runs are finished")
    patterns = {f"{outcome.run_dir.path.parent / run_name(outcome.cell.config)}_*": None for outcome in outcomes}
    print(f"compare: python -m launch.compare {' '.join(patterns)}")
    sys.exit(EXIT_FAILURES if failed else 0)


if __name__ == "__main__":
    main()
