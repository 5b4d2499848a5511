"""Tables on a terminal: as many pieces as its width needs, and nothing cut off.

A figure stays on one line. Headings, small print and long text are folded; what still does not fit goes into the next
piece, which repeats the pinned columns and says in its title which piece it is.
"""

from collections.abc import Iterator, Sequence
from typing import cast

from rich import box
from rich.cells import cell_len
from rich.console import Console, JustifyMethod, RenderableType
from rich.style import Style
from rich.table import Table as Grid
from rich.text import Text

from recsys.report.escape import printable
from recsys.report.table import Cell, Table

_STYLES = {"": "", "bold": "bold", "better": "green", "worse": "red", "quiet": "dim", "warning": "yellow"}
_WIDEST_TEXT, _WIDEST_DETAIL, _WIDEST_HEADING = 40, 20, 14
_GAP, _COMPACT_GAP = 3, 1


def open_console(pipe_width: int = 120) -> Console:
    """Return rich's console on stdout, `pipe_width` wide where it is no terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=pipe_width)


def draw_table(table: Table, width: int) -> Iterator[RenderableType]:
    """Yield what rich prints: the table in pieces of at most `width` letters, and its notes."""
    pieces = _fit(table, width)
    for number, (piece, widths) in enumerate(pieces, 1):
        sign = f"({number} of {len(pieces)})" if len(pieces) > 1 else ""
        if title := " ".join(filter(None, (table.title, sign))):
            yield Text(printable(title), "bold")  # rich would fold a title to the width of its table
        yield _grid(piece, widths)
    for note in table.notes:
        yield Text(printable(note))


def _text(cell: Cell, is_compact: bool) -> Text:
    style = Style.parse(_STYLES[cell.emphasis]) + Style(link=printable(cell.link) or None)
    text = Text(printable(cell.text), style)
    return text.append((" " if is_compact else "\n") + printable(cell.detail), "dim") if cell.detail else text


def _widths(table: Table, index: int) -> tuple[int, int]:
    """Return what a column needs, figures on one line and text on a few, and what it could use, in letters."""

    def measure(text: str, most: int) -> tuple[int, int]:
        lengths, words = [cell_len(line) for line in text.split("\n")], [cell_len(word) for word in text.split()]
        return max(min(max(lengths), most), min(max(words, default=0), _WIDEST_TEXT)), max(lengths)

    column = table.columns[index]
    sizes = [measure(column.heading, _WIDEST_HEADING), measure(column.detail, _WIDEST_DETAIL)]
    for row in table.rows:
        cell = row[index]
        beside = f"{cell.text} {cell.detail}" if table.is_compact and cell.detail else ""
        sizes += [measure(beside or cell.text, _WIDEST_TEXT), measure("" if beside else cell.detail, _WIDEST_DETAIL)]
    return max(1, *(least for least, _ in sizes)), max(most for _, most in sizes)


def _fit(table: Table, width: int) -> list[tuple[Table, list[int]]]:
    """Return pieces no wider than `width`, each with the widths of its columns."""
    sizes = [_widths(table, i) for i in range(len(table.columns))]
    gap = _COMPACT_GAP if table.is_compact else _GAP
    pinned = list(range(min(table.pinned, len(sizes))))
    widest = max((least for least, _ in sizes[len(pinned) :]), default=0)
    if sum(sizes[i][0] + gap for i in pinned) + widest > width:
        pinned = pinned[:1]
    groups, others = [[*pinned]], range(len(pinned), len(sizes))
    for i in others:
        taken = sum(sizes[j][0] + gap for j in groups[-1])
        if taken + sizes[i][0] > width and len(groups[-1]) > len(pinned):
            groups.append([*pinned])
        groups[-1].append(i)
    pieces = []
    for group in groups:
        widths, room = [sizes[i][0] for i in group], width - gap * (len(group) - 1)
        if sum(widths) > room:  # one column beside the names, and too wide: both are folded
            first = min(widths[0], max(1, room // 2)) if len(widths) > 1 else room
            widths = [first, *(max(1, room - first) for _ in widths[1:])]
        while wanting := [n for n, i in enumerate(group) if widths[n] < sizes[i][1]][: max(0, room - sum(widths))]:
            for place in wanting:  # what is left is shared by those whose text would use it
                widths[place] += 1
        pieces.append((table.take(group), widths))
    return pieces


def _grid(table: Table, widths: Sequence[int]) -> Grid:
    padding = (0, 0 if table.is_compact else 1)
    grid = Grid(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=padding)
    for i, (column, width) in enumerate(zip(table.columns, widths, strict=True)):
        heading = _text(Cell(column.heading, column.detail), False)
        grid.add_column(heading, justify=cast(JustifyMethod, table.align(i)), overflow="fold", width=width)
    for index, row in enumerate(table.rows):
        grid.add_row(*(_text(cell, table.is_compact) for cell in row), end_section=index + 1 in table.sections)
    return grid
