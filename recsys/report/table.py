"""The table of the project: one type for the terminal, Markdown, LaTeX, HTML and JSON.

A column knows its heading, what it means, and how to take its figure from an item; a table is columns over items.

>>> from recsys.report.numbers import format_bytes, three_digits
>>> columns = [
...     Column("method", "How embeddings are stored.", lambda run: run["method"]),
...     Column("step", "Median of a step.", lambda run: Cell.of(run["ms"], three_digits, "p95 9.1"), unit="ms"),
...     Column("memory", "Of the largest rank.", lambda run: Cell.of(run["bytes"], format_bytes)),
... ]
>>> runs = [{"method": "full", "ms": 8.25, "bytes": 3_565_158}, {"method": "robe", "ms": 4.5, "bytes": None}]
>>> table = Table.of(runs, columns, title="Two runs")
>>> print(table.to_markdown())
**Two runs**
<BLANKLINE>
| method | step, ms | memory |
| --- | ---: | ---: |
| full | 8.25 (p95 9.1) | 3.40 MiB |
| robe | 4.50 (p95 9.1) | – |
>>> table.to_json()["values"]
[[None, 8.25, 3565158], [None, 4.5, None]]
>>> print(Table(["n", "1 M"], [["ours", "2.1"]]).transposed().to_markdown())
|  | ours |
| --- | ---: |
| 1 M | 2.1 |

`console.print(table)` of rich breaks it into as many pieces as the width needs, `print(table.to_latex())` is for
\\usepackage{booktabs,graphicx}, and `table.to_html()` is a fragment for recsys.report.page.

Rich draws the terminal's table and markupsafe escapes HTML. great_tables 1.1 was tried for HTML and LaTeX: a table has
10 kB of its own CSS with fixed light colours and takes no data attributes to sort by; LaTeX has neither small print
nor ×, ± or ε; and it brings babel, websockets and seven more packages. The rest, below, is shorter than its settings.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar
from urllib.parse import quote, urlsplit

from recsys.report.escape import escape_latex, escape_markdown
from recsys.report.numbers import MISSING
from recsys.report.palette import Style

if TYPE_CHECKING:  # imported where they are used: a command's --help draws no table
    from markupsafe import Markup
    from rich.console import Console, ConsoleOptions, RenderResult

Align = Literal["", "left", "right", "center"]
Emphasis = Literal["", "bold", "better", "worse", "quiet", "warning"]
Item = TypeVar("Item")

_LATEX_ALIGN = {"left": "l", "right": "r", "center": "c"}
_MARKDOWN_ALIGN = {"left": "---", "right": "---:", "center": ":---:"}
_LONG = 40
"""Letters of a text from which on a page folds it."""
_LINK_SCHEMES, _LINK_LETTERS = ("", "http", "https", "file"), ":/?#@!$&'*+,;=%~"


@dataclass(frozen=True)
class Cell:
    """Hold a figure as it is shown, with what is said about it in small print.

    value: the number (or word) behind the text, for JSON and for sorting; inf sorts last and is null in JSON.
    meaning: shown when a reader points at it. style: a sample of the line that stands for it in plots, in HTML.
    """

    text: str
    detail: str = ""
    value: float | str | None = None
    emphasis: Emphasis = ""
    link: str = ""
    meaning: str = ""
    style: Style | None = None

    @classmethod
    def of(cls, value: float | None, text: Callable[[float], str], detail: str = "", emphasis: Emphasis = "") -> "Cell":
        """Return the cell of a number, or a dash where there is none; the small print is kept either way."""
        return cls(MISSING, detail) if value is None else cls(text(value), detail, value, emphasis)

    @property
    def flat(self) -> str:
        """Return text and small print on one line."""
        return self.text + (f" ({self.detail})" if self.detail else "")


CellLike = Cell | str | float | None


def as_cell(value: CellLike) -> Cell:
    """Return a cell of what may stand for one: text, a number, or None for a dash."""
    if isinstance(value, Cell):
        return value
    if value is None:
        return Cell(MISSING)
    if isinstance(value, str):
        return Cell(value)
    return Cell(f"{value:,}" if isinstance(value, int) else f"{value:g}", "", value)


@dataclass(frozen=True)
class Column(Generic[Item]):
    """Describe a figure of every item: its heading, how it is measured, and where it comes from.

    align: left for the first column and right for the others unless it is given. detail: small print below the heading.
    """

    title: str
    meaning: str = ""
    cell: Callable[[Item], CellLike] | None = None
    unit: str = ""
    align: Align = ""
    detail: str = ""

    @property
    def heading(self) -> str:
        """Return the title with its unit: 'step, ms'."""
        return f"{self.title}, {self.unit}" if self.unit else self.title


@dataclass(frozen=True, init=False)
class Table:
    """Hold rows of cells under columns, with a title and lines of notes.

    sections: rows (by index) that are set apart from the row above. pinned: how many columns every piece shows where
    a table is broken into pieces, names and perhaps a baseline. is_compact: in a terminal small print stands beside
    its figure, not below.
    """

    columns: Sequence[Column[Any]]
    rows: Sequence[Sequence[Cell]]
    title: str
    notes: Sequence[str]
    sections: Sequence[int]
    pinned: int
    is_compact: bool

    def __init__(
        self,
        columns: Sequence[Column[Any] | str],
        rows: Iterable[Sequence[CellLike]],
        title: str = "",
        notes: Sequence[str] = (),
        sections: Sequence[int] = (),
        pinned: int = 1,
        is_compact: bool = False,
    ) -> None:
        """Take headings as columns, and text, numbers or None as cells. Raises ValueError for a row of other length."""
        headed = tuple(c if isinstance(c, Column) else Column(c) for c in columns)
        cells = tuple(tuple(as_cell(value) for value in row) for row in rows)
        for index, row in enumerate(cells):
            if len(row) != len(headed):
                raise ValueError(f"table {title!r}, row {index}: {len(row)} cells under {len(headed)} columns")
        values = {
            "columns": headed, "rows": cells, "title": title, "notes": tuple(notes), "sections": tuple(sections),
            "pinned": pinned, "is_compact": is_compact,
        }  # fmt: skip
        for name, value in values.items():
            object.__setattr__(self, name, value)  # the class is frozen, and its arguments are wider than its fields

    @classmethod
    def of(
        cls,
        items: Iterable[Item],
        columns: Sequence[Column[Item]],
        section: Callable[[Item], object] | None = None,
        **more: Any,
    ) -> "Table":
        """Return the table of one row an item. section: rows are set apart where this changes; more: as for Table()."""
        items = list(items)
        keys = [section(item) for item in items] if section else []
        starts = [i for i in range(1, len(keys)) if keys[i] != keys[i - 1]]
        rows = [[column.cell(item) if column.cell else "" for column in columns] for item in items]
        return cls(columns, rows, sections=starts, **more)

    def align(self, index: int) -> str:
        """Return where the text of a column stands: left, right or center."""
        return self.columns[index].align or ("right" if index else "left")

    def transposed(self, pinned: int = 1) -> "Table":
        """Return figures downwards and items sideways. pinned = 2: the first item, a baseline, is in every piece."""
        items = [Column(row[0].text, row[0].meaning, detail=row[0].detail) for row in self.rows]
        rows = [
            [Cell(column.heading, column.detail, meaning=column.meaning), *(row[i] for row in self.rows)]
            for i, column in enumerate(self.columns)
        ][1:]
        return replace(self, columns=[Column(""), *items], rows=rows, sections=(), pinned=pinned)

    def take(self, indices: Sequence[int]) -> "Table":
        """Return the table of some columns, which stand as they did."""
        columns = [replace(self.columns[i], align=self.align(i)) for i in indices]
        return replace(self, columns=columns, rows=[[row[i] for i in indices] for row in self.rows])

    def split(self, at_once: int) -> list["Table"]:
        """Return pieces side by side: the pinned columns, and `at_once` of the others in each."""
        first, others = range(min(self.pinned, len(self.columns))), range(self.pinned, len(self.columns))
        starts = range(0, len(others), at_once) or range(1)
        return [self.take([*first, *others[start : start + at_once]]) for start in starts]

    def to_markdown(self) -> str:
        """Return the table of GitHub's Markdown, title above and notes below."""
        aligns = [_MARKDOWN_ALIGN[self.align(i)] for i in range(len(self.columns))]
        headings = [Cell(column.heading, column.detail) for column in self.columns]
        lines = [[_markdown_cell(cell) for cell in row] for row in (headings, *self.rows)]
        table = "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], aligns, *lines[1:]))
        title = [f"**{escape_markdown(self.title)}**"] if self.title else []
        notes = ["\n".join(f"- {escape_markdown(note)}" for note in self.notes)] if self.notes else []
        return "\n\n".join([*title, table, *notes])

    def to_latex(self, caption: str = "") -> str:
        """Return a table of booktabs, small print under the figures; what is wider than a line is scaled down to it."""
        spec = "".join(_LATEX_ALIGN[self.align(i)] for i in range(len(self.columns)))
        body = []
        for index, row in enumerate(self.rows):
            body += [r"\midrule"] * (index in self.sections) + _latex_lines(row)
        caption = caption or self.title
        return "\n".join(
            [r"\begin{table}", r"\centering", *([rf"\caption{{{escape_latex(caption)}}}"] if caption else []),
             r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
             rf"\begin{{tabular}}{{{spec}}}", r"\toprule",
             *_latex_lines([Cell(column.heading, column.detail) for column in self.columns]),
             r"\midrule", *body, r"\bottomrule", r"\end{tabular}}",
             *(rf"\par\footnotesize {escape_latex(note)}" for note in self.notes), r"\end{table}", ""]
        )  # fmt: skip

    def to_html(self) -> "Markup":
        """Return a fragment: a title, a table in a box that scrolls, whose headings sort it, and the notes."""
        from markupsafe import Markup

        sorts = [any(row[i].value is not None for row in self.rows) for i in range(len(self.columns))]
        heads = Markup().join(
            Markup('<th scope="col" class="{}"{}><button type="button">{}</button>{}</th>').format(
                self.align(i), _tooltip(column.meaning), column.heading, _small(column.detail)
            )
            for i, column in enumerate(self.columns)
        )
        body = Markup("\n").join(
            Markup("<tr{}>{}</tr>").format(
                Markup(' class="section"') if index in self.sections else "",
                Markup().join(_html_cell(cell, i, self.align(i), sorts[i]) for i, cell in enumerate(row)),
            )
            for index, row in enumerate(self.rows)
        )
        notes = Markup().join(Markup("<li>{}</li>").format(note) for note in self.notes)
        return Markup(
            '{}<div class="box"><div class="scroll" tabindex="0" role="region" aria-label="{}">\n'
            '<table class="sortable"><thead><tr>{}</tr></thead>\n<tbody>\n{}\n</tbody></table></div></div>{}'
        ).format(
            Markup("<h3>{}</h3>\n").format(self.title) if self.title else "",
            self.title or "table",
            heads,
            body,
            Markup('\n<ul class="small">{}</ul>').format(notes) if notes else "",
        )

    def to_json(self, values: bool = True) -> dict[str, Any]:
        """Return title, headings, rows of text, and as "values" the same rows as numbers, null where there is none."""
        table: dict[str, Any] = {
            "title": self.title,
            "headings": [column.heading for column in self.columns],
            "rows": [[cell.flat for cell in row] for row in self.rows],
        }
        return table | {"values": [[_plain(cell.value) for cell in row] for row in self.rows]} if values else table

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        from recsys.report.terminal import draw_table

        yield from draw_table(self, options.max_width)


