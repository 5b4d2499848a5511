"""An experiment as one self-contained page: its tables beside the paper's, curves, and Fig. 1."""

from pathlib import Path

from recsys.report.page import as_script_data, write_page
from recsys.studies.experiment_plots import draw_curves, draw_trade
from recsys.studies.experiment_tables import ExperimentTables


def write_experiment_page(found: ExperimentTables, path: Path) -> None:
    """The page, in one piece: data, styles and plotly.js are inside it, and nothing is fetched."""
    experiment = found.results.experiment
    write_page(
        path,
        "experiment_page.html.j2",
        experiment=experiment,
        tables=found.paper,
        every=found.every,
        notes=found.notes,
        caveats=found.caveats,
        failures=found.failures,
        settings={name or "all": keys for name, keys in found.results.facts["settings"].items()},
        environment=found.results.facts.get("environment", {}),
        figures=as_script_data(
            {
                "curves": draw_curves(experiment, found.groups),
                "trade": draw_trade(experiment, found.groups) if experiment.layout == "trade" else {},
            }
        ),
    )
