"""The comparison in one command: a sharded DLRM against ROBE data-parallel and ROBE in one process.

Three jobs of the same model, data, batch and threads, run one after the other through torchx on this machine, then
the table, the report page and where TensorBoard finds them. Without --data the rows are generated (configs/demo);
with it they are those of a dataset that knows the files (configs/<dataset>_sample).
"""

from pathlib import Path

import click

from launch import cli, compare

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
SETUPS = ("sharded", "robe", "robe_single")


@cli.command(
    "demo",
    __doc__,
    summary="Train sharded tables and ROBE, and compare them: two minutes.",
    examples=["", "--data train.tsv.xz training.epochs=1"],
)
@click.option(
    "--data", type=click.Path(path_type=Path), metavar="PATH", help="Rows, such as a Criteo TSV: plain, .gz, .xz, .zst."
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Where the runs are made.")
@cli.output_option("runs/demo", f"Directory of the three runs and the page, {compare.PAGE}.")
@cli.overrides_argument()
def main(data: Path | None, device: str, output: Path, overrides: tuple[str, ...]) -> None:
    """Make the three runs one after the other, and compare them."""
    from configs.load import run_name
    from launch.runners.torchx_jobs import TorchxRunner
    from launch.runners.trial import Trial, find_log
    from recsys.data.registry import find_dataset

    keys = [f"run.dir={output}", "run.overwrite=true", *device_overrides(device)]
    with cli.mistakes():
        family = CONFIGS / "demo"
        if data:
            dataset, files = find_dataset(data)
            family, keys = CONFIGS / f"{dataset}_sample", [*keys, *files]
        paths = [str(family / f"{name}.toml") for name in SETUPS]
        trials = [Trial(path, (*keys, *overrides), run_name(path)) for path in paths]
        run_dirs = [trial.run_dir for trial in trials]  # a mistake in any config stops here, before the first run
    for trial, run_dir in zip(trials, run_dirs, strict=True):
        (end,) = TorchxRunner(1).run([trial], trial.name)
        if end.failure:
            raise cli.Failure(f"{trial.name} failed: {end.failure}\nlogs: {find_log(run_dir)}")
    compare.main([*(str(run_dir.path) for run_dir in run_dirs), "--output", str(output)], standalone_mode=False)
    print(f"TensorBoard: tensorboard --logdir {output}")


def device_overrides(device: str) -> list[str]:
    """Return the keys that put the three runs on the device; on one GPU they take one rank each, and it says so."""
    import torch

    overrides = [f"run.device={device}"]
    gpus = 0 if device == "cpu" else torch.cuda.device_count()
    if gpus == 1:
        print("one GPU: every run takes one rank, so nothing is communicated and sharding costs nothing here")
        overrides.append("parallelism.world_size=1")
    return overrides


if __name__ == "__main__":
    main()
