"""The figures of an experiment's groups: quality over seeds, epochs and time to the target, quality at equal time.

Target: given, or as the PSS paper takes it, the lowest of the best test AUCs that the runs with full tables reach. It
is looked for on the test rows, which no choice is made on: rates and best evaluations are chosen on validation rows.
Relative time is epochs to the target (A) times time per iteration (B), over the same product of the full tables.
Equal time: every group has the training time of the group that was done first, and its best evaluation within it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import fmean
from typing import Any

from recsys.report.curves import Point, TimeToTarget, time_to_target
from recsys.report.frame import Measured, mean_over_runs
from recsys.report.verdict import AucDifference, Verdict
from recsys.studies.experiment_records import Results

Row = Mapping[str, Any]


@dataclass(frozen=True)
class RunFigures:
    """One run: its own columns in `row`, its evaluations in the order of training."""

    row: Row
    evaluations: Sequence[Row]

    def curve(self, column: str = "test_auc") -> list[Point]:
        return [
            Point(e["time_s"], e["samples"], e["epoch"], e[column]) for e in self.evaluations if e[column] is not None
        ]

    def best_within(self, seconds: float) -> Row | None:
        """The evaluation of lowest log loss on the selecting rows, of those in the first seconds of training."""
        column = f"{self.row['selected_on']}_log_loss"
        found = [e for e in self.evaluations if e["time_s"] <= seconds]
        return min(found, key=lambda e: e[column], default=None)

    @property
    def best(self) -> Row:
        return next(e for e in self.evaluations if e["is_best"])

    @property
    def seconds(self) -> float:
        """Training and evaluation."""
        return (self.row["train_time_s"] or 0.0) + (self.row["evaluation_time_s"] or 0.0)


@dataclass(frozen=True)
class GroupFigures:
    """One setting, model, method and compression.

    runs: finished ones at the chosen rate; trials: those it was chosen by. asked: seeds. is_able: whether anything was
    run; problems: of runs that failed, or why nothing was. budget_s: of the comparison at equal time.
    """

    setting: str
    architecture: str
    method: str
    compression: float
    is_baseline: bool
    is_able: bool
    asked: int
    runs: Sequence[RunFigures]
    trials: Sequence[RunFigures]
    problems: Sequence[str]
    parameters: int | None
    step_ms_alone: float | None
    difference: AucDifference | None
    target: float | None = None
    budget_s: float | None = None
    baseline: "GroupFigures | None" = field(default=None, repr=False)

    @cached_property
    def auc(self) -> Measured | None:
        return mean_over_runs(run.best["test_auc"] for run in self.runs)

    @cached_property
    def log_loss(self) -> Measured | None:
        return mean_over_runs(run.best["test_log_loss"] for run in self.runs)

    @cached_property
    def best_epoch(self) -> float | None:
        return fmean(run.best["epoch"] for run in self.runs) if self.runs else None

    @cached_property
    def arrival(self) -> TimeToTarget | None:
        if self.target is None or not self.runs:
            return None
        return time_to_target([run.curve() for run in self.runs], self.target)

    @cached_property
    def equal_time_auc(self) -> Measured | None:
        if self.budget_s is None:
            return None
        best = [run.best_within(self.budget_s) for run in self.runs]
        return mean_over_runs(found["test_auc"] for found in best if found is not None)

    @property
    def epochs(self) -> float | None:
        """The most that a run was trained."""
        return max((run.evaluations[-1]["epoch"] for run in self.runs), default=None)

    @property
    def is_stopped_early(self) -> bool:
        """Whether a run ended before the epochs it was given."""
        return any(run.row["stop_reason"] == "patience" for run in self.runs)

    @property
    def learning_rate(self) -> float | None:
        return self.runs[0].row["learning_rate"] if self.runs else None

    @property
    def is_at_edge(self) -> bool:
        """Whether the learning rate is the lowest or highest tried: a better one may lie beyond."""
        tried = {run.row["learning_rate"] for run in self.trials}
        return len(tried) > 1 and self.learning_rate in (min(tried), max(tried))

    @property
    def step_ms(self) -> float | None:
        """Measured alone where it was, else the mean of the runs' medians."""
        own = [run.row["step_ms"] for run in self.runs if run.row["step_ms"]]
        return self.step_ms_alone or (fmean(own) if own else None)

    @property
    def epochs_to_target(self) -> float | None:
        """Observed; None where a run did not reach it."""
        return self.arrival.observed.epochs if self.arrival and self.arrival.observed else None

    @property
    def seconds_to_target(self) -> float | None:
        """Steps to the target times step_ms: without loading and evaluation, all groups at their undisturbed speed."""
        if self.arrival is None or self.arrival.observed is None or self.step_ms is None:
            return None
        return 1e-3 * self.step_ms * self.arrival.observed.samples / self.runs[0].row["global_batch_size"]

    @property
    def relative_time(self) -> float | None:
        """A × B over the baseline's."""
        own, base = self.seconds_to_target, self.baseline and self.baseline.seconds_to_target
        return own / base if own is not None and base else None

    @property
    def held_gib(self) -> float | None:
        """Embedding parameters and their optimizer state."""
        if not self.runs:
            return None
        return (self.runs[0].row["embedding_bytes"] + self.runs[0].row["optimizer_bytes"]) / 2**30

    def judge(self, epsilon: float) -> Verdict | None:
        return self.difference.judge(epsilon) if self.difference else None

    @property
    def tuning_seconds(self) -> float:
        return sum(run.seconds for run in self.trials)


