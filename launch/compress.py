"""What compressing a trained table is worth: trained compressed, compressed after training, and then fine-tuned.

    full tables                      trained as they are; the best evaluation is kept
    trained compressed               the method from a random start
    compressed after training        the full model's layers, its tables fitted by the method; not trained
    compressed, then fine-tuned      the same, trained on; as good as before if no evaluation is better

The fit is least squares for what is linear in one shared array, TT-SVD for tensor trains (recsys.train.fit). All runs
share data, seed, layers and optimizer; test AUC and log loss are those of the evaluation with the best validation log
loss.
"""

from pathlib import Path

import click

from launch import cli


@cli.command(
    "compress",
    __doc__,
    summary="Compress a trained table, fine-tune, compare.",
    when_interrupted=cli.GOES_ON,
    examples=["configs/movielens/full.toml configs/movielens/robe.toml --seeds 0,1,2 training.epochs=1"],
)
@click.argument("full")
@click.argument("compressed")
@cli.overrides_argument()
@cli.output_option("runs/compress", "Directory of the runs.")
@cli.seeds_option()
@cli.jobs_option()
def main(
    full: str, compressed: str, overrides: tuple[str, ...], output: Path, seeds: tuple[int, ...], jobs: int | None
) -> int | None:
    """Make the runs and print their table. FULL and COMPRESSED: configs that share data and model."""
    from rich.console import Console

    from launch.runners.compress_runs import build_table, make_runs
    from launch.runners.trial import print_failures

    with cli.mistakes():
        outcomes = make_runs(full, compressed, overrides, output=output, seeds=seeds, jobs=jobs)
    if print_failures(outcomes):
        return cli.EXIT_FAILED
    Console().print(build_table(outcomes, len(seeds)))
    return None


if __name__ == "__main__":
    main()
