"""Runs on this machine, as many at a time as its cores hold: those of one rank in processes that stay
(`launch.runners.workers`), those of several as torchx jobs (`launch.runners.torchx_runs`), one kind after the other."""

import os
from collections.abc import Sequence
from typing import NamedTuple

from configs.load import ConfigError
from configs.schema import RunConfig
from launch.runners.cells import Cell, Ended
from launch.runners.torchx_runs import TorchxRuns
from launch.runners.workers import Workers
from recsys.runs.ranks import choose_device


def default_jobs(configs: Sequence[RunConfig]) -> int:
    """As many runs as the cores hold at the configs' ranks and threads; one on a GPU."""
    if any(choose_device(config.run.device).type != "cpu" for config in configs):
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = max((c.parallelism.world_size * c.parallelism.threads_per_rank for c in configs), default=1)
    return max(1, cores // most)


class Jobs(NamedTuple):
    """Runs at a time: of one rank, and of several."""

    one: int
    several: int

    def __str__(self) -> str:
        return f"{self.one}" if self.one == self.several else f"{self.one} ({self.several} of several ranks)"


def count_jobs(configs: Sequence[RunConfig], asked: int | None = None, at_most: int | None = None) -> Jobs:
    """asked: instead of what the cores hold; at_most: for another reason, such as memory. Raises ConfigError."""
    if asked is not None:
        if asked < 1:
            raise ConfigError(f"jobs = {asked}: at least one run at a time is needed")
        return Jobs(asked, asked)
    several = [config for config in configs if config.parallelism.world_size > 1]
    one = [config for config in configs if config.parallelism.world_size == 1]
    found = [default_jobs(kind or configs) for kind in (one, several)]
    return Jobs(*(count if at_most is None else max(1, min(count, at_most)) for count in found))


class LocalRuns:
    """The end of the `with` block ends what runs."""

    def __init__(self, jobs: Jobs) -> None:
        self.workers, self.torchx = Workers(jobs.one), TorchxRuns(jobs.several)

    def __enter__(self) -> "LocalRuns":
        return self

    def __exit__(self, *_: object) -> None:
        self.workers.close()

    def run(self, cells: Sequence[Cell], title: str = "runs") -> list[Ended]:
        """Makes every run, whatever becomes of the others; how they ended, in order."""
        several = [index for index, cell in enumerate(cells) if cell.load().parallelism.world_size > 1]
        one = [index for index in range(len(cells)) if index not in set(several)]
        found: dict[int, Ended] = {}
        for runs, indices in ((self.workers, one), (self.torchx, several)):
            if indices:
                found |= dict(zip(indices, runs.run([cells[index] for index in indices], title), strict=True))
        return [found[index] for index in range(len(cells))]
