"""What the command of the studies prints and writes: the list of studies, a plan, tables and page."""

from pathlib import Path

from rich.console import Console

from launch.runners.study import StudyPlan
from recsys.report.numbers import format_bytes, format_count, format_seconds, or_missing
from recsys.report.table import Cell, Column, Table
from recsys.runs.run_directory import write_atomically
from recsys.studies.page import build_page
from recsys.studies.plan import PlannedArm
from recsys.studies.spec import find_studies, load_study
from recsys.studies.tables import StudyTables

_PIPE_WIDTH = 220


def list_studies() -> None:
    """Print the studies there are."""
    studies = {name: load_study(path) for name, path in find_studies().items()}
    rows = [[name, Cell(study.title), ", ".join(study.data)] for name, study in studies.items()]
    columns = [Column("study"), Column("what", align="left"), Column("data", align="left")]
    _console().print(Table(columns, rows))


def print_plan(plan: StudyPlan) -> None:
    """Print what would be run, what each run holds, and how long it may take."""

    def runs(arm: PlannedArm) -> Cell:
        """Return the cell of an arm's runs."""
        return Cell.of(plan.runs_per_arm if arm.is_able else None, str)

    def problem(arm: PlannedArm) -> str:
        """Return why an arm cannot be run, in words."""
        return f"{arm.method} reaches {arm.limit:g}×" if arm.is_refused else arm.problem or ""

    columns: list[Column[PlannedArm]] = [
        Column("arm", cell=lambda arm: arm.name),
        Column("runs", cell=runs),
        Column("parameters", cell=lambda arm: or_missing(arm.parameters, format_count)),
        Column("memory of a run", cell=lambda arm: or_missing(arm.needs_bytes, format_bytes)),
        Column("about, a run", cell=lambda arm: or_missing(arm.seconds, format_seconds)),
        Column("problem", cell=problem, align="left"),
    ]
    _console().print(Table.of(plan.arms, columns))
    total, seconds = len(plan.able) * plan.runs_per_arm, plan.seconds()
    about = f", about {format_seconds(seconds)} (by figures of 2 cores of an AMD EPYC)" if seconds is not None else ""
    print(f"{total} runs, {plan.facts['jobs']}{about}; into {plan.output}")


def write_tables(tables: StudyTables, directory: Path) -> None:
    """Write index.html, tables.md and tables.tex."""
    build_page(tables).write(directory / "index.html")
    write_atomically(directory / "tables.md", tables.to_markdown())
    write_atomically(directory / "tables.tex", tables.to_latex())


def print_tables(tables: StudyTables) -> None:
    """Print the tables of the study's layout, and what is said about them."""
    console = _console()
    for table in tables.shown:
        console.print(table)
        console.print()
    for line in (*tables.notes, *tables.caveats, *(f"Failed: {failure}" for failure in tables.failures)):
        console.print(line, markup=False, soft_wrap=True)


def _console() -> Console:
    """Return a console; without a terminal it is wide enough for every table."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_PIPE_WIDTH)
