"""What the runs of a study measured, as one results frame: the only thing its tables, plots and page are made from.

`results.parquet` is a `recsys.report.frame.Results`. Columns of its runs besides those of every frame: `arm` (setting,
model, method and compression), each of these four, `learning_rate`, `is_trial` (made to choose the learning rate),
`is_result` (at the learning rate chosen), `failure`, and `interleaved_step_ms`. Its facts hold the study, and of every
arm, run or not, what was known before and its difference to the baseline.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from recsys.report.fairness import find_caveats, find_differences, shared_facts
from recsys.report.frame import Results, build_results
from recsys.report.run import Run, load_runs
from recsys.report.verdict import AucDifference, Placements, compare_placements, place
from recsys.runs.run_directory import RunDir
from recsys.studies.plan import PlannedArm, describe_options
from recsys.studies.spec import Study, parse_study

RATE = "optimizer.embedding_learning_rate"
_KNOWN = ("setting", "architecture", "method", "compression", "parameters", "problem", "limit", "initial_std")
"""Fields of a planned arm that are stored."""
_INTERNAL = ("study", "arms")
"""Facts that `StudyResults` reads into fields of its own."""


@dataclass(frozen=True)
class StudyRun:
    """Describe a run of an arm as it ended. failure: None where run_dir holds a finished run."""

    arm: PlannedArm
    learning_rate: float
    seed: int
    is_trial: bool
    is_result: bool
    run_dir: RunDir
    failure: str | None


@dataclass(frozen=True)
class StudyResults:
    """Hold what a study measured. arms: of each what was known before it ran; facts: about the whole."""

    study: Study
    frame: Results
    arms: Sequence[Mapping[str, Any]]
    facts: Mapping[str, Any]


def collect(
    study: Study,
    arms: Sequence[PlannedArm],
    runs: Sequence[StudyRun],
    interleaved_step_ms: Mapping[tuple[str, str, float], float],
    facts: Mapping[str, Any],
) -> StudyResults:
    """Read the runs of a study into its results. interleaved_step_ms: by the key of an arm."""
    loaded = load_runs([run.run_dir.path for run in runs if not run.failure])
    by_path = {run.path: replace(run, label=run.path.name) for run in loaded}
    differences = _compare_arms(study, runs)
    known = [
        {"name": arm.name, **{field: getattr(arm, field) for field in _KNOWN}, "difference": differences.get(arm.name)}
        for arm in arms
    ]
    rows = [
        (by_path.get(run.run_dir.path), _columns(run) | {"interleaved_step_ms": interleaved_step_ms.get(run.arm.key)})
        for run in runs
    ]
    more = _describe_fairness(list(by_path.values()), arms) if study.layout == "grid" else {}
    stored = {"study": study.model_dump_json(), "arms": known}
    return _read(build_results(rows, {**facts, **more, **stored}))


def _columns(run: StudyRun) -> dict[str, Any]:
    arm = run.arm
    return {
        "run": run.run_dir.name,
        "arm": arm.name,
        "setting": arm.setting,
        "architecture": arm.architecture,
        "method": arm.method,
        "compression": arm.compression,
        "seed": run.seed,
        "learning_rate": run.learning_rate,
        "is_trial": run.is_trial,
        "is_result": run.is_result,
        "failure": run.failure,
    }


def _describe_fairness(runs: Sequence[Run], arms: Sequence[PlannedArm]) -> dict[str, Any]:
    """Return what the runs should share and do not, what is doubtful about them, and what they may differ in."""
    return {
        "options": describe_options(arms),
        "differences": [str(d) for d in find_differences(runs, shared_facts) if d.key != RATE] if runs else [],
        "caveats": find_caveats(runs) if runs else [],
    }


def save_results(results: StudyResults, path: Path) -> None:
    """Write results.parquet, the whole file or nothing."""
    results.frame.save(path)


def load_results(path: Path) -> StudyResults:
    """Read what `save_results` wrote. Raises ValueError for another file, FileNotFoundError without one."""
    frame = Results.load(path)
    try:
        return _read(frame)
    except (KeyError, ValidationError) as error:
        raise ValueError(f"{path} does not hold the results of a study: {error}") from None


def _read(frame: Results) -> StudyResults:
    study = parse_study(json.loads(frame.facts["study"]))
    facts = {key: value for key, value in frame.facts.items() if key not in _INTERNAL}
    return StudyResults(study, frame, frame.facts["arms"], facts)


def _compare_arms(study: Study, runs: Sequence[StudyRun]) -> dict[str, dict[str, Any]]:
    """Return by name of an arm its difference to the baseline of its setting and model, where both have scores."""
    placements: dict[str, list[Placements]] = {}
    arms: dict[str, PlannedArm] = {}
    for run in runs:
        if run.is_result and not run.failure and (placed := _place(run.run_dir)) is not None:
            placements.setdefault(run.arm.name, []).append(placed)
            arms[run.arm.name] = run.arm
    baselines = {
        (arm.setting, arm.architecture): placements[name]
        for name, arm in arms.items()
        if arm.method == study.baseline.name
    }
    return {
        name: asdict(compare_placements(placements[name], baseline))
        for name, arm in arms.items()
        if arm.method != study.baseline.name
        and (baseline := baselines.get((arm.setting, arm.architecture))) is not None
    }


def _place(run_dir: RunDir) -> Placements | None:
    try:
        return place(*run_dir.read_scores())
    except FileNotFoundError:
        return None


def read_difference(arm: Mapping[str, Any]) -> AucDifference | None:
    """Return the difference to the baseline that is stored of an arm."""
    stored = arm["difference"]
    return stored and AucDifference(**{**stored, "seeds": tuple(stored["seeds"])})
