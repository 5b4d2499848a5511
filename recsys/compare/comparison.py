"""Runs side by side: taken together over their seeds, set against a target AUC and a baseline.

The baseline is the first arm with full tables, else the first. What fair means: `recsys.report.fairness`.
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import polars as pl

from recsys.report.curves import CurveOrder, TimeToTarget, order_curves
from recsys.report.fairness import (
    Difference,
    arm_keys,
    check_fair,
    find_caveats,
    find_differences,
    free_facts,
    shared_facts,
)
from recsys.report.frame import Arm, Ratios, Results, Target, build_results, figures_as_json
from recsys.report.run import Run, load_runs
from recsys.runs.metrics import QUALITY
from recsys.runs.summary import BestPossible

JSON_VERSION = 2
_FACTS = ("method", "placement", "sharding", "world_size", "threads_per_rank", "parameters", "compression")


@dataclass(frozen=True)
class Comparison:
    """Hold arms against the first of them, the baseline.

    runs: of all arms, in their order. split: whose rows choose the best evaluation. differences: what runs of a fair
    comparison share and these do not; varied: what they may differ in and do.
    """

    runs: tuple[Run, ...]
    arms: tuple[Arm, ...]
    split: str
    target: Target | None
    differences: tuple[Difference, ...]
    varied: tuple[Difference, ...]
    caveats: tuple[str, ...]

    @property
    def baseline(self) -> Arm:
        """Return the arm that ratios are taken to."""
        return self.arms[0]

    @property
    def others(self) -> list[Arm]:
        """Return the arms that are not the baseline."""
        return list(self.arms[1:])

    @property
    def best_possible(self) -> BestPossible | None:
        """Return the quality that no model can exceed on the test rows; None if unknown or not the same for all."""
        first, *others = (run.summary.best_possible for run in self.runs)
        return first if all(other == first for other in others) else None

    @property
    def metrics(self) -> list[str]:
        """Return the metrics of the registry that some arm has at its best evaluation.

        Runs made before a metric was registered do not have it: their table and JSON stay as they were.
        """
        return [name for name in QUALITY if any(arm.at_best(f"test_{name}") for arm in self.arms)]

    def runs_of(self, arm: Arm) -> list[Run]:
        """Return the runs of an arm, read from their directories."""
        names = arm.values("run")
        return [run for run in self.runs if run.label in names]

    def ratios(self, arm: Arm) -> Ratios:
        """Return an arm's figures over the baseline's."""
        return arm.ratios(self.baseline, self.target)

    def time_to_target(self, arm: Arm) -> TimeToTarget | None:
        """Return where in training an arm reaches the target."""
        return arm.time_to_target(self.target)

    def order(self, arm: Arm) -> CurveOrder | None:
        """Return when an arm's AUC is above the baseline's at equal training time; None for the baseline."""
        if arm is self.baseline:
            return None
        metric = f"{self.split}_auc"
        return order_curves(arm.mean_curve(metric), self.baseline.mean_curve(metric))

    def to_json(self) -> dict[str, Any]:
        """Return every figure as JSON holds it. A key is never left out: what was not measured is null."""
        best, metrics = self.best_possible, self.metrics or list(QUALITY)
        return {
            "version": JSON_VERSION,
            "baseline": self.baseline.label,
            "target": self.target and asdict(self.target),
            "best_possible": best and best.model_dump(),
            "arms": [self._arm_to_json(arm, metrics) for arm in self.arms],
            "runs": [_run_to_json(run) for run in self.runs],
            "varied": [difference.to_json() for difference in self.varied],
            "differences": [difference.to_json() for difference in self.differences],
            "caveats": list(self.caveats),
        }

    def _arm_to_json(self, arm: Arm, metrics: Sequence[str]) -> dict[str, Any]:
        summary, order = self.runs_of(arm)[0].summary.model_dump(), self.order(arm)
        return {
            "label": arm.label,
            "is_baseline": arm is self.baseline,
            "runs": arm.values("run"),
            "seeds": arm.values("seed"),
            "status": arm.values("status"),
            **{fact: summary[fact] for fact in _FACTS},
            "figures": _arm_figures(arm, self.split, self.target, metrics),
            "ratios": asdict(self.ratios(arm)),
            "curve_order": order and asdict(order),
        }


def compare(
    paths: Sequence[str | Path], target_auc: float | None = None, allow_differences: bool = False
) -> Comparison:
    """Read run directories and compare them. Raises ComparisonError when they cannot be read or compared fairly."""
    runs = load_runs(paths)
    if not allow_differences:
        check_fair(runs)
    members: dict[Any, list[Run]] = {}
    for run, key in zip(runs, arm_keys(runs), strict=True):
        members.setdefault(key, []).append(run)
    baseline = next((group for group in members.values() if is_full(group[0])), next(iter(members.values())))
    groups = [baseline, *(group for group in members.values() if group is not baseline)]
    labels = _label_arms(groups)
    results = build_results((run, {"arm": label}) for label, group in zip(labels, groups, strict=True) for run in group)
    split = groups[0][0].summary.selected_on
    by_arm = [replace(run, label=label) for label, group in zip(labels, groups, strict=True) for run in group]
    return Comparison(
        runs=tuple(run for group in groups for run in group),
        arms=tuple(results.arms()),
        split=split,
        target=choose_target(runs, results, split, target_auc),
        differences=tuple(find_differences(runs, shared_facts)),
        varied=tuple(find_differences(by_arm, free_facts)),
        caveats=tuple(find_caveats(runs)),
    )


def is_full(run: Run) -> bool:
    """Return whether a run has full tables."""
    return run.summary.compression.target == 1.0


def choose_target(runs: Sequence[Run], results: Results, split: str, given: float | None) -> Target | None:
    """Return the target given, else that of all configs, else what every finished run with full tables reaches."""
    if given is not None:
        return Target(given, split, "given on the command line")
    configured = {run.config.get("training", {}).get("target_auc") for run in runs}
    if len(configured) == 1 and (common := configured.pop()) is not None:
        return Target(common, split, "training.target_auc of every run")
    metric = f"{split}_auc"
    finished = (pl.col("compression.target") == 1.0) & (pl.col("status") == "finished")
    evaluated = [curve for arm in results.filter(finished).arms() for curve in arm.curves(metric) if curve]
    if not evaluated:
        return None
    rule = f"the lowest of the best {split} AUCs of the {len(evaluated)} finished runs with full tables"
    only = f"the best {split} AUC of the only finished run with full tables"
    lowest = min(max(point.value for point in curve) for curve in evaluated)
    return Target(lowest, split, rule if len(evaluated) > 1 else only)


def _label_arms(groups: Sequence[Sequence[Run]]) -> list[str]:
    """Return what the names of each arm's runs have in common, or the first name where two arms would be alike."""
    labels = [_common_name([run.summary.name for run in group]) for group in groups]
    return [label if labels.count(label) == 1 else group[0].label for label, group in zip(labels, groups, strict=True)]


