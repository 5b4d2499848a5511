"""Figure 2 of the PSS paper on this machine: what a step takes sharded, and with ROBE.

`a`: inference of batches of 16,384, by phase: full tables sharded over two ranks, ROBE data-parallel, ROBE in one
process. `b`: training at a batch of 2,048 over compression, dense and sparse gradients. Jobs of different ranks are
interleaved, setups of one job too. Writes <output>/results.json and index.html, and prints the table.
"""

import json
from pathlib import Path
from typing import Literal

import click

from launch import cli

_WIDTH = 190


@cli.command(
    "bench figure2",
    __doc__,
    summary="Measure Figure 2 of the PSS paper on this machine.",
    examples=[
        "a",
        "b --compression 10,100,1000,10000",
        "b model.embedding_dim=64 data.synthetic.scale=0.5",
    ],
)
@click.argument("part", type=click.Choice(["a", "b"]))
@cli.overrides_argument()
@click.option(
    "--batch", type=click.IntRange(min=1), metavar="N", help="Rows of a step, all ranks (default: the paper's)."
)
@click.option(
    "--compression",
    "compressions",
    type=cli.CommaList(cli.FiniteFloat(1)),
    help="Compressions of ROBE (default: 1000 of a, 10 to 10000 of b).",
)
@click.option("--family", default="demo", metavar="NAME", help="configs/<family>/sharded.toml, robe.toml and so on.")
@click.option("--repeats", type=click.IntRange(min=1), default=3, metavar="N", help="Repeats of every job.")
@click.option("--steps", type=click.IntRange(min=1), default=10, metavar="N", help="Steps of every setup in a round.")
@cli.output_option(None, "Directory of results.json and index.html (default: runs/fig2a or runs/fig2b).")
@cli.json_option()
def main(
    part: Literal["a", "b"],
    overrides: tuple[str, ...],
    batch: int | None,
    compressions: tuple[float, ...] | None,
    family: str,
    output: Path | None,
    as_json: bool,
    **rounds: int,
) -> None:
    """Measure one part of Figure 2, write its page and figures, and print it."""
    import torch

    from launch.runners.figure2_runs import BATCH, COMPRESSIONS, measure_lines, plan_jobs
    from launch.runners.step_jobs import MeasuringFailed
    from recsys.cost.figure2 import build_page, to_json
    from recsys.report.page import print_page
    from recsys.report.terminal import open_console
    from recsys.runs.environment import describe_environment
    from recsys.runs.run_directory import write_atomically

    with cli.mistakes():
        jobs = plan_jobs(part, family, batch or BATCH[part], compressions or COMPRESSIONS[part], overrides)
    with cli.failures(MeasuringFailed):
        lines = measure_lines(part, jobs, **rounds)
    output = output or Path("runs") / f"fig2{part}"
    environment = describe_environment(torch.device("cpu"), lines[0].ranks)
    page, text = build_page(part, lines, environment), json.dumps(to_json(part, lines, environment), indent=2)
    page.write(output / "index.html")
    write_atomically(output / "results.json", text)
    if as_json:
        print(text)
    else:
        print_page(page, open_console(_WIDTH))
        print(f"page: {output / 'index.html'}, figures: {output / 'results.json'}")


if __name__ == "__main__":
    main()
