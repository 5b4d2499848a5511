"""The comparison in one command: a sharded DLRM against ROBE data-parallel and ROBE in one process.

Three jobs of the same model, data, batch and threads, run one after the other through torchx on this machine, then
the table, the report page and where TensorBoard finds them. Without --data the rows are generated (configs/demo);
with it they are those of a dataset that knows the files (configs/<dataset>_sample).
"""

import argparse
import sys
from pathlib import Path

import torch

from configs.load import ConfigError, run_name
from launch import compare
from launch.runners.torchx_jobs import TorchxRunner
from launch.runners.trial import Trial, find_log
from recsys.data.registry import find_dataset

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
SETUPS = ("sharded", "robe", "robe_single")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m launch.demo",
        description=__doc__,
        epilog="examples:\n  python -m launch.demo\n  python -m launch.demo --data train.tsv.xz training.epochs=1\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--data",
        help="such as a Criteo TSV, plain, .gz, .xz or .zst",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--runs", default="runs/demo", help="directory of the three runs (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="laid over all three configs")
    arguments = parser.parse_args()
    overrides = [f"run.dir={arguments.runs}", "run.overwrite=true", *device_overrides(arguments.device)]
    try:
        family = CONFIGS / "demo"
        if arguments.data:
            dataset, files = find_dataset(arguments.data)
            family = CONFIGS / f"{dataset}_sample"
            overrides += files
        overrides += arguments.overrides
        paths = [str(family / f"{name}.toml") for name in SETUPS]
        trials = [Trial(path, tuple(overrides), run_name(path)) for path in paths]
        run_dirs = [trial.run_dir for trial in trials]  # a mistake in any config stops here, before the first run
        for trial, run_dir in zip(trials, run_dirs, strict=True):
            (end,) = TorchxRunner(1).run([trial], trial.name)
            if end.failure:
                sys.exit(f"error: {trial.name} failed: {end.failure}\nlogs: {find_log(run_dir)}")
    except ConfigError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    paths = [str(run_dir.path) for run_dir in run_dirs]
    compare.main([*paths, "--output", arguments.runs], standalone_mode=False)
    print(f"TensorBoard: tensorboard --logdir {arguments.runs}")


def device_overrides(device: str) -> list[str]:
    """Keys that put the three runs on the device; on a machine with one GPU they take one rank each, and it says so."""
    overrides = [f"run.device={device}"]
    gpus = 0 if device == "cpu" else torch.cuda.device_count()
    if gpus == 1:
        print("one GPU: every run takes one rank, so nothing is communicated and sharding costs nothing here")
        overrides.append("parallelism.world_size=1")
    return overrides


if __name__ == "__main__":
    main()
