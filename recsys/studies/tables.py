"""The tables of a study: with a paper's rows and columns, its figures in small print below ours, and every figure.

The same tables go to the terminal, into Markdown, LaTeX, JSON and the page.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import polars as pl

from recsys.report.frame import Measured, figures_as_json
from recsys.report.numbers import (
    MISSING,
    format_bytes,
    format_count,
    format_fine_ratio,
    format_interval,
    format_measured,
    format_ratio,
    format_seconds,
    format_signed,
    or_missing,
    three_digits,
)
from recsys.report.table import Cell, Column, Table
from recsys.studies.arms import StudyArm, build_arms
from recsys.studies.notes import describe, find_caveats, name_arm
from recsys.studies.records import StudyResults
from recsys.studies.spec import PaperRow

JSON_VERSION = 2
NO_PAPER = PaperRow()

CellOf = Callable[[StudyArm], Cell]


@dataclass(frozen=True)
class StudyTables:
    """Hold the tables of a study, and what is said about them.

    shown: as the study's layout has them. every: one row an arm. notes: how to read them; caveats: what is doubtful;
    both in sentences. failures: of runs, and of arms that could not be run.
    """

    results: StudyResults
    arms: Sequence[StudyArm]
    shown: Sequence[Table]
    every: Table
    notes: Sequence[str]
    caveats: Sequence[str]
    failures: Sequence[str]

    @property
    def tables(self) -> list[Table]:
        """Return all tables, the one of every figure last."""
        return [*self.shown, self.every]

    def to_markdown(self) -> str:
        """Return the document of all tables and notes."""
        tables = [line for table in self.tables for line in (table.to_markdown(), "")]
        notes = [f"- {note}" for note in (*self.notes, *self.caveats)]
        lines = [f"# {self.results.study.title}", "", *tables, *notes]
        return "\n".join([*lines, *(f"- Failed: {failure}" for failure in self.failures)]) + "\n"

    def to_latex(self) -> str:
        """Return the tables that are shown, for \\usepackage{booktabs,graphicx}."""
        return "\n".join(table.to_latex(f"{self.results.study.title}. {table.title}") for table in self.shown)

    def to_json(self) -> dict[str, Any]:
        """Return every figure as numbers, and the tables as text."""
        return {
            "version": JSON_VERSION,
            "title": self.results.study.title,
            "facts": dict(self.results.facts),
            "arms": [self._arm_to_json(arm) for arm in self.arms],
            "tables": [table.to_json(values=False) for table in self.tables],
            "notes": [*self.notes, *self.caveats],
            "failures": list(self.failures),
        }

    def _arm_to_json(self, arm: StudyArm) -> dict[str, Any]:
        figures: dict[str, Any] = {
            "setting": arm.setting,
            "architecture": arm.architecture,
            "method": arm.method,
            "compression": arm.compression,
            "num_seeds": arm.num_seeds,
            "parameters": arm.parameters,
            "learning_rate": arm.learning_rate,
            "target": arm.target and arm.target.auc,
            "best_epoch": arm.best_epoch,
            "epochs_to_target": arm.epochs_to_target,
            "step_ms": arm.step_ms,
            "relative_time": arm.relative_time,
            "budget_s": arm.budget_s,
            "tuning_seconds": arm.tuning_seconds,
            "problems": list(arm.failures),
            "auc": arm.auc,
            "log_loss": arm.log_loss,
            "time_to_target": arm.time_to_target,
            "equal_time_auc": arm.equal_time_auc,
            "difference": arm.difference,
            "runs": len(arm.runs),
            "verdict": arm.judge(self.results.study.epsilon),
        }
        if self.results.study.layout == "grid":
            figures |= {
                "limit": arm.limit,
                "actual_compression": arm.actual_compression,
                "stored_bytes": arm.stored_bytes,
                "optimizer_bytes": arm.optimizer_bytes,
                "initial_std": arm.initial_std,
                "is_at_edge": arm.is_at_edge,
                "test_auc_minus_full": arm.paired_difference(),
                "step_ms_p50": arm.runs.mean("step_ms.p50"),
                "train_time_s": arm.runs.mean("train_time_s"),
                "trials": _trials_to_json(arm),
            }
        return figures_as_json(figures)


def _trials_to_json(arm: StudyArm) -> list[dict[str, Any]]:
    """Return the runs that the learning rate was chosen by, each with the log loss that it was chosen on."""
    if not len(arm.trials):
        return []
    best = arm.trials.evaluations.filter(pl.col("is_best"))
    losses = dict(best.select("run", f"{arm.trials.fact('selected_on')}_log_loss").iter_rows())
    return [
        {"run": run, "learning_rate": rate, "log_loss": losses.get(run)}
        for run, rate in zip(arm.trials.values("run"), arm.trials.values("learning_rate"), strict=True)
    ]


def build_tables(results: StudyResults) -> StudyTables:
    """Return the tables of a study's results, in its layout."""
    arms = build_arms(results)
    layouts = {"models": _models_tables, "trade": _trade_tables, "methods": _methods_tables, "grid": _grid_tables}
    return StudyTables(
        results=results,
        arms=arms,
        shown=layouts[results.study.layout](results, arms),
        every=_every_table(results, arms),
        notes=describe(results, arms),
        caveats=find_caveats(results, arms),
        failures=[f"{name_arm(arm)}: {failure}" for arm in arms for failure in arm.failures],
    )


