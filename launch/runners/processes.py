"""Processes that make trials, several at a time: each takes one after the other and stays, since importing PyTorch and
TorchRec takes longer than a small run.

A trial is made as `python -m launch.train` makes it, on one rank. What it prints goes to log.txt in its directory. Two
of its figures are also of its environment: peak memory is that of the process, over all trials it has made; times are
those of a machine that makes several at once.

The pools of the standard library and of pebble do not fit: one process that dies (out of memory, say) breaks the whole
pool or loses its exit status, and Ctrl-C reaches their processes while they start.
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

from configs.schema import RunConfig
from launch.cli import EXIT_INTERRUPTED
from launch.runners.display import run_queue
from launch.runners.rank import Interrupted, interrupt, run_rank
from launch.runners.trial import LOG, End, Trial, run_dir_of
from recsys.runs.summary import Failure

_POLL_S = 0.5
_GRACE_S = 10.0
"""Time that a process has to leave a valid run before it is killed."""


@dataclass(frozen=True, eq=False)
class _Worker:
    process: SpawnProcess
    connection: Connection


class ProcessRunner:
    """Make trials of one rank in `jobs` processes, started when first needed.

    The end of the `with` block ends the processes and what they run.
    """

    def __init__(self, jobs: int) -> None:
        if jobs < 1:
            raise ValueError(f"jobs = {jobs}: at least one run at a time is needed")
        self.jobs = jobs
        self._idle: list[_Worker] = []
        self._running: dict[_Worker, int] = {}

    def __enter__(self) -> "ProcessRunner":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes and what they run."""
        workers = [*self._idle, *self._running]
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.process.join(_GRACE_S)
            worker.process.kill()
            worker.connection.close()

    def run(self, trials: Sequence[Trial], title: str = "runs") -> list[End]:
        """Make every trial, whatever becomes of the others, and return how each ended, in order."""
        configs = [trial.load() for trial in trials]

        def poll() -> dict[int, End]:
            """Return how the trials that have ended since ended, by index."""
            indices = {worker: self._running.pop(worker) for worker in self._find_ready()}
            return {index: self._receive(worker, configs[index]) for worker, index in indices.items()}

        return run_queue(configs, self.jobs, title, lambda index: self._start(configs[index], index), poll)

    def _start(self, config: RunConfig, index: int) -> None:
        self._idle = [worker for worker in self._idle if worker.process.is_alive()]
        worker = self._idle.pop() if self._idle else _start_worker()
        self._running[worker] = index
        with contextlib.suppress(OSError):  # it has died just now: `_receive` sees how
            worker.connection.send(config)

    def _find_ready(self) -> list[_Worker]:
        ready = wait([worker.connection for worker in self._running], timeout=_POLL_S)
        return [worker for worker in self._running if worker.connection in ready]

    def _receive(self, worker: _Worker, config: RunConfig) -> End:
        try:
            end = worker.connection.recv()
        except (EOFError, OSError):
            worker.process.join(_GRACE_S)
            failure = _describe_death(worker.process.exitcode)
            run_dir_of(config).mark_ended("failed", Failure(rank=0, message=failure))
            return End(failure, 0.0)
        self._idle.append(worker)
        return end


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
    """Run configs as they come and send an `End` for each, until the other side closes or asks this one to end."""
    signal.signal(signal.SIGTERM, interrupt)
    try:
        while True:
            config = connection.recv()
            started = time.perf_counter()
            failure = _run(config)
            connection.send(End(failure, time.perf_counter() - started))
    except Interrupted:
        sys.exit(EXIT_INTERRUPTED)
    except (EOFError, ConnectionError):
        pass  # whoever asked for the runs is gone


def _run(config: RunConfig) -> str | None:
    """Run one trial and return its failure, or None."""
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
    received = signal.Signals(-exitcode)
    return f"its process was killed by {received.name}" + (" (out of memory?)" if received == signal.SIGKILL else "")
