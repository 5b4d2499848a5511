"""What a study prints and writes: its plan, its tables, its page."""

from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as Grid

from launch.runners.experiment_runs import Plan
from recsys.report.numbers import format_bytes, format_count, format_seconds
from recsys.runs.run_dir import write_atomically
from recsys.studies.experiment import find_experiments, load_experiment
from recsys.studies.experiment_export import to_latex, to_markdown
from recsys.studies.experiment_page import write_experiment_page
from recsys.studies.experiment_tables import ExperimentTables

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


def list_experiments() -> None:
    grid = Grid(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for heading in ("experiment", "what", "data"):
        grid.add_column(heading)
    for name, path in find_experiments().items():
        experiment = load_experiment(path)
        grid.add_row(name, escape(experiment.title), ", ".join(experiment.data))
    _console().print(grid)