def _panels(results: StudyResults, arms: Sequence[StudyArm]) -> list[tuple[str, list[StudyArm]]]:
    """Return for each setting and compressed method a title and its arms, the baselines among them."""
    panels = []
    for setting in dict.fromkeys(arm.setting for arm in arms):
        for method in results.study.methods[1:]:
            own = [arm for arm in arms if arm.setting == setting and (arm.is_baseline or arm.method == method.name)]
            panels.append((method.title + (f" · {setting} rows" if setting else ""), own))
    return panels


def _trade_tables(results: StudyResults, arms: Sequence[StudyArm]) -> list[Table]:
    """Return Table 4: a row a figure, a column a compression."""
    tables = []
    for title, own in _panels(results, arms):
        for architecture in results.study.architectures:
            shown = [arm for arm in own if arm.architecture == architecture]
            rows = _trade_rows(results, shown[0], _paper_row(results, shown[-1]))
            headings = ["", *(_name_compression(arm) for arm in shown)]
            body = [[name, *(cell(arm) for arm in shown)] for name, cell in rows]
            tables.append(Table(headings, body, title + _of_model(results, architecture)))
    return tables


def _trade_rows(results: StudyResults, base: StudyArm, paper: PaperRow) -> list[tuple[str, CellOf]]:
    def beside_paper(figures: Mapping[str, float], text: Callable[[float], str], value: str) -> CellOf:
        """Return the cells of a figure of arms, the paper's in small print."""
        return lambda arm: _number(getattr(arm, value), text, _paper_value(figures, arm))

    return [
        (f"A: epochs to test AUC {_format_target(base)}", lambda arm: _epochs(arm, paper)),
        ("A on the line between evaluations", _interpolated_epochs),
        ("B: s for 1,000 iterations", beside_paper(paper.seconds, three_digits, "step_ms")),
        ("relative time A × B", beside_paper(paper.relative_time, format_ratio, "relative_time")),
        ("test AUC", lambda arm: _auc(arm, arm.auc, _paper_value(paper.auc, arm))),
        ("AUC − full", _difference),
        (f"verdict, ε = {results.study.epsilon:g}", lambda arm: _verdict(arm, results)),
        (
            f"AUC within {or_missing(base.budget_s, format_seconds)} of training",
            lambda arm: _auc(arm, arm.equal_time_auc),
        ),
        ("embedding parameters", lambda arm: _number(arm.parameters, format_count)),
    ]


