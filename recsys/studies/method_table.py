"""The table of embedding methods: its columns, and the same in Markdown and in words."""

from collections.abc import Callable
from dataclasses import dataclass

from recsys.report.numbers import MISSING, format_bytes, format_count, format_measured, format_ratio, format_seconds
from recsys.report.table import Cell
from recsys.studies.method_rows import MethodRow, MethodTable, paired_difference

UNFAIR = "Not a fair comparison: the runs differ in what they should share"


@dataclass(frozen=True)
class MethodColumn:
    """A figure of every row. meaning says how it is measured."""

    heading: str
    meaning: str
    cell: Callable[[MethodRow, MethodTable], Cell]


def _obtained(row: MethodRow, _: MethodTable) -> Cell:
    if row.is_refused:
        return Cell(f"reaches {row.limit:g}×")
    most = "its most" if row.limit is not None else ""
    return _shown(row.obtained, _fine_ratio, most) if row.runs else Cell("failed")


def _fine_ratio(value: float) -> str:
    return f"{value:,.{2 if value < 99.5 else 1}f}×"


def _shown(value: float | None, text: Callable[[float], str], detail: str = "") -> Cell:
    return Cell(MISSING) if value is None else Cell(text(value), detail, value)


def _mean(column: str, text: Callable[[float], str]):
    def cell(row: MethodRow, _: MethodTable) -> Cell:
        found = row.arm.mean(column) if row.arm else None
        return _shown(found.mean if found else None, text)

    return cell


def _auc(row: MethodRow, table: MethodTable) -> Cell:
    value = row.arm.at_best("test_auc", sampling_error=True) if row.arm else None
    if not value:
        return Cell(MISSING)
    few = f"{value.n} of {len(table.seeds)} seeds" if value.n < len(table.seeds) else ""
    return Cell(format_measured(value, 4), few, value.mean)


def _log_loss(row: MethodRow, _: MethodTable) -> Cell:
    value = row.arm.at_best("test_log_loss") if row.arm else None
    return Cell(format_measured(value, 4), "", value.mean) if value else Cell(MISSING)


def _against_full(row: MethodRow, table: MethodTable) -> Cell:
    value = paired_difference(row, table.baseline)
    if value is None:
        return Cell(MISSING)
    spread = "" if value.plus_minus is None else f" ± {value.plus_minus:.4f}"
    return Cell(f"{value.mean:+.4f}".replace("-", "−") + spread, "", value.mean)


def _parameters(row: MethodRow, _: MethodTable) -> Cell:
    return _shown(row.runs[0].summary.parameters.embedding if row.runs else None, format_count)


def _best_epoch(row: MethodRow, _: MethodTable) -> Cell:
    found = row.arm.at_best("epoch") if row.arm else None
    return _shown(found.mean if found else None, lambda epoch: f"{epoch:.1f}")


def _learning_rate(row: MethodRow, _: MethodTable) -> Cell:
    return _shown(row.learning_rate, lambda rate: f"{rate:g}", "edge" if row.is_at_edge else "")


def _optimizer_bytes(row: MethodRow, _: MethodTable) -> Cell:
    return _shown(row.arm.embedding_bytes[1] if row.arm else None, format_bytes)


