"""The arms of a study with their figures: quality over seeds, epochs and time to the target, quality at equal time.

Target: given, or as the PSS paper takes it, the lowest of the best test AUCs that the runs with full tables reach. It
is looked for on the test rows, which no choice is made on: rates and best evaluations are chosen on validation rows.
Relative time is epochs to the target (A) times time per iteration (B), over the same product of the full tables.
Equal time: every arm has the training time of the arm that was done first, and its best evaluation within it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import polars as pl

from recsys.report.curves import TimeToTarget
from recsys.report.frame import Arm, Measured, Target, mean_over_runs, ratio
from recsys.report.verdict import AucDifference, Verdict
from recsys.studies.records import StudyResults, read_difference


@dataclass(frozen=True, eq=False)
class StudyArm:
    """Hold the runs of one setting, model, method and compression, and compute their figures.

    runs: finished ones at the chosen rate; trials: those it was chosen by. num_seeds: of the study. is_able: whether
    anything was run; failures: of runs that failed, or why nothing was run. limit: the highest compression that the
    method reaches, where the target is higher. budget_s: of the comparison at equal time.
    """

    setting: str
    architecture: str
    method: str
    compression: float
    is_baseline: bool
    is_able: bool
    num_seeds: int
    runs: Arm
    trials: Arm
    failures: Sequence[str]
    parameters: int | None
    limit: float | None
    initial_std: float | None
    difference: AucDifference | None
    target: Target | None = None
    budget_s: float | None = None
    baseline: "StudyArm | None" = field(default=None, repr=False)

    @property
    def is_refused(self) -> bool:
        """Return whether the method does not reach the compression."""
        return self.limit is not None and self.compression > self.limit

    @cached_property
    def auc(self) -> Measured | None:
        """Return the test AUC at the best evaluations."""
        return self.runs.at_best("test_auc")

    @cached_property
    def log_loss(self) -> Measured | None:
        """Return the test log loss, in nats, at the best evaluations."""
        return self.runs.at_best("test_log_loss")

    @cached_property
    def best_epoch(self) -> float | None:
        """Return the epochs until the best evaluation, mean over runs."""
        best = self.runs.at_best("epoch")
        return best and best.mean

    @cached_property
    def time_to_target(self) -> TimeToTarget | None:
        """Return where in training the target is reached."""
        return self.runs.time_to_target(self.target) if len(self.runs) else None

    @cached_property
    def equal_time_auc(self) -> Measured | None:
        """Return the test AUC of the best evaluation within the common training time."""
        if self.budget_s is None or not len(self.runs):
            return None
        return self.runs.at_equal_time("test_auc", self.budget_s)

    @property
    def epochs(self) -> float | None:
        """Return the epochs of the run that was trained longest."""
        return max((curve[-1].epoch for curve in self.runs.curves("test_auc") if curve), default=None)

    @property
    def is_stopped_early(self) -> bool:
        """Return whether a run ended before the epochs it was given."""
        return "patience" in self.runs.values("stop_reason")

    @property
    def learning_rate(self) -> float | None:
        """Return the chosen learning rate of the embeddings."""
        return next(iter(self.runs.values("learning_rate")), None)

    @property
    def is_at_edge(self) -> bool:
        """Return whether the learning rate is the lowest or highest tried: a better one may lie beyond."""
        tried = set(self.trials.values("learning_rate"))
        return len(tried) > 1 and self.learning_rate in (min(tried), max(tried))

    @property
    def is_interleaved(self) -> bool:
        """Return whether its step was measured interleaved with those of all arms and nothing beside them."""
        return self.runs.mean("interleaved_step_ms") is not None

    @property
    def step_ms(self) -> float | None:
        """Return the time of a step: measured interleaved where it was, else the mean of the runs' medians."""
        return self.runs.step_ms

    @property
    def epochs_to_target(self) -> float | None:
        """Return the epochs until the target is observed; None where a run did not reach it."""
        reached = self.time_to_target
        return reached.observed.epochs if reached and reached.observed else None

    @property
    def seconds_to_target(self) -> float | None:
        """Return steps to the target times step_ms: no loading, no evaluation, all arms at their undisturbed speed."""
        reached = self.time_to_target
        if reached is None or reached.observed is None or self.step_ms is None:
            return None
        return 1e-3 * self.step_ms * reached.observed.samples / self.runs.fact("global_batch_size")

    @property
    def relative_time(self) -> float | None:
        """Return A × B over the baseline's."""
        return ratio(self.seconds_to_target, self.baseline and self.baseline.seconds_to_target)

    @property
    def held_gib(self) -> float | None:
        """Return the GiB of embedding parameters and their optimizer state, of all ranks."""
        if not len(self.runs):
            return None
        parts = ("bytes_per_rank.embedding", "bytes_per_rank.embedding_optimizer")
        return sum(sum(self.runs.fact(part)) for part in parts) / 2**30

    @property
    def threads(self) -> int:
        """Return the CPU threads of all ranks of a run."""
        return self.runs.fact("world_size") * self.runs.fact("threads_per_rank")

    @property
    def actual_compression(self) -> float | None:
        """Return full parameters over those stored."""
        return self.runs.fact("compression.actual") if len(self.runs) else None

    @property
    def stored_bytes(self) -> int | None:
        """Return the bytes of all that must be kept to look up: what the actual compression is over."""
        if self.actual_compression is None:
            return None
        return round(4 * self.runs.fact("parameters.embedding_full") / self.actual_compression)

    @property
    def optimizer_bytes(self) -> int | None:
        """Return the bytes that the optimizer keeps for the embeddings, on the rank that holds most."""
        return self.runs.embedding_bytes[1] if len(self.runs) else None

    @property
    def tuning_seconds(self) -> float:
        """Return the seconds of training and evaluation of the runs that the rate was chosen by."""
        times = zip(self.trials.values("train_time_s"), self.trials.values("evaluation_time_s"), strict=True)
        return sum((train or 0.0) + (evaluation or 0.0) for train, evaluation in times)

    def judge(self, epsilon: float) -> Verdict | None:
        """Return the verdict on the difference to the baseline, None without one."""
        return self.difference.judge(epsilon) if self.difference else None

    def paired_difference(self) -> Measured | None:
        """Return test AUC minus the baseline's at the same seed, over the seeds that both have."""
        if self.baseline is None or self.is_baseline:
            return None
        theirs = self.baseline.auc_by_seed
        return mean_over_runs(auc - theirs[seed] for seed, auc in self.auc_by_seed.items() if seed in theirs)

    @property
    def auc_by_seed(self) -> dict[int, float]:
        """Return the test AUC of every seed at its best evaluation."""
        best = self.runs.evaluations.filter(pl.col("is_best"), pl.col("test_auc").is_not_null())
        seeds = dict(self.runs.runs.select("run", "seed").iter_rows())
        return {seeds[run]: auc for run, auc in best.select("run", "test_auc").iter_rows()}


