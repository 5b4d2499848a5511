"""An experiment's tables: with the paper's rows and columns, its figures in small print below ours, and every figure.

The same tables go to the console, into Markdown, LaTeX, JSON and the page.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from recsys.report.numbers import MISSING, format_count, format_ratio, format_seconds, three_digits
from recsys.report.table import Cell
from recsys.studies.experiment import PaperRow
from recsys.studies.experiment_cells import (
    NO_PAPER,
    auc_cell,
    between_cell,
    difference_cell,
    epochs_cell,
    find_paper_row,
    format_auc,
    maybe_seconds,
    name_compression,
    name_group,
    number_cell,
    paper_value,
    spread_cell,
    verdict_cell,
)
from recsys.studies.experiment_figures import GroupFigures, build_figures
from recsys.studies.experiment_notes import describe, find_caveats
from recsys.studies.experiment_records import Results


@dataclass(frozen=True)
class Table:
    """rows: of as many cells as there are headings, the first a name. A cell's detail is the paper's figure or n."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class ExperimentTables:
    """paper: with the paper's rows and columns. every: one row a group. notes: how to read them, in sentences."""

    results: Results
    groups: Sequence[GroupFigures]
    paper: Sequence[Table]
    every: Table
    notes: Sequence[str]
    caveats: Sequence[str]
    failures: Sequence[str]

    @property
    def tables(self) -> list[Table]:
        return [*self.paper, self.every]


def build_tables(results: Results) -> ExperimentTables:
    groups = build_figures(results)
    shape = {"models": _models_tables, "trade": _trade_tables, "methods": _methods_tables}[results.experiment.layout]
    return ExperimentTables(
        results=results,
        groups=groups,
        paper=shape(results, groups),
        every=_every_table(results, groups),
        notes=describe(results, groups),
        caveats=find_caveats(groups),
        failures=[f"{name_group(g)}: {problem}" for g in groups for problem in g.problems],
    )


def _panels(results: Results, groups: Sequence[GroupFigures]) -> list[tuple[str, list[GroupFigures]]]:
    """For each setting and compressed method a title and its groups, the baselines among them."""
    found = []
    for setting in dict.fromkeys(group.setting for group in groups):
        for method in results.experiment.methods[1:]:
            own = [g for g in groups if g.setting == setting and (g.is_baseline or g.method == method.name)]
            title = method.title + (f" · {setting} rows" if setting else "")
            found.append((title, own))
    return found


def _trade_tables(results: Results, groups: Sequence[GroupFigures]) -> list[Table]:
    """Table 4: a row a figure, a column a compression."""
    tables = []
    for title, own in _panels(results, groups):
        for architecture in results.experiment.architectures:
            shown = [group for group in own if group.architecture == architecture]
            rows = _trade_rows(results, shown[0], find_paper_row(results, shown[-1]))
            headings = ["", *(name_compression(group) for group in shown)]
            body = [[Cell(name), *(cell(group) for group in shown)] for name, cell in rows]
            tables.append(Table(title + _of_model(results, architecture), headings, body))
    return tables


def _trade_rows(
    results: Results, base: GroupFigures, paper: PaperRow
) -> list[tuple[str, Callable[[GroupFigures], Cell]]]:
    def paper_of(figures: Mapping[str, float], text: Callable[[float], str], value: str):
        return lambda g: number_cell(getattr(g, value), text, paper_value(figures, g))

    return [
        (f"A: epochs to test AUC {format_auc(base.target)}", lambda g: epochs_cell(g, paper)),
        ("A on the line between evaluations", between_cell),
        ("B: s for 1,000 iterations", paper_of(paper.seconds, three_digits, "step_ms")),
        ("relative time A × B", paper_of(paper.relative_time, format_ratio, "relative_time")),
        ("test AUC", lambda g: auc_cell(g.auc, paper_value(paper.auc, g), g)),
        ("AUC − full", difference_cell),
        (f"verdict, ε = {results.experiment.epsilon:g}", lambda g: verdict_cell(g, results)),
        (f"AUC within {maybe_seconds(base.budget_s)} of training", lambda g: auc_cell(g.equal_time_auc, None, g)),
        ("embedding parameters", lambda g: number_cell(g.parameters, format_count)),
    ]


