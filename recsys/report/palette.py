"""The colours, dashes and symbols of all plots and tables: one style an arm, told apart without colour too.

>>> [choose_style(i).dash for i in (0, 1, len(COLOURS))]
['solid', 'solid', 'dash']
"""

from dataclasses import dataclass

BASELINE_COLOUR = "#7a7f87"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1")
"""Okabe and Ito's eight for colour-blind readers, without black (text) and yellow (faint on white), with a violet."""
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
SYMBOLS = ("circle", "square", "diamond", "cross", "triangle-down", "triangle-up", "x", "star", "pentagon")
ORIGIN_COLOURS = {"measured": "#009e73", "emulated": "#e69f00", "published": "#7a7f87", "projected": "#0072b2"}
"""Where a figure comes from, as a tag in words and a colour."""
_STROKES = {"solid": "", "dash": "6 3", "dot": "2 3", "dashdot": "6 2 2 2", "longdash": "9 3"}


@dataclass(frozen=True)
class Style:
    """Describe how an arm is drawn wherever it appears: plotly's words for a line's dash and a marker's symbol."""

    colour: str
    dash: str = "solid"
    symbol: str = "circle"

    @property
    def stroke(self) -> str:
        """Return the dash in SVG's words, "" for a solid line."""
        return _STROKES[self.dash]


BASELINE = Style(BASELINE_COLOUR)


def choose_style(index: int) -> Style:
    """Return the style of the index-th arm beside the baseline: colours first, then these with another dash."""
    again, colour = divmod(index, len(COLOURS))
    return Style(COLOURS[colour], DASHES[again % len(DASHES)], SYMBOLS[again % len(SYMBOLS)])
