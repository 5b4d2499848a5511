"""A comparison as a table of text: one column a figure, one row a setup, and numbers as people read them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from recsys.report.comparison import Comparison, Measured, Setup
from recsys.report.numbers import (
    format_bytes,
    format_count,
    format_epochs,
    format_ratio,
    format_seconds,
    format_share,
    three_digits,
)

MISSING = "–"


@dataclass(frozen=True)
class Cell:
    """What is shown, what is said about it in small print, and what a column is sorted by."""

    text: str
    detail: str = ""
    sort: float | str | None = None


@dataclass(frozen=True)
class Column:
    """A figure of every setup. unit is "" for pure numbers; meaning says how it is measured; left = text; profiled =
    shown where a run has profiled windows."""

    title: str
    unit: str
    meaning: str
    cell: Callable[[Setup], Cell]
    left: bool = False
    profiled: bool = False

    @property
    def heading(self) -> str:
        return f"{self.title}, {self.unit}" if self.unit else self.title


def format_measured(value: Measured | None, digits: int) -> str:
    """'0.7598', or '0.7598 ± 0.0019' where the spread is known."""
    if value is None:
        return MISSING
    spread = f" ± {value.plus_minus:.{digits}f}" if value.plus_minus is not None else ""
    return f"{value.mean:.{digits}f}{spread}"


def describe_source(value: Measured) -> str:
    return {"seeds": f"{value.n} seeds", "sampling": "test sampling", None: ""}[value.source]


def describe_placement(setup: Setup) -> str:
    summary = setup.summary
    return f"sharded: {summary.sharding}" if summary.placement == "shard" else "replicated"


def describe_state(setup: Setup) -> str:
    """'' for finished runs, else how they ended."""
    found = sorted(set(setup.unfinished))
    several = f"{len(setup.runs)} runs " if found and len(setup.runs) > 1 else ""
    return several + ", ".join(found)


def _plain(value: Measured | None, text: Callable[[float], str], detail: str = "") -> Cell:
    return Cell(text(value.mean), detail, value.mean) if value else Cell(MISSING)


def _auc(setup: Setup) -> Cell:
    value = setup.figures.test_auc
    return Cell(format_measured(value, 4), describe_source(value), value.mean) if value else Cell(MISSING)


def _log_loss(setup: Setup) -> Cell:
    value, ne = setup.figures.test_log_loss, setup.figures.test_ne
    if value is None:
        return Cell(MISSING)
    return Cell(format_measured(value, 4), f"NE {format_measured(ne, 4)}", value.mean)


def _placement(setup: Setup) -> Cell:
    ranks, threads = setup.summary.world_size, setup.summary.threads_per_rank
    shape = f"{ranks} rank{'s' * (ranks > 1)} × {threads} thread{'s' * (threads > 1)}"
    return Cell(describe_placement(setup), shape, describe_placement(setup))


def _method(setup: Setup) -> Cell:
    seeds = [str(run.summary.seed) for run in setup.runs]
    return Cell(setup.summary.method, f"seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}", setup.summary.method)


def _parameters(setup: Setup) -> Cell:
    found = setup.summary.parameters
    return Cell(format_count(found.embedding), f"dense {format_count(found.dense)}", found.embedding)


def _stored_bytes(setup: Setup) -> Cell:
    found = setup.summary.embedding_stored_bytes
    return Cell(format_bytes(found), "", found) if found is not None else Cell(MISSING)


def _embedding_bytes(setup: Setup) -> Cell:
    parameters, state = setup.figures.embedding_bytes, setup.figures.embedding_optimizer_bytes
    detail = f"optimizer {format_bytes(state)}" if state else "optimizer none"
    return Cell(format_bytes(parameters + state), detail, parameters + state)


def _compression(setup: Setup) -> Cell:
    found = setup.summary.compression
    return Cell(format_ratio(found.actual), f"asked {format_ratio(found.target)}", found.actual)


def _step(setup: Setup) -> Cell:
    p50, p95 = setup.figures.step_ms_p50, setup.figures.step_ms_p95
    return _plain(p50, three_digits, f"p95 {three_digits(p95.mean)}" if p95 else "")


def _step_ratio(setup: Setup) -> Cell:
    value = setup.ratios.step_time
    return Cell(format_ratio(value), "baseline" * setup.is_baseline, value) if value is not None else Cell(MISSING)


def _exposed(setup: Setup) -> Cell:
    time = setup.figures.time
    if time is None:
        return Cell(MISSING)
    if not time.mean.collectives:
        return Cell("none", "", 0.0)
    exposed, waiting = three_digits(time.mean.exposed_comm_ms), three_digits(time.mean.exposed_wait_ms)
    detail = f"{exposed} ms, waiting {waiting}"
    return Cell(format_share(time.exposed_share), detail, time.exposed_share)


def _communicated(setup: Setup) -> Cell:
    time = setup.figures.time
    if time is None:
        return Cell(MISSING)
    kinds = time.mean.collectives
    total = sum(kind.bytes for kind in kinds.values())
    detail = ", ".join(f"{name} {format_bytes(kind.bytes)} in {kind.count:g}" for name, kind in kinds.items())
    return Cell(format_bytes(total) if kinds else "none", detail, total)


def _train_time(setup: Setup) -> Cell:
    return _plain(setup.figures.train_time_s, format_seconds, format_epochs(setup.figures.epochs))


def _time_to_target(setup: Setup) -> Cell:
    arrival = setup.figures.target
    if arrival is None:
        return Cell(MISSING)
    if arrival.observed is None:
        some = f"by {arrival.runs} of {len(setup.runs)} runs, "
        return Cell("not reached", f"{some * bool(arrival.runs)}in {format_epochs(setup.figures.epochs)}", math.inf)
    between = arrival.interpolated
    detail = f"interp. {format_seconds(between.time_s)}" if between else "first evaluation"
    return Cell(format_seconds(arrival.observed.time_s), detail, arrival.observed.time_s)


def _samples_to_target(setup: Setup) -> Cell:
    arrival = setup.figures.target
    if arrival is None or arrival.observed is None:
        return Cell(MISSING, sort=math.inf)
    between = arrival.interpolated
    detail = f"interp. {format_count(between.samples)}" if between else "first evaluation"
    return Cell(format_count(arrival.observed.samples), detail, arrival.observed.samples)


def _relative_time(setup: Setup) -> Cell:
    arrival, value = setup.figures.target, setup.ratios.relative_time
    epochs = format_epochs(arrival.observed.epochs) if arrival and arrival.observed else ""
    return Cell(format_ratio(value), epochs, value) if value is not None else Cell(MISSING, epochs, math.inf)


def _peak_memory(setup: Setup) -> Cell:
    peak = setup.figures.peak_memory_gib
    return Cell(format_bytes(peak * 2**30), "", peak) if peak is not None else Cell(MISSING)


COLUMNS: Sequence[Column] = (
    Column("method", "", "How embeddings are stored, and the seeds of the runs.", _method, left=True),
    Column(
        "placement",
        "",
        "Sharded: tables divided over the ranks. Replicated: every rank holds all embeddings. Below: ranks of the job, "
        "and CPU threads of each.",
        _placement,
        left=True,
    ),
    Column("embedding parameters", "", "Stored embedding parameters over all tables, each counted once.", _parameters),
    Column(
        "stored bytes",
        "",
        "All that must be kept to look up embeddings once they are trained: parameters, and whatever says which an id "
        "reads.",
        _stored_bytes,
    ),
    Column(
        "compression", "", "Bytes of the full tables in fp32 over those stored; obtained, and asked for.", _compression
    ),
    Column(
        "embedding memory per rank",
        "",
        "Bytes of embedding parameters, buffers and optimizer state in training, on the rank that holds most.",
        _embedding_bytes,
    ),
    Column(
        "test AUC",
        "",
        "Of the evaluation with the best log loss on the selecting rows. Over several seeds: mean ± standard "
        "deviation; one seed: ± the standard error that the finite test sample alone causes (DeLong et al. 1988).",
        _auc,
    ),
    Column(
        "test log loss",
        "",
        "Mean binary cross-entropy in nats. NE: normalised entropy, log loss over the entropy of the mean label; "
        "below 1 = better than predicting the mean.",
        _log_loss,
    ),
    Column(
        "step",
        "ms",
        "Forward, backward and update, p50 and p95 after the first steps; without loading, evaluation, checkpoints.",
        _step,
    ),
    Column("step", "× baseline", "p50 over the baseline's.", _step_ratio),
    Column(
        "exposed communication",
        "",
        "Of a profiled step, slower than the others: share and ms in which a rank communicates and nothing computes "
        "on it; waiting: those until all ranks have joined.",
        _exposed,
        profiled=True,
    ),
    Column(
        "communicated per step",
        "",
        "Bytes that a rank puts into collectives, its own share included, mean over ranks; by kind, with the number of "
        "collectives.",
        _communicated,
        profiled=True,
    ),
    Column(
        "samples per second",
        "",
        "Training rows over training time, loading included.",
        lambda s: _plain(s.figures.samples_per_s, format_count),
    ),
    Column("training time", "", "Wall clock without evaluation and checkpoints.", _train_time),
    Column(
        "time to target",
        "",
        "Training time at the first evaluation that reaches the target; interp.: on the straight line from the "
        "evaluation before.",
        _time_to_target,
    ),
    Column(
        "samples to target", "", "Training rows seen by then, at that evaluation and on that line.", _samples_to_target
    ),
    Column(
        "relative time A × B",
        "",
        "Epochs to the target (A, at the evaluation) × step p50 (B), over the same product of the baseline.",
        _relative_time,
    ),
    Column("peak memory", "", "Of the largest rank: resident on CPU, allocated on the device on CUDA.", _peak_memory),
)


def choose_columns(comparison: Comparison) -> Sequence[Column]:
    """All of them, or those that need no profiled window where no run has one."""
    profiled = any(setup.figures.time for setup in comparison.setups)
    return [column for column in COLUMNS if profiled or not column.profiled]


def describe_target(comparison: Comparison) -> str:
    """The target and its rule in a sentence."""
    target = comparison.target
    if target is None:
        return "No target AUC: none was given, and no finished run has full tables to take it from."
    return f"Target: {target.split} AUC {target.auc:.4f}, {target.rule}."


def describe_best_possible(comparison: Comparison) -> str:
    best = comparison.best_possible
    if best is None:
        return ""
    return (
        f"Best possible on these test rows, by the probabilities that generated them: AUC {best.auc:.4f}, "
        f"log loss {best.log_loss:.4f}, base rate {best.base_rate:.4f}."
    )


def format_markdown(comparison: Comparison, setups_per_table: int = 5) -> str:
    """The table in Markdown, figures downwards and setups sideways, in pieces of a few setups."""
    tables = []
    for start in range(0, len(comparison.setups), setups_per_table):
        setups = comparison.setups[start : start + setups_per_table]
        rows = [["", *(_markdown_label(setup) for setup in setups)], ["---", *("---:" for _ in setups)]]
        for column in choose_columns(comparison):
            cells = (column.cell(setup) for setup in setups)
            rows.append([column.heading, *(c.text + (f" ({c.detail})" if c.detail else "") for c in cells)])
        tables.append("\n".join("| " + " | ".join(row) + " |" for row in rows))
    return "\n\n".join(tables)


def _markdown_label(setup: Setup) -> str:
    state = describe_state(setup)
    return setup.label.replace("|", "\\|") + (f" ({state})" if state else "")