def _plain(value: float | str | None) -> float | str | None:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _markdown_cell(cell: Cell) -> str:
    text, detail = escape_markdown(cell.text), escape_markdown(f" ({cell.detail})" if cell.detail else "")
    text = f"**{text}**" if cell.emphasis == "bold" and text else text
    return (f"[{text}]({quote(cell.link, safe=_LINK_LETTERS)})" if cell.link else text) + detail


def _latex_lines(row: Sequence[Cell]) -> list[str]:
    """Return the row, and under it in small print what its cells say beside: in one line it would be too wide."""
    texts = [escape_latex(cell.text) for cell in row]
    texts = [rf"\textbf{{{t}}}" if cell.emphasis == "bold" else t for t, cell in zip(texts, row, strict=True)]
    line = " & ".join(texts) + r" \\"
    if line.startswith(("[", "*")):  # LaTeX would take it for an option of the line before
        line = "{}" + line
    if not any(cell.detail for cell in row):
        return [line]
    details = (rf"\scriptsize {escape_latex(cell.detail)}" if cell.detail else "" for cell in row)
    return [line + "[-3pt]", " & ".join(details) + r" \\", r"\addlinespace[2pt]"]


def _tooltip(meaning: str) -> "Markup":
    from markupsafe import Markup

    return Markup(' title="{}"').format(meaning) if meaning else Markup()


