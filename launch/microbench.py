"""Embedding kernels against each other: Table 2 of the PSS paper as a measurement, beside full tables.

ROBE in its forms (fused updates, dense and sparse gradients, plain PyTorch), FBGEMM's table-batched embeddings,
nn.EmbeddingBag and TorchRec's EmbeddingBagCollection look up and train on the same ids, interleaved in one process.
Written are results.json, after every size, and a page with plots, index.html.

Grid "models" is the sizes of recommendation models; of it a selection that takes about eight minutes on two cores, or
all with --full, or what the options choose. Grid "paper" is Table 2: one table of
4 to 256 million rows, printed beside the paper's figures. What does not fit the memory is left out with a line.
"""

import sys
from pathlib import Path
from typing import Any

import click

from launch import cli

_COUNTS = cli.CommaList(int)


@cli.command(
    "bench kernels",
    __doc__,
    summary="Time embedding kernels: ROBE, FBGEMM, PyTorch.",
    examples=[
        "# a selection of sizes, in about eight minutes",
        "--d 64 --z 16,32 --m 1,10,100 --threads 1  # every combination of these, B = 10240",
        "--grid paper --n 4,8,16  # Table 2, first three columns",
        "--full --output runs/all  # the whole grid: hours",
        "--device cuda --json | jq .measurements",
    ],
    notes="A ratio is of medians from the same rounds. Figures of a machine that does something else meanwhile are "
    "worth little: look at the quartiles.",
)
@click.option("--grid", type=click.Choice(["models", "paper"]), default="models", help="Which sizes; see above.")
@click.option("--full", is_flag=True, help="Every size of the grid models instead of a selection.")
@click.option("--d", type=_COUNTS, help="Grid models: embedding_dim (default: 64). Of all, every combination.")
@click.option("--z", type=_COUNTS, help="Grid models: block_size; above d, tables flattened (default: 16).")
@click.option("--m", type=cli.CommaList(float, "MB"), help="Grid models: M in 10^6 bytes (default: 10).")
@click.option("--batch", type=_COUNTS, help="Grid models: samples (default: 10240).")
@click.option("--ids-per-bag", type=_COUNTS, help="Grid models: 1 = exactly one, else mean (default: 1).")
@click.option("--ids", type=cli.CommaList(str, "uniform|zipf"), help="Grid models: how drawn (default: uniform).")
@click.option("--rows", type=int, default=10_000_000, metavar="N", help="Grid models: rows of all tables.")
@click.option("--features", type=int, default=26, metavar="N", help="Grid models: tables.")
@click.option("--n", type=cli.CommaList(float, "MILLIONS"), help="Grid paper: rows of the table (default: 4 to 256).")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", help="Where kernels run.")
@click.option("--threads", type=_COUNTS, help="CPU threads (default: 1 and all cores; paper: all cores).")
@click.option("--rounds", type=int, default=9, metavar="N", help="At most, of each size.")
@click.option("--seconds", type=float, default=18.0, metavar="S", help="Of a size, then no further round begins.")
@cli.json_option("Print the figures as JSON instead of the tables.")
@cli.output_option("runs/microbench", "Directory of results.json and the page, index.html.")
def main(as_json: bool, output: Path, **request: Any) -> int | None:
    """Measure, print and write the kernels' times; what was measured is kept where it is interrupted."""
    from recsys.bench.kernel_run import KernelRequest, KernelRun, open_console

    with cli.mistakes(ValueError, OSError):
        run = KernelRun(KernelRequest(**request), output)
    run.run(open_console(quiet=as_json))
    if as_json:
        print(run.format_json())
    print(f"page: {output / 'index.html'}, figures: {output / 'results.json'}", file=sys.stderr)
    if run.report.status == "interrupted":
        print("interrupted: these are partial results", file=sys.stderr)
        return cli.EXIT_INTERRUPTED
    return None


if __name__ == "__main__":
    main()
