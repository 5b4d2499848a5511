"""What would it take on a cluster? Steps, devices, hours, energy and cost of sharded tables and ROBE, by a cost model.

The model: bytes and operations of a step, over what memory, GPU and links reach; all-to-all, all-reduce and
reduce-scatter by messages and bytes (α–β), within nodes and between them; tables placed by TorchRec's planner up to 64
GPUs. Given the crossover.json of launch.netlab, it is fitted to those steps first, and predicts those that were
left out: how far off it is, is printed, as is how far off it is of steps that others published.

Every figure is marked: measured, emulated (over an emulated network), published, or projected.
"""

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from configs.load import ConfigError
from launch.cli import EXIT_INTERRUPTED, EXIT_MISTAKE
from recsys.cost.cost_fit import FOLDS, CostFit, predict_held_out
from recsys.cost.cost_model import Optimizer
from recsys.cost.machines import MACHINES, MODELS, Assumptions, Model, find, override
from recsys.cost.measured_steps import read_steps
from recsys.cost.projection import FULL, Point, Projector, Scenario
from recsys.cost.projection_json import to_json
from recsys.cost.projection_page import write_projection_page
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
from recsys.runs.run_dir import write_atomically

_WIDTH = 140
_SECTIONS = ("machine", "assumed", "model")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m launch.project",
        description=__doc__,
        epilog="examples:\n"
        "  python -m launch.project                                   from published figures alone\n"
        "  python -m launch.project runs/netlab/crossover.json        and checked on what was measured here\n"
        "  python -m launch.project --machine h100 --gpus 8,64 --network-gbit 400 --batch 2048,65536\n"
        "  python -m launch.project --model 50tb --gpus 1024 --compression 10000,100000\n"
        "  python -m launch.project machine.memory_gb=40 assumed.link_efficiency=0.5 assumed.a100_price=2.5\n"
        "  python -m launch.project --model 1tb model.ids_per_bag=20 model.embedding_dim=64\n\n"
        "Keys of machine, assumed and model are listed with their values at the end of what is printed.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("arguments", nargs="*", metavar="crossover.json | section.key=value")
    parser.add_argument("--machine", default="a100", metavar="NAME", help=f"{', '.join(MACHINES)} (default: a100)")
    parser.add_argument("--gpus", default="8,16,64,256,1024", metavar="N,...", help="default: %(default)s")
    parser.add_argument(
        "--network-gbit", default="100,200,400", metavar="N,...", help="of one GPU, one way (default: %(default)s)"
    )
    parser.add_argument("--model", default=",".join(MODELS), metavar="NAME,...", help="default: %(default)s")
    parser.add_argument("--compression", default="100,1000,10000", metavar="N,...", help="default: %(default)s")
    parser.add_argument("--batch", default="16384", metavar="N,...", help="global batch size (default: %(default)s)")
    parser.add_argument(
        "--optimizer", default="sgd", metavar="NAME", help=f"{', '.join(get_args(Optimizer))} (default: sgd)"
    )
    parser.add_argument("--output", default="runs/projection", metavar="DIR", help="default: %(default)s")
    parser.add_argument("--json", metavar="FILE", help="projection.json also under this name")
    return parser.parse_args(arguments)


def build_scenario(asked: argparse.Namespace, overrides: Sequence[str]) -> Scenario:
    """Raises ValueError naming option or key, and value."""
    for text in overrides:
        if text.partition(".")[0] not in _SECTIONS:
            raise ConfigError(f"{text}: neither a crossover.json nor a key of {', '.join(_SECTIONS)}")
    machine = override(find("--machine", MACHINES, asked.machine), "machine", overrides)
    assumed = override(Assumptions(), "assumed", overrides)
    names = asked.model.split(",")
    models = [override(find("--model", MODELS, name), "model", overrides) for name in names]
    if asked.optimizer not in get_args(Optimizer):
        raise ConfigError(f"--optimizer {asked.optimizer}: unknown; known: {', '.join(get_args(Optimizer))}")
    gpus = [int(n) for n in _read_numbers("--gpus", asked.gpus, 2, whole=True)]
    for count in gpus:
        if count > machine.gpus_per_node and count % machine.gpus_per_node:
            raise ConfigError(f"--gpus {count}: does not fill nodes of {machine.gpus_per_node} GPUs")
    batch_sizes = [int(n) for n in _read_numbers("--batch", asked.batch, 1, whole=True)]
    for count in gpus:
        if count > min(batch_sizes):
            raise ConfigError(f"--batch {min(batch_sizes)}: fewer rows than the {count} GPUs of --gpus")
    return Scenario(
        machine=machine,
        assumed=assumed,
        price=getattr(assumed, f"{asked.machine}_price"),
        models=models,
        gpus=gpus,
        networks=_read_numbers("--network-gbit", asked.network_gbit, 0.001),
        compressions=_read_numbers("--compression", asked.compression, 1.001),
        batch_sizes=batch_sizes,
        optimizer=asked.optimizer,
    )


def _read_numbers(option: str, text: str, least: float, *, whole: bool = False) -> list[float]:
    """'8,16' -> [8, 16], each once, rising."""
    numbers = []
    for part in text.split(","):
        try:
            number = int(part) if whole else float(part)
        except ValueError:
            raise ConfigError(f"{option} {part!r}: not a {'whole ' * whole}number") from None
        if not least <= number < 1e12:
            raise ConfigError(f"{option} {part}: must be at least {least:g}")
        numbers.append(number)
    return sorted(set(numbers))


def validate(path: Path) -> Validation:
    """Raises ValueError where the file is none of launch.netlab's, or holds too little to fit."""
    steps = read_steps(path)
    predictions = [prediction for fold in FOLDS for prediction in predict_held_out(steps, fold)]
    return Validation(steps, CostFit(steps).constants(), predictions)


def build_report(scenario: Scenario, validation: Validation | None) -> ProjectionReport:
    projector = Projector(scenario)
    with Console(stderr=True).status("placing tables over GPUs with TorchRec's planner"):
        points, checks = projector.points(), check_published(scenario.assumed)
    return ProjectionReport(scenario, points, projector.crossovers(), checks, validation)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints and writes; status 2 for a mistake, 130 where it was interrupted: then nothing is written."""
    asked = parse_arguments(arguments)
    files = [text for text in asked.arguments if "=" not in text]
    output = Path(asked.output)
    try:
        if len(files) > 1:
            raise ConfigError(f"{files[1]}: one crossover.json at a time")
        scenario = build_scenario(asked, [text for text in asked.arguments if "=" in text])
        validation = validate(Path(files[0])) if files else None
        report = build_report(scenario, validation)
        output.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_MISTAKE)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    text = json.dumps(to_json(report), indent=2, default=float)
    for path in (output / "projection.json", asked.json and Path(asked.json)):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, text)
    write_projection_page(report, output / "projection.html")
    print_report(report, Console(highlight=False, width=_WIDTH))
    print(f"page: {output / 'projection.html'}, figures: {output / 'projection.json'}", file=sys.stderr)


def print_report(report: ProjectionReport, console: Console) -> None:
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


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `... | head` is no error
    main()