def _models_tables(results: StudyResults, arms: Sequence[StudyArm]) -> list[Table]:
    """Return Table 3: a row a model; AUC at each compression, target, epochs to it at each compression."""
    tables = []
    for title, own in _panels(results, arms):
        compressions = list(dict.fromkeys(arm.compression for arm in own))
        labels = ["full" if c == 1 else f"{c:,g}×" for c in compressions]
        rows = []
        for architecture in dict.fromkeys(arm.architecture for arm in own):
            shown = {arm.compression: arm for arm in own if arm.architecture == architecture}
            paper = _paper_row(results, shown[compressions[-1]])
            aucs = [_auc(arm, arm.auc, _paper_value(paper.auc, arm), results) for arm in shown.values()]
            target = Cell(_format_target(shown[1.0]), f"paper {paper.target:.4f}" if paper.target else "")
            rows.append([architecture, *aucs, target, *(_epochs(arm, paper) for arm in shown.values())])
        headings = ["", *(f"AUC {label}" for label in labels), "target", *(f"epochs {label}" for label in labels)]
        tables.append(Table(headings, rows, title))
    return tables


def _methods_tables(results: StudyResults, arms: Sequence[StudyArm]) -> list[Table]:
    """Return Table 1: a row a method at the compression claimed for it."""
    find = results.study.find_method
    columns: list[Column[StudyArm]] = [
        Column("method", cell=lambda arm: find(arm.method).title),
        Column("compression", cell=_name_compression),
        Column("the paper says", cell=lambda arm: find(arm.method).claim or MISSING),
        Column("test AUC", cell=lambda arm: _auc(arm, arm.auc)),
        Column("AUC − full", cell=_difference),
        Column("verdict", cell=lambda arm: _verdict(arm, results)),
        Column("epochs to target", cell=_epochs),
        Column("s for 1,000 iterations", cell=lambda arm: _number(arm.step_ms, three_digits)),
        Column("relative time A × B", cell=lambda arm: _number(arm.relative_time, format_ratio)),
    ]
    return _tables_by_model(results, arms, columns, "Methods")


def _grid_tables(results: StudyResults, arms: Sequence[StudyArm]) -> list[Table]:
    """Return a row a method and compression: what it stores, what it costs, and how good it is."""
    return _tables_by_model(results, arms, GRID_COLUMNS, "Methods", section=lambda arm: arm.method)


def _tables_by_model(
    results: StudyResults, arms: Sequence[StudyArm], columns: Sequence[Column[StudyArm]], title: str, **more: Any
) -> list[Table]:
    """Return a table for each setting and model."""
    tables = []
    for setting in dict.fromkeys(arm.setting for arm in arms):
        for architecture in results.study.architectures:
            own = [arm for arm in arms if (arm.setting, arm.architecture) == (setting, architecture)]
            name = (f"{setting} rows" if setting else title) + _of_model(results, architecture)
            tables.append(Table.of(own, columns, title=name, **more))
    return tables


def _every_table(results: StudyResults, arms: Sequence[StudyArm]) -> Table:
    columns: list[Column[StudyArm]] = [
        Column("runs", cell=name_arm),
        Column("n", cell=lambda arm: Cell(f"{len(arm.runs)} of {arm.num_seeds}", "", len(arm.runs))),
        Column("parameters", cell=lambda arm: _number(arm.parameters, format_count)),
        Column("learning rate", cell=_learning_rate),
        Column("tuning", cell=lambda arm: _number(arm.tuning_seconds or None, format_seconds, _count_trials(arm))),
        Column("test AUC", cell=lambda arm: _auc(arm, arm.auc)),
        Column("test log loss", cell=lambda arm: _spread(arm.log_loss)),
        Column("best epoch", cell=lambda arm: _number(arm.best_epoch, lambda epoch: f"{epoch:.2f}")),
        Column("AUC − full", cell=_difference),
        Column("verdict", cell=lambda arm: _verdict(arm, results)),
        Column("target", cell=lambda arm: _number(arm.target and arm.target.auc, lambda auc: f"{auc:.4f}")),
        Column("epochs to target", cell=_epochs),
        Column("interpolated", cell=_interpolated_epochs),
        Column("samples to target", cell=lambda arm: _number(_reached(arm, "samples"), format_count)),
        Column("training time to target", cell=lambda arm: _number(_reached(arm, "time_s"), format_seconds)),
        Column(
            "step, ms",
            cell=lambda arm: _number(arm.step_ms, three_digits, "" if arm.is_interleaved else "of the runs"),
        ),
        Column("A × B", cell=lambda arm: _number(arm.relative_time, format_ratio)),
        Column("AUC at equal time", cell=lambda arm: _auc(arm, arm.equal_time_auc)),
        Column("training time", cell=lambda arm: _number(_mean(arm, "train_time_s"), format_seconds)),
        Column("evaluation time", cell=lambda arm: _number(_mean(arm, "evaluation_time_s"), format_seconds)),
    ]
    return Table.of(arms, columns, title="Every figure")


