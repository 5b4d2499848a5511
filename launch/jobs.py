"""Run training jobs on this machine through torchx, one after the other, with progress and a clear end.

Ranks write to files; what a user sees is a progress bar fed from the run directory, and, where a rank fails, the error
of the rank that failed first and where the logs are.
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from torchx.runner import Runner, get_runner
from torchx.schedulers.local_scheduler import SignalException
from torchx.specs import AppDef, AppState, AppStatus

from configs.schema import RunConfig
from recsys.run_dir import RunDir

POLL_S = 0.25


@dataclass(frozen=True)
class Job:
    """A torchx job and the config it will resolve to."""

    app: AppDef
    config: RunConfig

    @property
    def run_dir(self) -> RunDir:
        return RunDir(Path(self.config.run.dir) / self.config.run.name)


class JobFailed(RuntimeError):
    """A job did not succeed; the message is what its first failing rank said."""


def run_jobs(jobs: Sequence[Job]) -> list[RunDir]:
    """Runs every job to its end, in order; returns their run directories. Raises JobFailed at the first failure."""
    # torchx finds `torchrun` on PATH: that of this interpreter, whether or not its environment is activated.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    console = Console(stderr=True)
    with get_runner() as runner, _progress(console) as progress:
        for job in jobs:
            task = progress.add_task(job.config.run.name, total=None, note="starting")
            _run(runner, job, progress, task)
            progress.stop_task(task)
            if not console.is_terminal:
                console.print(f"{job.config.run.name}: {_note(_newest(job.run_dir))}")
    return [job.run_dir for job in jobs]


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=not console.is_terminal,
    )


def _run(runner: Runner, job: Job, progress: Progress, task: TaskID) -> None:
    logs = job.run_dir.path / "logs"
    handle = runner.run(job.app, scheduler="local_cwd", cfg={"log_dir": str(logs)})
    started = time.time()
    try:
        while not (status := _status(runner, handle)).is_terminal():
            time.sleep(POLL_S)
            _show(job, progress, task, started)
    except (KeyboardInterrupt, SignalException):  # the latter is what torchx's own signal handler raises
        runner.cancel(handle)
        while not _status(runner, handle).is_terminal():
            time.sleep(POLL_S)
        raise KeyboardInterrupt from None
    _show(job, progress, task, started)
    if status.state != AppState.SUCCEEDED:
        state = status.state.name.lower()
        raise JobFailed(f"{job.config.run.name} {state}: {_reason(status, job)}\nlogs: {logs}")


def _status(runner: Runner, handle: str) -> AppStatus:
    status = runner.status(handle)
    assert status is not None, handle
    return status


def _show(job: Job, progress: Progress, task: TaskID, started: float) -> None:
    """Brings the bar up to date; where there is none, reading would only take time from the ranks."""
    path = job.run_dir.path / "metrics.jsonl"
    if progress.disable or not path.exists() or path.stat().st_mtime < started:
        return
    if newest := _newest(job.run_dir):
        epochs = job.config.training.epochs
        progress.update(task, total=epochs, completed=min(newest["epoch"], epochs), note=_note(newest))


def _newest(run_dir: RunDir) -> dict[str, float]:
    """The newest value of every metric that a run has recorded."""
    newest: dict[str, float] = {}
    for record in run_dir.records():
        newest |= record
    return newest


def _note(newest: dict[str, float]) -> str:
    """A run's newest figures in a few words."""
    parts = [f"{newest['step']} steps"] if newest else ["no steps"]
    if "time/step_ms" in newest:
        parts.append(f"{newest['time/step_ms']:.1f} ms a step")
    if "quality/test_auc" in newest:
        parts.append(f"test AUC {newest['quality/test_auc']:.4f}")
    return ", ".join(parts)


def _reason(status: AppStatus, job: Job) -> str:
    """What the rank said that failed first, from torchelastic's reply file; without one, the end of its stderr."""
    try:
        message = json.loads(status.structured_error_msg)["message"]
        return message["message"] if isinstance(message, dict) else str(message)
    except (ValueError, KeyError, TypeError):
        pass
    newest = max(job.run_dir.path.glob("logs/**/stderr.log"), key=lambda p: p.stat().st_mtime, default=None)
    lines = newest.read_text(errors="replace").splitlines() if newest else []
    return "\n".join(lines[-15:]) or "it left no error"
