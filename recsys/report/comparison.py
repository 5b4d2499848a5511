"""The figures of runs side by side: taken over seeds, set against a target AUC and a baseline.

Runs that differ in nothing but their seed form one setup. Relative time is the PSS paper's (Table 4): epochs to the
target times time per iteration, over the same product for the full model.
"""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Literal

from recsys.report.compared_runs import (
    Difference,
    Run,
    check_fair,
    find_caveats,
    find_differences,
    free_facts,
    group_by_seed,
    is_full,
    load_runs,
    shared_facts,
)
from recsys.report.curves import CurveOrder, Point, TimeToTarget, mean_curve, order_curves, time_to_target
from recsys.runs.metrics import quality_name
from recsys.runs.summary import BestPossible, RunSummary
from recsys.runs.window_timing import RankTiming, average


@dataclass(frozen=True)
class Measured:
    """A mean over n runs. plus_minus: standard deviation over seeds, or standard error of an AUC by its test sample."""

    mean: float
    plus_minus: float | None
    source: Literal["seeds", "sampling"] | None
    n: int


@dataclass(frozen=True)
class Target:
    """The AUC that setups are timed to. split: whose AUC; rule: where the figure comes from."""

    auc: float
    split: str
    rule: str


@dataclass(frozen=True)
class TimeFigures:
    """Where a step goes, in ms and bytes a step of the profiled windows; what the parts are: `recsys.profile.timing`.

    steps: of all windows together. exposed_share: exposed communication over the step, with the lowest and the highest
    of single windows. overlap_share: of communication, None without any. overhead: profiled step over the mean step
    outside of windows. clock_error_ms: of the worst window. mean: over ranks; both are means over windows.
    """

    windows: int
    steps: int
    exposed_share: float
    exposed_share_lowest: float
    exposed_share_highest: float
    overlap_share: float | None
    overhead: float | None
    clock_error_ms: float
    mean: RankTiming
    ranks: tuple[RankTiming, ...]


@dataclass(frozen=True)
class Figures:
    """What a setup measured: means over its runs. None = not measured. Bytes and memory are the largest rank's."""

    test_auc: Measured | None
    test_log_loss: Measured | None
    test_ne: Measured | None
    test_calibration: Measured | None
    target_split_auc: Measured | None
    best_epoch: float | None
    embedding_bytes: int
    embedding_optimizer_bytes: int
    step_ms_p50: Measured | None
    step_ms_p95: Measured | None
    data_ms_p50: Measured | None
    data_ms_p95: Measured | None
    samples_per_s: Measured | None
    time: TimeFigures | None
    train_time_s: Measured | None
    epochs: float
    samples: float
    peak_memory_gib: float | None
    target: TimeToTarget | None


@dataclass(frozen=True)
class Ratios:
    """A setup over the baseline; below 1 = less time, fewer bytes."""

    step_time: float | None
    embedding_bytes: float | None
    time_to_target: float | None
    relative_time: float | None


@dataclass(frozen=True)
class Setup:
    """Runs that differ in their seed alone, the figures they give together, and how these stand to the baseline's."""

    label: str
    runs: tuple[Run, ...]
    figures: Figures
    ratios: Ratios
    lead: CurveOrder | None
    is_baseline: bool

    @property
    def summary(self) -> RunSummary:
        """Facts that all runs of the setup share."""
        return self.runs[0].summary

    @property
    def unfinished(self) -> list[str]:
        return [run.summary.status for run in self.runs if run.summary.status != "finished"]

    def mean_curve(self, metric: str, split: str) -> list[Point]:
        """Means over the runs at the positions in samples where all of them were measured."""
        return mean_curve([run.curve(quality_name(split, metric)) for run in self.runs])


@dataclass(frozen=True)
class Comparison:
    """setups: the baseline first, then in the order given. differences: what should be shared and is not."""

    setups: tuple[Setup, ...]
    target: Target | None
    differences: tuple[Difference, ...]
    varied: tuple[Difference, ...]
    caveats: tuple[str, ...]

    @property
    def runs(self) -> list[Run]:
        return [run for setup in self.setups for run in setup.runs]

    @property
    def baseline(self) -> Setup:
        return self.setups[0]

    @property
    def others(self) -> list[Setup]:
        return list(self.setups[1:])

    @property
    def best_possible(self) -> BestPossible | None:
        """Of generated data, on its test rows; None where it is unknown or not the same for all."""
        first, *others = (run.summary.best_possible for run in self.runs)
        return first if all(other == first for other in others) else None


