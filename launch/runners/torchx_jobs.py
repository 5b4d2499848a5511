"""Trials as torchx jobs, several at a time: on this machine, or on a cluster whose scheduler torchx knows.

Every trial is a job as `launch.components` builds it and `torchx run` submits it; the keys of .torchxconfig hold. A job
that still runs when its sweep was killed is recognised by its handle, which lies in the run directory, and is waited
for, not submitted twice. Ctrl-C cancels what runs.
"""

import contextlib
import json
import os
import re
import signal
import sys
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torchx.runner import Runner, get_runner
from torchx.runner.config import apply
from torchx.schedulers import get_scheduler_factories
from torchx.schedulers.local_scheduler import SignalException
from torchx.specs import AppDef, AppState, AppStatus, CfgVal

from configs.load import ConfigError
from configs.schema import RunConfig
from launch.runners.display import run_queue
from launch.runners.train_job import JobOptions, build_train_job
from launch.runners.trial import End, Trial, run_dir_of
from recsys.runs.run_directory import RunDir
from recsys.runs.summary import Failure

LOCAL = "local_cwd"
HANDLE = "torchx_handle.txt"
_POLL_S = {LOCAL: 0.25}
_REMOTE_POLL_S = 3.0
_LOST_S = 120.0
"""A job that its scheduler does not know for so long has gone."""
_FIRST_PORT, _LAST_PORT = 20_000, 32_767
"""Ports where the nodes of a job meet: below those that Linux hands out by itself."""


@dataclass
class _Running:
    handle: str
    started: float
    lost_since: float | None = None


class TorchxRunner:
    """Make trials as torchx jobs, at most `jobs` at once, on this machine by default.

    ranks_per_node: of every job, all on one node if None. options: of the component, such as memMB or gpu. Raises
    ConfigError for a scheduler that torchx does not know and an option that components do not have.
    """

    def __init__(
        self,
        jobs: int,
        scheduler: str = LOCAL,
        ranks_per_node: int | None = None,
        options: Mapping[str, str] | None = None,
    ) -> None:
        if jobs < 1:
            raise ConfigError(f"jobs = {jobs}: at least one run at a time is needed")
        if ranks_per_node is not None and ranks_per_node < 1:
            raise ConfigError(f"ranks per node = {ranks_per_node}: must be at least 1")
        if scheduler not in (known := get_scheduler_factories()):
            raise ConfigError(f"scheduler {scheduler!r}: torchx knows {', '.join(known)}")
        self.jobs, self.scheduler, self.ranks_per_node = jobs, scheduler, ranks_per_node
        self.options = _parse_options(options or {})
        self._ports: dict[Path, int] = {}

    def run(self, trials: Sequence[Trial], title: str = "runs") -> list[End]:
        """Make every trial, whatever becomes of the others, and return how each ended, in order.

        Raises ConfigError before any is made.
        """
        # torchx looks for `torchrun` on PATH: that of this interpreter, whether or not its environment is activated.
        os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        configs = [trial.load() for trial in trials]
        jobs = [self._build_job(trial, config) for trial, config in zip(trials, configs, strict=True)]
        running: dict[int, _Running] = {}
        ends: list[End] = []
        with _signal_handlers_kept(), get_runner() as runner:

            def start(index: int) -> None:
                """Submit the job of a trial, or find the one that still runs."""
                running[index] = self._start(runner, jobs[index], configs[index])

            def poll() -> dict[int, End]:
                """Wait a moment and return the trials that have ended since, by index."""
                time.sleep(_POLL_S.get(self.scheduler, _REMOTE_POLL_S))
                states = {index: self._find_end(runner, job, configs[index]) for index, job in running.items()}
                ended = {index: end for index, end in states.items() if end is not None}
                for index in ended:
                    del running[index]
                return ended

            try:
                ends = run_queue(configs, self.jobs, title, start, poll)
            except (KeyboardInterrupt, SignalException):  # the latter is what torchx's own signal handler raises
                self._cancel(runner, list(running.values()))
                raise KeyboardInterrupt from None
        return ends

    def _build_job(self, trial: Trial, config: RunConfig) -> AppDef:
        ranks, each = config.parallelism.world_size, self.ranks_per_node
        if each is not None and ranks > each and ranks % each:
            raise ConfigError(f"{trial.name}: {ranks} ranks are no whole number of nodes of {each}")
        nodes = 1 if each is None or ranks <= each else ranks // each
        layout = f"{nodes}x{ranks // nodes}"
        port = self._choose_port(run_dir_of(config).path.resolve())
        try:
            return build_train_job(trial.config, trial.arguments, self.options, layout, port)
        except ValueError as error:
            raise ConfigError(f"{trial.name}: {error}") from None

    def _choose_port(self, run: Path) -> int:
        """Return the port where the nodes of a run's job meet.

        Jobs that share a node each need their own, and those of another sweep are not known here: so the port follows
        from the run directory, and steps aside for the other jobs of this runner.
        """
        ports = _LAST_PORT - _FIRST_PORT + 1
        port = self._ports.get(run) or _FIRST_PORT + zlib.crc32(str(run).encode()) % ports
        while port in (taken for other, taken in self._ports.items() if other != run):
            port = _FIRST_PORT + (port + 1 - _FIRST_PORT) % ports
        self._ports[run] = port
        return port

    def _start(self, runner: Runner, job: AppDef, config: RunConfig) -> _Running:
        kept = run_dir_of(config).path / HANDLE
        if self.scheduler != LOCAL and kept.is_file():
            handle = kept.read_text().strip()
            status = runner.status(handle) if handle.startswith(f"{self.scheduler}://") else None
            if status is not None and not status.is_terminal():
                return _Running(handle, time.time())
        options: dict[str, CfgVal] = (
            {"log_dir": str(run_dir_of(config).path / "logs")} if self.scheduler == LOCAL else {}
        )
        apply(self.scheduler, options)
        handle = runner.run(job, scheduler=self.scheduler, cfg=options)
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(handle + "\n")
        return _Running(handle, time.time())

    def _find_end(self, runner: Runner, job: _Running, config: RunConfig) -> End | None:
        """Return how the job ended, None while it has not."""
        status, now = runner.status(job.handle), time.time()
        if status is not None and not status.is_terminal():
            job.lost_since = None
            return None
        run_dir = run_dir_of(config)
        if status is None:
            job.lost_since = job.lost_since or now
            if now - job.lost_since < _LOST_S:
                return None
            state = f"{job.handle} is not known to {self.scheduler}"
        elif status.state == AppState.SUCCEEDED:
            return End(None, now - job.started)
        else:
            state = f"{job.handle} {status.state.name.lower()}"
        reason = _describe_failure(status, run_dir)
        run_dir.mark_ended("failed", Failure(rank=0, message=f"{state}: {reason}"))
        return End(reason if self.scheduler == LOCAL else f"{state}: {reason}", now - job.started)

    def _cancel(self, runner: Runner, running: Sequence[_Running]) -> None:
        for job in running:
            with contextlib.suppress(Exception):  # the others are to be cancelled, whatever becomes of this one
                runner.cancel(job.handle)
        if self.scheduler == LOCAL:
            for job in running:
                while (status := runner.status(job.handle)) and not status.is_terminal():
                    time.sleep(_POLL_S[LOCAL])


