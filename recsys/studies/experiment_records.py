"""What the runs of an experiment measured, as one columnar file: the only thing its tables and plots are made from.

results.parquet has a row for every evaluation of every run, the run's own figures repeated in each; a run that failed,
and a group that could not be run, is one row that says why. The schema's metadata holds the definition, the scale, and
the environment. A group is all runs of one setting, model, method and compression.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from recsys.report.verdict import AucDifference, Placements, compare_placements, place
from recsys.runs.metrics import quality_name
from recsys.runs.run_dir import RunDir
from recsys.runs.summary import RunSummary
from recsys.studies.experiment import Experiment, parse_experiment
from recsys.studies.experiment_plan import Group

VERSION = "1"
_TEXT, _REAL, _WHOLE, _FLAG = pa.string(), pa.float64(), pa.int64(), pa.bool_()
SCHEMA = pa.schema(
    [
        *((name, _TEXT) for name in ("setting", "architecture", "method")),
        ("compression", _REAL),  # asked for
        ("run", _TEXT),  # name of its directory; null: nothing of the group could be run
        ("seed", _WHOLE),
        ("learning_rate", _REAL),
        ("is_trial", _FLAG),  # made to choose the learning rate
        ("is_result", _FLAG),  # at the learning rate chosen
        ("problem", _TEXT),  # why there is nothing, null where there is
        ("status", _TEXT),
        ("stop_reason", _TEXT),
        ("obtained", _REAL),  # compression as built
        *((name, _WHOLE) for name in ("embedding_parameters", "dense_parameters", "full_parameters")),
        *((name, _WHOLE) for name in ("embedding_bytes", "optimizer_bytes")),
        *((name, _WHOLE) for name in ("train_rows", "test_rows", "global_batch_size", "threads")),
        ("asked_epochs", _REAL),
        ("step_ms", _REAL),  # median of the run, of a machine that makes several at once
        ("step_ms_alone", _REAL),  # median, all setups taking turns on a machine that does nothing else
        *((name, _REAL) for name in ("train_time_s", "evaluation_time_s", "peak_memory_gib", "best_possible_auc")),
        ("selected_on", _TEXT),
        # Of the group against the baseline of its setting and model, results on both sides:
        # recsys.report.verdict.
        *(
            (name, _REAL)
            for name in ("difference", "difference_se", "difference_low", "difference_high", "difference_p")
        ),
        ("difference_covers_seeds", _FLAG),
        ("difference_seeds", pa.list_(_WHOLE)),  # runs on either side
        # One evaluation.
        ("step", _WHOLE),
        *((name, _REAL) for name in ("samples", "epoch", "time_s")),
        *((f"{split}_{metric}", _REAL) for split in ("validation", "test") for metric in ("auc", "log_loss")),
        ("is_best", _FLAG),  # lowest log loss on the selecting rows
    ]
)


@dataclass(frozen=True)
class Made:
    """A run of a group as it ended. error: None where run_dir holds a finished run."""

    group: Group
    learning_rate: float
    seed: int
    is_trial: bool
    is_result: bool
    run_dir: RunDir
    error: str | None


@dataclass(frozen=True)
class Results:
    """results.parquet, read. facts: about the whole, as text."""

    experiment: Experiment
    facts: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]


def collect(
    experiment: Experiment,
    groups: Sequence[Group],
    made: Sequence[Made],
    steps_alone: Mapping[tuple[str, str, float], float],
    facts: Mapping[str, Any],
) -> pa.Table:
    """steps_alone: (model, method, compression) -> ms a step."""
    differences = _compare_groups(experiment, made)
    rows: list[dict[str, Any]] = []
    for group in groups:
        own = [run for run in made if run.group.name == group.name]
        alone = steps_alone.get((group.architecture, group.method, group.compression))
        common = _describe_group(group) | {"step_ms_alone": alone} | _as_columns(differences.get(group.name))
        if not own:
            rows.append(common | {"problem": group.problem or "nothing was run", "is_trial": False, "is_result": True})
        for run in own:
            rows += [common | row for row in _read_run(run)]
    found = pa.Table.from_pylist(rows, schema=SCHEMA)
    metadata = {"version": VERSION, "experiment": experiment.model_dump_json(), "facts": json.dumps(facts)}
    return found.replace_schema_metadata(metadata)


def write_results(table: pa.Table, path: Path) -> None:
    """The whole file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    pq.write_table(table, temporary)
    temporary.replace(path)


