"""What a run leaves behind, and the only thing a comparison reads.

    runs/<name>/
      config.toml        the resolved config: every default filled in
      environment.json   commit, versions, hardware, threads, command
      plan.txt           where each embedding table lives
      metrics.jsonl      one record a line: step, samples, epoch, time_s and metrics by their names
      summary.json       the run in one object; rewritten at every evaluation, so a killed run has a valid one
      test_scores.npz    logits and labels of the test rows at the best evaluation
      events.out.*       the same records for TensorBoard
      checkpoints/       step_<n>/
      profile/           traces of profiled windows, one a rank, for a trace viewer

Small files are written to a temporary name and renamed: a reader never sees half of one.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recsys.runs.summary import Failure, RunSummary, Status

_PACKAGES = ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "torchx", "numpy")


def write_atomically(path: Path, text: str) -> None:
    """The whole text or nothing."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)


class RunDir:
    """Paths and readers of one run directory."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def trace(self, step: int, rank: int) -> Path:
        """Of the profiled window that begins with the step."""
        return self.path / "profile" / f"step_{step}_rank_{rank}.json.gz"

    def exists(self) -> bool:
        return (self.path / "summary.json").exists()

    def check_free(self, overwrite: bool, resume: bool) -> None:
        """Raises ValueError when a finished run would be lost; a run that can be resumed, or never ended, is not."""
        if overwrite or not self.exists() or self.read_summary().status != "finished":
            return
        if resume and self._can_be_resumed():
            return
        raise ValueError(f"{self.path} holds a finished run: choose another run.name, or set run.overwrite=true")

    def _can_be_resumed(self) -> bool:
        return any(self.checkpoints.glob("step_*"))

    def create(self, config: str, environment: Mapping[str, Any], *, resume: bool) -> None:
        """Makes the directory ready for a run; what an earlier one left goes, unless its checkpoints are continued."""
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
        write_atomically(self.path / "plan.txt", plan)

    def write_summary(self, summary: RunSummary) -> None:
        write_atomically(self.path / "summary.json", json.dumps(summary.model_dump(), indent=2))

    def mark_ended(self, status: Status, failure: Failure) -> None:
        """Writes how the run ended into its summary; of several ranks the first to say so is where it began."""
        if self.exists() and (summary := self.read_summary()).status == "running":
            self.write_summary(summary.ended(status, failure))

    def write_scores(self, logits: np.ndarray, labels: np.ndarray) -> None:
        """Of the test rows, in their order: (n,) float32 and (n,) of 0 and 1."""
        path = self.path / "test_scores.npz"
        temporary = path.with_name(f".{path.name}.{os.getpid()}.npz")
        np.savez(temporary, logits=logits.astype(np.float32), labels=labels.astype(np.uint8))
        os.replace(temporary, path)

    def read_scores(self) -> tuple[np.ndarray, np.ndarray]:
        """What `write_scores` was given at the best evaluation. Raises FileNotFoundError."""
        path = self.path / "test_scores.npz"
        if not path.is_file():
            raise FileNotFoundError(f"{self.path} has no scores of its test rows: {path.name} is missing")
        with np.load(path) as found:
            return found["logits"], found["labels"]

    def read_config(self) -> dict[str, Any]:
        return tomllib.loads(self._read("config.toml"))

    def read_environment(self) -> dict[str, Any]:
        return json.loads(self._read("environment.json"))

    def read_summary(self) -> RunSummary:
        """Raises pydantic's ValidationError for what is no summary of a run."""
        return RunSummary.model_validate(json.loads(self._read("summary.json")))

    def read_plan(self) -> str:
        return self._read("plan.txt")

    def records(self) -> Iterator[dict[str, Any]]:
        """The records of metrics.jsonl in order; a last line cut off by a crash is left out."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return
        with path.open() as lines:
            for line in lines:
                if line.endswith("\n"):
                    yield json.loads(line)

    def keep_records_until(self, step: int) -> None:
        """Drops the records after `step`: a resumed run writes them again."""
        kept = [json.dumps(record) + "\n" for record in self.records() if record["step"] <= step]
        write_atomically(self.path / "metrics.jsonl", "".join(kept))

    def append_record(self, record: Mapping[str, Any]) -> None:
        with (self.path / "metrics.jsonl").open("a") as lines:
            lines.write(json.dumps(record) + "\n")

    def _read(self, name: str) -> str:
        path = self.path / name
        if not path.is_file():
            raise FileNotFoundError(f"{self.path} is not a run directory: {name} is missing")
        return path.read_text()


def describe_environment(device: torch.device, world_size: int) -> dict[str, Any]:
    """When and from what this process was started: commit, versions, hardware, threads and command."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_cores": os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "world_size": world_size,
        "threads_per_rank": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", ""),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def _git(*arguments: str) -> str | None:
    root = Path(__file__).parent
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()
