"""A study planned from its options, and its runs: tuned, made several at a time, timed, collected."""

import json
import sys
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from configs.load import ConfigError, flatten
from launch.runners.local import Jobs, RunnerOptions, count_jobs
from launch.runners.step_jobs import MeasuringFailed, measure
from launch.runners.trial import Outcome, Runner, Trial, find_log, run_trials
from recsys.report.numbers import format_bytes
from recsys.runs.run_directory import RunDir, write_atomically
from recsys.studies.plan import (
    PROCESS_BYTES,
    PlannedArm,
    available_bytes,
    check_target,
    find_source,
    open_datasets,
    plan_arms,
    size_arms,
)
from recsys.studies.records import RATE, StudyRun, collect, save_results
from recsys.studies.spec import Source, Study, find_studies, load_study

RESULTS = "results.parquet"
_REPEATS = 3
"""Of each job that measures steps, where several jobs are interleaved."""
_BUSY = 1.5
"""Seconds of a run made beside others on the same machine, over seconds alone: for the estimate."""

RunKey = tuple[PlannedArm, float, int]
"""A run by its arm, learning rate and seed."""
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, kw_only=True)
class StudyRequest:
    """Hold the options of `launch.study` by their names; None = the study's own.

    items: the name of the study, and overrides of all its runs. compressions: of every method but the baseline.
    """

    items: Sequence[str]
    data: str | None = None
    scale: float = 1.0
    methods: Sequence[str] | None = None
    compressions: Sequence[float] | None = None
    rates: Sequence[float] | None = None
    seeds: Sequence[int] | None = None
    target: float | None = None
    epsilon: float | None = None
    output: Path | None = None


@dataclass(frozen=True)
class StudyPlan:
    """Say what is to be run. study: as requested; arms: all, also those that cannot be run; output: a directory."""

    name: str
    study: Study
    source: Source
    arms: Sequence[PlannedArm]
    output: Path
    jobs: Jobs
    facts: dict[str, Any]
    runner: RunnerOptions

    @property
    def able(self) -> list[PlannedArm]:
        """Return the arms that can be run."""
        return [arm for arm in self.arms if arm.is_able]

    @property
    def runs_per_arm(self) -> int:
        """Return the number of runs of an arm whose best rate is not at an end of the grid."""
        return len(self.source.rates) + len(self.study.seeds) - 1

    def seconds(self) -> float | None:
        """Return an estimate for all runs, None where an arm has none."""
        each = [self._seconds_at_a_time(arm) for arm in self.able]
        known = [seconds for seconds in each if seconds is not None]
        return _BUSY * self.runs_per_arm * sum(known) if len(known) == len(each) and self.runner.is_local else None

    def _seconds_at_a_time(self, arm: PlannedArm) -> float | None:
        """Return what a run takes of the whole: its seconds over the runs that are made beside it."""
        jobs = self.jobs.one if arm.load().parallelism.world_size == 1 else self.jobs.several
        return None if arm.seconds is None else arm.seconds / jobs


def make_plan(request: StudyRequest, runner: RunnerOptions) -> StudyPlan:
    """Return the plan of a study. Raises ConfigError, and what the rows raise when they are opened."""
    name, overrides = _split_items(request.items)
    study = change_study(load_study(find_studies()[name]), request)
    source_name, source, files = find_source(study, request.data)
    if request.rates is not None:
        source = source.model_copy(update={"rates": tuple(request.rates)})
    suffix = _name_place(study, source_name, request.scale)
    output = request.output or Path(f"runs/experiments/{name}{suffix}")
    runs = (output.parent / f"{study.runs}{suffix}" if study.runs else output) / "runs"
    # A finished run of another config under a name of this study is out of date: it is made again, without asking.
    common = [f"run.dir={json.dumps(str(runs))}", "run.overwrite=true", *files, *overrides]
    arms = plan_arms(study, source, common, request.scale)
    datasets = open_datasets(arms)
    best = check_target(request.target, datasets)
    memory = available_bytes(arms[0].load().run.device) if runner.is_local else None
    arms = size_arms(study, arms, datasets, memory)
    able = [arm for arm in arms if arm.is_able]
    if not able:
        raise ConfigError("nothing can be run:\n" + "\n".join(f"  {arm.name}: {arm.problem}" for arm in arms))
    largest = max(arm.needs_bytes or 0 for arm in able)
    at_most = memory // largest if memory is not None else None
    jobs = count_jobs([arm.load() for arm in able], runner.jobs, at_most)
    facts = {
        "name": name,
        "data": source_name,
        "file": Path(request.data).name if request.data else None,
        "shows": source.shows.strip(),
        "scale": request.scale,
        "target": request.target,
        "best_possible_auc": best,
        "rates": list(source.rates),
        "settings": {key: dict(value) for key, value in source.settings.items()},
        "overrides": overrides,
        "jobs": f"{jobs} at a time" if runner.is_local else f"as jobs of {runner.scheduler}",
    }
    return StudyPlan(name, study, source, arms, output, jobs, facts, runner)