def _small(detail: str) -> "Markup":
    from markupsafe import Markup

    long = Markup(' class="long"') if len(detail) > _LONG else ""
    return Markup("<small{}>{}</small>").format(long, detail) if detail else Markup()


def _html_cell(cell: Cell, index: int, align: str, has_values: bool) -> "Markup":
    """Return a cell sorted by its value, or by its text in a column without values; "" stands last either way."""
    from markupsafe import Markup, escape

    key = cell.value if has_values else "" if cell.text == MISSING else cell.text
    if isinstance(key, float) and not math.isfinite(key):
        key = "Infinity" if key == math.inf else ""
    text = escape(cell.text)
    if cell.link and urlsplit(cell.link).scheme in _LINK_SCHEMES:  # a name must not become a script
        text = Markup('<a href="{}">{}</a>').format(cell.link, text)
    swatch = Markup(
        '<svg class="swatch" viewBox="0 0 22 12" aria-hidden="true">'
        '<path d="M0 6h22" stroke="{}" stroke-width="3" stroke-dasharray="{}"/></svg>'
    )
    return Markup('<{} class="{}"{} data-sort="{}">{}{}{}</{}>').format(
        Markup("td" if index else 'th scope="row"'),
        " ".join(filter(None, (align, cell.emphasis, "long" * (len(cell.text) > _LONG)))),
        _tooltip(cell.meaning),
        "" if key is None else key,
        swatch.format(cell.style.colour, cell.style.stroke) if cell.style else "",
        text,
        _small(cell.detail),
        Markup("td" if index else "th"),
    )
