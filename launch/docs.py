"""Write the tables of README.md and docs/ from stored results, so that text and figures cannot part.

A document says where a table stands:

    <!-- result: table1 -->
    (written by this command: the table, and when, where and by what it was measured)
    <!-- end of result -->

docs/results/table1.json holds the figures as a command's --json or a table's `to_json` gives them, and as "measured"
date, commit, command, hardware and packages. With --check nothing is written, and a document that differs is a failure.
"""

import json
import re
from pathlib import Path
from typing import Any

import click

from launch import cli

ROOT = Path(__file__).resolve().parent.parent
_PLACE = re.compile(r"(<!-- result: (?P<name>[\w-]+) -->\n).*?(<!-- end of result -->)", re.DOTALL)


def render_result(result: dict[str, Any]) -> str:
    """Return a stored result as Markdown: its table, and a line that says how it was measured."""
    from recsys.report.table import Table

    table, measured = result["table"], result["measured"]
    told = [f"Measured on {measured['date']}"]
    told += [f"on {measured['hardware']}"] if measured["hardware"] else []
    told += [measured["packages"]] if measured["packages"] else []
    told += [f"commit {measured['commit']}"] if measured["commit"] else []
    text = Table(table["headings"], table["rows"]).to_markdown()
    return f"{text}\n\n{', '.join(told)}, by `{measured['command']}`.\n"


def fill_document(text: str, results: Path) -> str:
    """Return the document with every marked place filled. Raises ValueError naming a result that is not stored."""

    def fill(place: re.Match[str]) -> str:
        """Return a marked place with its table."""
        path = results / f"{place['name']}.json"
        if not path.is_file():
            raise ValueError(f"result: {place['name']}: there is no {path.name} in {results}")
        return f"{place[1]}{render_result(json.loads(path.read_text()))}{place[3]}"

    return _PLACE.sub(fill, text)


def find_documents(root: Path) -> list[Path]:
    """Return README.md and the documents of docs/."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


@cli.command("docs", __doc__, summary="Write tables of README and docs from stored results.", examples=["", "--check"])
@click.option("--check", is_flag=True, help="Fail where a document differs from its results; write nothing.")
def main(check: bool) -> int:
    """Fill every document, or with --check list those that differ from their results."""
    stale = []
    for path in find_documents(ROOT):
        text = path.read_text()
        with cli.mistakes():
            filled = fill_document(text, ROOT / "docs" / "results")
        if filled == text:
            continue
        stale.append(path.relative_to(ROOT))
        if not check:
            path.write_text(filled)
    for path in stale:
        print(f"{path} {'differs from docs/results: run `make docs`' if check else 'written'}")
    return cli.EXIT_FAILED if check and stale else 0


if __name__ == "__main__":
    main()
