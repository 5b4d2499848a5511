"""A projection as one self-contained page: steps over GPUs and batch sizes, totals, and how far to trust them.

Every figure carries what it is in word and colour: measured, emulated, published or projected.
"""

from pathlib import Path

from recsys.cost.projection_plots import ORIGIN_COLOURS, build_plots
from recsys.cost.projection_table import (
    TOTAL_HEADINGS,
    ProjectionReport,
    check_row,
    crossover_table,
    describe_assumptions,
    describe_caveats,
    describe_cheapest,
    models_of,
    sharded_of,
    step_cell,
    total_row,
)
from recsys.report.page import as_script_data, write_page

_TEMPLATE = "projection_page.html.j2"


def write_projection_page(report: ProjectionReport, path: Path) -> None:
    """The page, in one piece: data, styles and plotly.js are inside it, and nothing is fetched."""
    write_page(
        path,
        _TEMPLATE,
        report=report,
        colours=ORIGIN_COLOURS,
        caveats=describe_caveats(report),
        summaries=report.validation.summaries if report.validation else [],
        checks=[check_row(check) for check in report.checks],
        headings=TOTAL_HEADINGS,
        models=[(model, _rows(report, model.name)) for model in models_of(report.points)],
        crossovers=[(model.name, *crossover_table(report, model)) for model in models_of(report.points)],
        cheapest=describe_cheapest(report.points),
        assumptions=describe_assumptions(report.scenario.machine, report.scenario.assumed),
        environment={
            "machine": f"{report.scenario.machine.name}: {report.scenario.machine.source}",
            **{f"model {model.name}": model.source for model in report.scenario.models},
            "optimizer": report.scenario.optimizer,
            "price": f"${report.scenario.price:g} a GPU-hour, assumed",
        },
        figures=as_script_data(build_plots(report)),
    )


def _rows(report: ProjectionReport, name: str) -> list[tuple[int, list[str], str, str]]:
    """(batch size, cells under TOTAL_HEADINGS, ratio to sharded tables, computing + exposed communication)."""
    rows = []
    for point in report.points:
        if point.model.name == name:
            sharded = sharded_of(report.points, point)
            ratio = ""
            if sharded and sharded.cost and point.cost:
                ratio = f"{point.cost.step_ms / sharded.cost.step_ms:.2f}"
            rows.append((point.global_batch_size, total_row(point), ratio, step_cell(point)[1]))
    return rows