def build_figures(results: Results) -> list[GroupFigures]:
    """In the order of the file: the baseline of a setting and model before the others."""
    keys = ("setting", "architecture", "method", "compression")
    groups = [_read_group(results, rows) for rows in _split(results.rows, lambda r: tuple(r[k] for k in keys)).values()]
    finished = []
    for own in _split(groups, lambda g: (g.setting, g.architecture)).values():
        baseline = next(group for group in own if group.is_baseline)
        target = results.facts.get("target") or _find_target(baseline)
        budget = min((r.row["train_time_s"] for g in own for r in g.runs), default=None)
        baseline = replace(baseline, target=target, budget_s=budget)
        # The baseline's own baseline is itself, but for the circle.
        finished.append(replace(baseline, baseline=baseline))
        others = [group for group in own if not group.is_baseline]
        finished += [replace(group, target=target, budget_s=budget, baseline=baseline) for group in others]
    return finished


def _find_target(baseline: GroupFigures) -> float | None:
    best = [max(point.value for point in run.curve()) for run in baseline.runs]
    return min(best, default=None)


def _split(items: Sequence[Any], key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    found: dict[Any, list[Any]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def _read_group(results: Results, rows: Sequence[Row]) -> GroupFigures:
    first = rows[0]
    runs = [RunFigures(own[0], own) for name, own in _split(rows, lambda r: r["run"]).items() if name is not None]
    good = [run for run in runs if run.row["problem"] is None]
    problems = {run.row["run"]: run.row["problem"] for run in runs if run.row["problem"]}
    whole = [first["problem"]] if first["run"] is None else []
    return GroupFigures(
        setting=first["setting"],
        architecture=first["architecture"],
        method=first["method"],
        compression=first["compression"],
        is_baseline=first["method"] == results.experiment.baseline.name,
        is_able=first["run"] is not None,
        asked=len(results.experiment.seeds),
        runs=[run for run in good if run.row["is_result"]],
        trials=[run for run in good if run.row["is_trial"]],
        problems=[*whole, *(f"{name}: {problem}" for name, problem in problems.items())],
        parameters=next((r.row["embedding_parameters"] for r in good), first["embedding_parameters"]),
        step_ms_alone=first["step_ms_alone"],
        difference=_read_difference(first),
    )


def _read_difference(row: Row) -> AucDifference | None:
    if row["difference"] is None:
        return None
    return AucDifference(
        difference=row["difference"],
        standard_error=row["difference_se"],
        low=row["difference_low"],
        high=row["difference_high"],
        p=row["difference_p"],
        seeds=tuple(row["difference_seeds"]),
        covers_seeds=row["difference_covers_seeds"],
    )
