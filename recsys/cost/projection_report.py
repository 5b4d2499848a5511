"""A projection from what is asked for to what is printed: scenario, fit to measured steps, tables on the terminal."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast, get_args

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from configs.load import ConfigError
from recsys.cost.cost_fit import FOLDS, CostFit, predict_held_out
from recsys.cost.cost_model import Optimizer
from recsys.cost.machines import MACHINES, MODELS, Assumptions, Model, find, override
from recsys.cost.measured_steps import read_steps
from recsys.cost.projection import FULL, Point, Projector, Scenario
from recsys.cost.projection_table import (
    DOES_NOT_FIT,
    TOTAL_HEADINGS,
    ProjectionReport,
    Validation,
    check_row,
    crossover_table,
    describe_assumptions,
    describe_caveats,
    describe_cheapest,
    describe_place,
    describe_refusals,
    models_of,
    sharded_of,
    step_cell,
    total_row,
)
from recsys.cost.published_steps import check_published

_WIDTH = 140
_SECTIONS = ("machine", "assumed", "model")


def build_scenario(
    *,
    machine: str,
    models: Sequence[str] | None,
    gpus: Sequence[int],
    networks_gbit: Sequence[float],
    compressions: Sequence[float],
    batch_sizes: Sequence[int],
    optimizer: str,
    overrides: Sequence[str],
) -> Scenario:
    """Return what is projected: named machine and models with `section.key=value` laid over them, figures rising.

    models: None = all. Raises ConfigError naming option or key, and value.
    """
    for text in overrides:
        if text.partition(".")[0] not in _SECTIONS:
            raise ConfigError(f"{text}: neither a crossover.json nor a key of {', '.join(_SECTIONS)}")
    published = override(find("--machine", MACHINES, machine), "machine", overrides)
    assumed = override(Assumptions(), "assumed", overrides)
    if optimizer not in get_args(Optimizer):
        raise ConfigError(f"--optimizer {optimizer}: unknown; known: {', '.join(get_args(Optimizer))}")
    for count in gpus:
        if count > published.gpus_per_node and count % published.gpus_per_node:
            raise ConfigError(f"--gpus {count}: does not fill nodes of {published.gpus_per_node} GPUs")
        if count > min(batch_sizes):
            raise ConfigError(f"--batch {min(batch_sizes)}: fewer rows than the {count} GPUs of --gpus")
    return Scenario(
        machine=published,
        assumed=assumed,
        price=getattr(assumed, f"{machine}_price"),
        models=[override(find("--model", MODELS, name), "model", overrides) for name in models or MODELS],
        gpus=sorted(gpus),
        networks=sorted(networks_gbit),
        compressions=sorted(compressions),
        batch_sizes=sorted(batch_sizes),
        optimizer=cast(Optimizer, optimizer),
    )


def validate(path: Path) -> Validation:
    """Raises ValueError where the file is none of netlab's, or holds too little to fit."""
    steps = read_steps(path)
    predictions = [prediction for fold in FOLDS for prediction in predict_held_out(steps, fold)]
    return Validation(steps, CostFit(steps).constants(), predictions)


def build_report(scenario: Scenario, validation: Validation | None) -> ProjectionReport:
    projector = Projector(scenario)
    with Console(stderr=True).status("placing tables over GPUs with TorchRec's planner"):
        points, checks = projector.points(), check_published(scenario.assumed)
    return ProjectionReport(scenario, points, projector.crossovers(), checks, validation)


