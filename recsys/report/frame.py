"""The results of runs, as two frames that comparison, studies and the method bench read alike.

`runs` has a row for every run, `evaluations` a row for every evaluation of every run, with a column for every metric
that was recorded. Runs that are equal but for their seed form an `Arm`, which gives every figure as a mean over them:

    results = build_results((run, {"arm": run.summary.method}) for run in load_runs(["runs/full_s0", "runs/robe_s0"]))
    full, robe = results.arms()
    robe.mean("step_ms.p50")                                  # Measured(mean=6.6, plus_minus=0.2, n=3, …)
    robe.at_best("test_auc")                                  # at the best evaluation of each run
    target = Target(full.lowest_best("validation_auc"), "validation", "what every run with full tables reaches")
    robe.time_to_target(target).observed.time_s
    robe.ratios(full, target).relative_time
    results.filter(pl.col("method") == "robe").runs["seed"]   # both frames are plain polars
    results.save("results.parquet")
    Results.load("results.parquet")

Columns of `runs`: `run`, the key; `arm`, what `arms` splits by; everything of `RunSummary`, nested fields joined by
dots (`compression.target`); and what the caller adds, such as a study's settings. Columns of `evaluations`: `run`,
`step`, `samples`, `epoch`, `time_s`, `is_best`, and metrics as `<split>_<metric>` (`test_auc`).
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

import polars as pl
from pydantic import TypeAdapter

from configs.load import flatten
from recsys.report.curves import Point, TimeToTarget, mean_curve, time_to_target
from recsys.report.run import Run
from recsys.runs.window_timing import RankTiming, WindowTiming, average

FORMAT = "pss-bench results 2"
_POSITION = ("step", "samples", "epoch", "time_s")
_IN_FILE = "evaluation."
"""Goes before the columns of `evaluations` in the file: `samples` is a column of both frames."""
_QUALITY = "quality/"
_TRAINING = "quality/train_"
_STEP_MS = ("interleaved_step_ms", "step_ms.p50")
"""Columns of `runs`, the better one first: measured with all arms interleaved and nothing beside them, or as it ran."""
_AS_TEXT = "profiles"
"""The field of a summary that is no table: it is kept as JSON."""
_EVALUATIONS = ("best", "last")
"""Fields of a summary that are rows of `evaluations`."""
_WINDOWS = TypeAdapter(list[WindowTiming])


def figures_as_json(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Return figures as JSON holds them: those made of several numbers, such as `Measured`, as objects."""
    return {
        name: asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
        for name, value in figures.items()
    }


@dataclass(frozen=True)
class Measured:
    """Hold a mean over n runs.

    plus_minus: standard deviation over seeds, or standard error of an AUC by its test sample, as source says.
    """

    mean: float
    plus_minus: float | None
    source: Literal["seeds", "sampling"] | None
    n: int


@dataclass(frozen=True)
class Target:
    """Hold the AUC that arms are timed to. split: whose AUC; rule: where the figure comes from."""

    auc: float
    split: str
    rule: str

    @property
    def metric(self) -> str:
        """Return the column of `evaluations` that is set against the target."""
        return f"{self.split}_auc"