def compare(
    paths: Sequence[str | Path], target_auc: float | None = None, allow_differences: bool = False
) -> Comparison:
    """Reads run directories and compares them. Raises ComparisonError when they cannot be read or compared fairly."""
    runs = load_runs(paths)
    if not allow_differences:
        check_fair(runs)
    groups = group_by_seed(runs)
    base = next((group for group in groups if is_full(group[0])), groups[0])
    groups = [base, *(group for group in groups if group is not base)]
    split = base[0].summary.selected_on
    target = choose_target(runs, split, target_auc)
    figures = [measure(group, split, target) for group in groups]
    curves = [mean_curve(_auc_curves(group, split)) for group in groups]
    setups = [
        Setup(
            label=label,
            runs=tuple(group),
            figures=found,
            ratios=compare_with(found, figures[0]),
            lead=None if group is base else order_curves(curve, curves[0]),
            is_baseline=group is base,
        )
        for label, group, found, curve in zip(_label_groups(groups), groups, figures, curves, strict=True)
    ]
    by_setup = [replace(run, label=setup.label) for setup in setups for run in setup.runs]
    return Comparison(
        setups=tuple(setups),
        target=target,
        differences=tuple(find_differences(runs, shared_facts)),
        varied=tuple(find_differences(by_setup, free_facts)),
        caveats=tuple(find_caveats(runs)),
    )


def _auc_curves(runs: Sequence[Run], split: str) -> list[list[Point]]:
    return [run.curve(quality_name(split, "auc")) for run in runs]


def choose_target(runs: Sequence[Run], split: str, asked: float | None) -> Target | None:
    """The target asked for, else that of all configs, else the lowest best AUC of finished runs with full tables."""
    if asked is not None:
        return Target(asked, split, "given on the command line")
    configured = {run.config.get("training", {}).get("target_auc") for run in runs}
    if len(configured) == 1 and (common := configured.pop()) is not None:
        return Target(common, split, "training.target_auc of every run")
    full = [run for run in runs if is_full(run) and run.summary.status == "finished"]
    best = [max(point.value for point in curve) for curve in _auc_curves(full, split) if curve]
    if not best:
        return None
    rule = f"the lowest of the best {split} AUCs of the {len(best)} finished runs with full tables"
    only = f"the best {split} AUC of the only finished run with full tables"
    return Target(min(best), split, rule if len(best) > 1 else only)


def _label_groups(groups: Sequence[Sequence[Run]]) -> list[str]:
    """What the names of a group's runs have in common, or the first of them where two groups would be called alike."""
    labels = [_common_name([run.summary.name for run in group]) for group in groups]
    return [label if labels.count(label) == 1 else group[0].label for label, group in zip(labels, groups, strict=True)]


def _common_name(names: Sequence[str]) -> str:
    """("robe_seed1", "robe_seed2") -> "robe"; the first name where nothing is common."""
    if len(names) == 1:
        return names[0]
    letters = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*names, strict=False))
    common = "".join(column[0] for column in letters)
    return re.sub(r"[_.-]*(?:(?<=[_.-])s(?:eed)?)?[_.-]*$", "", common) or names[0]


