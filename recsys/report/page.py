"""One self-contained page for every result: sections of prose, plots and tables in one file, which fetches nothing.

>>> from recsys.report.table import Table
>>> page = Page(
...     "Two methods",
...     "ROBE is as good as full tables.",
...     [
...         Section("Figures", [Table(["method", "AUC"], [["full", 0.75], ["robe", 0.75]])]),
...         Section("Environment", [Pairs({"cpu": "AMD EPYC"}), Details("Plan", [Code("t0: rank 0")])]),
...     ],
... )
>>> "ROBE is as good as full tables." in page.render()
True

A block is text (a paragraph), a Table, or one of the classes below. Text is escaped; markupsafe.Markup is not.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from recsys.report.palette import ORIGIN_COLOURS, Style
from recsys.report.table import Cell, CellLike, Table, as_cell
from recsys.runs.run_directory import write_atomically

if TYPE_CHECKING:  # only what prints a page needs it
    from rich.console import Console

_HERE = Path(__file__).parent

Figure = dict[str, Any]
"""A plotly figure: {"data": [traces], "layout": {...}}. Colours of text and grid are the page's, light and dark."""


@dataclass(frozen=True)
class Plot:
    """Hold a panel with one plotly figure, or with several of which the reader chooses.

    figures: by the name of the choice, "" for a single one; a tuple of names makes as many menus. height: in pixels.
    first: the choice shown at first, the first one by default. tags: where the figures come from, "measured" or
    "projected".
    """

    id: str
    title: str
    caption: str
    figures: Mapping[str, Figure] | Mapping[tuple[str, ...], Figure]
    height: int = 340
    is_wide: bool = False
    first: str | tuple[str, ...] | None = None
    tags: Sequence[str] = ()


@dataclass(frozen=True)
class Grid:
    """Hold plots beside each other: two or three columns, one where the page is narrow; a wide plot takes a row."""

    plots: Sequence[Plot]
    columns: int = 2


@dataclass(frozen=True)
class Controls:
    """Hold buttons for all plots of the page: arms to hide, and views to choose from.

    arms: label and style of each; a trace belongs to the one whose place its meta["arm"] gives. views: names of
    figures; every plot that has figures of these names follows.
    """

    arms: Sequence[tuple[str, Style]]
    views: Sequence[str] = ()


@dataclass(frozen=True)
class Lines:
    """Hold a list; styles put the sample of a plotted line before each."""

    lines: Sequence[str]
    styles: Sequence[Style] = ()


@dataclass(frozen=True)
class Notice:
    """Hold lines that a reader must not miss, shown in a box; nothing is shown without lines."""

    heading: str
    lines: Sequence[str]


@dataclass(frozen=True)
class Pairs:
    """Hold keys and values of a config or an environment; several cells in a value stand below each other."""

    pairs: Mapping[str, CellLike | Sequence[CellLike]]

    def rows(self) -> Iterator[tuple[str, list[Cell]]]:
        """Yield every key with the cells of its value."""
        for key, value in self.pairs.items():
            values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
            yield key, [as_cell(each) for each in values]


@dataclass(frozen=True)
class Terms:
    """Hold words and their meanings."""

    terms: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Code:
    """Hold text that is shown as it is: a command, a plan."""

    text: str


@dataclass(frozen=True)
class Details:
    """Hold blocks that open at a click."""

    summary: str
    blocks: "Sequence[Block]"


Block = str | Table | Plot | Grid | Controls | Lines | Notice | Pairs | Terms | Code | Details


@dataclass(frozen=True)
class Section:
    """Hold blocks under a heading, "" to go on from the answer; tags say where the figures come from."""

    heading: str
    blocks: Sequence[Block]
    tags: Sequence[str] = ()


@dataclass(frozen=True)
class Page:
    """Hold a title, the answer in one sentence, and sections. kicker stands above the title; origin at the foot."""

    title: str
    answer: str
    sections: Sequence[Section]
    kicker: str = ""
    origin: str = ""
    plots: Sequence[Plot] = field(init=False)

    def __post_init__(self) -> None:
        plots = [plot for section in self.sections for plot in _plots_of(section.blocks)]
        ids = [plot.id for plot in plots]
        if twice := sorted({name for name in ids if ids.count(name) > 1}):
            raise ValueError(f"page {self.title!r}: plots of the same id: {', '.join(twice)}")
        object.__setattr__(self, "plots", plots)

    def render(self) -> str:
        """Return the page's HTML, with its data, styles and plotly.js inside."""
        environment = Environment(
            loader=FileSystemLoader(_HERE),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters["kind"] = lambda block: "text" if isinstance(block, str) else type(block).__name__
        return environment.get_template("page.html.j2").render(
            page=self,
            css=Markup((_HERE / "page.css").read_text()),
            js=Markup((_HERE / "page.js").read_text()),
            plotly=Markup(get_plotlyjs()) if self.plots else "",
            origins=ORIGIN_COLOURS,
            figures=as_script_data([_plot_data(plot) for plot in self.plots]),
            written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        )

    def write(self, path: Path) -> None:
        """Write the page, whole or not at all. Raises OSError where `path` cannot be written."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, self.render())


def meanings_of(table: Table) -> Terms:
    """Return the headings of a table with what they mean."""
    return Terms([(column.heading, column.meaning) for column in table.columns if column.meaning])


def print_page(page: Page, console: "Console") -> None:
    """Print what a terminal can show of a page: no plots, nothing that is folded away.

    What stands above the first heading comes last: the last lines are those that are seen.
    """
    for section in sorted(page.sections, key=lambda section: not section.heading):
        for block in section.blocks:
            match block:
                case Table():
                    console.print(block)
                case Lines(lines):
                    _print_lines(console, lines)
                case Notice(_, lines):
                    _print_lines(console, lines, "bold")
                case str():
                    _print_lines(console, [block], "dim")


def _print_lines(console: "Console", lines: Sequence[str], style: str = "") -> None:
    for line in lines:
        console.print(line, markup=False, soft_wrap=True, style=style)


def _plots_of(blocks: Sequence[Block]) -> Iterator[Plot]:
    for block in blocks:
        if isinstance(block, Plot):
            yield block
        elif isinstance(block, Grid):
            yield from block.plots
        elif isinstance(block, Details):
            yield from _plots_of(block.blocks)


def _plot_data(plot: Plot) -> dict[str, Any]:
    def names(choice: str | tuple[str, ...]) -> list[str]:
        return [choice] if isinstance(choice, str) else list(choice)

    views = [{"names": names(choice), "figure": figure} for choice, figure in plot.figures.items()]
    first = views[0]["names"] if plot.first is None else names(plot.first)
    return {"id": plot.id, "title": plot.title, "height": plot.height, "views": views, "first": first}


def as_script_data(value: Any) -> Markup:
    """Return JSON that cannot end the script element it stands in. Raises ValueError for a number not finite."""
    return Markup(json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"))