def print_report(report: ProjectionReport) -> None:
    """Print every table and figure of a projection."""
    console = Console(highlight=False, width=_WIDTH)
    if report.validation:
        _print_validation(report.validation, console)
    console.print(_table("Published steps, and the model's", ["source", "step", "published", "projected", "×"],
                         [check_row(check) for check in report.checks]))  # fmt: skip
    for model in models_of(report.points):
        for batch_size in report.scenario.batch_sizes:
            console.print(_steps_table(report, model, batch_size))
            console.print(_totals_table(report, model, batch_size))
            refused = [p for p in report.points if p.model is model and p.global_batch_size == batch_size]
            for line in describe_refusals(refused):
                console.print(line, markup=False, soft_wrap=True, style="dim")
    model = report.scenario.models[0]
    headings, rows = crossover_table(report, model)
    if rows:
        title = f"{model.name}: who is the faster below < and above a global batch size, projected"
        console.print(_table(title, headings, rows))
    for line in describe_cheapest(report.points):
        console.print(line, markup=False, soft_wrap=True, style="bold")
    rows = [list(row) for row in describe_assumptions(report.scenario.machine, report.scenario.assumed)]
    console.print(_table(f"Assumptions: {report.scenario.machine.name}", ["key", "value", "meaning"], rows, left=True))
    console.print(f"{report.scenario.machine.source}.", style="dim", markup=False, soft_wrap=True)
    for line in describe_caveats(report):
        console.print(line, markup=False, soft_wrap=True, style="bold")


def _print_validation(validation: Validation, console: Console) -> None:
    rows = [[c.name, f"{c.value:.3g}", c.unit, c.meaning] for c in validation.constants]
    origin = "measured and emulated steps of this machine"
    console.print(_table(f"Constants fitted to {len(validation.steps)} {origin}",
                         ["constant", "value", "unit", "meaning"], rows, left=True))  # fmt: skip
    for line in validation.summaries:
        console.print(f"  {line}", markup=False, soft_wrap=True, style="bold")


def _table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], left: bool = False) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, title=f"[bold]{escape(title)}[/]",
                  title_justify="left", title_style="")  # fmt: skip
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if left or i < 2 else "right", no_wrap=i < 2)
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    return table


def _steps_table(report: ProjectionReport, model: Model, batch_size: int) -> Table:
    """A line for every place, a column for every setup."""
    points = [p for p in report.points if p.model is model and p.global_batch_size == batch_size]
    robe = [f"ROBE {compression:,.0f}×" for compression in report.scenario.compressions]
    headings = ["step, ms, × sharded", "placement", "sharded", *robe]
    rows = []
    for gpus, network in dict.fromkeys((p.gpus, p.network_gbit) for p in points):
        here = [p for p in points if (p.gpus, p.network_gbit) == (gpus, network)]
        sharded = sharded_of(points, here[0])
        cells = [] if sharded else ["", ""]
        if sharded:
            how = f"{sharded.placement}, busiest {sharded.imbalance:.2f}×" if sharded.cost else ""
            cells = [how, _cell(sharded, None)]
        cells += [_cell(p, sharded) for p in here if p.compression != FULL]
        rows.append([describe_place(gpus, network), *cells])
    title = f"{model.name}, batch {batch_size:,}: projected steps (computing + exposed communication)"
    return _table(title, headings, rows)


def _cell(point: Point, sharded: Point | None) -> str:
    text, parts = step_cell(point, sharded)
    return f"{text}\n({parts})" if point.cost else DOES_NOT_FIT


def _totals_table(report: ProjectionReport, model: Model, batch_size: int) -> Table:
    """Per setup the place with the fewest hours, or the first that it fits where no total is published."""
    points = [p for p in report.points if p.model is model and p.global_batch_size == batch_size]
    rows = []
    for setup in dict.fromkeys(point.setup for point in points):
        found = [p for p in points if p.setup == setup]
        fitting = [p for p in found if p.cost] or found[:1]
        fastest = min(fitting, key=lambda p: p.cost.step_ms if p.cost else 0.0)
        rows += [total_row(point) for point in (fitting[0], *([fastest] if fastest is not fitting[0] else []))]
    title = f"{model.name}, batch {batch_size:,}: on the fewest and on the fastest GPUs, projected"
    return _table(title, TOTAL_HEADINGS, rows)
