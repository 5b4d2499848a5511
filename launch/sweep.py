"""Run many configs, several at a time, and go on where an earlier attempt stopped.

A run that fails is reported, and the rest goes on. The same command again makes what is missing: a finished run of the
same config is taken as it is, one with checkpoints goes on from the newest. Runs are made on this machine, those of one
rank in processes that stay and those of several as torchx jobs; or, with --scheduler, all as torchx jobs on a cluster.

Every config runs with every combination of values and seeds. A run is called <config>_<key><value>_s<seed>, such as
debug_compression10_s0, and lies in run.dir. `pss-bench train --keys` lists the keys.
"""

from typing import Any

import click

from launch import cli


@cli.command(
    "sweep",
    __doc__,
    summary="Train many configs, several at a time, resumable.",
    when_interrupted=cli.GOES_ON,
    examples=[
        "configs/debug.toml --seeds 0,1,2",
        "configs/debug.toml training.epochs=0.5 --set embedding.compression=10,100",
        "configs/demo/robe.toml --seeds 0,1 --set embedding.compression=10,100 --set model.embedding_dim=16,32",
        "configs/criteo_kaggle/robe.toml --scheduler slurm --ranks-per-node 8 --job gpu=8 --job memMB=64000",
    ],
    notes="Exit status: 1 = some runs failed, 2 = a mistake was found before any was made, 130 = interrupted.",
)
@cli.items_argument("config.toml", required=True)
@click.option(
    "--set", "swept", multiple=True, metavar="section.key=A,B", help="Values to sweep; may be given repeatedly."
)
@cli.seeds_option()
@cli.runner_options
def main(items: tuple[str, ...], swept: tuple[str, ...], seeds: tuple[int, ...], runner: dict[str, Any]) -> int:
    """Make the runs that are missing, and list those that failed."""
    from configs.load import run_name
    from launch.runners.grid import build_trials
    from launch.runners.local import RunnerOptions, count_jobs
    from launch.runners.trial import print_failures, run_trials

    configs, overrides = cli.split_items(items)
    if not configs:
        raise cli.Mistake("no config file is given")
    options = RunnerOptions(**runner)
    with cli.mistakes():
        trials = build_trials(configs, overrides, swept, seeds)
        jobs = count_jobs([trial.load() for trial in trials], options.jobs)
        with options.open(jobs) as opened:
            outcomes = run_trials(trials, opened)
    failed = print_failures(outcomes)
    print(f"{len(outcomes) - failed} of {len(outcomes)} runs are finished")
    patterns = {f"{outcome.run_dir.path.parent / run_name(outcome.trial.config)}_*": None for outcome in outcomes}
    print(f"compare: pss-bench compare {' '.join(patterns)}")
    return cli.EXIT_FAILED if failed else 0


if __name__ == "__main__":
    main()
