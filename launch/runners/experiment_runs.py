"""An experiment's plan made from what is asked for, and its runs: tuned, made several at a time, timed, collected."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from configs.load import ConfigError, flatten
from launch.runners.local import Jobs, RunnerOptions, count_jobs
from launch.runners.step_jobs import MeasuringFailed, measure
from launch.runners.trial import Outcome, Runner, Trial, find_log, run_trials
from launch.runners.tuning import RATE, choose_rate, tune
from recsys.report.numbers import format_bytes
from recsys.runs.run_dir import RunDir, write_atomically
from recsys.studies.experiment import Experiment, Source, find_experiments, load_experiment
from recsys.studies.experiment_plan import (
    PROCESS_BYTES,
    Group,
    available_bytes,
    check_source,
    check_target,
    find_source,
    plan_groups,
    size_groups,
)
from recsys.studies.experiment_records import Made, collect, write_results

RESULTS = "results.parquet"
_TURNS = 3
_BUSY = 1.5
"""Seconds of a run made beside others on the same machine, over seconds alone: for the estimate."""

Key = tuple[Group, float, int]
"""A run by its group, learning rate and seed."""


@dataclass(frozen=True, kw_only=True)
class StudyRequest:
    """What is asked for: the options of `launch.study` by their names; None = the study's own."""

    items: Sequence[str]
    data: str | None = None
    scale: float = 1.0
    seeds: Sequence[int] | None = None
    target: float | None = None
    epsilon: float | None = None
    output: Path | None = None


@dataclass(frozen=True)
class Plan:
    """experiment: with the seeds and the epsilon asked for. groups: all, those that cannot be run among them."""

    name: str
    experiment: Experiment
    source: Source
    groups: Sequence[Group]
    output: Path
    runs: Path
    jobs: Jobs
    facts: dict[str, Any]
    runner: RunnerOptions

    @property
    def able(self) -> list[Group]:
        return [group for group in self.groups if group.problem is None]

    @property
    def runs_per_group(self) -> int:
        return len(self.source.rates) + len(self.experiment.seeds) - 1

    def seconds(self) -> float | None:
        """Estimate for all runs, None where a group has none."""
        each = [self._seconds_at_a_time(group) for group in self.able]
        known = [seconds for seconds in each if seconds is not None]
        return _BUSY * self.runs_per_group * sum(known) if len(known) == len(each) and self.runner.is_local else None

    def _seconds_at_a_time(self, group: Group) -> float | None:
        jobs = self.jobs.one if group.load().parallelism.world_size == 1 else self.jobs.several
        return None if group.seconds is None else group.seconds / jobs


