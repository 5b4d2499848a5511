"""What would it take on a cluster? Steps, devices, hours, energy and cost of sharded tables and ROBE, by a cost model.

The model: bytes and operations of a step, over what memory, GPU and links reach; all-to-all, all-reduce and
reduce-scatter by messages and bytes (α–β), within nodes and between them; tables placed by TorchRec's planner up to 64
GPUs. Given the crossover.json of netlab, it is fitted to those steps first, and predicts those that were left out: how
far off it is, is printed, as is how far off it is of steps that others published.

Every figure is marked: measured, emulated (over an emulated network), published, or projected.

Keys of machine, assumed and model are listed with their values at the end of what is printed.
"""

import json
import sys
from pathlib import Path
from typing import Any

import click

from launch import cli

_WIDTH = 140


@cli.command(
    "project",
    __doc__,
    summary="Project steps, devices, hours, energy and cost to a cluster.",
    examples=[
        "# from published figures alone",
        "runs/netlab/crossover.json  # and checked on what was measured here",
        "--machine h100 --gpus 8,64 --network-gbit 400 --batch 2048,65536",
        "--model 50tb --gpus 1024 --compression 10000,100000",
        "machine.memory_gb=40 assumed.link_efficiency=0.5 assumed.a100_price=2.5",
        "--model 1tb model.ids_per_bag=20 model.embedding_dim=64",
    ],
)
@cli.items_argument("crossover.json")
@click.option("--machine", default="a100", metavar="NAME", help="Machine: a100 or h100.")
@click.option("--gpus", type=cli.CommaList(click.IntRange(min=2)), default="8,16,64,256,1024", help="GPUs.")
@click.option(
    "--network-gbit",
    "networks_gbit",
    type=cli.CommaList(cli.FiniteFloat(0.001)),
    default="100,200,400",
    help="Gbit/s of one GPU, one way.",
)
@click.option(
    "--model",
    "models",
    type=cli.CommaList(str, "NAME"),
    help="Models, of criteo_tb, 1tb and 50tb (default: all).",
)
@click.option(
    "--compression",
    "compressions",
    type=cli.CommaList(cli.FiniteFloat(1.001)),
    default="100,1000,10000",
    help="Compressions of ROBE.",
)
@click.option(
    "--batch", "batch_sizes", type=cli.CommaList(click.IntRange(min=1)), default="16384", help="Global batch sizes."
)
@click.option("--optimizer", default="sgd", metavar="NAME", help="Optimizer of the embeddings: sgd or adagrad.")
@cli.json_option("Print the figures as JSON instead of the tables.")
@cli.output_option("runs/projection", "Directory of projection.json and the page, projection.html.")
def main(items: tuple[str, ...], as_json: bool, output: Path, **scenario: Any) -> None:
    """Print and write the projection; where it is interrupted nothing is written."""
    from recsys.cost.projection import Projection, build_scenario, validate
    from recsys.cost.projection_report import build_page, to_json
    from recsys.report.page import print_page
    from recsys.report.terminal import open_console
    from recsys.runs.run_directory import write_atomically

    files, overrides = cli.split_items(items)
    if len(files) > 1:
        raise cli.Mistake(f"{files[1]}: one crossover.json at a time")
    with cli.mistakes(ValueError, OSError):
        checked = build_scenario(**scenario, overrides=overrides)
        projection = Projection.of(checked, validate(Path(files[0])) if files else None)
        output.mkdir(parents=True, exist_ok=True)
    page, text = build_page(projection), json.dumps(to_json(projection), indent=2, default=float)
    write_atomically(output / "projection.json", text)
    page.write(output / "projection.html")
    if as_json:
        print(text)
    else:
        print_page(page, open_console(_WIDTH))
    print(f"page: {output / 'projection.html'}, figures: {output / 'projection.json'}", file=sys.stderr)


if __name__ == "__main__":
    main()
