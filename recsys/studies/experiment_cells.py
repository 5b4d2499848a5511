"""Cells of an experiment's tables: a figure of a group as text, in small print n and the paper's figure."""

from collections.abc import Callable
from typing import Any

from recsys.report.frame import Measured
from recsys.report.numbers import MISSING, format_measured, format_seconds
from recsys.report.table import Cell
from recsys.studies.experiment import PaperRow
from recsys.studies.experiment_figures import GroupFigures
from recsys.studies.experiment_records import Results

NO_PAPER = PaperRow()


def find_paper_row(results: Results, group: GroupFigures) -> PaperRow:
    row = results.experiment.paper.get(group.architecture, NO_PAPER)
    return row if group.method == row.method else NO_PAPER


def paper_value(figures: Any, group: GroupFigures) -> Any:
    """The paper's figure at a group's compression, as its keys are written: 1, 1000, 100000."""
    return figures.get(f"{group.compression:.12g}")


def name_group(group: GroupFigures) -> str:
    parts = [group.setting, group.architecture, group.method, "" if group.is_baseline else f"{group.compression:,g}×"]
    return " ".join(part for part in parts if part)


def name_compression(group: GroupFigures) -> str:
    return "full" if group.is_baseline else f"{group.compression:,g}×"


def format_auc(value: float | None) -> str:
    return MISSING if value is None else f"{value:.4f}"


def maybe_seconds(value: float | None) -> str:
    return MISSING if value is None else format_seconds(value)


def number_cell(value: float | None, text: Callable[[float], str], paper: Any = None) -> Cell:
    """paper: its figure, or words for the small print."""
    detail = paper if isinstance(paper, str) else f"paper {paper:g}" if paper is not None else ""
    return Cell(MISSING, detail) if value is None else Cell(text(value), detail, value)


def spread_cell(value: Measured | None) -> Cell:
    return Cell(MISSING) if value is None else Cell(format_measured(value, 4), "", value.mean)


def auc_cell(value: Measured | None, paper: float | None, group: GroupFigures, results: Results | None = None) -> Cell:
    """With n, and where results are given the verdict."""
    if value is None:
        return Cell(_why_not(group), "" if paper is None else f"paper {paper:.4f}")
    verdict = group.judge(results.experiment.epsilon) if results else None
    parts = [f"n = {value.n}", verdict or "", "" if paper is None else f"paper {paper:.4f}"]
    return Cell(format_measured(value, 4), ", ".join(part for part in parts if part), value.mean)


def epochs_cell(group: GroupFigures, paper: PaperRow) -> Cell:
    found = paper_value(paper.epochs, group)
    said = "" if found is None else f"paper {found:.2f}" if isinstance(found, float | int) else f"paper: {found}"
    if group.arrival is None:
        return Cell(_why_not(group), said)
    if group.epochs_to_target is not None:
        n = f"n = {group.arrival.runs}"
        return Cell(f"{group.epochs_to_target:.2f}", f"{n}, {said}" if said else n, group.epochs_to_target)
    reached = f"{group.arrival.runs} of {len(group.runs)}" if group.arrival.runs else "not"
    early = "stopped early" if group.is_stopped_early else ""
    return Cell(f"{reached} in {group.epochs:.3g}", ", ".join(part for part in (early, said) if part))


def between_cell(group: GroupFigures) -> Cell:
    between = group.arrival and group.arrival.interpolated
    return number_cell(between.epochs if between else None, lambda epochs: f"{epochs:.2f}")


def difference_cell(group: GroupFigures) -> Cell:
    found = group.difference
    if found is None:
        return Cell("baseline" if group.is_baseline else MISSING)
    interval = f"[{found.low:+.4f}, {found.high:+.4f}]".replace("-", "−")
    of = f"n = {found.seeds[0]} and {found.seeds[1]}" + ("" if found.covers_seeds else ", these runs alone")
    return Cell(f"{found.difference:+.4f}".replace("-", "−"), f"{interval}, {of}", found.difference)


def verdict_cell(group: GroupFigures, results: Results) -> Cell:
    verdict = group.judge(results.experiment.epsilon)
    if verdict is None:
        return Cell(MISSING)
    return Cell(f"same within {results.experiment.epsilon:g}" if verdict == "same" else verdict, "", verdict)


def _why_not(group: GroupFigures) -> str:
    if group.runs or not group.problems:
        return MISSING
    return "failed" if group.is_able else "cannot"
