"""Trials on this machine or on a cluster: which runner, and how many at a time.

On this machine those of one rank run in processes that stay (`launch.runners.processes`), those of several as torchx
jobs (`launch.runners.torchx_jobs`), one kind after the other.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from configs.load import ConfigError
from configs.schema import RunConfig
from launch.runners.processes import ProcessRunner
from launch.runners.torchx_jobs import LOCAL, TorchxRunner
from launch.runners.trial import End, Runner, Trial
from recsys.runs.environment import count_cores
from recsys.runs.ranks import choose_device

_CLUSTER_JOBS = 1000
"""Jobs that a cluster is given at once: its own queue decides which run."""


class Jobs(NamedTuple):
    """Say how many trials run at once: of one rank, and of several."""

    one: int
    several: int

    def __str__(self) -> str:
        return f"{self.one}" if self.one == self.several else f"{self.one} ({self.several} of several ranks)"


def count_jobs(configs: Sequence[RunConfig], requested: int | None = None, at_most: int | None = None) -> Jobs:
    """Return as many runs at a time as the cores hold at the configs' ranks and threads; one on a GPU.

    requested: instead of what the cores hold; at_most: a limit for another reason, such as memory. Raises ConfigError.
    """
    if requested is not None:
        if requested < 1:
            raise ConfigError(f"jobs = {requested}: at least one run at a time is needed")
        return Jobs(requested, requested)
    several = [config for config in configs if config.parallelism.world_size > 1]
    one = [config for config in configs if config.parallelism.world_size == 1]
    counts = [_count_by_cores(kind or configs) for kind in (one, several)]
    return Jobs(*(count if at_most is None else max(1, min(count, at_most)) for count in counts))


def _count_by_cores(configs: Sequence[RunConfig]) -> int:
    if any(choose_device(config.run.device).type != "cpu" for config in configs):
        return 1
    most = max((c.parallelism.world_size * c.parallelism.threads_per_rank for c in configs), default=1)
    return max(1, count_cores() // most)


class LocalRunner:
    """Make trials on this machine. The end of the `with` block ends what runs."""

    def __init__(self, jobs: Jobs) -> None:
        self.processes, self.torchx = ProcessRunner(jobs.one), TorchxRunner(jobs.several)

    def __enter__(self) -> "LocalRunner":
        return self

    def __exit__(self, *_: object) -> None:
        self.processes.close()  # jobs of torchx need no end here: `run` returns when all have ended, or cancels them

    def run(self, trials: Sequence[Trial], title: str = "runs") -> list[End]:
        """Make every trial, whatever becomes of the others, and return how each ended, in order."""
        several = [index for index, trial in enumerate(trials) if trial.load().parallelism.world_size > 1]
        one = [index for index in range(len(trials)) if index not in set(several)]
        ends: dict[int, End] = {}
        for runner, indices in ((self.processes, one), (self.torchx, several)):
            if indices:
                ends |= dict(zip(indices, runner.run([trials[index] for index in indices], title), strict=True))
        return [ends[index] for index in range(len(trials))]


@dataclass(frozen=True)
class RunnerOptions:
    """Say where trials are made, and how many at once, as the options of a command have it.

    jobs: None = what the cores hold, on a cluster what it takes. scheduler: None = this machine, else one that torchx
    knows. ranks_per_node and job ("option=value" of the component): of jobs on a scheduler.
    """

    jobs: int | None = None
    scheduler: str | None = None
    ranks_per_node: int | None = None
    job: Sequence[str] = ()

    @property
    def is_local(self) -> bool:
        """Return whether the trials are made on this machine."""
        return self.scheduler in (None, LOCAL)

    def open(self, jobs: Jobs) -> contextlib.AbstractContextManager[Runner]:
        """Return the runner. jobs: on this machine. Raises ConfigError for options that do not go together."""
        if self.scheduler is None:
            if self.job or self.ranks_per_node is not None:
                raise ConfigError("--job and --ranks-per-node are for jobs: they need --scheduler")
            return LocalRunner(jobs)
        if wrong := [item for item in self.job if "=" not in item]:
            raise ConfigError(f"--job {wrong[0]}: must look like option=value")
        options = dict(item.split("=", 1) for item in self.job)
        at_a_time = self.jobs or (jobs.several if self.scheduler == LOCAL else _CLUSTER_JOBS)
        return contextlib.nullcontext(TorchxRunner(at_a_time, self.scheduler, self.ranks_per_node, options))
