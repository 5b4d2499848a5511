"""A comparison on the terminal, in Markdown and as JSON: what the page shows, without its plots."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from recsys.report.compared_runs import Difference, Run
from recsys.report.comparison import Comparison, Setup
from recsys.report.report import describe_overview, describe_subject, find_findings
from recsys.report.result_table import (
    Column,
    choose_columns,
    describe_best_possible,
    describe_state,
    describe_target,
    format_markdown,
)

JSON_VERSION = 1
UNFAIR = "Not a fair comparison"
_HEADING_WIDTH, _SETUP_WIDTH, _PIPE_WIDTH = 27, 24, 120


def describe_context(comparison: Comparison) -> list[list[str]]:
    """What the table alone does not say, in blocks of lines: the outcome, how to read it, what differs, warnings."""
    overview = describe_overview(comparison)
    findings = [overview] if overview else [f"{found.label}: {found.text}" for found in find_findings(comparison)]
    reading = [describe_target(comparison), describe_best_possible(comparison), _describe_spread(comparison)]
    blocks = [
        [describe_subject(comparison), *findings],
        [line for line in reading if line],
        [f"Differs: {difference}." for difference in comparison.varied],
        describe_warnings(comparison),
    ]
    return [block for block in blocks if block]


def _describe_spread(comparison: Comparison) -> str:
    sources = {setup.figures.test_auc.source for setup in comparison.setups if setup.figures.test_auc}
    meanings = {
        "seeds": "± over seeds is their standard deviation",
        "sampling": "± of test sampling is the standard error of one run's AUC by its finite test rows",
    }
    said = [meaning for source, meaning in meanings.items() if source in sources]
    return "; ".join(said) + "." if said else ""


def describe_warnings(comparison: Comparison) -> list[str]:
    unlike = [f"{UNFAIR}: runs differ in {difference}." for difference in comparison.differences]
    return unlike + list(comparison.caveats)


def format_document(comparison: Comparison) -> str:
    """Return the table in Markdown, and below it what it does not say."""
    parts = [f"**{UNFAIR}**\n"] if comparison.differences else []
    parts.append(format_markdown(comparison))
    parts += ["\n" + "\n".join(f"- {line}" for line in block) for block in describe_context(comparison)]
    return "\n".join(parts)


def print_comparison(comparison: Comparison) -> None:
    """The table, figures downwards and setups sideways, in as many pieces as the terminal's width asks for."""
    console = Console(highlight=False)
    width = console.width if console.is_terminal else _PIPE_WIDTH
    console = Console(highlight=False, width=width)
    at_once = max(1, (width - _HEADING_WIDTH) // _SETUP_WIDTH)
    for start in range(0, len(comparison.setups), at_once):
        table = _table(comparison.setups[start : start + at_once], choose_columns(comparison))
        table.title = f"[bold red]{UNFAIR}[/]" if comparison.differences else None
        console.print(table)
    warnings = describe_warnings(comparison)
    for block in describe_context(comparison):
        console.print()
        for line in block:
            console.print(Padding(escape(line), (0, 0, 0, 2)), style="yellow" if block == warnings else "")


def _table(setups: Sequence[Setup], columns: Sequence[Column]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("", style="dim", overflow="fold")
    for setup in setups:
        state = f"\n[yellow]{escape(describe_state(setup))}[/]" if setup.unfinished else ""
        table.add_column(escape(setup.label) + state, justify="right", overflow="fold")
    for column in columns:
        cells = [column.cell(setup) for setup in setups]
        table.add_row(column.heading, *(c.text + (f"\n[dim]{escape(c.detail)}[/]" if c.detail else "") for c in cells))
    return table


def to_json(comparison: Comparison) -> dict[str, Any]:
    """Every figure of the comparison. A key is never left out: what was not measured is null."""
    best = comparison.best_possible
    return {
        "version": JSON_VERSION,
        "baseline": comparison.baseline.label,
        "target": comparison.target and asdict(comparison.target),
        "best_possible": best and best.model_dump(),
        "setups": [_setup_to_json(setup) for setup in comparison.setups],
        "runs": [_run_to_json(run) for run in comparison.runs],
        "varied": [_difference_to_json(difference) for difference in comparison.varied],
        "differences": [_difference_to_json(difference) for difference in comparison.differences],
        "caveats": list(comparison.caveats),
    }


def _setup_to_json(setup: Setup) -> dict[str, Any]:
    facts = ("method", "placement", "sharding", "world_size", "threads_per_rank", "parameters", "compression")
    summary = setup.summary.model_dump()
    return {
        "label": setup.label,
        "is_baseline": setup.is_baseline,
        "runs": [run.label for run in setup.runs],
        "seeds": [run.summary.seed for run in setup.runs],
        "status": [run.summary.status for run in setup.runs],
        **{fact: summary[fact] for fact in facts},
        "figures": asdict(setup.figures),
        "ratios": asdict(setup.ratios),
        "lead": setup.lead and asdict(setup.lead),
    }


def _run_to_json(run: Run) -> dict[str, Any]:
    commit, changed = run.environment.get("commit"), run.environment.get("uncommitted_changes")
    return {
        "label": run.label,
        "path": str(run.path),
        "commit": commit,
        "uncommitted_changes": changed,
        **run.summary.model_dump(),
    }


def _difference_to_json(difference: Difference) -> dict[str, Any]:
    return {"key": difference.key, "values": [{"value": v, "runs": list(labels)} for v, labels in difference.values]}
