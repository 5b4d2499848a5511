"""Compare runs: a table on the terminal, in Markdown or JSON, and one self-contained page.

It reads run directories alone. Runs must share data, model, optimizer, training, evaluation, threads in total and
hardware; they may differ in the embeddings, their placement and the seed. Runs that differ in their seed alone are
taken together: mean ± standard deviation.
"""

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from recsys.report.compared_runs import ComparisonError, Difference, Run
from recsys.report.comparison import Comparison, Setup, compare
from recsys.report.report import describe_overview, describe_subject, find_findings, write_report
from recsys.report.result_table import (
    Column,
    choose_columns,
    describe_best_possible,
    describe_state,
    describe_target,
    format_markdown,
)

EXIT_MISTAKE = 2
JSON_VERSION = 1
UNFAIR = "Not a fair comparison"
_HEADING_WIDTH, _SETUP_WIDTH, _PIPE_WIDTH = 27, 24, 120


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m launch.compare",
        description=__doc__,
        epilog="examples:\n"
        "  python -m launch.compare runs/demo/demo_sharded runs/demo/demo_robe\n"
        "  python -m launch.compare runs/full_s* runs/robe_s*            several seeds: mean ± standard deviation\n"
        "  python -m launch.compare runs/* --target-auc 0.8025 --output paper.html\n"
        "  python -m launch.compare runs/* --json | jq '.setups[] | {label, auc: .figures.test_auc.mean}'\n\n"
        "The baseline of ratios is the first run with compression 1, else the first run. Time to target is to\n"
        "--target-auc, else to the target_auc all configs share, else to the lowest best AUC of the finished runs\n"
        "with full tables. Exit status 2: runs could not be read, or differ in what a fair comparison shares.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "runs", nargs="+", metavar="runs/<name>", help="run directories; pages (.html) among them are passed over"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print all figures as JSON instead of the table")
    form.add_argument("--markdown", action="store_true", help="print the table in Markdown")
    parser.add_argument("--target-auc", type=_auc, metavar="X", help="measure the time to this AUC")
    parser.add_argument(
        "--output",
        metavar="PATH",
        help="where the page goes (default: report.html; with --json or --markdown none is written unless asked for)",
    )
    parser.add_argument(
        "--allow-differences", action="store_true", help="compare unlike runs, and say prominently in what they differ"
    )
    return parser.parse_args(arguments)


def _auc(text: str) -> float:
    value = float(text)
    if not 0.5 < value < 1:
        raise argparse.ArgumentTypeError(f"{text}: an AUC between 0.5 and 1 is expected")
    return value


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints, and writes the page; exits with status 2 where the runs cannot be compared."""
    asked = parse_arguments(arguments)
    runs = [run for run in asked.runs if not run.endswith(".html")]  # of an earlier comparison, under runs/*
    try:
        comparison = compare(runs or asked.runs, asked.target_auc, asked.allow_differences)
    except ComparisonError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_MISTAKE)
    if asked.json:
        print(json.dumps(to_json(comparison), indent=2, allow_nan=False))
    elif asked.markdown:
        if comparison.differences:
            print(f"**{UNFAIR}**\n")
        print(format_markdown(comparison))
        for block in describe_context(comparison):
            print("\n" + "\n".join(f"- {line}" for line in block))
    else:
        print_comparison(comparison)
    output = asked.output or (None if asked.json or asked.markdown else "report.html")
    if output:
        try:
            write_report(comparison, Path(output))
        except OSError as error:
            print(f"error: {output} cannot be written: {error.strerror}", file=sys.stderr)
            sys.exit(EXIT_MISTAKE)
        print(f"page: {output}", file=sys.stderr)


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


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `... | head` is no error
    main()