@contextlib.contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    """Restore the signal handlers at the end: torchx's local scheduler sets its own and leaves them."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            if handler is not None:
                signal.signal(number, handler)


def _parse_options(given: Mapping[str, str]) -> JobOptions:
    """Return {"gpu": "8"} as JobOptions(gpu=8). Raises ConfigError for an unknown name and for what is no number."""
    known = {field.name: field.type for field in fields(JobOptions)}
    values: dict[str, Any] = {}
    for name, value in given.items():
        if name not in known:
            raise ConfigError(f"job option {name}={value}: unknown; known: {', '.join(known)}")
        try:
            values[name] = int(value) if known[name] is int else value
        except ValueError:
            raise ConfigError(f"job option {name}={value}: a whole number is needed") from None
    return JobOptions(**values)


def _describe_failure(status: AppStatus | None, run_dir: RunDir) -> str:
    """Return what the rank that failed first said, from torchelastic's reply file or the run's summary.

    Without either it is the end of the newest stderr.
    """
    if status is not None:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            message = json.loads(status.structured_error_msg)["message"]
            said = message["message"] if isinstance(message, dict) else str(message)
            return re.sub(r"^(\w+: )\1", r"\1", said)  # torchelastic names the error, and so does its message
    if run_dir.exists() and (error := run_dir.read_summary().error):
        return f"rank {error.rank}: {error.message}"
    newest = max(run_dir.path.glob("logs/**/stderr.log"), key=lambda p: p.stat().st_mtime, default=None)
    lines = newest.read_text(errors="replace").splitlines() if newest else []
    return "\n".join(lines[-15:]) or "it left no error"