@dataclass(frozen=True)
class ProfiledSteps:
    """Hold where a profiled step goes, in ms and bytes a step; what the parts are: `recsys.profile.timing`.

    windows, steps: of all runs together. exposed_share: exposed communication over the step, with the lowest and the
    highest of single windows. overlap_share: of communication, None without any. overhead: profiled step over the mean
    step outside of windows. clock_error_ms: of the worst window. mean: over ranks; both are means over windows.
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
class Ratios:
    """Hold an arm's figures over the baseline's; below 1 = less time, fewer bytes.

    None: one of the two was not measured. relative_time: the PSS paper's A × B (Table 4), epochs to the target times
    time of a step, over the same product.
    """

    step_time: float | None
    embedding_bytes: float | None
    time_to_target: float | None
    relative_time: float | None


@dataclass(frozen=True, eq=False)
class Arm:
    """Hold runs that are equal but for their seed, and give the figures they have together. None = not measured."""

    label: str
    runs: pl.DataFrame
    evaluations: pl.DataFrame

    def __len__(self) -> int:
        return len(self.runs)

    def values(self, column: str) -> list[Any]:
        """Return a column of `runs`, one value a run; Nones where no run has the column."""
        return self.runs[column].to_list() if column in self.runs.columns else [None] * len(self)

    def fact(self, column: str) -> Any:
        """Return what all runs of the arm share, by the first of them."""
        return self.values(column)[0]

    def mean(self, column: str) -> Measured | None:
        """Return the mean of a column of `runs` over the runs that have a value."""
        return mean_over_runs(self.values(column))

    def at_best(self, metric: str, sampling_error: bool = False) -> Measured | None:
        """Return the mean of a metric at the best evaluation of each run.

        sampling_error: give a single run the standard error that was recorded beside the metric, as `<metric>_se`.
        """
        best = self._best
        # The error of one test sample says nothing beside a spread over seeds: several runs keep theirs.
        value = mean_over_runs(row.get(metric) for row in best)
        if not sampling_error or value is None or value.n > 1 or (error := best[0].get(f"{metric}_se")) is None:
            return value
        return Measured(value.mean, error, "sampling", 1)

    def at_equal_time(self, metric: str, seconds: float) -> Measured | None:
        """Return the mean of a metric at the evaluation of lowest log loss in the first seconds of training."""
        chosen = f"{self.fact('selected_on')}_log_loss"
        within = [[row for row in rows if row["time_s"] <= seconds] for rows in self._evaluations]
        return mean_over_runs(min(rows, key=lambda row: row[chosen])[metric] for rows in within if rows)

    def curves(self, metric: str) -> list[list[Point]]:
        """Return the learning curve of every run, empty for a run that the metric was not measured of."""
        return [
            [Point(e["time_s"], e["samples"], e["epoch"], e[metric]) for e in rows if e.get(metric) is not None]
            for rows in self._evaluations
        ]

    def mean_curve(self, metric: str) -> list[Point]:
        """Return the mean learning curve, at the positions in samples where all runs were measured."""
        return mean_curve(self.curves(metric))

    def lowest_best(self, metric: str) -> float | None:
        """Return the lowest of the runs' highest values: what every run reaches."""
        return min((max(p.value for p in curve) for curve in self.curves(metric) if curve), default=None)

    def time_to_target(self, target: Target | None) -> TimeToTarget | None:
        """Return where the runs reach the target; None without a target, or when a run was not evaluated."""
        return target and time_to_target(self.curves(target.metric), target.auc)

    def ratios(self, baseline: "Arm", target: Target | None) -> Ratios:
        """Return this arm's figures over the baseline's."""

        def over(figure: Any) -> float | None:
            return ratio(figure(self), figure(baseline))

        def position(arm: Arm) -> Any:
            reached = arm.time_to_target(target)
            return reached and reached.observed

        def epochs_times_step(arm: Arm) -> float | None:
            reached, step_ms = position(arm), arm.step_ms
            return reached.epochs * step_ms if reached and step_ms is not None else None

        return Ratios(
            step_time=over(lambda arm: arm.step_ms),
            embedding_bytes=over(lambda arm: sum(arm.embedding_bytes)),
            time_to_target=over(lambda arm: position(arm) and position(arm).time_s),
            relative_time=over(epochs_times_step),
        )

    @property
    def step_ms(self) -> float | None:
        """Return the step time that ratios are taken of, in ms.

        It is the mean of the runs' medians, measured with all arms interleaved where it was.
        """
        return next((step.mean for column in _STEP_MS if (step := self.mean(column))), None)

    @property
    def embedding_bytes(self) -> tuple[int, int]:
        """Return the bytes of embedding parameters and of their optimizer state, on the rank that holds most."""
        held = self.fact("bytes_per_rank.embedding"), self.fact("bytes_per_rank.embedding_optimizer")
        return max(zip(*held, strict=False), key=sum)

    @property
    def peak_memory_gib(self) -> float | None:
        """Return the peak memory in GiB of the rank that has the largest, over all runs."""
        return max((gib for ranks in self.values("peak_memory_gib") for gib in ranks or ()), default=None)

    @property
    def unfinished(self) -> list[str]:
        """Return the status of every run that is not finished."""
        return [status for status in self.values("status") if status != "finished"]

    @cached_property
    def windows(self) -> list[list[WindowTiming]]:
        """Return the profiled windows of every run."""
        return [_WINDOWS.validate_json(text) if text else [] for text in self.values(_AS_TEXT)]

    @cached_property
    def profiled(self) -> ProfiledSteps | None:
        """Return where a step goes, over all profiled windows of the runs; None where there are none."""
        means = [mean for mean, own in zip(self.values("step_ms.mean"), self.windows, strict=True) for _ in own]
        return _profiled_steps([window for own in self.windows for window in own], [m for m in means if m is not None])

    @cached_property
    def _evaluations(self) -> list[list[dict[str, Any]]]:
        """Return the evaluations of every run, in the order of training."""
        by_run: dict[str, list[dict[str, Any]]] = {run: [] for run in self.runs["run"]}
        for row in self.evaluations.iter_rows(named=True):
            by_run[row["run"]].append(row)
        return list(by_run.values())

    @property
    def _best(self) -> list[dict[str, Any]]:
        return [row for rows in self._evaluations for row in rows if row["is_best"]]


