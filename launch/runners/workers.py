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
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import FrameType

from configs.schema import RunConfig
from launch.cli import EXIT_INTERRUPTED
from launch.runners.cells import LOG, Cell, Ended, run_dir_of
from launch.runners.rank import Interrupted, run_rank
from launch.runners.runs_display import take_turns
from recsys.runs.summary import Failure

_POLL_S = 0.5
_GRACE_S = 10.0


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
        self.close()

    def close(self) -> None:
        """Ends the processes and what they run."""
        workers = [*self._idle, *self._running]
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.process.join(_GRACE_S)
            worker.process.kill()
            worker.connection.close()

    def run(self, cells: Sequence[Cell], title: str = "runs") -> list[Ended]:
        """Makes every run, whatever becomes of the others; how they ended, in order."""
        configs = [cell.load() for cell in cells]

        def look() -> dict[int, Ended]:
            indices = {worker: self._running.pop(worker) for worker in self._ready()}
            return {index: self._take(worker, configs[index]) for worker, index in indices.items()}

        return take_turns(configs, self.jobs, title, lambda index: self._give(configs[index], index), look)

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
            run_dir_of(config).mark_ended("failed", Failure(rank=0, message=error))
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
