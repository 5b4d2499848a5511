"""Embedding methods side by side at several compressions: what their runs measured, row by row.

A row is one config of a method at one compression: runs of several seeds at the learning rate that was best for this
row. Quality is that of each run's best evaluation, chosen on the validation rows.
"""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from statistics import fmean, stdev
from typing import Any

from configs.load import flatten, resolved
from configs.schema import RunConfig
from recsys.report.comparison import figures_to_json
from recsys.report.fairness import find_caveats, find_differences, shared_facts
from recsys.report.frame import Arm, Measured, build_results
from recsys.report.run import Run
from recsys.train.registry import CHOICES

JSON_VERSION = 1
_TUNED = "optimizer.embedding_learning_rate"
_LONGEST_CAVEAT = 300


@dataclass(frozen=True)
class RateTrial:
    """A run that was made to choose the learning rate. log_loss: its best on the validation rows; None if it failed."""

    learning_rate: float
    log_loss: float | None
    seconds: float
    error: str | None = None


@dataclass(frozen=True, eq=False)
class MethodRow:
    """name: of the method's config. compression: asked for. limit: the highest that the method reaches on these
    tables, where it was asked for more; above it nothing is run. initial_std: of the tables it starts with, over that
    of full tables; None where it was not built. errors: of the method where it could not be, and of runs that failed.
    """

    name: str
    compression: float
    limit: float | None = None
    initial_std: float | None = None
    trials: tuple[RateTrial, ...] = ()
    runs: tuple[Run, ...] = ()
    errors: tuple[str, ...] = ()

    @cached_property
    def arm(self) -> Arm | None:
        """The runs taken together."""
        return build_results((run, {"arm": self.name}) for run in self.runs).arms()[0] if self.runs else None

    @property
    def is_full(self) -> bool:
        return bool(self.runs) and self.runs[0].summary.method == "full"

    @property
    def is_refused(self) -> bool:
        return self.limit is not None and self.compression > self.limit

    @property
    def learning_rate(self) -> float | None:
        return self.runs[0].config["optimizer"]["embedding_learning_rate"] if self.runs else None

    @property
    def is_at_edge(self) -> bool:
        """Whether the best learning rate is the lowest or highest tried: a better one may lie beyond."""
        tried = [trial.learning_rate for trial in self.trials]
        return len(tried) > 1 and self.learning_rate in (min(tried), max(tried))

    @property
    def obtained(self) -> float | None:
        return self.runs[0].summary.compression.actual if self.runs else None

    @property
    def stored_bytes(self) -> int | None:
        """Of all that must be kept to look up: what the compression obtained is over."""
        if self.obtained is None:
            return None
        return round(4 * self.runs[0].summary.parameters.embedding_full / self.obtained)


@dataclass(frozen=True)
class MethodTable:
    """options: name -> its [embedding] as text. environment: of the runs. differences: what they should share and do
    not. caveats: what a reader must know of how they came about."""

    rows: tuple[MethodRow, ...]
    seeds: tuple[int, ...]
    rates: tuple[float, ...]
    options: Mapping[str, str]
    environment: Mapping[str, Any]
    differences: tuple[str, ...]
    caveats: tuple[str, ...]

    @property
    def baseline(self) -> MethodRow | None:
        return next((row for row in self.rows if row.is_full), None)

    @property
    def measured(self) -> list[MethodRow]:
        return [row for row in self.rows if row.runs]


def build_method_table(
    rows: Sequence[MethodRow], configs: Mapping[str, RunConfig], seeds: Sequence[int], rates: Sequence[float], jobs: int
) -> MethodTable:
    """configs: of every name, at any compression. jobs: how many runs were made at a time."""
    runs = [run for row in rows for run in row.runs]
    differences = [d for d in find_differences(runs, shared_facts) if d.key != _TUNED] if runs else []
    caveats = [*_find_row_caveats(rows), *(find_caveats(runs) if runs else [])]
    environment = flatten({k: v for k, v in runs[0].environment.items() if k != "command"}) if runs else {}
    return MethodTable(
        rows=tuple(rows),
        seeds=tuple(seeds),
        rates=tuple(sorted(rates)),
        options={name: _describe_options(config) for name, config in configs.items()},
        environment=environment | {"runs at a time": jobs},
        differences=tuple(_shorten(str(difference)) for difference in differences),
        caveats=tuple(_shorten(caveat) for caveat in caveats),
    )


def _describe_options(config: RunConfig) -> str:
    embedding = {k: v for k, v in resolved(config, CHOICES)["embedding"].items() if k != "compression"}
    return ", ".join(f"{key} = {value}" for key, value in flatten(embedding).items())


def _find_row_caveats(rows: Sequence[MethodRow]) -> list[str]:
    caveats = []
    if cut := [row for row in rows if any(run.summary.stop_reason != "patience" for run in row.runs)]:
        caveats.append(f"Not stopped by patience, so quality may still have risen: {_name(cut)}.")
    if edge := [row for row in rows if row.is_at_edge]:
        caveats.append(f"The best learning rate is the last one tried: {_name(edge)}.")
    if failed := [row for row in rows if any(trial.error for trial in row.trials)]:
        caveats.append(f"Some learning rates failed, such as by a loss that is not finite: {_name(failed)}.")
    return caveats


def _name(rows: Sequence[MethodRow]) -> str:
    return ", ".join(f"{row.name} {row.compression:g}×" for row in rows)


def _shorten(text: str) -> str:
    return textwrap.shorten(text, _LONGEST_CAVEAT, placeholder=" …")


def paired_difference(row: MethodRow, baseline: MethodRow | None) -> Measured | None:
    """Test AUC minus the baseline's at the same seed: mean and standard deviation over the seeds both have."""
    if baseline is None or baseline is row:
        return None
    theirs = {run.summary.seed: run.summary.best["test_auc"] for run in baseline.runs if run.summary.best}
    found = [
        run.summary.best["test_auc"] - theirs[run.summary.seed]
        for run in row.runs
        if run.summary.best and run.summary.seed in theirs
    ]
    if not found:
        return None
    several = len(found) > 1
    return Measured(fmean(found), stdev(found) if several else None, "seeds" if several else None, len(found))


def to_json(table: MethodTable) -> dict[str, Any]:
    """Every figure of the table. A key is never left out: what was not measured is null."""
    return {
        "version": JSON_VERSION,
        "rows": [_row_to_json(row, table) for row in table.rows],
        **{key: value for key, value in vars(table).items() if key != "rows"},
    }


def _row_to_json(row: MethodRow, table: MethodTable) -> dict[str, Any]:
    difference = paired_difference(row, table.baseline)
    return {
        "name": row.name,
        "compression": row.compression,
        "limit": row.limit,
        "obtained": row.obtained,
        "parameters": row.runs[0].summary.parameters.embedding if row.runs else None,
        "stored_bytes": row.stored_bytes,
        "initial_std": row.initial_std,
        "learning_rate": row.learning_rate,
        "is_at_edge": row.is_at_edge,
        "figures": row.arm and figures_to_json(row.arm, row.arm.fact("selected_on"), None),
        "test_auc_minus_full": difference and asdict(difference),
        "runs": [{"label": run.label, "path": str(run.path), **run.summary.model_dump()} for run in row.runs],
        "trials": [asdict(trial) for trial in row.trials],
        "errors": row.errors,
    }
