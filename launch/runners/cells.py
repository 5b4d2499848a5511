"""What a sweep is made of: a cell is one run to be made, `Ended` how making it went, `Runs` whatever makes many.

`launch.runners.workers` makes runs of one rank in processes of this machine, `launch.runners.torchx_runs` any as torchx
jobs, here or on a cluster; `launch.runners.local_runs` takes each where it fits on this machine.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from configs.load import load_config
from configs.schema import RunConfig
from recsys.runs.run_dir import RunDir
from recsys.train.registry import CHOICES

LOG = "log.txt"
"""Where a run made in a process of `launch.runners.workers` says what it prints."""


@dataclass(frozen=True)
class Cell:
    """A run to be made. config: path of a TOML file; overrides: section.key=value; name: of the run directory."""

    config: str
    overrides: tuple[str, ...]
    name: str

    @property
    def arguments(self) -> list[str]:
        """All overrides, its name among them."""
        return [*self.overrides, f"run.name={json.dumps(self.name)}"]

    def load(self) -> RunConfig:
        return load_config(self.config, self.arguments, CHOICES)


class Ended(NamedTuple):
    """How a run ended. error: None where it finished. seconds: its wall clock, with loading and evaluation."""

    error: str | None
    seconds: float


class Runs(Protocol):
    def run(self, cells: Sequence[Cell], title: str = "runs") -> list[Ended]:
        """Makes every run, whatever becomes of the others; how they ended, in order."""
        ...


def run_dir_of(config: RunConfig) -> RunDir:
    return RunDir(Path(config.run.dir) / config.run.name)


def find_log(run_dir: RunDir) -> Path:
    """The file or directory that holds what the run printed."""
    logs = run_dir.path / "logs"
    return logs if logs.is_dir() else run_dir.path / LOG
