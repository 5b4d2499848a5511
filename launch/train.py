"""Train one model as a config says, on the ranks that torchrun started or on this process alone.

CONFIG is a TOML file, see configs/. Every `section.key=value` is laid over its values. The keys of a section are listed
by `--keys SECTION`, those of one of its choices by `--keys embedding.robe`.
"""

from pathlib import Path

import click

from launch import cli

SECTIONS = {
    "run": "name, directory, seed and device",
    "data": "where the rows come from; [data.<dataset>] is the dataset's own",
    "model": "the layers around the embeddings; [model.<architecture>] is the architecture's own",
    "embedding": "how embeddings are stored: method and compression; [embedding.<method>] is the method's own",
    "parallelism": "ranks, threads, and how tables are sharded",
    "optimizer": "optimizers and learning rates, of layers and of embeddings",
    "training": "batch size, epochs, budgets, target AUC",
    "evaluation": "how often, on how many rows, and when to stop early",
    "checkpoint": "what is kept, and whether a run goes on from it",
    "logging": "records and TensorBoard",
    "profile": "profiled steps: where the time of a step goes",
}
"""What each section of a config is for: written here, for the schema takes longer to import than help may take."""


def _print_keys(context: click.Context, _parameter: click.Parameter, section: str | None) -> None:
    """Print the keys of a section, or of all, and exit: the callback of --keys."""
    if section is None or context.resilient_parsing:
        return
    from configs.load import describe_keys
    from recsys.train.registry import CHOICES

    with cli.mistakes():
        click.echo(describe_keys(CHOICES, section))
    context.exit()


@cli.command(
    "train",
    f"{__doc__}\nSections:\n\n" + "\n".join(f"    {name:12} {text}" for name, text in SECTIONS.items()),
    summary="Train one model as a config says.",
    examples=["configs/debug.toml training.epochs=0.5", "--keys embedding", "--keys embedding.robe"],
    notes="Several ranks: torchrun --nproc-per-node 2 -m launch.train configs/demo/sharded.toml training.epochs=1",
)
@click.option(
    "--keys",
    is_flag=False,
    flag_value="",
    is_eager=True,
    expose_value=False,
    callback=_print_keys,
    metavar="[SECTION]",
    help="List the keys of a section, or of all, with type, default and meaning, and exit.",
)
@click.argument("config", type=click.Path(path_type=Path))
@cli.overrides_argument()
def main(config: Path, overrides: tuple[str, ...]) -> None:
    """Train on this rank; the process ends here."""
    from configs.load import load_config
    from launch.runners.rank import run_process
    from recsys.train.registry import CHOICES

    with cli.mistakes():
        run_config = load_config(config, overrides, CHOICES)
    run_process(run_config)


if __name__ == "__main__":
    main()
