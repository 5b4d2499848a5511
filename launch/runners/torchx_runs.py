"""Runs as torchx jobs, several at a time: on this machine, or on a cluster whose scheduler torchx knows.

Every run is a job of `launch.components`, as a user would submit it with `torchx run`; the keys of .torchxconfig hold.
A job that was left running when its sweep was killed is found again by its handle, which lies in the run directory,
and is waited for, not submitted twice. Ctrl-C cancels what runs.
"""

import contextlib
import inspect
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchx.runner import Runner, get_runner
from torchx.runner.config import apply
from torchx.schedulers import get_scheduler_factories
from torchx.schedulers.local_scheduler import SignalException
from torchx.specs import AppDef, AppState, AppStatus, CfgVal

from configs.load import ConfigError
from configs.schema import RunConfig
from launch.components import baseline, compressed
from launch.runners.cells import Cell, Ended, run_dir_of
from launch.runners.runs_display import take_turns
from recsys.embedding.embeddings import METHODS
from recsys.runs.run_dir import RunDir
from recsys.runs.summary import Failure

LOCAL = "local_cwd"
HANDLE = "torchx_handle.txt"
_POLL_S = {LOCAL: 0.25}
_REMOTE_POLL_S = 3.0
_LOST_S = 120.0
"""A job that its scheduler does not know for so long has gone."""
_FIRST_PORT, _PORTS = 29500, 1000
_NOT_TO_GIVE = ("overrides", "config", "j", "rdzv_port")


@dataclass
class _Running:
    handle: str
    started: float
    lost_since: float | None = None


class TorchxRuns:
    """`jobs` jobs at a time, on this machine by default.

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
        self._submitted = 0

    def run(self, cells: Sequence[Cell], title: str = "runs") -> list[Ended]:
        """Makes every run, whatever becomes of the others; how they ended, in order. Raises ConfigError before any."""
        # torchx finds `torchrun` on PATH: that of this interpreter, whether or not its environment is activated.
        os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        configs = [cell.load() for cell in cells]
        for cell, config in zip(cells, configs, strict=True):
            self._plan(cell, config)
        ended: list[Ended] = []
        running: dict[int, _Running] = {}
        with _signals_kept(), get_runner() as runner:

            def start(index: int) -> None:
                running[index] = self._start(runner, cells[index], configs[index])

            def look() -> dict[int, Ended]:
                time.sleep(_POLL_S.get(self.scheduler, _REMOTE_POLL_S))
                found = {index: self._look(runner, job, configs[index]) for index, job in running.items()}
                gone = {index: end for index, end in found.items() if end is not None}
                for index in gone:
                    del running[index]
                return gone

            try:
                ended = take_turns(configs, self.jobs, title, start, look)
            except (KeyboardInterrupt, SignalException):  # the latter is what torchx's own signal handler raises
                self._cancel(runner, list(running.values()))
                raise KeyboardInterrupt from None
        return ended

    def _plan(self, cell: Cell, config: RunConfig) -> AppDef:
        component = baseline if METHODS[config.embedding.method].placement == "shard" else compressed
        ranks, each = config.parallelism.world_size, self.ranks_per_node
        if each is not None and ranks > each and ranks % each:
            raise ConfigError(f"{cell.name}: {ranks} ranks are no whole number of nodes of {each}")
        nodes = 1 if each is None or ranks <= each else ranks // each
        port = _FIRST_PORT + self._submitted % _PORTS  # of jobs that share a node each needs its own
        try:
            return component(
                *cell.arguments, config=cell.config, j=f"{nodes}x{ranks // nodes}", rdzv_port=port, **self.options
            )
        except ValueError as error:
            raise ConfigError(f"{cell.name}: {error}") from None

    def _start(self, runner: Runner, cell: Cell, config: RunConfig) -> _Running:
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
        self._submitted += 1
        handle = runner.run(self._plan(cell, config), scheduler=self.scheduler, cfg=options)
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(handle + "\n")
        return _Running(handle, time.time())

    def _look(self, runner: Runner, job: _Running, config: RunConfig) -> Ended | None:
        """How the job ended, None while it has not."""
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
            return Ended(None, now - job.started)
        else:
            state = f"{job.handle} {status.state.name.lower()}"
        reason = _reason(status, run_dir)
        run_dir.mark_ended("failed", Failure(rank=0, message=f"{state}: {reason}"))
        return Ended(reason if self.scheduler == LOCAL else f"{state}: {reason}", now - job.started)

    def _cancel(self, runner: Runner, running: Sequence[_Running]) -> None:
        for job in running:
            with contextlib.suppress(Exception):  # the others are to be cancelled, whatever becomes of this one
                runner.cancel(job.handle)
        if self.scheduler == LOCAL:
            for job in running:
                while (status := runner.status(job.handle)) and not status.is_terminal():
                    time.sleep(_POLL_S[LOCAL])


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """torchx's local scheduler sets handlers of its own and leaves them."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            if handler is not None:
                signal.signal(number, handler)


def _parse_options(given: Mapping[str, str]) -> dict[str, Any]:
    """{"gpu": "8"} -> {"gpu": 8}, by the signature that components share."""
    known = {
        name: parameter.annotation
        for name, parameter in inspect.signature(compressed).parameters.items()
        if name not in _NOT_TO_GIVE
    }
    found: dict[str, Any] = {}
    for name, value in given.items():
        if name not in known:
            raise ConfigError(f"job option {name}={value}: unknown; known: {', '.join(known)}")
        convert: Callable[[str], int | str] = int if known[name] is int else str
        try:
            found[name] = convert(value)
        except ValueError:
            raise ConfigError(f"job option {name}={value}: a whole number is needed") from None
    return found


def _reason(status: AppStatus | None, run_dir: RunDir) -> str:
    """What the rank said that failed first, from torchelastic's reply file or the run's summary; without either, the
    end of the newest stderr."""
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