@dataclass(frozen=True, eq=False)
class Results:
    """Hold runs and their evaluations. facts: about the whole, as JSON can hold them."""

    runs: pl.DataFrame
    evaluations: pl.DataFrame
    facts: Mapping[str, Any] = field(default_factory=dict)

    def filter(self, *predicates: pl.Expr) -> "Results":
        """Return the runs that fulfil all predicates, with their evaluations."""
        runs = self.runs.filter(*predicates)
        return Results(runs, self.evaluations.filter(pl.col("run").is_in(runs["run"].to_list())), self.facts)

    def arms(self, by: Sequence[str] = ("arm",)) -> list[Arm]:
        """Return the arms in the order of their first runs. by: columns of `runs` that are the same within an arm."""
        return list(self._split(by))

    def _split(self, by: Sequence[str]) -> Iterator[Arm]:
        for key, runs in self.runs.group_by(*by, maintain_order=True):
            evaluations = self.evaluations.filter(pl.col("run").is_in(runs["run"].to_list()))
            yield Arm(" ".join(str(part) for part in key if part not in (None, "")), runs, evaluations)

    def save(self, path: str | Path) -> None:
        """Write one parquet file, whole or not at all: a row an evaluation, its run's columns repeated."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")  # beside it: a rename is atomic within a disk only
        evaluations = self.evaluations.rename(lambda name: name if name == "run" else _IN_FILE + name)
        whole = self.runs.join(evaluations, on="run", how="left", maintain_order="left_right")
        whole.write_parquet(temporary, metadata={"format": FORMAT, "facts": json.dumps(self.facts)})
        temporary.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> "Results":
        """Read what `save` wrote. Raises FileNotFoundError, and ValueError for another file."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist")
        try:
            metadata = pl.read_parquet_metadata(path)
        except pl.exceptions.ComputeError as error:
            raise ValueError(f"{path} is not a parquet file: {error}") from None
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{path} does not hold results in the format {FORMAT!r}, but {metadata.get('format')!r}")
        whole = pl.read_parquet(path)
        names = [name for name in whole.columns if name.startswith(_IN_FILE)]
        evaluations = whole.select("run", *names).rename({name: name.removeprefix(_IN_FILE) for name in names})
        # A run without evaluations is one row, whose evaluation is empty.
        evaluations = evaluations.filter(pl.col("step").is_not_null())
        runs = whole.drop(names).unique("run", keep="first", maintain_order=True)
        return cls(runs, evaluations, json.loads(metadata["facts"]))


