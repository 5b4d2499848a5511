"""An experiment's plan made from what is asked for, and its runs: tuned, made several at a time, timed, collected."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.load import ConfigError, flatten
from launch.bench_methods import RATE, choose_rate
from launch.measured_jobs import MeasuringFailed, measure
from launch.sweep import Cell, Outcome, run_cells
from launch.workers import LOG, Workers, default_jobs
from recsys.experiment import Experiment, Source, find_experiments, load_experiment
from recsys.experiment_plan import (
    PROCESS_BYTES,
    Group,
    available_bytes,
    check_source,
    check_target,
    find_source,
    plan_groups,
    size_groups,
)
from recsys.experiment_records import Made, collect, write_results
from recsys.method_rows import Trial
from recsys.result_table import format_bytes
from recsys.run_dir import write_atomically

RESULTS = "results.parquet"
_BUSY = 1.5
"""Seconds of a run made beside others on the same machine, over seconds alone: for the estimate."""

Key = tuple[Group, float, int]
"""A run by its group, learning rate and seed."""


@dataclass(frozen=True)
class Plan:
    """experiment: with the seeds and the epsilon asked for. groups: all, those that cannot be run among them."""

    name: str
    experiment: Experiment
    source: Source
    groups: Sequence[Group]
    output: Path
    runs: Path
    jobs: int
    facts: dict[str, Any]

    @property
    def able(self) -> list[Group]:
        return [group for group in self.groups if group.problem is None]

    @property
    def runs_per_group(self) -> int:
        return len(self.source.rates) + len(self.experiment.seeds) - 1

    def seconds(self) -> float | None:
        """Estimate for all runs, None where a group has none."""
        each = [group.seconds for group in self.able]
        known = [seconds for seconds in each if seconds is not None]
        return _BUSY * self.runs_per_group * sum(known) / self.jobs if len(known) == len(each) else None


def make_plan(asked: argparse.Namespace) -> Plan:
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
    memory = available_bytes(groups[0].load().run.device)
    groups = size_groups(groups, datasets, memory)
    able = [group for group in groups if group.problem is None]
    if not able:
        raise ConfigError("nothing can be run:\n" + "\n".join(f"  {g.name}: {g.problem}" for g in groups))
    largest = max(group.needs_bytes or 0 for group in able)
    jobs = min(default_jobs([g.load() for g in able]), max(1, memory // largest)) if asked.jobs is None else asked.jobs
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
        "jobs": jobs,
    }
    return Plan(name, experiment, source, groups, output, runs, jobs, facts)


def _lay_options(experiment: Experiment, asked: argparse.Namespace) -> Experiment:
    seeds = tuple(experiment.seeds if asked.seeds is None else asked.seeds)
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds {' '.join(map(str, seeds))}: a seed is given twice")
    if asked.epsilon is not None and asked.epsilon <= 0:
        raise ConfigError(f"--epsilon {asked.epsilon:g}: must be above 0")
    if asked.target is not None and not 0.5 < asked.target < 1:
        raise ConfigError(f"--target {asked.target:g}: an AUC between 0.5 and 1 is needed")
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


def make_runs(plan: Plan, workers: Workers) -> list[Made]:
    """All runs of the plan, in the order of its groups. Raises ConfigError before any is made."""
    first, rates = plan.experiment.seeds[0], plan.source.rates
    keys = [(group, rate, first) for group in plan.able for rate in rates]
    outcomes = _run(keys, workers, "learning rates")
    chosen = {g.name: _choose(g, rates, first, outcomes) for g in plan.able}
    others = [(g, r, s) for g in plan.able if (r := chosen[g.name]) is not None for s in plan.experiment.seeds[1:]]
    outcomes |= _run(others, workers, "other seeds")
    order = {group.name: place for place, group in enumerate(plan.groups)}
    made = [
        Made(
            group, rate, seed, seed == first and len(rates) > 1, rate == chosen[group.name], outcome.run_dir,
            f"{outcome.error} (log: {outcome.run_dir.path / LOG})" if outcome.error else None,
        )
        for (group, rate, seed), outcome in outcomes.items()
    ]  # fmt: skip
    return sorted(made, key=lambda run: order[run.group.name])


def _run(keys: Sequence[Key], workers: Workers, title: str) -> dict[Key, Outcome]:
    if not keys:
        return {}
    cells = [
        Cell(g.config, (*g.overrides, f"{RATE}={rate!r}", f"run.seed={seed}"), f"{g.name}_lr{_plain(rate)}_s{seed}")
        for g, rate, seed in keys
    ]
    return dict(zip(keys, run_cells(cells, workers, title), strict=True))


def _plain(value: float) -> str:
    """1e30 -> '1e30': names of runs have no plus."""
    return f"{value:g}".replace("+", "")


def _choose(group: Group, rates: Sequence[float], seed: int, outcomes: dict[Key, Outcome]) -> float | None:
    return choose_rate([_read_trial(rate, outcomes[group, rate, seed]) for rate in rates])


def _read_trial(rate: float, outcome: Outcome) -> Trial:
    if outcome.error:
        return Trial(rate, None, outcome.seconds or 0.0, outcome.error)
    summary = outcome.run_dir.read_summary()
    return Trial(rate, summary["best"][f"{summary['selected_on']}_log_loss"], summary["train_time_s"])


def measure_alone(plan: Plan, made: Sequence[Made]) -> tuple[dict[tuple[str, str, float], float], str | None]:
    """(model, method, compression) -> median ms of a step, all setups in one process and taking turns, kept in
    steps.json; and why there is nothing, where there is nothing."""
    setups, keys = [], []
    for run in made:
        key = (run.group.architecture, run.group.method, run.group.compression)
        if run.is_result and not run.error and key not in keys:
            keys.append(key)
            setups.append({"label": run.group.name, "config": run.group.config, "overrides": list(run.group.overrides)})
    needs = PROCESS_BYTES + sum(
        (g.needs_bytes or 0) - PROCESS_BYTES for g in {r.group.name: r.group for r in made}.values()
    )
    if not setups or needs > available_bytes(plan.able[0].load().run.device):
        return {}, f"steps are those of the runs: all setups at once need {format_bytes(needs)}"
    file = plan.output / "steps.json"
    kept = json.loads(file.read_text()) if file.is_file() else {}
    if kept.get("setups") != setups:
        print(f"steps: {len(setups)} setups take turns", file=sys.stderr)
        try:
            found = measure(setups, mode="train", rounds=5, steps=10, warm_up=5, profile_steps=0)
        except MeasuringFailed as error:
            return {}, f"steps are those of the runs: {error}"
        kept = {"setups": setups, "step_ms": [one["step_ms"] for one in found]}
        plan.output.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(kept, indent=2))
    return {key: one["median"] for key, one in zip(keys, kept["step_ms"], strict=True)}, None


def run_plan(plan: Plan) -> Path:
    """Makes what is missing and writes results.parquet; its path."""
    with Workers(plan.jobs) as workers:
        made = make_runs(plan, workers)
    steps, why_none = measure_alone(plan, made)
    if why_none:
        print(why_none, file=sys.stderr)
    finished = next((run.run_dir for run in made if not run.error), None)
    environment = flatten({k: v for k, v in finished.read_environment().items() if k != "command"}) if finished else {}
    facts = plan.facts | {"environment": environment | {"runs at a time": plan.jobs}}
    path = plan.output / RESULTS
    write_results(collect(plan.experiment, plan.groups, made, steps, facts), path)
    return path
