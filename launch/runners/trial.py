"""A trial is one run to be made: what it is, how it ended, and which of many are still to be made.

`launch.runners.processes` makes trials of one rank in processes of this machine, `launch.runners.torchx_jobs` makes any
as torchx jobs, here or on a cluster, and `launch.runners.local` takes for each the one that fits.
"""

import json
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol

from configs.load import ConfigError, dump_config, flatten, load_config
from configs.schema import RunConfig
from recsys.runs.run_directory import RunDir
from recsys.train.registry import CHOICES

LOG = "log.txt"
"""File in the run directory that holds what a trial printed in a process of `launch.runners.processes`."""
_IRRELEVANT = ("run.dir", "run.overwrite", "data.cache_dir", "checkpoint.", "logging.")
"""Keys, and beginnings of keys, that do not change what a run measures."""


@dataclass(frozen=True)
class Trial:
    """Describe one run of a sweep or a study, named by its run directory.

    config: path of a TOML file; overrides: section.key=value, laid over it in turn.
    """

    config: str
    overrides: tuple[str, ...]
    name: str

    @property
    def arguments(self) -> list[str]:
        """Return all overrides, the name of the run among them."""
        return [*self.overrides, f"run.name={json.dumps(self.name)}"]

    def load(self) -> RunConfig:
        """Return the checked config. Raises ConfigError for a mistake in a key or value."""
        return self._config

    @cached_property
    def _config(self) -> RunConfig:
        return load_config(self.config, self.arguments, CHOICES)

    @property
    def run_dir(self) -> RunDir:
        """Return the directory where the run is made."""
        return run_dir_of(self.load())


class End(NamedTuple):
    """Say how a runner saw a trial end. failure: None where it finished; seconds: wall clock, loading included."""

    failure: str | None
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """Say what became of a trial.

    failure: None where run_dir holds a finished run; seconds: None where it held one before.
    """

    trial: Trial
    run_dir: RunDir
    failure: str | None = None
    seconds: float | None = None


class Runner(Protocol):
    """Make trials, several at once: what every runner can do."""

    def run(self, trials: Sequence[Trial], title: str = "runs") -> list[End]:
        """Make every trial, whatever becomes of the others, and return how each ended, in order."""
        ...


def run_dir_of(config: RunConfig) -> RunDir:
    """Return the directory that a config names for its run."""
    return RunDir(Path(config.run.dir) / config.run.name)


def find_log(run_dir: RunDir) -> Path:
    """Return the file or directory that holds what a run printed."""
    logs = run_dir.path / "logs"
    return logs if logs.is_dir() else run_dir.path / LOG


def run_trials(trials: Sequence[Trial], runner: Runner, title: str = "runs") -> list[Outcome]:
    """Make the trials that are missing and return the outcomes of all, in order.

    A finished run of the same config is taken as it is. Raises ConfigError before anything is run: for a mistake in a
    config, a finished run of another config under a trial's name, and two trials in one directory.
    """
    _check_apart(trials)
    missing = [index for index, trial in enumerate(trials) if not _is_finished(trial.load())]
    if finished := len(trials) - len(missing):
        print(f"{title}: {finished} of {len(trials)} are there already", file=sys.stderr)
    ends = dict(zip(missing, runner.run([trials[index] for index in missing], title), strict=True))
    return [
        Outcome(trial, trial.run_dir, end.failure, end.seconds)
        if (end := ends.get(index))
        else Outcome(trial, trial.run_dir)
        for index, trial in enumerate(trials)
    ]


def _check_apart(trials: Sequence[Trial]) -> None:
    seen: dict[Path, Trial] = {}
    for trial in trials:
        other = seen.setdefault(path := trial.run_dir.path.resolve(), trial)
        if other is not trial:
            raise ConfigError(f"two runs would be made in {path}: {other} and {trial}")


def _is_finished(config: RunConfig) -> bool:
    run_dir = run_dir_of(config)
    if not run_dir.exists() or run_dir.read_summary().status != "finished":
        return False
    there, here = flatten(run_dir.read_config()), flatten(tomllib.loads(dump_config(config, CHOICES)))
    differences = [
        f"  {key}: {there.get(key)!r} there, {here.get(key)!r} asked for"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key) and not key.startswith(_IRRELEVANT)
    ]
    if differences and not config.run.overwrite:
        raise ConfigError(
            "\n".join([f"{run_dir.path} holds a finished run of another config:", *differences])
            + "\nset another run.dir, remove that run, or set run.overwrite=true"
        )
    return not differences


def print_failures(outcomes: Sequence[Outcome]) -> int:
    """List on stderr what failed and where its log is, and return how many did."""
    failed = [outcome for outcome in outcomes if outcome.failure]
    for outcome in failed:
        print(f"failed: {outcome.trial.name}: {outcome.failure}\n  log: {find_log(outcome.run_dir)}", file=sys.stderr)
    return len(failed)