def change_study(study: Study, request: StudyRequest) -> Study:
    """Return the study with the requested methods, compressions, seeds and epsilon. Raises ConfigError."""
    methods = list(study.methods)
    if request.methods is not None:
        if unknown := [name for name in request.methods if name not in [method.name for method in methods]]:
            known = ", ".join(method.name for method in methods)
            raise ConfigError(f"--methods: the study has no {', '.join(unknown)}; it has {known}")
        methods = [method for method in methods if method is study.baseline or method.name in request.methods]
    if request.compressions is not None:
        if min(request.compressions) < 1:
            raise ConfigError(f"--compressions {min(request.compressions):g}: must be at least 1")
        ascending = {"compressions": tuple(sorted(request.compressions))}
        methods = [method if method is study.baseline else method.model_copy(update=ascending) for method in methods]
    if len(methods) < 2:
        raise ConfigError("--methods: one besides the baseline is needed")
    changes = {
        "methods": tuple(methods),
        "seeds": tuple(study.seeds if request.seeds is None else request.seeds),
        "epsilon": request.epsilon or study.epsilon,
    }
    return study.model_copy(update=changes)


def _split_items(items: Sequence[str]) -> tuple[str, list[str]]:
    """Return the name of the study, and the overrides. Raises ConfigError."""
    names = [item for item in items if "=" not in item]
    known = find_studies()
    if len(names) != 1 or names[0] not in known:
        given = " ".join(names) or "none"
        raise ConfigError(f"study: one of {', '.join(known)} is needed, given: {given}")
    return names[0], [item for item in items if "=" in item]


def _name_place(study: Study, source: str, scale: float) -> str:
    """Return what tells the directory of other rows apart."""
    return ("" if source == next(iter(study.data)) else f"_{source}") + ("" if scale == 1 else f"_x{scale:g}")


def run_study(plan: StudyPlan) -> Path:
    """Make what is missing and write results.parquet; return its path."""
    with plan.runner.open(plan.jobs) as runner:
        runs = make_runs(plan, runner)
    steps, why_none = measure_interleaved(plan, runs)
    if why_none:
        print(why_none, file=sys.stderr)
    environment = merge_environments([run.run_dir for run in runs if not run.failure])
    facts = plan.facts | {"environment": environment | {"runs": plan.facts["jobs"]}}
    path = plan.output / RESULTS
    save_results(collect(plan.study, plan.arms, runs, steps, facts), path)
    return path


def make_runs(plan: StudyPlan, runner: Runner) -> list[StudyRun]:
    """Make all runs of the plan and return them in the order of its arms. Raises ConfigError before any is made."""
    first = plan.study.seeds[0]
    outcomes: dict[RunKey, Outcome] = {}

    def make(title: str, keys: Sequence[RunKey]) -> list[Outcome]:
        """Make the runs of keys, remember their outcomes, and return them in order."""
        ended = run_trials([_trial(*key) for key in keys], runner, title) if keys else []
        outcomes.update(zip(keys, ended, strict=True))
        return ended

    rates = plan.source.rates
    losses = tune(plan.able, rates, lambda title, tried: make(title, [(*key, first) for key in tried]))
    chosen = {arm.name: choose_rate(losses[arm]) for arm in plan.able}
    others = [(a, r, s) for a in plan.able if (r := chosen[a.name]) is not None for s in plan.study.seeds[1:]]
    make("other seeds", others)
    order = {arm.name: place for place, arm in enumerate(plan.arms)}
    is_tuned = len(rates) > 1
    runs = [
        StudyRun(
            arm, rate, seed, is_tuned and seed == first, rate == chosen[arm.name], outcome.run_dir,
            f"{outcome.failure} (log: {find_log(outcome.run_dir)})" if outcome.failure else None,
        )
        for (arm, rate, seed), outcome in outcomes.items()
    ]  # fmt: skip
    return sorted(runs, key=lambda run: (order[run.arm.name], run.learning_rate, run.seed))


def _trial(arm: PlannedArm, rate: float, seed: int) -> Trial:
    name = f"{arm.name}_lr{rate:g}_s{seed}".replace("+", "")  # names of runs have no plus
    return Trial(arm.config, (*arm.overrides, f"{RATE}={rate!r}", f"run.seed={seed}"), name)


