"""Run many configs, several at a time, and go on where an earlier attempt stopped.

A run that fails is reported, and the rest goes on. The same command again makes what is missing: a finished run of the
same config is taken as it is, one with checkpoints goes on from the newest. Runs are made on this machine, those of one
rank in processes that stay and those of several as torchx jobs; or, with --scheduler, all as torchx jobs on a cluster.
"""

import argparse
import itertools
import re
import signal
import sys
from collections.abc import Sequence

from configs.load import ConfigError, run_name
from launch.cli import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_MISTAKE
from launch.runners.local import RunnerOptions, count_jobs
from launch.runners.trial import Trial, print_failures, run_trials


def build_trials(
    configs: Sequence[str], overrides: Sequence[str], swept: Sequence[str], seeds: Sequence[int]
) -> list[Trial]:
    """Return every config with every combination of the swept values ("section.key=A,B") and every seed."""
    axes = [_parse_swept(text) for text in swept]
    last = [key.rpartition(".")[2] for key, _ in axes]
    short = [name if last.count(name) == 1 else key for name, (key, _) in zip(last, axes, strict=True)]
    trials = []
    for config, values, seed in itertools.product(configs, itertools.product(*(v for _, v in axes)), seeds):
        settings = [f"{key}={value}" for (key, _), value in zip(axes, values, strict=True)]
        named = [f"{name}{_plain(value)}" for name, value in zip(short, values, strict=True)]
        name = "_".join([run_name(config), *named, f"s{seed}"])
        trials.append(Trial(config, (*overrides, *settings, f"run.seed={seed}"), name))
    return trials


def _parse_swept(text: str) -> tuple[str, list[str]]:
    """Return 'a.b=1e9,[2,3]' as ('a.b', ['1e9', '[2,3]']): commas within brackets do not part values."""
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
    add_runner_options(parser)
    return parser.parse_intermixed_args(arguments)


def add_runner_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where runs are made, and how many at a time."""
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


def read_runner_options(asked: argparse.Namespace) -> RunnerOptions:
    """Return what `add_runner_options` read."""
    return RunnerOptions(asked.jobs, asked.scheduler, asked.ranks_per_node, asked.job)


def main(arguments: Sequence[str] | None = None) -> None:
    asked = parse_arguments(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    configs = [item for item in asked.items if "=" not in item]
    overrides = [item for item in asked.items if "=" in item]
    try:
        if not configs:
            raise ConfigError("no config file is given")
        trials = build_trials(configs, overrides, asked.set, asked.seeds)
        jobs = count_jobs([trial.load() for trial in trials], asked.jobs)
        with read_runner_options(asked).open(jobs) as runner:
            outcomes = run_trials(trials, runner)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(EXIT_MISTAKE)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    failed = print_failures(outcomes)
    print(f"{len(outcomes) - failed} of {len(outcomes)} runs are finished")
    patterns = {f"{outcome.run_dir.path.parent / run_name(outcome.trial.config)}_*": None for outcome in outcomes}
    print(f"compare: python -m launch.compare {' '.join(patterns)}")
    sys.exit(EXIT_FAILED if failed else 0)


if __name__ == "__main__":
    main()