def _common_name(names: Sequence[str]) -> str:
    """Return the start that names share: ("robe_seed1", "robe_seed2") -> "robe"; the first one where nothing is."""
    if len(names) == 1:
        return names[0]
    letters = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*names, strict=False))
    common = "".join(column[0] for column in letters)
    return re.sub(r"[_.-]*(?:(?<=[_.-])s(?:eed)?)?[_.-]*$", "", common) or names[0]


def _arm_figures(arm: Arm, split: str, target: Target | None, metrics: Sequence[str]) -> dict[str, Any]:
    """Return what an arm measured as JSON holds it.

    split: whose AUC the target is set to. Times are in ms or s as their names say, sizes in bytes or GiB.
    """
    best_epoch, parameters = arm.at_best("epoch"), arm.embedding_bytes
    measured = {
        **{f"test_{name}": arm.at_best(f"test_{name}", sampling_error=True) for name in metrics},
        "target_split_auc": arm.at_best(f"{split}_auc"),
        "best_epoch": best_epoch and best_epoch.mean,
        "embedding_bytes": parameters[0],
        "embedding_optimizer_bytes": parameters[1],
        **{f"{what}_{part}": arm.mean(f"{what}.{part}") for what in ("step_ms", "data_ms") for part in ("p50", "p95")},
        "samples_per_s": arm.mean("samples_per_s"),
        "time": arm.profiled,
        "train_time_s": arm.mean("train_time_s"),
        "epochs": fmean(arm.values("epochs")),
        "samples": fmean(arm.values("samples")),
        "peak_memory_gib": arm.peak_memory_gib,
        "target": arm.time_to_target(target),
    }
    return figures_as_json(measured)


def _run_to_json(run: Run) -> dict[str, Any]:
    commit, changed = run.environment.get("commit"), run.environment.get("uncommitted_changes")
    head = {"label": run.label, "path": str(run.path), "commit": commit, "uncommitted_changes": changed}
    return head | run.summary.model_dump()
