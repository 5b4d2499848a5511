"""One rank of a measurement of steps.

    torchrun --nproc-per-node 2 -m launch.runners.measure_steps PLAN.json OUTPUT.json

The plan names the setups, all of one world size; their steps are measured interleaved (`recsys.bench.step_bench`), and
rank 0 writes the results. `launch.runners.step_jobs` starts such jobs; without torchrun it is one process.
"""

import json
import signal
import sys
from pathlib import Path

import click
from pydantic import Field, ValidationError
from torch.distributed.elastic.multiprocessing.errors import record

from configs.load import ConfigError, load_config
from configs.schema import RunConfig, Section
from launch import cli
from recsys.bench.step_bench import Mode, StepMeasurement, measure_steps
from recsys.runs.environment import describe_environment
from recsys.runs.ranks import choose_device, process_group
from recsys.runs.run_directory import write_atomically
from recsys.train.heap import keep_freed_memory
from recsys.train.registry import CHOICES

JSON_VERSION = 1
EXAMPLE = """a plan:
  {"rounds": 5, "steps": 10, "setups": [
    {"label": "sharded", "config": "configs/demo/sharded.toml", "overrides": ["training.global_batch_size=2048"]},
    {"label": "ROBE", "config": "configs/demo/robe.toml", "overrides": ["training.global_batch_size=2048"]}]}"""


class Setup(Section):
    """Name a config to be measured, and what the results call it."""

    label: str
    config: str
    overrides: tuple[str, ...] = Field(default=(), strict=False)

    def load(self) -> RunConfig:
        """Return the checked config. Raises ConfigError."""
        return load_config(self.config, self.overrides, CHOICES)


class Plan(Section):
    """Say what is measured, and how often."""

    setups: list[Setup] = Field(min_length=1)
    mode: Mode = "train"
    """train: forward, backward and update. inference: forward alone."""
    rounds: int = Field(default=5, ge=1)
    steps: int = Field(default=10, ge=1)
    """Of every setup in every round."""
    warm_up: int = Field(default=5, ge=0)
    profile_steps: int = Field(default=5, ge=0)
    """Of the profiled window of every setup; 0 = none."""


def load_plan(path: Path) -> tuple[Plan, list[RunConfig]]:
    """Return the plan and its configs. Raises ConfigError naming the file and what is wrong in it."""
    try:
        plan = Plan.model_validate_json(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        found = error.errors()[0]
        raise ConfigError(f"{path}: {'.'.join(map(str, found['loc']))}: {found['msg']}") from None
    configs = [setup.load() for setup in plan.setups]
    sizes = {config.parallelism.world_size for config in configs}
    if len(sizes) > 1:
        raise ConfigError(f"{path}: setups of one plan share their ranks, these have world_size {sorted(sizes)}")
    return plan, configs


def to_json(plan: Plan, measured: list[StepMeasurement], environment: dict) -> str:
    """Return the results of all setups in the plan's order, and where they were measured."""
    setups = [
        {"label": setup.label, "config": setup.config, "overrides": setup.overrides, **found.summary()}
        for setup, found in zip(plan.setups, measured, strict=True)
    ]
    found = {"version": JSON_VERSION, "mode": plan.mode, "environment": environment, "setups": setups}
    return json.dumps(found, indent=2)


@record
def run_rank(plan: Plan, configs: list[RunConfig], output: Path) -> None:
    """Measure the plan on this rank; rank 0 writes `output`."""
    device = choose_device(configs[0].run.device)
    if device.type == "cpu":
        keep_freed_memory()
    with process_group(configs[0].parallelism, device) as ranks:
        measured = measure_steps(
            configs, ranks, mode=plan.mode, rounds=plan.rounds, steps=plan.steps, warm_up=plan.warm_up,
            profile_steps=plan.profile_steps,
            progress=lambda what: print(what, file=sys.stderr, flush=True) if ranks.is_first else None,
        )  # fmt: skip
        if ranks.is_first:
            output.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(output, to_json(plan, measured, describe_environment(device, ranks.world_size)))


@cli.command("measure-steps", __doc__, summary="Measure the steps of setups, interleaved.", notes=f"\b\n{EXAMPLE}")
@click.argument("plan", type=click.Path(path_type=Path), metavar="PLAN.json")
@click.argument("output", type=click.Path(path_type=Path), metavar="OUTPUT.json")
def main(plan: Path, output: Path) -> None:
    """Measure this rank's part of the plan."""
    with cli.mistakes():
        checked, configs = load_plan(plan)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a rank that waits in a collective could not take it otherwise
    run_rank(checked, configs, output)


if __name__ == "__main__":
    main()
