"""Sharded tables against ROBE over emulated networks: where does each side make the faster step?

Ranks run as hosts, each in a network namespace, with links of chosen rate and delay. Over every network and at every
batch size the same steps are timed, all arms of several ranks interleaved in one job: tables sharded table-wise and
row-wise, and ROBE data-parallel at several compressions. ROBE in one process, with the threads of all ranks together,
needs no network: it is timed right before, each time anew, for a machine drifts. This machine's plain loopback is
measured too. Everything over other networks is emulated, and called so.

A trial, one network at one batch size, is kept as soon as it is measured: the same command again measures what is
missing or was measured with other settings. Written are crossover.json and a page, crossover.html. Linux and root.
"""

import json
import sys
from pathlib import Path
from typing import Any

import click

from launch import cli

_POSITIVE = click.IntRange(min=1)


class Network(click.ParamType):
    """Parse RATE:DELAY, the Mbit/s and the one-way µs of a link."""

    name = "RATE:DELAY"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, float]:
        """Return rate and delay as numbers; fail where one is missing or out of bounds."""
        rate, colon, delay = value.partition(":")
        if not colon:
            self.fail(f"{value}: must look like RATE:DELAY, such as 1000:50", param, ctx)
        return RATE.convert(rate, param, ctx), DELAY.convert(delay, param, ctx)


RATE, DELAY = cli.FiniteFloat(0.1, 100_000), cli.FiniteFloat(0, 1e6)


@cli.command(
    "netlab",
    __doc__,
    summary="Sharding against ROBE over emulated networks; root, Linux.",
    when_interrupted=cli.GOES_ON,
    examples=[
        "# four networks, three batch sizes",
        "--rate-mbit 100,1000,10000 --delay-us 50,1000  # every rate with every delay",
        "--network 1000:1000,25:20000 --batch 2048 --compression 1000",
        "--hosts 3 --batch 1536 --output runs/three",
        "model.embedding_dim=64 data.synthetic.scale=0.03",
    ],
    notes="The network is measured before each trial, and printed beside what was requested. Relay "
    "and ranks share this machine's cores: at 10 Gbit/s the relay alone can take one of them.",
)
@click.option(
    "--rate-mbit", "rates_mbit", type=cli.CommaList(RATE), help="Mbit/s of a host's link, each way; with every delay."
)
@click.option("--delay-us", "delays_us", type=cli.CommaList(DELAY), help="One-way µs between hosts; with every rate.")
@click.option(
    "--network",
    "pairs",
    type=cli.CommaList(Network(), "RATE:DELAY"),
    help="These pairs instead (default: 10000:50,1000:50,1000:1000,100:1000).",
)
@click.option("--hosts", type=click.IntRange(min=2), default=2, metavar="N", help="Hosts, one rank on each.")
@click.option(
    "--batch",
    "batch_sizes",
    type=cli.CommaList(click.IntRange(1, 1 << 24)),
    default="512,2048,8192",
    help="Global batch sizes.",
)
@click.option(
    "--compression",
    "compressions",
    type=cli.CommaList(cli.FiniteFloat(1, 1e9)),
    default="100,1000,10000",
    help="Compressions of ROBE.",
)
@click.option(
    "--sharding", "shardings", type=cli.CommaList(str, "NAME"), default="table_wise,row_wise", help="Of full tables."
)
@click.option(
    "--config-family",
    "family",
    default="configs/demo",
    metavar="PATH",
    help="Directory of sharded.toml, robe.toml and robe_single.toml.",
)
@click.option("--rounds", type=_POSITIVE, default=4, metavar="N", help="Rounds of a trial.")
@click.option("--steps", type=_POSITIVE, default=5, metavar="N", help="Steps of an arm in a round.")
@cli.json_option("Print the figures as JSON instead of the tables.")
@cli.output_option("runs/netlab", "Directory of trials, crossover.json and the page, crossover.html.")
@cli.overrides_argument()
def main(as_json: bool, output: Path, rates_mbit: Any, delays_us: Any, pairs: Any, **options: Any) -> int | None:
    """Measure, print and write. What was measured is kept and shown whatever ends it."""
    from launch.netlab import crossover_run
    from launch.netlab.emulated_network import describe_obstacle
    from launch.netlab.trials import build_trials, load_trial
    from recsys.report.page import print_page
    from recsys.report.terminal import open_console

    if obstacle := describe_obstacle():
        raise cli.Mistake(obstacle)
    with cli.mistakes(ValueError, OSError):
        links = crossover_run.choose_links(rates_mbit, delays_us, pairs)
        trials = build_trials(crossover_run.build_sweep(links=links, **options))
        measured = {trial: kept for trial in trials if (kept := load_trial(trial, output / "trials"))}
        output.mkdir(parents=True, exist_ok=True)
    if measured:
        print(f"{len(measured)} of {len(trials)} trials are there already", file=sys.stderr)
    try:
        with cli.failures(RuntimeError):  # a rank failed, or the network could not be started
            missing = [trial for trial in trials if trial not in measured]
            crossover_run.measure_trials(missing, measured, output / "trials")
    finally:
        in_order = [measured[trial] for trial in trials if trial in measured]
        document, page = crossover_run.write_crossover(in_order, len(trials), options["hosts"], output)
        if as_json:
            print(json.dumps(document, indent=2, allow_nan=False))
        elif page:
            print_page(page, open_console())
    return None


if __name__ == "__main__":
    main()
