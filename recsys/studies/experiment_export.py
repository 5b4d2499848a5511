"""An experiment's tables in Markdown, LaTeX and JSON."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from recsys.report.table import Cell
from recsys.studies.experiment_figures import GroupFigures
from recsys.studies.experiment_tables import ExperimentTables, Table

JSON_VERSION = 1


def _flat(cell: Cell) -> str:
    return cell.text + (f" ({cell.detail})" if cell.detail else "")


def to_markdown(found: ExperimentTables) -> str:
    lines = [f"# {found.results.experiment.title}", ""]
    for table in found.tables:
        lines += [
            f"**{table.title}**",
            "",
            _row(table.headings),
            _row(["---", *(["---:"] * (len(table.headings) - 1))]),
        ]
        lines += [*(_row([_flat(cell) for cell in row]) for row in table.rows), ""]
    lines += [f"- {note}" for note in (*found.notes, *found.caveats)]
    return "\n".join([*lines, *(f"- Failed: {failure}" for failure in found.failures)]) + "\n"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def to_latex(found: ExperimentTables) -> str:
    """The paper-shaped tables, for \\usepackage{booktabs,graphicx}; what is wider than a line is scaled down to it."""
    return "\n".join(_latex_table(table, found.results.experiment.title) for table in found.paper)


def _latex_table(table: Table, title: str) -> str:
    body = [line for row in table.rows for line in _latex_lines(row)]
    head = " & ".join(_escape_latex(heading) for heading in table.headings) + r" \\"
    columns = "l" + "r" * (len(table.headings) - 1)
    caption = rf"\caption{{{_escape_latex(f'{title}. {table.title}')}}}"
    return "\n".join(
        [r"\begin{table}", r"\centering", caption, r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
         rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}}",
         r"\end{table}", ""]
    )  # fmt: skip


def _latex_lines(row: Sequence[Cell]) -> list[str]:
    """The row, and under it in small print what its cells say beside: side by side they are wider than a page."""
    first = " & ".join(_escape_latex(cell.text) for cell in row) + r" \\"
    if not any(cell.detail for cell in row):
        return [first]
    details = (rf"\scriptsize {_escape_latex(cell.detail)}" if cell.detail else "" for cell in row)
    return [first + "[-3pt]", " & ".join(details) + r" \\", r"\addlinespace[2pt]"]


_LATEX = {"×": r"$\times$", "±": r"$\pm$", "−": r"$-$", "–": "--", "ε": r"$\varepsilon$", "·": r"$\cdot$"}
_LATEX |= {c: rf"\{c}" for c in "&%$#_{}"} | {"~": r"\textasciitilde{}", "^": r"\^{}", "\\": r"\textbackslash{}"}


def _escape_latex(text: str) -> str:
    return re.sub("|".join(map(re.escape, _LATEX)), lambda found: _LATEX[found[0]], text)


def to_json(found: ExperimentTables) -> dict[str, Any]:
    """Every figure as numbers, and the tables as text."""

    def plain(group: GroupFigures) -> dict[str, Any]:
        names = ("setting", "architecture", "method", "compression", "asked", "parameters", "learning_rate", "target")
        names += ("best_epoch", "epochs_to_target", "step_ms", "relative_time", "budget_s", "tuning_seconds")
        nested = ("auc", "log_loss", "arrival", "equal_time_auc", "difference")
        values = {name: getattr(group, name) for name in names} | {"problems": list(group.problems)}
        values |= {name: (v := getattr(group, name)) and dataclasses.asdict(v) for name in nested}
        return values | {"runs": len(group.runs), "verdict": group.judge(found.results.experiment.epsilon)}

    tables = [
        {"title": t.title, "headings": list(t.headings), "rows": [[_flat(c) for c in row] for row in t.rows]}
        for t in found.tables
    ]
    return {
        "version": JSON_VERSION,
        "title": found.results.experiment.title,
        "facts": dict(found.results.facts),
        "groups": [plain(group) for group in found.groups],
        "tables": tables,
        "notes": [*found.notes, *found.caveats],
        "failures": list(found.failures),
    }