def read_results(path: Path) -> Results:
    """Raises ValueError for a file that `write_results` did not write, FileNotFoundError without one."""
    table = pq.read_table(path)
    metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    if metadata.get("version") != VERSION:
        raise ValueError(f"{path}: not the results of an experiment in version {VERSION}: {metadata.get('version')}")
    experiment = parse_experiment(json.loads(metadata["experiment"]))
    return Results(experiment, json.loads(metadata["facts"]), table.to_pylist())


def _describe_group(group: Group) -> dict[str, Any]:
    return {
        "setting": group.setting,
        "architecture": group.architecture,
        "method": group.method,
        "compression": group.compression,
        "embedding_parameters": group.parameters,
    }


def _as_columns(difference: AucDifference | None) -> dict[str, Any]:
    if difference is None:
        return {}
    return {
        "difference": difference.difference,
        "difference_se": difference.standard_error,
        "difference_low": difference.low,
        "difference_high": difference.high,
        "difference_p": difference.p,
        "difference_covers_seeds": difference.covers_seeds,
        "difference_seeds": list(difference.seeds),
    }


def _read_run(run: Made) -> list[dict[str, Any]]:
    """A row an evaluation."""
    common = {
        "run": run.run_dir.name,
        "seed": run.seed,
        "learning_rate": run.learning_rate,
        "is_trial": run.is_trial,
        "is_result": run.is_result,
        "problem": run.error,
    }
    if run.error:
        return [common | {"status": "failed"}]
    summary, config = run.run_dir.read_summary(), run.run_dir.read_config()
    common |= _read_summary(summary) | {"asked_epochs": float(config["training"]["epochs"])}
    assert summary.best is not None, "a finished run has evaluations"
    best_step = int(summary.best["step"])
    evaluations = [r for r in run.run_dir.records() if r.get(quality_name("test", "auc")) is not None]
    return [common | _read_evaluation(record, best_step) for record in evaluations]


def _read_summary(summary: RunSummary) -> dict[str, Any]:
    names = ("status", "stop_reason", "selected_on", "train_rows", "test_rows")
    names += ("global_batch_size", "train_time_s", "evaluation_time_s")
    return {
        **{name: getattr(summary, name) for name in names},
        "obtained": summary.compression.actual,
        "embedding_parameters": summary.parameters.embedding,
        "dense_parameters": summary.parameters.dense,
        "full_parameters": summary.parameters.embedding_full,
        "embedding_bytes": sum(summary.bytes_per_rank.embedding),
        "optimizer_bytes": sum(summary.bytes_per_rank.embedding_optimizer),
        "threads": summary.world_size * summary.threads_per_rank,
        "step_ms": summary.step_ms and summary.step_ms.p50,
        "peak_memory_gib": max(summary.peak_memory_gib or [0.0]) or None,
        "best_possible_auc": summary.best_possible and summary.best_possible.auc,
    }


def _read_evaluation(record: Mapping[str, Any], best_step: int) -> dict[str, Any]:
    quality = {
        f"{split}_{metric}": record.get(quality_name(split, metric))
        for split in ("validation", "test")
        for metric in ("auc", "log_loss")
    }
    position = {"step": int(record["step"]), "samples": float(record["samples"])}
    return {
        **position,
        "epoch": record["epoch"],
        "time_s": record["time_s"],
        "is_best": record["step"] == best_step,
    } | quality


def _compare_groups(experiment: Experiment, made: Sequence[Made]) -> dict[str, AucDifference]:
    """Name of a group -> its test AUC over the baseline's of its setting and model, where the scores are there."""
    results = [run for run in made if run.is_result and not run.error]
    baselines: dict[tuple[str, str], list[Placements]] = {}
    found = {}
    for name in dict.fromkeys(run.group.name for run in results):
        runs = [run for run in results if run.group.name == name]
        where = runs[0].group.setting, runs[0].group.architecture
        if runs[0].group.method == experiment.baseline.name:
            baselines[where] = _place_all(runs)
        elif (own := _place_all(runs)) and baselines.get(where):
            found[name] = compare_placements(own, baselines[where])
    return found


def _place_all(runs: Sequence[Made]) -> list[Placements]:
    """Of the runs that left their scores."""
    placed = []
    for run in runs:
        try:
            logits, labels = run.run_dir.read_scores()
        except FileNotFoundError:
            continue
        placed.append(place(logits, labels))
    return placed