def build_arms(results: StudyResults) -> list[StudyArm]:
    """Return the arms in the order of the study: the baseline of a setting and model before the others."""
    arms = [_read_arm(results, index) for index in range(len(results.arms))]
    finished: list[StudyArm] = []
    for where in dict.fromkeys((arm.setting, arm.architecture) for arm in arms):
        own = [arm for arm in arms if (arm.setting, arm.architecture) == where]
        baseline = next(arm for arm in own if arm.is_baseline)
        target = _choose_target(results, baseline)
        times = (seconds for arm in own for seconds in arm.runs.values("train_time_s") if seconds is not None)
        baseline = replace(baseline, target=target, budget_s=(budget := min(times, default=None)))
        # The baseline's own baseline is itself, but for the circle.
        finished.append(replace(baseline, baseline=baseline))
        others = [arm for arm in own if not arm.is_baseline]
        finished += [replace(arm, target=target, budget_s=budget, baseline=baseline) for arm in others]
    return finished


def _choose_target(results: StudyResults, baseline: StudyArm) -> Target | None:
    """Return the given target, else the lowest of the baseline's best test AUCs, None where it has none."""
    if (given := results.facts.get("target")) is not None:
        return Target(given, "test", "given")
    lowest = baseline.runs.lowest_best("test_auc")
    if lowest is None:
        return None
    return Target(lowest, "test", "the lowest of the best test AUCs of the full tables' seeds")


def _read_arm(results: StudyResults, index: int) -> StudyArm:
    """Return an arm with its runs, before it knows its target and baseline."""
    known, frame = results.arms[index], results.frame.filter(pl.col("arm") == results.arms[index]["name"])
    failed = frame.runs.filter(pl.col("failure").is_not_null())
    finished = frame.filter(pl.col("failure").is_null())
    runs, trials = finished.filter(pl.col("is_result")), finished.filter(pl.col("is_trial"))
    failures = [f"{run}: {failure}" for run, failure in failed.select("run", "failure").iter_rows()]
    # Nothing was run beyond the reach of a method: that is a figure of the method, no failure.
    if not len(frame.runs) and not (known["limit"] is not None and known["compression"] > known["limit"]):
        failures = [known["problem"] or "nothing was run"]
    trained = next(iter(Arm("", finished.runs, finished.evaluations).values("parameters.embedding")), None)
    return StudyArm(
        setting=known["setting"],
        architecture=known["architecture"],
        method=known["method"],
        compression=known["compression"],
        is_baseline=known["method"] == results.study.baseline.name,
        is_able=len(frame.runs) > 0,
        num_seeds=len(results.study.seeds),
        runs=Arm(known["name"], runs.runs, runs.evaluations),
        trials=Arm(known["name"], trials.runs, trials.evaluations),
        failures=failures,
        parameters=trained if trained is not None else known["parameters"],
        limit=known["limit"],
        initial_std=known["initial_std"],
        difference=read_difference(known),
    )