def measure(runs: Sequence[Run], split: str, target: Target | None) -> Figures:
    """The figures of one setup; split: the one whose AUC is set against the target."""
    summaries = [run.summary for run in runs]
    best = [s.best for s in summaries if s.best]
    held = summaries[0].bytes_per_rank
    parameters, state = max(zip(held.embedding, held.embedding_optimizer, strict=False), key=sum)
    return Figures(
        test_auc=_measure_auc(best),
        test_log_loss=mean_over_runs(b.get("test_log_loss") for b in best),
        test_ne=mean_over_runs(b.get("test_ne") for b in best),
        test_calibration=mean_over_runs(b.get("test_calibration") for b in best),
        target_split_auc=mean_over_runs(b.get(f"{split}_auc") for b in best),
        best_epoch=fmean(b["epoch"] for b in best) if best else None,
        embedding_bytes=parameters,
        embedding_optimizer_bytes=state,
        step_ms_p50=mean_over_runs(s.step_ms and s.step_ms.p50 for s in summaries),
        step_ms_p95=mean_over_runs(s.step_ms and s.step_ms.p95 for s in summaries),
        data_ms_p50=mean_over_runs(s.data_ms and s.data_ms.p50 for s in summaries),
        data_ms_p95=mean_over_runs(s.data_ms and s.data_ms.p95 for s in summaries),
        samples_per_s=mean_over_runs(s.samples_per_s for s in summaries),
        time=measure_time(summaries),
        train_time_s=mean_over_runs(s.train_time_s for s in summaries),
        epochs=fmean(s.epochs for s in summaries),
        samples=fmean(s.samples for s in summaries),
        peak_memory_gib=max((gib for s in summaries for gib in s.peak_memory_gib or ()), default=None),
        target=target and time_to_target(_auc_curves(runs, split), target.auc),
    )


def measure_time(summaries: Sequence[RunSummary]) -> TimeFigures | None:
    """Over all windows of the runs; None where there are none."""
    windows = [window for summary in summaries for window in summary.profiles]
    if not windows:
        return None
    num_ranks = max(len(window.ranks) for window in windows)
    ranks = [average([w.ranks[r] for w in windows if r < len(w.ranks)]) for r in range(num_ranks)]
    mean: RankTiming = average(ranks)
    shares = [window.mean("exposed_comm_ms") / window.mean("step_ms") for window in windows]
    unprofiled = [s.step_ms.mean for s in summaries for _ in s.profiles if s.step_ms]
    return TimeFigures(
        windows=len(windows),
        steps=sum(window.num_steps for window in windows),
        exposed_share=mean.exposed_comm_ms / mean.step_ms,
        exposed_share_lowest=min(shares),
        exposed_share_highest=max(shares),
        overlap_share=_ratio(mean.overlap_ms, mean.comm_ms),
        overhead=_ratio(mean.step_ms, average(unprofiled)),
        clock_error_ms=max(window.clock_error_ms for window in windows),
        mean=mean,
        ranks=tuple(ranks),
    )


def mean_over_runs(values: Iterable[float | None]) -> Measured | None:
    """Of those that are known; with their spread where there are several."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    several = len(known) > 1
    return Measured(fmean(known), stdev(known) if several else None, "seeds" if several else None, len(known))


def _measure_auc(best: Sequence[Mapping[str, float]]) -> Measured | None:
    """Test AUC; a single one with the standard error it was recorded with."""
    found = mean_over_runs(evaluation.get("test_auc") for evaluation in best)
    if found is None or found.n > 1 or (error := best[0].get("test_auc_se")) is None:
        return found
    return Measured(found.mean, error, "sampling", 1)


def compare_with(figures: Figures, baseline: Figures) -> Ratios:
    """Ratios of a setup's figures over the baseline's, None where one of them was not measured."""

    def step_ms(of: Figures) -> float | None:
        return of.step_ms_p50.mean if of.step_ms_p50 else None

    def epochs_times_step(of: Figures) -> float | None:
        reached, ms = of.target and of.target.observed, step_ms(of)
        return reached.epochs * ms if reached and ms is not None else None

    def time_to_target(of: Figures) -> float | None:
        return of.target.observed.time_s if of.target and of.target.observed else None

    held = figures.embedding_bytes + figures.embedding_optimizer_bytes
    held_baseline = baseline.embedding_bytes + baseline.embedding_optimizer_bytes
    return Ratios(
        step_time=_ratio(step_ms(figures), step_ms(baseline)),
        embedding_bytes=_ratio(held, held_baseline),
        time_to_target=_ratio(time_to_target(figures), time_to_target(baseline)),
        relative_time=_ratio(epochs_times_step(figures), epochs_times_step(baseline)),
    )


def _ratio(value: float | None, over: float | None) -> float | None:
    return value / over if value is not None and over else None
