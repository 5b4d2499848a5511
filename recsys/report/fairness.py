"""Whether runs may be compared: what all of them must share, what they may differ in, and what a reader must know.

Fair means: the same data, model, optimizer, training, evaluation, threads in total and hardware. What may differ are
the embeddings, their placement, and the seed.
"""

import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from configs.load import flatten
from recsys.report.run import ComparisonError, Run

SHARED_SECTIONS = ("data", "model", "optimizer", "training", "evaluation")
FREE_SECTIONS = ("embedding", "parallelism")
_PLACES = ("cache_dir", "path")  # in [data]: where files lie; what is in them has a fingerprint


@dataclass(frozen=True)
class Difference:
    """Hold a key on which runs differ: each value with the labels of the runs that have it."""

    key: str
    values: tuple[tuple[Any, tuple[str, ...]], ...]

    def __str__(self) -> str:
        return f"{self.key}: " + ", ".join(f"{_show(value)} ({', '.join(labels)})" for value, labels in self.values)

    def to_json(self) -> dict[str, Any]:
        """Return the difference as JSON holds it."""
        return {"key": self.key, "values": [{"value": v, "runs": list(labels)} for v, labels in self.values]}


def shared_facts(run: Run) -> dict[str, Any]:
    """Return what every run of a fair comparison must have in common."""
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
    """Return what runs of a fair comparison may differ in."""
    return {**_sections(run, FREE_SECTIONS), "seed": run.summary.seed}


def _sections(run: Run, sections: Sequence[str]) -> dict[str, Any]:
    flat = flatten({section: run.config.get(section, {}) for section in sections})
    return {k: v for k, v in flat.items() if not (k.startswith("data.") and k.rpartition(".")[2] in _PLACES)}


def arm_keys(runs: Sequence[Run]) -> list[Hashable]:
    """Return a key for every run, the same for runs that are alike in all but their seed.

    A run that repeats a seed of its arm begins another, and so do runs that are not finished: their figures are not
    averaged with those of finished ones.
    """
    keys, seen = [], set()
    for run in runs:
        facts = {**shared_facts(run), **free_facts(run), "seed": None, "finished": run.summary.status == "finished"}
        alike, repeat = json.dumps(facts, sort_keys=True, default=str), 0
        while (alike, repeat, run.summary.seed) in seen:
            repeat += 1
        seen.add((alike, repeat, run.summary.seed))
        keys.append((alike, repeat))
    return keys


def find_differences(runs: Sequence[Run], facts: Callable[[Run], Mapping[str, Any]]) -> list[Difference]:
    """Return the keys whose values are not the same in all runs; a key that a run lacks counts as None there."""
    tables = [facts(run) for run in runs]
    differences = []
    for key in dict.fromkeys(key for table in tables for key in table):
        labels: dict[str, dict[str, None]] = {}  # ordered, each label once: an arm of several runs has one
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
    """Raise ComparisonError listing everything that should be shared and is not, with all values."""
    if differences := find_differences(runs, shared_facts):
        raise ComparisonError(
            "these runs differ in what a fair comparison shares:\n"
            + "\n".join(f"  {difference}" for difference in differences)
            + "\nRun them alike, or compare them nevertheless with --allow-differences."
        )


def find_caveats(runs: Sequence[Run]) -> list[str]:
    """Return what a reader must know of how these runs came about, in sentences."""
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
