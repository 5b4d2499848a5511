"""What compressing a trained table is worth: trained compressed, compressed after training, and then fine-tuned.

    full tables                      trained as they are; the best evaluation is kept
    trained compressed               the method from a random start
    compressed after training        the full model's layers, its tables fitted by the method; not trained
    compressed, then fine-tuned      the same, trained on; as good as before if no evaluation is better

The fit is least squares for what is linear in one shared array, TT-SVD for tensor trains (recsys.train.fit). All runs
share data, seed, layers and optimizer; test AUC and log loss are those of the evaluation with the best validation log
loss.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

from configs.load import run_name
from launch.cli import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_MISTAKE
from launch.runners.local import LocalRunner, count_jobs
from launch.runners.trial import Outcome, Trial, print_failures, run_trials
from recsys.runs.summary import RunSummary

ROWS = ("full tables", "trained compressed", "compressed after training", "compressed, then fine-tuned")


def main(arguments: Sequence[str] | None = None) -> None:
    asked = parse_arguments(arguments)
    common = (*asked.overrides, f"run.dir={asked.runs}")
    seeds = [(seed, (*common, f"run.seed={seed}")) for seed in asked.seeds]
    kept = [Trial(asked.full, (*keys, "checkpoint.keep_best=true"), f"full_s{seed}") for seed, keys in seeds]
    stem = run_name(asked.compressed)
    others = []
    for seed, keys in seeds:
        others.append(Trial(asked.compressed, keys, f"{stem}_s{seed}"))
        fitted = (*keys, f"embedding.fit_to={asked.runs}/full_s{seed}", "evaluation.at_start=true")
        others.append(Trial(asked.compressed, fitted, f"{stem}_fitted_s{seed}"))
    try:
        with LocalRunner(count_jobs([trial.load() for trial in [*kept, *others]], asked.jobs)) as runner:
            outcomes = run_trials(kept, runner, "full tables")
            if not any(outcome.failure for outcome in outcomes):
                outcomes += run_trials(others, runner, "compressed")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_MISTAKE)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    if print_failures(outcomes):
        sys.exit(EXIT_FAILED)
    Console().print(build_table(outcomes, len(seeds)))


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
    return f"{fmean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m launch.compress",
        description=__doc__,
        epilog="example:\n  python -m launch.compress configs/movielens/full.toml configs/movielens/robe.toml \\\n"
        "      --seeds 0 1 2 data.movielens.ratings=ratings.csv data.movielens.movies=movies.csv\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("full", help="config of the run with full tables")
    parser.add_argument("compressed", help="config of the method; must share data and model with it")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="laid over both configs")
    parser.add_argument("--runs", default="runs/compress", help="directory of the runs (default: %(default)s)")
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0], metavar="N", help="values of run.seed (default: 0)"
    )
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at a time (default: cores / threads of a run)")
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    main()
