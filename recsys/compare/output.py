"""A comparison on the terminal and in Markdown: what the page shows, without its plots."""

from rich.padding import Padding
from rich.text import Text

from recsys.compare.comparison import Comparison
from recsys.compare.outcome import UNFAIR, build_outcome
from recsys.compare.table import build_table
from recsys.report.escape import printable
from recsys.report.terminal import open_console

_ARMS_PER_TABLE = 5


def format_document(comparison: Comparison) -> str:
    """Return the table in Markdown, figures downwards and a few arms sideways, and below it what it does not say."""
    parts = [f"**{UNFAIR}**"] if comparison.differences else []
    parts += [piece.to_markdown() for piece in build_table(comparison).transposed().split(_ARMS_PER_TABLE)]
    parts += ["\n".join(f"- {line}" for line in block) for block in build_outcome(comparison).blocks]
    return "\n\n".join(parts)


def print_comparison(comparison: Comparison) -> None:
    """Print the table, figures downwards and arms sideways, the baseline beside each, and what it does not say."""
    console, outcome = open_console(), build_outcome(comparison)
    if comparison.differences:
        console.print(Text(UNFAIR, "bold red"))
    console.print(build_table(comparison).transposed(pinned=2))
    for block in outcome.blocks:
        console.print()
        for line in block:
            console.print(Padding(Text(printable(line)), (0, 0, 0, 2)), style="yellow" * (line in outcome.warnings))