def tune(
    arms: Sequence[Key], rates: Sequence[float], make: Callable[[str, list[tuple[Key, float]]], Sequence[Outcome]]
) -> dict[Key, dict[float, float | None]]:
    """Try the learning rates of every arm and return the log loss of each, None where the run failed.

    It is the same for all methods: one grid, and one step beyond it where the best lies at its end. make: takes a title
    and arms with rates, and returns the outcomes of their runs.
    """
    losses: dict[Key, dict[float, float | None]] = {arm: {} for arm in arms}

    def run(title: str, keys: list[tuple[Key, float]]) -> None:
        """Run arms at learning rates and note the log loss of each."""
        for (arm, rate), outcome in zip(keys, make(title, keys), strict=True):
            losses[arm][rate] = None if outcome.failure else _read_log_loss(outcome.run_dir)

    run("learning rates", [(arm, rate) for arm in arms for rate in rates])
    run("beyond the grid", [(arm, rate) for arm in arms if (rate := choose_next_rate(losses[arm])) is not None])
    return losses


def _read_log_loss(run_dir: RunDir) -> float:
    """Return the best log loss on the rows that choose: no choice is made on test rows where there are others."""
    summary = run_dir.read_summary()
    assert summary.best is not None, "a finished run has evaluations"
    return summary.best[f"{summary.selected_on}_log_loss"]


def choose_rate(losses: dict[float, float | None]) -> float | None:
    """Return the learning rate of the lowest log loss, the lower of equals; None where every run failed."""
    known = [(loss, rate) for rate, loss in losses.items() if loss is not None]
    return min(known)[1] if known else None


def choose_next_rate(losses: dict[float, float | None]) -> float | None:
    """Return one step of the grid beyond its end, where the best rate lies there; below it where every run failed."""
    rates, best = sorted(losses), choose_rate(losses)
    if len(rates) < 2 or best not in (None, rates[0], rates[-1]):
        return None
    end, inner = (rates[-1], rates[-2]) if best == rates[-1] else (rates[0], rates[1])
    return float(f"{end * end / inner:.1g}")


def measure_interleaved(
    plan: StudyPlan, runs: Sequence[StudyRun]
) -> tuple[dict[tuple[str, str, float], float], str | None]:
    """Measure the steps of all arms, interleaved and with nothing beside them, and keep them in steps.json.

    Returns median ms by the key of an arm, and why there is nothing, where there is nothing. All arms of as many ranks
    and threads are measured in one job; several jobs are interleaved too.
    """
    if not plan.runner.is_local:
        return {}, "steps are those of the runs: these were made elsewhere"
    chosen: dict[tuple[str, str, float], PlannedArm] = {}
    for run in runs:
        if run.is_result and not run.failure:
            chosen.setdefault(run.arm.key, run.arm)
    jobs: dict[tuple[int, int], list[PlannedArm]] = {}
    for arm in chosen.values():
        parallelism = arm.load().parallelism
        jobs.setdefault((parallelism.world_size, parallelism.threads_per_rank), []).append(arm)
    needs = max((sum(arm.held_bytes for arm in arms) + PROCESS_BYTES for arms in jobs.values()), default=0)
    if not chosen or needs > available_bytes(plan.able[0].load().run.device):
        return {}, f"steps are those of the runs: all setups at once need {format_bytes(needs)}"
    setups = [
        [{"label": arm.name, "config": arm.config, "overrides": list(arm.overrides)} for arm in arms]
        for arms in jobs.values()
    ]
    file = plan.output / "steps.json"
    kept = json.loads(file.read_text()) if file.is_file() else {}
    if kept.get("jobs") != setups:
        try:
            kept = {"jobs": setups, "step_ms": _measure_jobs(setups)}
        except MeasuringFailed as error:
            return {}, f"steps are those of the runs: {error}"
        plan.output.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(kept, indent=2))
    return {key: median(kept["step_ms"][arm.name]) for key, arm in chosen.items()}, None


def _measure_jobs(jobs: Sequence[list[dict[str, Any]]]) -> dict[str, list[float]]:
    """Return the median ms of a step of every setup, once for each time that its job ran."""
    step_ms: dict[str, list[float]] = {}
    for number, setups in (1 if len(jobs) == 1 else _REPEATS) * list(enumerate(jobs, 1)):
        print(f"steps: job {number} of {len(jobs)}, {len(setups)} arms interleaved", file=sys.stderr)
        for measured in measure(setups, mode="train", rounds=5, steps=10, warm_up=5, profile_steps=0):
            step_ms.setdefault(measured["label"], []).append(measured["step_ms"]["median"])
    return step_ms


def merge_environments(finished: Sequence[RunDir]) -> dict[str, Any]:
    """Return where runs were made, by dotted key: what they share, and lists of what they do not.

    `started` is when the first and the last began.
    """
    values: dict[str, list[Any]] = {}
    for run_dir in finished:
        for key, value in flatten({k: v for k, v in run_dir.read_environment().items() if k != "command"}).items():
            if value not in values.setdefault(key, []):
                values[key].append(value)
    merged = {key: seen[0] if len(seen) == 1 else ", ".join(sorted(map(str, seen))) for key, seen in values.items()}
    if len(started := values.get("started", [])) > 1:
        merged["started"] = f"{min(started)} to {max(started)}"
    return merged
