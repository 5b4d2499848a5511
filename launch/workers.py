"""Processes that make runs, several at a time: each takes one after the other and stays, since importing PyTorch and
TorchRec takes longer than a small run.

A run is made as `python -m launch.train` makes it, on one rank. What it prints goes to log.txt in its directory. Two of
its figures are of its surroundings too: peak memory is the process's, of all runs it has made; times are those of a
machine that makes several runs at once.
"""

import contextlib
import os
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from statistics import fmean
from types import FrameType
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from configs.schema import RunConfig
from launch.train import EXIT_INTERRUPTED, Interrupted, run_rank
from recsys.parallelism import choose_device
from recsys.result_table import format_seconds
from recsys.run_dir import RunDir

LOG = "log.txt"
_POLL_S = 0.5
_GRACE_S = 10.0


class Ended(NamedTuple):
    """How a run ended. error: None where it finished. seconds: its wall clock, with loading and evaluation."""

    error: str | None
    seconds: float


def default_jobs(configs: Sequence[RunConfig]) -> int:
    """As many runs as the cores hold at the configs' threads; one on a GPU."""
    if any(choose_device(config.run.device).type != "cpu" for config in configs):
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // max(config.parallelism.threads_per_rank for config in configs))


def run_dir_of(config: RunConfig) -> RunDir:
    return RunDir(Path(config.run.dir) / config.run.name)


@dataclass(frozen=True, eq=False)
class _Worker:
    process: SpawnProcess
    connection: Connection


class Workers:
    """`jobs` processes, started when first needed; the end of the `with` block ends them and what they run."""

    def __init__(self, jobs: int) -> None:
        if jobs < 1:
            raise ValueError(f"jobs = {jobs}: at least one run at a time is needed")
        self.jobs = jobs
        self._idle: list[_Worker] = []
        self._running: dict[_Worker, int] = {}

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        workers = [*self._idle, *self._running]
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.process.join(_GRACE_S)
            worker.process.kill()
            worker.connection.close()

    def run(self, configs: Sequence[RunConfig], title: str = "runs") -> list[Ended]:
        """Makes every run, whatever becomes of the others; how they ended, in order."""
        ended: dict[int, Ended] = {}
        waiting = deque(range(len(configs)))
        with _Display(title, len(configs), self.jobs) as display:
            while waiting or self._running:
                while waiting and len(self._running) < self.jobs:
                    index = waiting.popleft()
                    display.start(configs[index].run.name)
                    self._give(configs[index], index)
                for worker in self._ready():
                    index = self._running.pop(worker)
                    ended[index] = self._take(worker, configs[index])
                    display.finish(configs[index].run.name, ended[index])
                display.update(len(waiting))
        return [ended[index] for index in range(len(configs))]

    def _give(self, config: RunConfig, index: int) -> None:
        self._idle = [worker for worker in self._idle if worker.process.is_alive()]
        worker = self._idle.pop() if self._idle else _start_worker()
        self._running[worker] = index
        with contextlib.suppress(OSError):  # it has died just now: `_take` finds its end
            worker.connection.send(config)

    def _ready(self) -> list[_Worker]:
        ready = wait([worker.connection for worker in self._running], timeout=_POLL_S)
        return [worker for worker in self._running if worker.connection in ready]

    def _take(self, worker: _Worker, config: RunConfig) -> Ended:
        try:
            ended = worker.connection.recv()
        except (EOFError, OSError):
            worker.process.join(_GRACE_S)
            error = _describe_death(worker.process.exitcode)
            run_dir_of(config).mark_ended("failed", 0, error)
            return Ended(error, 0.0)
        self._idle.append(worker)
        return ended


def _start_worker() -> _Worker:
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs,), daemon=True)
    # A terminal sends Ctrl-C to every process of the job: this one alone is to take it, and it ends the others. What
    # is blocked here stays so in the process; Python's resource tracker would unblock it as it starts.
    resource_tracker.ensure_running()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        theirs.close()
    return _Worker(process, ours)


def _work(connection: Connection) -> None:
    """A worker's life: configs come, `Ended` goes, until the other end closes or says to end."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        while True:
            config = connection.recv()
            started = time.perf_counter()
            error = _run(config)
            connection.send(Ended(error, time.perf_counter() - started))
    except Interrupted:
        sys.exit(EXIT_INTERRUPTED)
    except (EOFError, ConnectionError):
        pass  # whoever asked for the runs is gone


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Interrupted


def _run(config: RunConfig) -> str | None:
    """One run; what went wrong, or None."""
    directory = run_dir_of(config).path
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / LOG).open("w") as log:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log.fileno(), stream.fileno())
    for variable in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE"):
        os.environ.pop(variable, None)  # left by the run before
    try:
        run_rank(config)
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {error}"
    finally:
        sys.stdout.flush()
    return None


def _describe_death(exitcode: int | None) -> str:
    if exitcode is None or exitcode >= 0:
        return f"its process ended with exit status {exitcode}"
    found = signal.Signals(-exitcode)
    return f"its process was killed by {found.name}" + (" (out of memory?)" if found == signal.SIGKILL else "")


class _Display:
    """A bar of all runs with the time left, and the names of those being made; off a terminal a line for each end."""

    def __init__(self, title: str, total: int, jobs: int) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.total, self.jobs = total, jobs
        self.seconds: list[float] = []
        self.started: dict[str, float] = {}
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.bar = self.progress.add_task(escape(title), total=total, note="")
        self.running = {}

    def __enter__(self) -> "_Display":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        for task in self.running.values():
            self.progress.remove_task(task)
        self.progress.stop()

    def start(self, name: str) -> None:
        self.started[name] = time.monotonic()
        self.running[name] = self.progress.add_task(f"  {escape(name)}", total=None, note="")

    def finish(self, name: str, ended: Ended) -> None:
        del self.started[name]
        self.progress.remove_task(self.running.pop(name))
        self.seconds.append(ended.seconds)
        if ended.error or not self.console.is_terminal:
            said = f"failed: {ended.error}" if ended.error else format_seconds(ended.seconds)
            self.console.print(f"{len(self.seconds)}/{self.total} {name}: {said}", markup=False, soft_wrap=True)

    def update(self, waiting: int) -> None:
        note = f"{len(self.seconds)} of {self.total}"
        if self.seconds:
            mean, now = fmean(self.seconds), time.monotonic()
            begun = sum(max(0.0, mean - (now - started)) for started in self.started.values())
            note += f", about {format_seconds((waiting * mean + begun) / self.jobs)} left"
        self.progress.update(self.bar, completed=len(self.seconds), note=note)
