"""Run directories as a comparison takes them: read, checked, and held against each other.

Fair means: the same data, model, optimizer, training, evaluation, threads in total and hardware. What may differ are
the embeddings, their placement, and the seed.
"""

import json
import tomllib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from configs.load import flatten
from recsys.report.curves import Point
from recsys.runs.run_dir import RunDir
from recsys.runs.summary import RunSummary

SHARED_SECTIONS = ("data", "model", "optimizer", "training", "evaluation")
FREE_SECTIONS = ("embedding", "parallelism")
_PLACES = ("cache_dir", "path")  # in [data]: where files lie; what is in them has a fingerprint


class ComparisonError(ValueError):
    """Runs that cannot be read or compared; the message names them."""


@dataclass(frozen=True)
class Run:
    """One run directory, read. label: its name, or its path where another run has that name too."""

    path: Path
    label: str
    summary: RunSummary
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]
    plan: str | None

    @property
    def threads(self) -> int:
        return self.summary.world_size * self.summary.threads_per_rank

    def curve(self, metric: str) -> list[Point]:
        """The records that hold the metric, in the order of training."""
        found = (r for r in self.records if r.get(metric) is not None)
        return [Point(r["time_s"], r["samples"], r["epoch"], r[metric]) for r in found]


@dataclass(frozen=True)
class Difference:
    """A key on which runs differ: each value with the labels of the runs that have it."""

    key: str
    values: tuple[tuple[Any, tuple[str, ...]], ...]

    def __str__(self) -> str:
        return f"{self.key}: " + ", ".join(f"{_show(value)} ({', '.join(labels)})" for value, labels in self.values)


def load_runs(paths: Sequence[str | Path]) -> list[Run]:
    """The runs in order. Raises ComparisonError naming the path that is missing, given twice or not readable."""
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
        found = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'the whole'}: {e['msg'].lower()}" for e in error.errors())
        raise ComparisonError(f"{path} is not a summary of a run: {found}") from None
    except (json.JSONDecodeError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ComparisonError(f"{path} is corrupt: {error}") from None


def _read_records(run_dir: RunDir) -> list[dict[str, Any]]:
    path, records = run_dir.path / "metrics.jsonl", []
    try:
        for record in run_dir.records():
            if not isinstance(record, dict) or not {"step", "samples", "epoch", "time_s"} <= record.keys():
                raise ComparisonError(f"{path}, line {len(records) + 1}: a record lacks step, samples, epoch or time_s")
            records.append(record)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ComparisonError(f"{path}, line {len(records) + 1} is corrupt: {error}") from None
    return records


def _sections(run: Run, sections: Sequence[str]) -> dict[str, Any]:
    flat = flatten({section: run.config.get(section, {}) for section in sections})
    return {k: v for k, v in flat.items() if not (k.startswith("data.") and k.rpartition(".")[2] in _PLACES)}


def shared_facts(run: Run) -> dict[str, Any]:
    """What every run of a fair comparison must have in common."""
    best, on_gpu = run.summary.best_possible, run.summary.device == "cuda"
    return {
        **_sections(run, SHARED_SECTIONS),
        "fingerprint of the data": run.summary.data_fingerprint,
        "training rows": run.summary.train_rows,
        "test rows": run.summary.test_rows,
        "best possible AUC": best and round(best.auc, 6),
        "selecting rows": run.summary.selected_on,
        "device": run.summary.device,
        "hardware": run.environment.get("device" if on_gpu else "cpu"),
        "threads in total": run.threads,
    }


def free_facts(run: Run) -> dict[str, Any]:
    """What runs of a fair comparison may differ in."""
    return {**_sections(run, FREE_SECTIONS), "seed": run.summary.seed}


def is_full(run: Run) -> bool:
    return run.summary.compression.target == 1.0


def group_by_seed(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs alike in all but their seed, in the order given.

    A run that repeats a seed of its group begins another, and so do runs that are not finished: their figures are not
    averaged with those of finished ones.
    """
    groups: dict[tuple[str, int], list[Run]] = {}
    for run in runs:
        facts = {**shared_facts(run), **free_facts(run), "seed": None, "finished": run.summary.status == "finished"}
        alike, repeat = json.dumps(facts, sort_keys=True, default=str), 0
        while any(other.summary.seed == run.summary.seed for other in groups.get((alike, repeat), [])):
            repeat += 1
        groups.setdefault((alike, repeat), []).append(run)
    return list(groups.values())


def find_differences(runs: Sequence[Run], facts: Callable[[Run], Mapping[str, Any]]) -> list[Difference]:
    """The keys whose values are not the same in all runs; a key that a run lacks counts as None there."""
    tables = [facts(run) for run in runs]
    differences = []
    for key in dict.fromkeys(key for table in tables for key in table):
        labels: dict[str, dict[str, None]] = {}  # ordered, each label once: a setup of several runs has one
        values: dict[str, Any] = {}
        for run, table in zip(runs, tables, strict=True):
            value = table.get(key)
            # 1 and 1.0 are one value, 1 and True are not.
            identity = f"{value:.17g}" if type(value) in (int, float) else repr(value)
            values.setdefault(identity, value)
            labels.setdefault(identity, {})[run.label] = None
        if len(labels) > 1:
            differences.append(Difference(key, tuple((values[i], tuple(names)) for i, names in labels.items())))
    return differences


def check_fair(runs: Sequence[Run]) -> None:
    """Raises ComparisonError listing everything that should be shared and is not, with all values."""
    if differences := find_differences(runs, shared_facts):
        raise ComparisonError(
            "these runs differ in what a fair comparison shares:\n"
            + "\n".join(f"  {difference}" for difference in differences)
            + "\nRun them alike, or compare them nevertheless with --allow-differences."
        )


def find_caveats(runs: Sequence[Run]) -> list[str]:
    """What a reader must know of how these runs came about, in sentences."""
    caveats = []
    for run in runs:
        if run.summary.status != "finished":
            error = run.summary.error
            why = f" (rank {error.rank}: {error.message})" if error and error.message != run.summary.status else ""
            caveats.append(f"{run.label} is not finished but {run.summary.status}: its figures are those so far{why}.")
        if run.summary.selected_on == "test":
            caveats.append(f"{run.label} had no validation rows: its best evaluation was chosen on the test rows.")
        if unmatched := sum(rank.unmatched for window in run.summary.profiles for rank in window.ranks):
            caveats.append(
                f"{run.label}: {unmatched} collectives of its profiled windows could not be matched between ranks; "
                "none of their time counts as waiting."
            )
    if changed := [run.label for run in runs if run.environment.get("uncommitted_changes")]:
        caveats.append(f"Started from uncommitted changes: {', '.join(changed)}.")
    if unknown := [run.label for run in runs if not run.environment.get("commit")]:
        caveats.append(f"Started outside a git repository, commit unknown: {', '.join(unknown)}.")
    for key, what in (("commit", "Commits"), ("packages", "Package versions"), ("python", "Python versions")):
        differences = find_differences(runs, lambda run, key=key: flatten({key: _short(run.environment.get(key))}))
        caveats += [f"{what} differ: {difference}." for difference in differences]
    return caveats


def _show(value: Any) -> str:
    return "none" if value is None else json.dumps(value) if isinstance(value, bool | list | dict) else str(value)


def _short(value: Any) -> Any:
    return value[:10] if isinstance(value, str) else value
