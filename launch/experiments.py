"""The papers' experiments: what they claim, run on generated rows or on yours, beside their own numbers.

An experiment is a file of configs/experiments/: methods x compressions x models x settings x seeds. The embeddings'
learning rate is tuned for each method and compression on the first seed, from one grid and one step beyond it where the
best lies at its end; the other seeds follow at the best. Several runs are made at a time, here or as jobs of a cluster;
finished ones are never made again, an interrupted one goes on from its checkpoint if it has one, one that fails is
listed and the rest goes on. Last, the time of a step of every setup is measured, all taking turns and nothing beside
them. Writes <output>/results.parquet, and from it alone index.html, tables.md and tables.tex.
"""

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as Grid

from launch.cli import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_MISTAKE
from launch.runners.experiment_runs import Plan, make_plan, run_plan
from launch.sweep import add_runner_options, read_runner_options
from recsys.report.numbers import format_bytes, format_count, format_seconds
from recsys.runs.run_dir import write_atomically
from recsys.studies.experiment import find_experiments, load_experiment
from recsys.studies.experiment_export import to_json, to_latex, to_markdown
from recsys.studies.experiment_page import write_experiment_page
from recsys.studies.experiment_records import read_results
from recsys.studies.experiment_tables import ExperimentTables, build_tables

_PIPE_WIDTH = 220


def write_tables(found: ExperimentTables, directory: Path) -> None:
    write_experiment_page(found, directory / "index.html")
    write_atomically(directory / "tables.md", to_markdown(found))
    write_atomically(directory / "tables.tex", to_latex(found))


def print_tables(found: ExperimentTables) -> None:
    console = _console()
    for table in found.paper:
        grid = Grid(title=table.title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for number, heading in enumerate(table.headings):
            grid.add_column(escape(heading), justify="left" if number == 0 else "right", overflow="fold")
        for row in table.rows:
            grid.add_row(*(escape(c.text) + (f"\n[dim]{escape(c.detail)}[/]" if c.detail else "") for c in row))
        console.print(grid)
        console.print()
    for line in (*found.notes, *found.caveats, *(f"Failed: {failure}" for failure in found.failures)):
        console.print(line, markup=False, soft_wrap=True)


def print_plan(plan: Plan) -> None:
    """What would be run, what each holds, and how long it may take."""
    grid = Grid(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for heading in ("group", "runs", "parameters", "memory of a run", "about, a run", "problem"):
        grid.add_column(heading, justify="left" if heading in ("group", "problem") else "right", overflow="fold")
    for group in plan.groups:
        needs = format_bytes(group.needs_bytes) if group.needs_bytes else "–"
        seconds = format_seconds(group.seconds) if group.seconds is not None else "–"
        runs = "–" if group.problem else str(plan.runs_per_group)
        count = format_count(group.parameters) if group.parameters else "–"
        grid.add_row(escape(group.name), runs, count, needs, seconds, escape(group.problem or ""))
    _console().print(grid)
    total, seconds = len(plan.able) * plan.runs_per_group, plan.seconds()
    about = f", about {format_seconds(seconds)} (by figures of 2 cores of an AMD EPYC)" if seconds is not None else ""
    print(f"{total} runs, {plan.facts['jobs']}{about}; into {plan.output}")


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_PIPE_WIDTH)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m launch.experiments",
        description=__doc__,
        epilog="examples:\n"
        "  python -m launch.experiments --list\n"
        "  python -m launch.experiments table4 --dry-run\n"
        "  python -m launch.experiments table4 --scale 0.02 --seeds 0 1      # minutes become seconds\n"
        "  python -m launch.experiments table3 --data ~/ml-25m               # MovieLens: ratings and movies\n"
        "  python -m launch.experiments table3 --data train.txt model.embedding_dim=16\n"
        "  python -m launch.experiments --show runs/experiments/table4/results.parquet --latex\n\n"
        "Exit status: 1 = some runs failed, 2 = a mistake was found before any was made, 130 = interrupted.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "items",
        nargs="*",
        metavar="experiment | section.key=value",
        help="which one, and values laid over all its runs",
    )
    parser.add_argument("--list", action="store_true", help="the experiments")
    parser.add_argument("--dry-run", action="store_true", help="what would be run, with bytes and an estimate of time")
    parser.add_argument("--show", type=Path, metavar="results.parquet", help="make tables and page anew, run nothing")
    parser.add_argument("--data", metavar="PATH", help="Criteo's file or directory, or MovieLens' (default: generated)")
    parser.add_argument("--scale", type=float, default=1.0, metavar="X", help="factor on generated rows and tables")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="default: the experiment's, three")
    parser.add_argument("--target", type=float, metavar="AUC", help="default: what all seeds of full tables reach")
    parser.add_argument("--epsilon", type=float, metavar="X", help="AUCs within it are the same (default: 0.001)")
    parser.add_argument("--output", metavar="DIR", help="default: runs/experiments/<experiment>")
    for kind in ("json", "markdown", "latex"):
        parser.add_argument(f"--{kind}", action="store_true", help=f"print {kind} instead of the tables")
    add_runner_options(parser)
    return parser.parse_intermixed_args(arguments)


def list_experiments() -> None:
    grid = Grid(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for heading in ("experiment", "what", "data"):
        grid.add_column(heading)
    for name, path in find_experiments().items():
        experiment = load_experiment(path)
        grid.add_row(name, escape(experiment.title), ", ".join(experiment.data))
    _console().print(grid)


def main(arguments: Sequence[str] | None = None) -> None:
    asked = parse_arguments(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if asked.list:
            return list_experiments()
        if asked.show:
            path = asked.show
        else:
            plan = make_plan(asked, read_runner_options(asked))
            if asked.dry_run:
                return print_plan(plan)
            path = run_plan(plan)
        found = build_tables(read_results(path))
        write_tables(found, path.parent)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_MISTAKE)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    if asked.json:
        print(json.dumps(to_json(found), indent=2, allow_nan=False))
    elif asked.markdown or asked.latex:
        print(to_markdown(found) if asked.markdown else to_latex(found))
    else:
        print_tables(found)
        print(f"page: {path.parent / 'index.html'}; also tables.md, tables.tex and {path.name}")
    sys.exit(EXIT_FAILED if found.failures else 0)


if __name__ == "__main__":
    main()
