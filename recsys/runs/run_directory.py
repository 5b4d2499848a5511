"""What a run leaves behind, and the only thing a comparison reads.

    runs/<name>/
      config.toml        the resolved config: every default filled in
      environment.json   commit, versions, hardware, threads, command
      plan.txt           where each embedding table lives
      metrics.jsonl      one record a line: step, samples, epoch, time_s and metrics by their names
      summary.json       the run in one object; rewritten at every evaluation, so a killed run has a valid one
      test_scores.npz    logits and labels of the test rows at the best evaluation
      events.out.*       the same records for TensorBoard
      checkpoints/       step_<n>/, best
      profile/           traces of profiled windows, one a rank, for a trace viewer

Small files are written to a temporary name and renamed: a reader never sees half of one.
"""

import contextlib
import json
import os
import shutil
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from recsys.runs.summary import Failure, RunSummary, Status


def write_atomically(path: Path, text: str) -> None:
    """Write the whole text or nothing: a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)


class RunDir:
    """One run directory: its paths, its readers, and what writes it.

    Whoever trains into it holds it open (`open_for_writing`); everything else only reads.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def name(self) -> str:
        """The name of the run, which is that of its directory."""
        return self.path.name

    @property
    def checkpoints(self) -> Path:
        """The directory of the run's checkpoints, see `recsys.train.checkpoint`."""
        return self.path / "checkpoints"

    def trace(self, step: int, rank: int) -> Path:
        """Return the file of a rank's trace of the profiled window that begins with the step."""
        return self.path / "profile" / f"step_{step}_rank_{rank}.json.gz"

    def exists(self) -> bool:
        """Return whether a run has come so far as to have a summary."""
        return (self.path / "summary.json").exists()

    @contextlib.contextmanager
    def open_for_writing(self, *, overwrite: bool, resume: bool) -> Iterator[None]:
        """Hold the directory for one run: the one place through which a process may begin to write to it.

        Raises ValueError when a finished run would be lost, before anything is written. Nothing is created or removed
        here: that is `start`, once the run has all it needs.
        """
        self._check_free(overwrite, resume)
        yield

    def _check_free(self, overwrite: bool, resume: bool) -> None:
        if overwrite or not self.exists() or self.read_summary().status != "finished":
            return
        if resume and self._can_be_resumed():
            return
        raise ValueError(f"{self.path} holds a finished run: choose another run.name, or set run.overwrite=true")

    def _can_be_resumed(self) -> bool:
        return any(self.checkpoints.glob("step_*"))

    def start(self, config: str, environment: Mapping[str, Any], *, resume: bool) -> None:
        """Make the directory ready for a run: what an earlier one left goes, unless its checkpoints are continued."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not (resume and self._can_be_resumed()):
            for directory in (self.checkpoints, self.path / "profile"):
                shutil.rmtree(directory, ignore_errors=True)
            named = [self.path / name for name in ("summary.json", "metrics.jsonl", "test_scores.npz")]
            for old in (*named, *self.path.glob("events.out.*")):
                old.unlink(missing_ok=True)
        write_atomically(self.path / "config.toml", config)
        write_atomically(self.path / "environment.json", json.dumps(environment, indent=2))

    def write_plan(self, plan: str) -> None:
        """Write where each embedding table lives, as text."""
        write_atomically(self.path / "plan.txt", plan)

    def write_summary(self, summary: RunSummary) -> None:
        """Write what is known of the run so far."""
        write_atomically(self.path / "summary.json", json.dumps(summary.model_dump(), indent=2))

    def mark_ended(self, status: Status, failure: Failure) -> None:
        """Write how the run ended into its summary, once: of several ranks the first to say so is where it began."""
        if self.exists() and (summary := self.read_summary()).status == "running":
            self.write_summary(summary.ended(status, failure))

    def write_scores(self, logits: np.ndarray, labels: np.ndarray) -> None:
        """Write the scores of the test rows in their order: logits (n,) float32, labels (n,) of 0 and 1."""
        path = self.path / "test_scores.npz"
        temporary = path.with_name(f".{path.name}.{os.getpid()}.npz")
        np.savez(temporary, logits=logits.astype(np.float32), labels=labels.astype(np.uint8))
        os.replace(temporary, path)

    def read_scores(self) -> tuple[np.ndarray, np.ndarray]:
        """Return logits (n,) and labels (n,) of the test rows at the best evaluation. Raises FileNotFoundError."""
        path = self.path / "test_scores.npz"
        if not path.is_file():
            raise FileNotFoundError(f"{self.path} has no scores of its test rows: {path.name} is missing")
        with np.load(path) as scores:
            return scores["logits"], scores["labels"]

    def read_config(self) -> dict[str, Any]:
        """Return the resolved config as nested tables."""
        return tomllib.loads(self._read("config.toml"))

    def read_environment(self) -> dict[str, Any]:
        """Return what `recsys.runs.environment.describe_environment` said."""
        return json.loads(self._read("environment.json"))

    def read_summary(self) -> RunSummary:
        """Return the summary. Raises pydantic's ValidationError for what is no summary of a run."""
        return RunSummary.model_validate(json.loads(self._read("summary.json")))

    def read_plan(self) -> str:
        """Return where each embedding table lives, as text."""
        return self._read("plan.txt")

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield the records of metrics.jsonl in order; a last line cut off by a crash is left out."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return
        with path.open() as lines:
            for line in lines:
                if line.endswith("\n"):
                    yield json.loads(line)

    def keep_records_until(self, step: int) -> None:
        """Drop the records after `step`: a resumed run writes them again."""
        kept = [json.dumps(record) + "\n" for record in self.records() if record["step"] <= step]
        write_atomically(self.path / "metrics.jsonl", "".join(kept))

    def append_record(self, record: Mapping[str, Any]) -> None:
        """Add a record to metrics.jsonl."""
        with (self.path / "metrics.jsonl").open("a") as lines:
            lines.write(json.dumps(record) + "\n")

    def _read(self, name: str) -> str:
        path = self.path / name
        if not path.is_file():
            raise FileNotFoundError(f"{self.path} is not a run directory: {name} is missing")
        return path.read_text()
