"""What all plots share: plotly figures in plain dictionaries.

Colours of text and grid are the page's: they follow the reader's light or dark theme.
"""

from collections.abc import Sequence
from typing import Any

from recsys.report.escape import escape_plotly
from recsys.report.page import Figure


def axis(title: str, **more: Any) -> Figure:
    """Return an axis with its title."""
    return {"title": {"text": title, "standoff": 8}, "automargin": True, **more}


def figure(data: list[Figure], x: Figure, y: Figure, **layout: Any) -> Figure:
    """Return the figure of traces on two axes."""
    return {"data": data, "layout": {"xaxis": x, "yaxis": y, **layout}}


def label_rows(labels: Sequence[str], letters: int = 24) -> tuple[Figure, int]:
    """Return a y axis with one row a label, from the top, and the plot's height; longer labels lose their middle."""
    row_height = 44 if len(labels) <= 8 else 30 if len(labels) <= 24 else 20
    short = [name if len(name) <= letters else f"{name[: letters // 2]}…{name[-letters // 2 :]}" for name in labels]
    rows = axis("", tickvals=list(range(len(labels))), ticktext=[escape_plotly(n) for n in short], showgrid=False)
    rows |= {"range": [len(labels) - 0.5, -0.5], "zeroline": False, "ticks": ""}
    return rows, 90 + row_height * max(2, len(labels))


def rounded(value: float) -> float:
    """Return the value with six digits, all that a plot can show."""
    return float(f"{value:.6g}")
