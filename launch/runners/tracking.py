"""What torchx's trackers record of a run: its config, its figures and where its files are.

torchx hands the trackers that .torchxconfig configures to the jobs it starts, through their environment. Rank 0 then
records, and `torchx tracker list jobs`, `torchx tracker list metadata <job>` and `torchx tracker list artifacts <job>`
find the run. Without a tracker nothing happens, and nothing is imported. A tracker that fails costs a warning, never
the run.
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from configs.load import flatten
from recsys.runs.metrics import PEAK_GIB, QUALITY, SAMPLES_PER_S, STEP_MS, TRAIN_S, quality_name
from recsys.runs.run_directory import RunDir
from recsys.runs.summary import RunSummary

if TYPE_CHECKING:
    from torchx.tracker.api import AppRun

_FILES = ("config.toml", "environment.json", "plan.txt", "metrics.jsonl", "summary.json")


def track_start(run_dir: RunDir, config: Mapping[str, Any]) -> None:
    """Record the config under its dotted keys, and the run directory. config: nested tables, as in config.toml."""

    def record(run: "AppRun") -> None:
        """Write the config and the run directory into the tracker's entry."""
        run.add_metadata(**flatten(config))
        run.add_artifact("run_dir", str(run_dir.path.resolve()))

    _record("start", record)


def track_end(run_dir: RunDir) -> None:
    """Record the figures of a finished run, and the files it left.

    Of a run that failed there are none: a job that is started again keeps its entry, in which the figures of one
    attempt could not be told from those of another. Its run directory says why it failed.
    """

    def record(run: "AppRun") -> None:
        """Write figures and files into the tracker's entry."""
        run.add_metadata(**figures(run_dir.read_summary()))
        for name, path in _artifacts(run_dir):
            run.add_artifact(name, path)

    _record("end", record)


def figures(summary: RunSummary) -> dict[str, Any]:
    """Return the figures of a run by the names of `recsys.runs.metrics`; what was not measured is left out."""
    best = summary.best or {}
    found = {
        "status": summary.status,
        "stop_reason": summary.stop_reason,
        **{quality_name("test", name): best.get(f"test_{name}") for name in QUALITY},
        STEP_MS: summary.step_ms and summary.step_ms.p50,
        SAMPLES_PER_S: summary.samples_per_s,
        TRAIN_S: summary.train_time_s,
        PEAK_GIB: max(summary.peak_memory_gib or (), default=None),
    }
    return {name: value for name, value in found.items() if value is not None}


def _artifacts(run_dir: RunDir) -> Iterator[tuple[str, str]]:
    """Yield names and absolute paths of the files there are; for TensorBoard the directory it is started with."""
    path = run_dir.path.resolve()
    found = [path / name for name in _FILES]
    found += sorted(path.glob("profile/*"))
    yield from ((str(file.relative_to(path)), str(file)) for file in found if file.exists())
    if any(path.glob("events.out.*")):
        yield "tensorboard", str(path)


def _record(what: str, record: Callable[["AppRun"], None]) -> None:
    """Record in the tracker's entry of this job, where torchx started it with a tracker."""
    if not os.environ.get("TORCHX_TRACKERS") or not os.environ.get("TORCHX_JOB_ID"):
        return
    try:
        from torchx.tracker.api import AppRun

        record(AppRun.run_from_env())
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        print(f"warning: the {what} of the run is not tracked: {reason}", file=sys.stderr, flush=True)