def _of_model(results: StudyResults, architecture: str) -> str:
    return f" · {architecture}" if len(results.study.architectures) > 1 else ""


def _paper_row(results: StudyResults, arm: StudyArm) -> PaperRow:
    row = results.study.paper.get(arm.architecture, NO_PAPER)
    return row if arm.method == row.method else NO_PAPER


def _paper_value(figures: Any, arm: StudyArm) -> Any:
    """Return the paper's figure at an arm's compression, as its keys are written: 1, 1000, 100000."""
    return figures.get(f"{arm.compression:.12g}")


def _name_compression(arm: StudyArm) -> str:
    return "full" if arm.is_baseline else f"{arm.compression:,g}×"


def _format_target(arm: StudyArm) -> str:
    return or_missing(arm.target and arm.target.auc, lambda auc: f"{auc:.4f}")


def _number(value: float | None, text: Callable[[float], str], paper: Any = None) -> Cell:
    """Return the cell of a number. paper: its figure there, or words for the small print."""
    return Cell.of(value, text, paper if isinstance(paper, str) else f"paper {paper:g}" if paper is not None else "")


def _spread(value: Measured | None) -> Cell:
    return Cell(format_measured(value, 4), "", value and value.mean)


def _auc(
    arm: StudyArm, value: Measured | None, paper: float | None = None, results: StudyResults | None = None
) -> Cell:
    """Return an AUC with n, and where results are given the verdict."""
    if value is None:
        return Cell(_why_none(arm), "" if paper is None else f"paper {paper:.4f}")
    verdict = arm.judge(results.study.epsilon) if results else None
    parts = [f"n = {value.n}", verdict or "", "" if paper is None else f"paper {paper:.4f}"]
    return Cell(format_measured(value, 4), ", ".join(part for part in parts if part), value.mean)


def _epochs(arm: StudyArm, paper: PaperRow = NO_PAPER) -> Cell:
    theirs = _paper_value(paper.epochs, arm)
    detail = "" if theirs is None else f"paper {theirs:.2f}" if isinstance(theirs, float | int) else f"paper: {theirs}"
    reached = arm.time_to_target
    if reached is None:
        return Cell(_why_none(arm), detail)
    if arm.epochs_to_target is not None:
        n = f"n = {reached.runs}"
        return Cell(f"{arm.epochs_to_target:.2f}", f"{n}, {detail}" if detail else n, arm.epochs_to_target)
    some = f"{reached.runs} of {len(arm.runs)}" if reached.runs else "not"
    early = "stopped early" if arm.is_stopped_early else ""
    return Cell(f"{some} in {arm.epochs:.3g}", ", ".join(part for part in (early, detail) if part))


def _interpolated_epochs(arm: StudyArm) -> Cell:
    between = arm.time_to_target and arm.time_to_target.interpolated
    return _number(between.epochs if between else None, lambda epochs: f"{epochs:.2f}")


def _difference(arm: StudyArm) -> Cell:
    measured = arm.difference
    if measured is None:
        return Cell("baseline" if arm.is_baseline else MISSING)
    of = f"n = {measured.seeds[0]} and {measured.seeds[1]}" + ("" if measured.covers_seeds else ", these runs alone")
    detail = f"{format_interval(measured.low, measured.high)}, {of}"
    return Cell(format_signed(measured.difference), detail, measured.difference)


def _verdict(arm: StudyArm, results: StudyResults) -> Cell:
    verdict = arm.judge(results.study.epsilon)
    if verdict is None:
        return Cell(MISSING)
    return Cell(f"same within {results.study.epsilon:g}" if verdict == "same" else verdict, "", verdict)


def _learning_rate(arm: StudyArm) -> Cell:
    return _number(arm.learning_rate, lambda rate: f"{rate:g}", "edge" if arm.is_at_edge else "")


