"""A run directory, read and checked: what every comparison, table and page is made from."""

import json
import tomllib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from recsys.report.curves import Point
from recsys.runs.run_directory import RunDir
from recsys.runs.summary import RunSummary

_POSITION = {"step", "samples", "epoch", "time_s"}


class ComparisonError(ValueError):
    """Report runs that cannot be read or compared; the message names them."""


@dataclass(frozen=True)
class Run:
    """Hold one run directory, read. label: its name, or its path where another run has that name too."""

    path: Path
    label: str
    summary: RunSummary
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]
    plan: str | None

    @property
    def threads(self) -> int:
        """Return the CPU threads of all ranks together."""
        return self.summary.world_size * self.summary.threads_per_rank

    def curve(self, metric: str) -> list[Point]:
        """Return the records that hold the metric, in the order of training."""
        records = (r for r in self.records if r.get(metric) is not None)
        return [Point(r["time_s"], r["samples"], r["epoch"], r[metric]) for r in records]


def load_runs(paths: Sequence[str | Path]) -> list[Run]:
    """Return the runs in order. Raises ComparisonError naming the path that is missing, given twice or not readable."""
    first: dict[Path, str | Path] = {}
    for path in paths:
        if (real := Path(path).resolve()) in first:
            raise ComparisonError(
                f"{path} is given twice" + (f", also as {first[real]}" if first[real] != path else "")
            )
        first[real] = path
    read = [_load_run(Path(path)) for path in paths]
    names = Counter(run.summary.name for run in read)
    return [run if names[run.summary.name] == 1 else replace(run, label=str(run.path)) for run in read]


def _load_run(path: Path) -> Run:
    if not path.is_dir():
        what = "is not a directory" if path.exists() else "does not exist"
        raise ComparisonError(f"{path} {what}: a run directory is expected, such as runs/demo/demo_robe")
    run_dir = RunDir(path)
    try:
        summary = _read(path / "summary.json", run_dir.read_summary)
        config = _read(path / "config.toml", run_dir.read_config)
        environment = _read(path / "environment.json", run_dir.read_environment)
        plan = run_dir.read_plan() if (path / "plan.txt").is_file() else None
    except FileNotFoundError as error:
        raise ComparisonError(str(error)) from None
    if not isinstance(environment, dict):
        raise ComparisonError(f"{path / 'environment.json'} is corrupt: it holds no object")
    return Run(path, summary.name, summary, config, environment, _read_records(run_dir), plan)


def _read(path: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except ValidationError as error:
        mistakes = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'the whole'}: {e['msg'].lower()}" for e in error.errors()
        )
        raise ComparisonError(f"{path} is not a summary of a run: {mistakes}") from None
    except (json.JSONDecodeError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ComparisonError(f"{path} is corrupt: {error}") from None


def _read_records(run_dir: RunDir) -> list[dict[str, Any]]:
    path, records = run_dir.path / "metrics.jsonl", []
    try:
        for record in run_dir.records():
            if not isinstance(record, dict) or not record.keys() >= _POSITION:
                raise ComparisonError(f"{path}, line {len(records) + 1}: a record lacks step, samples, epoch or time_s")
            records.append(record)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ComparisonError(f"{path}, line {len(records) + 1} is corrupt: {error}") from None
    return records