COLUMNS = (
    MethodColumn("method", "Its config is configs/<dataset>/<method>.toml.", lambda r, _: Cell(r.name, "", r.name)),
    MethodColumn(
        "compression",
        "Asked for; where a method reaches none of those asked for, the highest that it does.",
        lambda r, _: Cell(f"{r.compression:,g}×", "", r.compression),
    ),
    MethodColumn(
        "obtained",
        "Bytes of the full tables over bytes that must be kept to look up; reaches: what was asked for is more than "
        "the method can on these tables.",
        _obtained,
    ),
    MethodColumn("parameters", "Trainable numbers of the embeddings.", _parameters),
    MethodColumn("stored", "Bytes that must be kept to look up.", lambda r, _: _shown(r.stored_bytes, format_bytes)),
    MethodColumn("optimizer state", "Bytes the optimizer keeps for the embeddings.", _optimizer_bytes),
    MethodColumn(
        "learning rate",
        "Of the embeddings, the best of those tried on the first seed by validation log loss; edge: of those tried it "
        "is the lowest or highest, after one step beyond the grid.",
        _learning_rate,
    ),
    MethodColumn("best epoch", "Passes over the training rows at the best evaluation, mean over seeds.", _best_epoch),
    MethodColumn(
        "test AUC", "Mean ± standard deviation over seeds, at the evaluation of lowest validation log loss.", _auc
    ),
    MethodColumn(
        "AUC − full", "The difference to full tables at the same seed, mean ± standard deviation.", _against_full
    ),
    MethodColumn("test log loss", "Mean binary cross-entropy in nats, of the same evaluations.", _log_loss),
    MethodColumn(
        "training time",
        "Until early stopping, without evaluation; of a machine that makes several runs at once.",
        _mean("train_time_s", format_seconds),
    ),
    MethodColumn(
        "step, ms",
        "Forward, backward and update, median; of a machine that makes several runs at once.",
        _mean("step_ms.p50", lambda ms: f"{ms:.2f}"),
    ),
    MethodColumn(
        "initial std",
        "Standard deviation of the elements of random rows at the start, over that of full tables: init_scale / √3.",
        lambda r, _: _shown(r.initial_std, format_ratio),
    ),
)


def format_markdown(table: MethodTable) -> str:
    rows = [[column.heading for column in COLUMNS], ["---", *("---:" for _ in COLUMNS[1:])]]
    for row in table.rows:
        cells = (column.cell(row, table) for column in COLUMNS)
        rows.append([cell.text + (f" ({cell.detail})" if cell.detail else "") for cell in cells])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def describe_subject(table: MethodTable) -> str:
    """What was run on what."""
    if not table.measured:
        return "Nothing was measured."
    run = table.measured[0].runs[0]
    summary, dim = run.summary, run.config["model"]["embedding_dim"]
    return (
        f"{len(table.options)} methods in a {summary.architecture} with embeddings of dimension {dim}, "
        f"{format_count(summary.parameters.embedding_full)} parameters in full tables, on {summary.dataset} data: "
        f"{format_count(summary.train_rows)} training and {format_count(summary.test_rows)} test rows; "
        f"{len(table.seeds)} seeds; {run.environment.get('device' if summary.device == 'cuda' else 'cpu')}, "
        f"{table.environment['runs at a time']} runs at a time."
    )


def describe_tuning(table: MethodTable) -> str:
    """What was tried for the learning rate, and what it cost."""
    trials = [trial for row in table.rows for trial in row.trials]
    kept = len([row for row in table.measured if row.trials])
    extended = len([row for row in table.rows if len(row.trials) > len(table.rates)])
    beyond = f"; one step beyond for {extended} methods whose best was at an end" if extended else ""
    return (
        f"Learning rate of the embeddings: the best of {', '.join(f'{rate:g}' for rate in table.rates)} for each "
        f"method, at its lowest compression, by the log loss on validation rows at seed {table.seeds[0]}{beyond}. "
        f"{len(trials)} runs, {format_seconds(sum(trial.seconds for trial in trials))} in all, {kept} of them among "
        "the results."
    )


def describe_context(table: MethodTable) -> list[str]:
    """What the table alone does not say, in lines."""
    return [
        describe_subject(table),
        describe_tuning(table),
        "Differs: the learning rate of the embeddings, the seed, and [embedding]:",
        *(f"  {name}: {options}" for name, options in table.options.items()),
        *(f"{UNFAIR}: {difference}." for difference in table.differences),
        *table.caveats,
        *(f"Failed: {failure}" for failure in describe_failures(table)),
    ]


def describe_failures(table: MethodTable) -> list[str]:
    return [f"{row.name} {row.compression:g}×: {error}" for row in table.rows for error in row.errors]