def build_results(
    rows: Iterable[tuple[Run | None, Mapping[str, Any]]], facts: Mapping[str, Any] | None = None
) -> Results:
    """Return the results of runs.

    rows: every run with the columns that the caller adds, `arm` among them; None in place of a run that left nothing,
    such as one that failed, whose columns then name it as `run`.
    """
    runs, evaluations = [], []
    for run, columns in rows:
        row = (_run_row(run) if run else {}) | dict(columns)
        runs.append(row)
        evaluations += [{"run": row["run"]} | evaluation for evaluation in (_evaluation_rows(run) if run else [])]
    keys = [row["run"] for row in runs]
    assert len(set(keys)) == len(keys), f"runs with one name: {sorted(keys)}"
    schema = {"run": pl.String, **dict.fromkeys(_POSITION, pl.Float64), "is_best": pl.Boolean}
    metrics = dict.fromkeys(name for row in evaluations for name in row if name not in schema)
    rows_of_metrics = pl.DataFrame(evaluations, schema=schema | dict.fromkeys(metrics, pl.Float64), strict=False)
    return Results(pl.DataFrame(runs, infer_schema_length=None, strict=False), rows_of_metrics, facts or {})


def _run_row(run: Run) -> dict[str, Any]:
    summary = run.summary.model_dump(mode="json", exclude={*_EVALUATIONS, _AS_TEXT})
    windows = json.loads(_WINDOWS.dump_json(list(run.summary.profiles)))
    return {"run": run.label, "path": str(run.path), **flatten(summary), _AS_TEXT: json.dumps(windows)}


def _evaluation_rows(run: Run) -> list[dict[str, Any]]:
    """Return the held-out evaluations among a run's records, and what the summary alone says of the best."""
    best = run.summary.best
    rows = {}
    for record in run.records:
        quality = {
            name.removeprefix(_QUALITY): value
            for name, value in record.items()
            if name.startswith(_QUALITY) and not name.startswith(_TRAINING)
        }
        if quality:
            rows[record["step"]] = {**{key: record[key] for key in _POSITION}, "is_best": False, **quality}
    if best:
        rows[best["step"]] = rows.get(best["step"], {}) | best | {"is_best": True}
    return sorted(rows.values(), key=lambda row: row["step"])


def mean_over_runs(values: Iterable[float | None]) -> Measured | None:
    """Return the mean of the values that are known, with their standard deviation where there are several."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    several = len(known) > 1
    return Measured(fmean(known), stdev(known) if several else None, "seeds" if several else None, len(known))


def ratio(value: float | None, over: float | None) -> float | None:
    """Return value / over; None where one is not known, or nothing."""
    return value / over if value is not None and over else None


def _profiled_steps(windows: Sequence[WindowTiming], unprofiled_ms: Sequence[float]) -> ProfiledSteps | None:
    """Return where a step goes over windows; None without any.

    unprofiled_ms: mean step time outside of windows, once for every window whose run has it.
    """
    if not windows:
        return None
    num_ranks = max(len(window.ranks) for window in windows)
    ranks = [average([w.ranks[r] for w in windows if r < len(w.ranks)]) for r in range(num_ranks)]
    mean: RankTiming = average(ranks)
    shares = [window.mean("exposed_comm_ms") / window.mean("step_ms") for window in windows]
    return ProfiledSteps(
        windows=len(windows),
        steps=sum(window.num_steps for window in windows),
        exposed_share=mean.exposed_comm_ms / mean.step_ms,
        exposed_share_lowest=min(shares),
        exposed_share_highest=max(shares),
        overlap_share=ratio(mean.overlap_ms, mean.comm_ms),
        overhead=ratio(mean.step_ms, average(unprofiled_ms)),
        clock_error_ms=max(window.clock_error_ms for window in windows),
        mean=mean,
        ranks=tuple(ranks),
    )
