"""A comparison as tables: one row an arm, one column a figure, and a column for every metric of the registry."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from recsys.compare.comparison import Comparison
from recsys.report.curves import TimeToTarget
from recsys.report.frame import Arm, Measured, ProfiledSteps, Ratios
from recsys.report.numbers import (
    MISSING,
    format_bytes,
    format_count,
    format_epochs,
    format_measured,
    format_ratio,
    format_seconds,
    format_share,
    plural,
    three_digits,
)
from recsys.report.palette import BASELINE, Style, choose_style
from recsys.report.table import Cell, Column, Table
from recsys.runs.metrics import QUALITY

_PLACED = ("auc", "log_loss", "ne", "calibration")
"""Metrics with a column of their own below, in the small print of another, or in JSON alone."""


class ArmRow(NamedTuple):
    """Hold what a row of the table is built from: an arm in its comparison."""

    comparison: Comparison
    arm: Arm

    @property
    def ratios(self) -> Ratios:
        """Return the arm's figures over the baseline's."""
        return self.comparison.ratios(self.arm)

    @property
    def reached(self) -> TimeToTarget | None:
        """Return where in training the arm reaches the target."""
        return self.comparison.time_to_target(self.arm)

    @property
    def is_baseline(self) -> bool:
        """Return whether the arm is what ratios are taken to."""
        return self.arm is self.comparison.baseline


def build_table(comparison: Comparison) -> Table:
    """Return the table of all arms; figures of profiled windows only where a run has one."""
    profiled = () if any(arm.profiled for arm in comparison.arms) else _OF_PROFILED
    others = [_metric_column(name) for name in comparison.metrics if name not in _PLACED]
    columns = [_ARM, *_FACTS, *_QUALITY, *others, *(column for column in _COSTS if column not in profiled)]
    return Table.of([ArmRow(comparison, arm) for arm in comparison.arms], columns)


def build_profiled_table(comparison: Comparison) -> Table:
    """Return where the steps of profiled arms go, with a column for every kind of collective."""
    rows = [ArmRow(comparison, arm) for arm in comparison.arms if arm.profiled]
    kinds = dict.fromkeys(kind for row in rows if row.arm.profiled for kind in row.arm.profiled.mean.collectives)
    return Table.of(rows, [_ARM, *_PROFILED, *(_kind_column(kind) for kind in kinds)])


def choose_styles(comparison: Comparison) -> list[Style]:
    """Return one style an arm, the same in all plots and tables: grey for the baseline."""
    return [BASELINE, *(choose_style(i) for i in range(len(comparison.others)))]


def describe_state(arm: Arm) -> str:
    """Return '' for finished runs, else how they ended."""
    states = sorted(set(arm.unfinished))
    several = f"{len(arm)} runs " if states and len(arm) > 1 else ""
    return several + ", ".join(states)


def _label(row: ArmRow) -> Cell:
    style = choose_styles(row.comparison)[row.comparison.arms.index(row.arm)]
    return Cell(row.arm.label, describe_state(row.arm), row.arm.label, style=style)


def _plain(value: Measured | None, text: Callable[[float], str], detail: str = "") -> Cell:
    return Cell.of(value.mean if value else None, text, detail if value else "")


def _auc(row: ArmRow) -> Cell:
    value = row.arm.at_best("test_auc", sampling_error=True)
    if value is None:
        return Cell(MISSING)
    source = {"seeds": f"{value.n} seeds", "sampling": "test sampling", None: ""}[value.source]
    return Cell(format_measured(value), source, value.mean)


def _log_loss(row: ArmRow) -> Cell:
    value, ne = row.arm.at_best("test_log_loss"), row.arm.at_best("test_ne")
    return Cell(format_measured(value), f"NE {format_measured(ne)}", value.mean) if value else Cell(MISSING)


def _metric_column(name: str) -> Column[ArmRow]:
    """Return the column of a metric that has no place of its own."""

    def cell(row: ArmRow) -> Cell:
        value = row.arm.at_best(f"test_{name}")
        return Cell(format_measured(value, digits=QUALITY[name].digits), "", value.mean) if value else Cell(MISSING)

    return Column(f"test {QUALITY[name].title}", QUALITY[name].text, cell)


def _placement(row: ArmRow) -> Cell:
    ranks, threads = row.arm.fact("world_size"), row.arm.fact("threads_per_rank")
    is_sharded = row.arm.fact("placement") == "shard"
    text = f"sharded: {row.arm.fact('sharding')}" if is_sharded else "replicated"
    return Cell(text, f"{plural(ranks, 'rank')} × {plural(threads, 'thread')}", text)


def _method(row: ArmRow) -> Cell:
    seeds, method = [str(seed) for seed in row.arm.values("seed")], row.arm.fact("method")
    return Cell(method, f"seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}", method)


def _parameters(row: ArmRow) -> Cell:
    dense = format_count(row.arm.fact("parameters.dense"))
    return Cell.of(row.arm.fact("parameters.embedding"), format_count, f"dense {dense}")


def _embedding_bytes(row: ArmRow) -> Cell:
    parameters, state = row.arm.embedding_bytes
    detail = f"optimizer {format_bytes(state)}" if state else "optimizer none"
    return Cell(format_bytes(parameters + state), detail, parameters + state)


def _compression(row: ArmRow) -> Cell:
    target = format_ratio(row.arm.fact("compression.target"))
    return Cell.of(row.arm.fact("compression.actual"), format_ratio, f"target {target}")


def _step(row: ArmRow) -> Cell:
    p50, p95 = row.arm.mean("step_ms.p50"), row.arm.mean("step_ms.p95")
    return _plain(p50, three_digits, f"p95 {three_digits(p95.mean)}" if p95 else "")


def _step_ratio(row: ArmRow) -> Cell:
    value = row.ratios.step_time
    return Cell.of(value, format_ratio, "baseline" * row.is_baseline * (value is not None))


def _exposed(row: ArmRow) -> Cell:
    if (steps := row.arm.profiled) is None:
        return Cell(MISSING)
    if not steps.mean.collectives:
        return Cell("none", "", 0.0)
    exposed, waiting = three_digits(steps.mean.exposed_comm_ms), three_digits(steps.mean.exposed_wait_ms)
    return Cell(format_share(steps.exposed_share), f"{exposed} ms, waiting {waiting}", steps.exposed_share)


def _communicated(row: ArmRow) -> Cell:
    if (steps := row.arm.profiled) is None:
        return Cell(MISSING)
    kinds = steps.mean.collectives
    total = sum(kind.bytes for kind in kinds.values())
    detail = ", ".join(f"{name} {format_bytes(kind.bytes)} in {kind.count:g}" for name, kind in kinds.items())
    return Cell(format_bytes(total) if kinds else "none", detail, total)


def _epochs(row: ArmRow) -> str:
    trained = row.arm.mean("epochs")
    return format_epochs(trained.mean if trained else 0.0)


def _time_to_target(row: ArmRow) -> Cell:
    if (reached := row.reached) is None:
        return Cell(MISSING)
    if reached.observed is None:
        some = f"by {reached.runs} of {len(row.arm)} runs, " * bool(reached.runs)
        return Cell("not reached", f"{some}in {_epochs(row)}", math.inf)
    between = reached.interpolated
    detail = f"interp. {format_seconds(between.time_s)}" if between else "first evaluation"
    return Cell(format_seconds(reached.observed.time_s), detail, reached.observed.time_s)


def _samples_to_target(row: ArmRow) -> Cell:
    reached = row.reached
    if reached is None or reached.observed is None:
        return Cell(MISSING, value=math.inf)
    between = reached.interpolated
    detail = f"interp. {format_count(between.samples)}" if between else "first evaluation"
    return Cell(format_count(reached.observed.samples), detail, reached.observed.samples)


def _relative_time(row: ArmRow) -> Cell:
    reached, value = row.reached, row.ratios.relative_time
    epochs = format_epochs(reached.observed.epochs) if reached and reached.observed else ""
    return Cell(MISSING, epochs, math.inf) if value is None else Cell(format_ratio(value), epochs, value)


def _peak_memory(row: ArmRow) -> Cell:
    return Cell.of(row.arm.peak_memory_gib, lambda gib: format_bytes(gib * 2**30))


_ARM = Column("arm", "", _label)
_FACTS: Sequence[Column[ArmRow]] = (
    Column("method", "How embeddings are stored, and the seeds of the runs.", _method, align="left"),
    Column(
        "placement",
        "Sharded: tables divided over the ranks. Replicated: every rank holds all embeddings. Below: ranks of the job, "
        "and CPU threads of each.",
        _placement,
        align="left",
    ),
    Column("embedding parameters", "Stored embedding parameters over all tables, each counted once.", _parameters),
    Column(
        "stored bytes",
        "All that must be kept to look up embeddings once they are trained: parameters, and whatever says which an id "
        "reads.",
        lambda row: Cell.of(row.arm.fact("embedding_stored_bytes"), format_bytes),
    ),
    Column(
        "compression", "Bytes of the full tables in fp32 over those stored: actual, and target.", _compression
    ),
    Column(
        "embedding memory per rank",
        "Bytes of embedding parameters, buffers and optimizer state in training, on the rank that holds most.",
        _embedding_bytes,
    ),
)  # fmt: skip
_QUALITY: Sequence[Column[ArmRow]] = (
    Column(
        "test AUC",
        "Of the evaluation with the best log loss on the selecting rows. Over several seeds: mean ± standard "
        "deviation; one seed: ± the standard error that the finite test sample alone causes (DeLong et al. 1988).",
        _auc,
    ),
    Column(
        "test log loss",
        "Mean binary cross-entropy in nats. NE: normalised entropy, log loss over the entropy of the mean label; "
        "below 1 = better than predicting the mean.",
        _log_loss,
    ),
)
_OF_PROFILED: Sequence[Column[ArmRow]] = (
    Column(
        "exposed communication",
        "Of a profiled step, slower than the others: share and ms in which a rank communicates and nothing computes "
        "on it; waiting: those until all ranks have joined.",
        _exposed,
    ),
    Column(
        "communicated per step",
        "Bytes that a rank puts into collectives, its own share included, mean over ranks; by kind, with the number of "
        "collectives.",
        _communicated,
    ),
)
_COSTS: Sequence[Column[ArmRow]] = (
    Column(
        "step",
        "Forward, backward and update, p50 and p95 after the first steps; without loading, evaluation, checkpoints.",
        _step,
        unit="ms",
    ),
    Column("step", "p50 over the baseline's.", _step_ratio, unit="× baseline"),
    *_OF_PROFILED,
    Column(
        "samples per second",
        "Training rows over training time, loading included.",
        lambda row: _plain(row.arm.mean("samples_per_s"), format_count),
    ),
    Column(
        "training time",
        "Wall clock without evaluation and checkpoints.",
        lambda row: _plain(row.arm.mean("train_time_s"), format_seconds, _epochs(row)),
    ),
    Column(
        "time to target",
        "Training time at the first evaluation that reaches the target; interp.: on the straight line from the "
        "evaluation before.",
        _time_to_target,
    ),
    Column("samples to target", "Training rows seen by then, at that evaluation and on that line.", _samples_to_target),
    Column(
        "relative time A × B",
        "Epochs to the target (A, at the evaluation) × step p50 (B), over the same product of the baseline.",
        _relative_time,
    ),
    Column("peak memory", "Of the largest rank: resident on CPU, allocated on the device on CUDA.", _peak_memory),
)


def _of_profiled(cell: Callable[[ProfiledSteps], Cell]) -> Callable[[ArmRow], Cell]:
    return lambda row: cell(row.arm.profiled) if row.arm.profiled else Cell(MISSING)


def _overhead(steps: ProfiledSteps) -> Cell:
    overhead = steps.overhead
    detail = "" if overhead is None else f"mean {three_digits(steps.mean.step_ms / overhead)} ms"
    return Cell.of(overhead, format_ratio, detail)


def _exposed_range(steps: ProfiledSteps) -> Cell:
    if not steps.mean.collectives:
        return Cell("none")
    low, high = format_share(steps.exposed_share_lowest), format_share(steps.exposed_share_highest)
    return Cell.of(steps.exposed_share, format_share, f"{low} to {high}" if steps.windows > 1 else "")


def _waiting(steps: ProfiledSteps) -> Cell:
    exposed = steps.mean.exposed_comm_ms
    return Cell.of(steps.mean.exposed_wait_ms / exposed if exposed else None, format_share)


def _overlap(steps: ProfiledSteps) -> Cell:
    detail = "" if steps.overlap_share is None else f"of {three_digits(steps.mean.comm_ms)} ms"
    return Cell.of(steps.overlap_share, format_share, detail)


def _kind_column(kind: str) -> Column[ArmRow]:
    def cell(steps: ProfiledSteps) -> Cell:
        if (sums := steps.mean.collectives.get(kind)) is None:
            return Cell("none")
        times = f"waiting {three_digits(sums.wait_ms)}, transfer {three_digits(sums.transfer_ms)} ms"
        return Cell(f"{format_bytes(sums.bytes)} in {sums.count:g}", times, sums.bytes)

    meaning = "Bytes a rank puts in and number of collectives, a step; sums of their waiting and transfer."
    return Column(kind, meaning, _of_profiled(cell))


_PROFILED: Sequence[Column[ArmRow]] = (
    Column(
        "windows",
        "Profiled windows of all runs, and their steps.",
        _of_profiled(lambda steps: Cell(str(steps.windows), f"{steps.steps} steps", steps.windows)),
    ),
    Column(
        "profiled step",
        "Mean over windows and ranks.",
        _of_profiled(lambda steps: Cell.of(steps.mean.step_ms, three_digits)),
        unit="ms",
    ),
    Column(
        "× not profiled",
        "Profiled step over the mean step outside of windows: the profiler's overhead, and what else the machine did "
        "meanwhile; less than 1 is that alone.",
        _of_profiled(_overhead),
    ),
    Column(
        "exposed communication",
        "Share of the step; below: of the window with least and with most.",
        _of_profiled(_exposed_range),
    ),
    Column(
        "of it waiting", "Share of exposed communication in which not all ranks have joined.", _of_profiled(_waiting)
    ),
    Column("overlap", "Share of communication beside which something computes.", _of_profiled(_overlap)),
    Column(
        "clock error",
        "How far apart the ranks' clocks may be after alignment, of the worst window: waiting and transfer are known "
        "to this.",
        _of_profiled(
            lambda steps: Cell.of(steps.clock_error_ms if len(steps.ranks) > 1 else None, lambda ms: f"{ms:.2f}")
        ),
        unit="ms",
    ),
)