def _models_tables(results: Results, groups: Sequence[GroupFigures]) -> list[Table]:
    """Table 3: a row a model; the AUC at each compression, the target, the epochs to it at each compression."""
    tables = []
    for title, own in _panels(results, groups):
        compressions = list(dict.fromkeys(group.compression for group in own))
        labels = ["full" if c == 1 else f"{c:,g}×" for c in compressions]
        rows = []
        for architecture in dict.fromkeys(group.architecture for group in own):
            shown = {g.compression: g for g in own if g.architecture == architecture}
            paper = find_paper_row(results, shown[compressions[-1]])
            aucs = [auc_cell(g.auc, paper_value(paper.auc, g), g, results) for g in shown.values()]
            target = Cell(format_auc(shown[1.0].target), f"paper {format_auc(paper.target)}" if paper.target else "")
            rows.append([Cell(architecture), *aucs, target, *(epochs_cell(g, paper) for g in shown.values())])
        headings = ["", *(f"AUC {n}" for n in labels), "target", *(f"epochs {n}" for n in labels)]
        tables.append(Table(title, headings, rows))
    return tables


def _methods_tables(results: Results, groups: Sequence[GroupFigures]) -> list[Table]:
    """Table 1: a row a method at the compression claimed for it."""
    headings = ["method", "compression", "the paper says", "test AUC", "AUC − full", "verdict", "epochs to target",
                "s for 1,000 iterations", "relative time A × B"]  # fmt: skip
    tables = []
    for setting in dict.fromkeys(group.setting for group in groups):
        for architecture in results.experiment.architectures:
            rows = []
            for group in (g for g in groups if (g.setting, g.architecture) == (setting, architecture)):
                method = results.experiment.find_method(group.method)
                rows.append([
                    Cell(method.title), Cell(name_compression(group)), Cell(method.claim or MISSING),
                    auc_cell(group.auc, None, group), difference_cell(group), verdict_cell(group, results),
                    epochs_cell(group, NO_PAPER), number_cell(group.step_ms, three_digits),
                    number_cell(group.relative_time, format_ratio),
                ])  # fmt: skip
            title = f"{setting} rows" if setting else "Methods"
            tables.append(Table(title + _of_model(results, architecture), headings, rows))
    return tables


def _every_table(results: Results, groups: Sequence[GroupFigures]) -> Table:
    columns: list[tuple[str, Callable[[GroupFigures], Cell]]] = [
        ("runs", lambda g: Cell(name_group(g))),
        ("n", lambda g: Cell(f"{len(g.runs)} of {g.asked}", "", len(g.runs))),
        ("parameters", lambda g: number_cell(g.parameters, format_count)),
        ("learning rate", lambda g: number_cell(g.learning_rate, lambda r: f"{r:g}", "edge" if g.is_at_edge else "")),
        ("tuning", lambda g: number_cell(g.tuning_seconds or None, format_seconds, _tried(g))),
        ("test AUC", lambda g: auc_cell(g.auc, None, g)),
        ("test log loss", lambda g: spread_cell(g.log_loss)),
        ("best epoch", lambda g: number_cell(g.best_epoch, lambda e: f"{e:.2f}")),
        ("AUC − full", difference_cell),
        ("verdict", lambda g: verdict_cell(g, results)),
        ("target", lambda g: number_cell(g.target, format_auc)),
        ("epochs to target", lambda g: epochs_cell(g, NO_PAPER)),
        ("interpolated", between_cell),
        ("samples to target", lambda g: number_cell(_reached(g, "samples"), format_count)),
        ("training time to target", lambda g: number_cell(_reached(g, "time_s"), format_seconds)),
        ("step, ms", lambda g: number_cell(g.step_ms, three_digits, "" if g.step_ms_alone else "of the runs")),
        ("A × B", lambda g: number_cell(g.relative_time, format_ratio)),
        ("AUC at equal time", lambda g: auc_cell(g.equal_time_auc, None, g)),
        ("training time", lambda g: number_cell(_mean(g, "train_time_s"), format_seconds)),
        ("evaluation time", lambda g: number_cell(_mean(g, "evaluation_time_s"), format_seconds)),
    ]
    rows = [[cell(group) for _, cell in columns] for group in groups]
    return Table("Every figure", [heading for heading, _ in columns], rows)


def _of_model(results: Results, architecture: str) -> str:
    return f" · {architecture}" if len(results.experiment.architectures) > 1 else ""


def _tried(group: GroupFigures) -> str:
    return f"{len(group.trials)} runs" if group.trials else ""


def _reached(group: GroupFigures, what: str) -> float | None:
    return getattr(group.arrival.observed, what) if group.arrival and group.arrival.observed else None


def _mean(group: GroupFigures, column: str) -> float | None:
    known = [run.row[column] for run in group.runs if run.row[column] is not None]
    return sum(known) / len(known) if known else None
