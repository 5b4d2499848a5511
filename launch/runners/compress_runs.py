"""The runs of a comparison before, after and without compression of a trained table, and their table."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich.table import Table

from configs.load import run_name
from launch.runners.local import LocalRunner, count_jobs
from launch.runners.trial import Outcome, Trial, run_trials
from recsys.runs.summary import RunSummary

ROWS = ("full tables", "trained compressed", "compressed after training", "compressed, then fine-tuned")


def make_runs(
    full: str, compressed: str, overrides: Sequence[str], *, output: Path, seeds: Sequence[int], jobs: int | None
) -> list[Outcome]:
    """Make the runs of every seed: those with full tables first, and if they finish those of the method.

    full, compressed: paths of configs. Raises ConfigError before anything is run.
    """
    common = (*overrides, f"run.dir={output}")
    keys_of = {seed: (*common, f"run.seed={seed}") for seed in seeds}
    kept = [Trial(full, (*keys, "checkpoint.keep_best=true"), f"full_s{seed}") for seed, keys in keys_of.items()]
    stem = run_name(compressed)
    others = []
    for seed, keys in keys_of.items():
        others.append(Trial(compressed, keys, f"{stem}_s{seed}"))
        fitted = (*keys, f"embedding.fit_to={output}/full_s{seed}", "evaluation.at_start=true")
        others.append(Trial(compressed, fitted, f"{stem}_fitted_s{seed}"))
    with LocalRunner(count_jobs([trial.load() for trial in [*kept, *others]], jobs)) as runner:
        outcomes = run_trials(kept, runner, "full tables")
        if not any(outcome.failure for outcome in outcomes):
            outcomes += run_trials(others, runner, "compressed")
    return outcomes


def build_table(outcomes: Sequence[Outcome], seeds: int) -> Table:
    """Return the table of the four rows, mean ± standard deviation over the seeds."""
    summaries = [outcome.run_dir.read_summary() for outcome in outcomes]
    full, trained, fitted = summaries[:seeds], summaries[seeds::2], summaries[seeds + 1 :: 2]
    compression = fmean(summary.compression.actual for summary in trained)
    table = Table(title=f"{trained[0].method} at {compression:.3g}×, {seeds} seed{'s' if seeds > 1 else ''}")
    table.add_column("")
    for column in ("test AUC", "test log loss", "epochs"):
        table.add_column(column, justify="right")
    measured = (
        [_best(summary) for summary in full],
        [_best(summary) for summary in trained],
        [_first_evaluation(outcome) for outcome in outcomes[seeds + 1 :: 2]],
        [_best(summary) for summary in fitted],
    )
    for name, evaluations in zip(ROWS, measured, strict=True):
        columns = [_spread([e[key] for e in evaluations]) for key in ("test_auc", "test_log_loss")]
        table.add_row(name, *columns, f"{fmean(e['epoch'] for e in evaluations):.1f}")
    return table


def _best(summary: RunSummary) -> dict[str, int | float]:
    assert summary.best is not None, "a finished run has evaluations"
    return summary.best


def _first_evaluation(outcome: Outcome) -> dict[str, Any]:
    """Return the evaluation before the first step. Raises ValueError where none is recorded."""
    for line in (outcome.run_dir.path / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "quality/test_auc" in record:
            assert record["step"] == 0
            names = {"test_auc": "quality/test_auc", "test_log_loss": "quality/test_log_loss", "epoch": "epoch"}
            return {name: record[key] for name, key in names.items()}
    raise ValueError(f"{outcome.run_dir.path}: no evaluation is recorded")


def _spread(values: Sequence[float]) -> str:
    """Return mean ± standard deviation as text, the mean alone of one value."""
    return f"{fmean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")