def _why_none(arm: StudyArm) -> str:
    if len(arm.runs) or not arm.failures:
        return MISSING
    return "failed" if arm.is_able else "cannot"


def _count_trials(arm: StudyArm) -> str:
    return f"{len(arm.trials)} runs" if len(arm.trials) else ""


def _reached(arm: StudyArm, what: str) -> float | None:
    reached = arm.time_to_target
    return getattr(reached.observed, what) if reached and reached.observed else None


def _mean(arm: StudyArm, column: str) -> float | None:
    known = [value for value in arm.runs.values(column) if value is not None]
    return fmean(known) if known else None


def _actual_compression(arm: StudyArm) -> Cell:
    if arm.is_refused:
        return Cell(f"reaches {arm.limit:g}×")
    if not len(arm.runs):
        return Cell(_why_none(arm))
    return Cell.of(arm.actual_compression, format_fine_ratio, "its most" if arm.limit is not None else "")


def _auc_over_seeds(arm: StudyArm) -> Cell:
    auc = arm.runs.at_best("test_auc", sampling_error=True)
    if auc is None:
        return Cell(MISSING)
    few = f"{auc.n} of {arm.num_seeds} seeds" if auc.n < arm.num_seeds else ""
    return Cell(format_measured(auc, 4), few, auc.mean)


def _paired_difference(arm: StudyArm) -> Cell:
    measured = arm.paired_difference()
    if measured is None:
        return Cell(MISSING)
    spread = "" if measured.plus_minus is None else f" ± {measured.plus_minus:.4f}"
    return Cell(format_signed(measured.mean) + spread, "", measured.mean)


GRID_COLUMNS: Sequence[Column[StudyArm]] = (
    Column("method", "Its options stand below.", lambda arm: Cell(arm.method, "", arm.method)),
    Column(
        "compression",
        "The target; where a method reaches none of its targets, the highest that it does.",
        lambda arm: Cell(f"{arm.compression:,g}×", "", arm.compression),
    ),
    Column(
        "actual",
        "Bytes of the full tables over bytes that must be kept to look up; reaches: the target is more than the method "
        "can on these tables.",
        _actual_compression,
    ),
    Column(
        "parameters",
        "Trainable numbers of the embeddings.",
        lambda arm: _number(arm.parameters if len(arm.runs) else None, format_count),
    ),
    Column("stored", "Bytes that must be kept to look up.", lambda arm: _number(arm.stored_bytes, format_bytes)),
    Column(
        "optimizer state",
        "Bytes the optimizer keeps for the embeddings.",
        lambda arm: _number(arm.optimizer_bytes, format_bytes),
    ),
    Column(
        "learning rate",
        "Of the embeddings, the best of those tried on the first seed by validation log loss; edge: of those tried it "
        "is the lowest or highest, after one step beyond the grid.",
        _learning_rate,
    ),
    Column(
        "best epoch",
        "Passes over the training rows at the best evaluation, mean over seeds.",
        lambda arm: _number(arm.best_epoch, lambda epoch: f"{epoch:.1f}"),
    ),
    Column(
        "test AUC",
        "Mean ± standard deviation over seeds, at the evaluation of lowest validation log loss.",
        _auc_over_seeds,
    ),
    Column(
        "AUC − full",
        "The difference to full tables at the same seed, mean ± standard deviation.",
        _paired_difference,
    ),
    Column(
        "test log loss",
        "Mean binary cross-entropy in nats, of the same evaluations.",
        lambda arm: _spread(arm.log_loss),
    ),
    Column(
        "training time",
        "Until early stopping, without evaluation; of a machine that makes several runs at once.",
        lambda arm: _number(_mean(arm, "train_time_s"), format_seconds),
    ),
    Column(
        "step",
        "Forward, backward and update, median; of a machine that makes several runs at once.",
        lambda arm: _number(_mean(arm, "step_ms.p50"), lambda ms: f"{ms:.2f}"),
        unit="ms",
    ),
    Column(
        "initial std",
        "Standard deviation of the elements of random rows at the start, over that of full tables: init_scale / √3.",
        lambda arm: _number(arm.initial_std, format_ratio),
    ),
)
