"""A study as one self-contained page: its tables beside the paper's, curves, and the plots of its layout."""

from collections.abc import Mapping
from typing import Any

from recsys.report.page import Block, Lines, Notice, Page, Pairs, Plot, Section
from recsys.studies.plots import draw_curves, draw_sizes, draw_trade
from recsys.studies.tables import StudyTables

_TRADE = (
    "Everything over the full tables. Total time: epochs to the target times time per iteration. The energy proxies "
    "are not measured energy: core-seconds (on one thread the total time again), and the memory that embeddings and "
    "their optimizer state hold, times the total time. No point where not every seed reached the target."
)
_SIZES = (
    "Bars: ± one standard deviation over seeds; the band is that of full tables. Points are set a little aside of "
    "their compression so that bars do not cover each other; hovering tells it. Click a name to hide it, twice to see "
    "it alone."
)
_CURVES = (
    "Test rows; means over seeds, single seeds faint. Evaluation is not in the training time. Click a name to hide it, "
    "twice to see it alone."
)


def build_page(tables: StudyTables) -> Page:
    """Return the page of a study. Figures are those of its tables; nothing else is read."""
    study, facts = tables.results.study, tables.results.facts
    first, *others = tables.notes
    return Page(
        study.title,
        first,
        [
            Section(
                "",
                [
                    Lines(others),
                    Notice("Keep in mind", tables.caveats),
                    Notice("Failed, or cannot be run", tables.failures),
                ],
            ),
            Section("Beside the paper" if study.reference else "Results", list(tables.shown)),
            Section("Plots", _build_plots(tables)),
            Section("Every figure", ["One row a setting, model, method and compression.", tables.every]),
            *_build_sections(facts),
            Section("Environment", [Pairs({key: str(value) for key, value in facts.get("environment", {}).items()})]),
        ],
        kicker=study.reference,
        origin="Every figure is read from results.parquet beside this page, but those marked as the paper's.",
    )


def _build_plots(tables: StudyTables) -> list[Block]:
    study, arms = tables.results.study, tables.arms
    plots: list[Block] = []
    if study.layout == "trade" and (trade := draw_trade(study, arms)):
        plots.append(Plot("trade", "The trade-off of Figure 1, from these runs", _TRADE, trade, 560, is_wide=True))
    if study.layout == "grid" and any(arm.auc for arm in arms):
        plots.append(Plot("sizes", "Test AUC against compression", _SIZES, draw_sizes(arms), 560, is_wide=True))
    plots.append(Plot("curves", "AUC over training", _CURVES, draw_curves(study, arms), 520, is_wide=True))
    return plots


def _build_sections(facts: Mapping[str, Any]) -> list[Section]:
    """Return the sections that not every study has."""
    sections = []
    if any(facts["settings"].values()):
        settings = facts["settings"].items()
        pairs = {name or "all": ", ".join(f"{k} = {v}" for k, v in keys.items()) for name, keys in settings}
        sections.append(Section("Settings", [Pairs(pairs)]))
    if options := facts.get("options"):
        note = "The learning rate of the embeddings, the seed, and [embedding]; everything else is shared."
        sections.append(Section("What differs", [note, Pairs(options)]))
    return sections