def make_plan(asked: StudyRequest, runner: RunnerOptions) -> Plan:
    """Raises ConfigError, and what the rows raise when they are opened."""
    name, overrides = _split_items(asked.items)
    experiment = _lay_options(load_experiment(find_experiments()[name]), asked)
    source_name, source, files = find_source(experiment, asked.data)
    place = _describe_place(source_name, asked.scale)
    output = Path(asked.output or f"runs/experiments/{name}{place}")
    runs = (output.parent / f"{experiment.runs}{place}" if experiment.runs else output) / "runs"
    common = [f"run.dir={json.dumps(str(runs))}", "run.overwrite=true", *files, *overrides]
    groups = plan_groups(experiment, source, common, asked.scale)
    datasets = check_source(groups)
    best = check_target(asked.target, datasets)
    memory = available_bytes(groups[0].load().run.device) if runner.is_local else None
    groups = size_groups(groups, datasets, memory)
    able = [group for group in groups if group.problem is None]
    if not able:
        raise ConfigError("nothing can be run:\n" + "\n".join(f"  {g.name}: {g.problem}" for g in groups))
    largest = max(group.needs_bytes or 0 for group in able)
    jobs = count_jobs([g.load() for g in able], runner.jobs, memory // largest if memory is not None else None)
    facts = {
        "name": name,
        "data": source_name,
        "file": Path(asked.data).name if asked.data else None,
        "shows": source.shows.strip(),
        "scale": asked.scale,
        "target": asked.target,
        "best_possible_auc": best,
        "rates": list(source.rates),
        "settings": {key: dict(value) for key, value in source.settings.items()},
        "overrides": overrides,
        "jobs": f"{jobs} at a time" if runner.is_local else f"as jobs of {runner.scheduler}",
    }
    return Plan(name, experiment, source, groups, output, runs, jobs, facts, runner)


def _lay_options(experiment: Experiment, asked: StudyRequest) -> Experiment:
    seeds = tuple(experiment.seeds if asked.seeds is None else asked.seeds)
    return experiment.model_copy(update={"seeds": seeds, "epsilon": asked.epsilon or experiment.epsilon})


def _split_items(items: Sequence[str]) -> tuple[str, list[str]]:
    names = [item for item in items if "=" not in item]
    known = find_experiments()
    if len(names) != 1 or names[0] not in known:
        given = " ".join(names) or "none"
        raise ConfigError(f"experiment: one of {', '.join(known)} is needed, given: {given}")
    return names[0], [item for item in items if "=" in item]


def _describe_place(source: str, scale: float) -> str:
    return ("" if source == "generated" else f"_{source}") + ("" if scale == 1 else f"_x{scale:g}")


def make_runs(plan: Plan, runs: Runner) -> list[Made]:
    """All runs of the plan, in the order of its groups. Raises ConfigError before any is made."""
    first = plan.experiment.seeds[0]
    outcomes: dict[Key, Outcome] = {}

    def make(title: str, keys: Sequence[Key]) -> list[Outcome]:
        found = run_trials([_trial(*key) for key in keys], runs, title) if keys else []
        outcomes.update(zip(keys, found, strict=True))
        return found

    rates = plan.source.rates
    trials = tune(plan.able, rates, lambda title, tried: make(title, [(*key, first) for key in tried]))
    chosen = {group.name: choose_rate(trials[group]) for group in plan.able}
    others = [(g, r, s) for g in plan.able if (r := chosen[g.name]) is not None for s in plan.experiment.seeds[1:]]
    make("other seeds", others)
    order = {group.name: place for place, group in enumerate(plan.groups)}
    is_tuned = len(rates) > 1
    made = [
        Made(
            group, rate, seed, is_tuned and seed == first, rate == chosen[group.name], outcome.run_dir,
            f"{outcome.failure} (log: {find_log(outcome.run_dir)})" if outcome.failure else None,
        )
        for (group, rate, seed), outcome in outcomes.items()
    ]  # fmt: skip
    return sorted(made, key=lambda run: (order[run.group.name], run.learning_rate, run.seed))


def _trial(group: Group, rate: float, seed: int) -> Trial:
    name = f"{group.name}_lr{rate:g}_s{seed}".replace("+", "")  # names of runs have no plus
    return Trial(group.config, (*group.overrides, f"{RATE}={rate!r}", f"run.seed={seed}"), name)


def measure_alone(plan: Plan, made: Sequence[Made]) -> tuple[dict[tuple[str, str, float], float], str | None]:
    """(model, method, compression) -> median ms of a step, kept in steps.json; and why there is nothing, where there
    is nothing. All setups of as many ranks and threads take turns in one job, and these jobs do."""
    if not plan.runner.is_local:
        return {}, "steps are those of the runs: these were made elsewhere"
    chosen: dict[tuple[str, str, float], Group] = {}
    for run in made:
        if run.is_result and not run.error:
            chosen.setdefault(run.group.setup, run.group)
    jobs: dict[tuple[int, int], list[Group]] = {}
    for group in chosen.values():
        parallelism = group.load().parallelism
        jobs.setdefault((parallelism.world_size, parallelism.threads_per_rank), []).append(group)
    needs = max((sum(g.held_bytes for g in groups) + PROCESS_BYTES for groups in jobs.values()), default=0)
    if not chosen or needs > available_bytes(plan.able[0].load().run.device):
        return {}, f"steps are those of the runs: all setups at once need {format_bytes(needs)}"
    plans = [
        [{"label": g.name, "config": g.config, "overrides": list(g.overrides)} for g in groups]
        for groups in jobs.values()
    ]
    file = plan.output / "steps.json"
    kept = json.loads(file.read_text()) if file.is_file() else {}
    if kept.get("jobs") != plans:
        turns = 1 if len(plans) == 1 else _TURNS
        found: dict[str, list[float]] = {}
        try:
            for number, setups in turns * list(enumerate(plans, 1)):
                print(f"steps: job {number} of {len(plans)}, {len(setups)} setups take turns", file=sys.stderr)
                for one in measure(setups, mode="train", rounds=5, steps=10, warm_up=5, profile_steps=0):
                    found.setdefault(one["label"], []).append(one["step_ms"]["median"])
        except MeasuringFailed as error:
            return {}, f"steps are those of the runs: {error}"
        kept = {"jobs": plans, "turns": turns, "step_ms": found}
        plan.output.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(kept, indent=2))
    return {setup: median(kept["step_ms"][group.name]) for setup, group in chosen.items()}, None


def merge_environments(finished: Sequence[RunDir]) -> dict[str, Any]:
    """Where runs were made, by dotted key: what they share, lists of what they do not, and when the first and the last
    started."""
    values: dict[str, list[Any]] = {}
    for run_dir in finished:
        for key, value in flatten({k: v for k, v in run_dir.read_environment().items() if k != "command"}).items():
            if value not in values.setdefault(key, []):
                values[key].append(value)
    merged = {key: found[0] if len(found) == 1 else ", ".join(sorted(map(str, found))) for key, found in values.items()}
    if len(started := values.get("started", [])) > 1:
        merged["started"] = f"{min(started)} to {max(started)}"
    return merged


def run_plan(plan: Plan) -> Path:
    """Makes what is missing and writes results.parquet; its path."""
    with plan.runner.open(plan.jobs) as runs:
        made = make_runs(plan, runs)
    steps, why_none = measure_alone(plan, made)
    if why_none:
        print(why_none, file=sys.stderr)
    environment = merge_environments([run.run_dir for run in made if not run.error])
    facts = plan.facts | {"environment": environment | {"runs": plan.facts["jobs"]}}
    path = plan.output / RESULTS
    write_results(collect(plan.experiment, plan.groups, made, steps, facts), path)
    return path
