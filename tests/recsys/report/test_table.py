"""One table in five renderings: nothing lost, nothing taken for markup, sorted and split as a reader expects."""

import doctest
import io
import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.cells import cell_len
from rich.console import Console

from recsys.report import escape, palette, table
from recsys.report.escape import escape_latex, escape_markdown, escape_plotly, printable
from recsys.report.numbers import three_digits
from recsys.report.palette import Style
from recsys.report.table import Cell, Column, Table

LETTERS = [
    *"aZ09 -,.:;()+'",
    "--json",
    "my_name",
    "x_",
    "<b>",
    "</td>",
    "&amp;",
    "http",
    "[a](b)",
    "![i]",
    "`",
    '"',
    "é",
]
SPECIAL = [*"|\\*_<>~&%$#{}^[]=!×±−–ε·≤√μ²"]
TEXTS = st.lists(st.sampled_from(LETTERS + SPECIAL), min_size=1, max_size=12).map("".join).map(str.strip)
TEXTS = TEXTS.filter(bool).map(lambda text: " ".join(text.split()))


@pytest.mark.parametrize("module", [table, escape, palette])
def test_the_examples_of_the_docstrings_hold(module):
    result = doctest.testmod(module)
    assert result.attempted
    assert result.failed == 0


def printed(what, width=200):
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(what)
    return console.file.getvalue()


def markdown_cells(text):
    """Rows of cells as a reader sees them."""
    tokens = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(text)
    rows = []
    for token in tokens:
        if token.type == "tr_open":
            rows.append([])
        if token.type == "inline" and rows:
            kinds = {child.type for child in token.children}
            assert kinds <= {"text", "text_special", "softbreak"}, (text, kinds)
            rows[-1].append("".join(child.content for child in token.children))
    return rows


class Reader(HTMLParser):
    """Tags, attributes, and the text of every cell."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.sorts, self.texts, self.attributes = [], [], [], []
        self.feed(str(html))

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag in ("th", "td"):
            self.texts.append("")
            self.sorts.append(dict(attributes).get("data-sort"))

    def handle_data(self, data):
        if self.texts and data.strip():
            self.texts[-1] += data


def read_latex(text):
    """What LaTeX would set, by rules of its own; fails on a special character that is none of ours."""
    commands = {r"\textbackslash{}": "\\", r"\textasciitilde{}": "~", r"\^{}": "^", "--": "–", "-{}": "-", "--{}": "–"}
    commands |= {rf"\{c}": c for c in "&%$#_{}"}
    commands |= {"$-$": "−", r"$\times$": "×", r"$\pm$": "±", r"$\varepsilon$": "ε", r"$\cdot$": "·", r"$\leq$": "≤",
                 r"$\surd$": "√", r"$\mu$": "μ", "$^2$": "²", "$<$": "<", "$>$": ">", "$|$": "|"}  # fmt: skip
    pattern = "|".join(map(re.escape, sorted(commands, key=len, reverse=True)))
    return re.sub(rf"({pattern})|([\\&%$#_{{}}~^<>|])", lambda m: commands[m[1]], text)


@given(TEXTS)
def test_markdown_shows_every_text_as_it_is(text):
    shown = Table(["a", text], [[text, Cell("x", text)]]).to_markdown()
    assert markdown_cells(shown) == [["a", text], [text, f"x ({text})"]]


@given(TEXTS)
def test_latex_sets_every_text_as_it_is(text):
    assert read_latex(escape_latex(text)) == text


@given(TEXTS)
def test_html_shows_every_text_as_it_is(text):
    cell = Cell(text, text, value=text, meaning=text)
    plain = Table([Column("a", "a", detail="a")], [[Cell("a", "a", "a", meaning="a")]], title="a", notes=["a"])
    shown = Table([Column(text, text, detail=text)], [[cell]], title=text, notes=[text]).to_html()
    found = Reader(shown)
    assert found.tags == Reader(plain.to_html()).tags
    assert found.texts[0] == text * 2
    assert found.texts[1].startswith(text * 2)
    assert found.sorts[1] == text
    assert [value for name, value in found.attributes if name in ("title", "aria-label")] == [text] * 3


@given(TEXTS)
def test_a_terminal_shows_every_text_as_it_is(text):
    assert text in printed(Table(["a", text], [["x", text]]))
    assert text in printed(Table(["a"], [["x"]], title=text, notes=[text])).splitlines()


def test_control_characters_reach_no_rendering():
    bad = Table(["a\x1b[31m"], [["b\x1b]8;;evil\x07"]], title="c\x9b", notes=["d\r"])
    for shown in (printed(bad), bad.to_markdown(), bad.to_latex()):
        assert not set(shown) & set("\x1b\x07\x9b\r")
    assert printable("two\nlines") == "two\nlines"


def test_lines_within_a_cell_stay_lines():
    two = Table(["a"], [["x & y\nz"]])
    assert "x & y<br>z" in two.to_markdown()
    assert r"\shortstack{x \& y \\ z}" in two.to_latex()
    assert [line.strip() for line in printed(two).splitlines()][-2:] == ["x & y", "z"]


def test_plotly_labels_are_escaped():
    assert escape_plotly("<b>&") == "&lt;b&gt;&amp;"


@given(st.lists(st.lists(st.one_of(st.none(), st.floats(), st.integers(), TEXTS), min_size=3, max_size=3), max_size=4))
def test_json_can_be_read_back(rows):
    cells = [[value if isinstance(value, str) else Cell.of(value, str, "small") for value in row] for row in rows]
    found = Table(["a", "b", "c"], cells, title="t").to_json()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    for row, texts, values in zip(rows, found["rows"], found["values"], strict=True):
        for value, text, number in zip(row, texts, values, strict=True):
            is_number = isinstance(value, int | float) and math.isfinite(value)
            assert number == (value if is_number else None)
            assert text == (value if isinstance(value, str) else f"{'–' if value is None else value} (small)")


def test_json_has_no_values_where_none_are_asked_for():
    assert Table(["a"], [[1]], title="t").to_json(values=False) == {"title": "t", "headings": ["a"], "rows": [["1"]]}


TOKENS = st.tuples(st.integers(2, 9), st.integers(1, 4), st.integers(1, 2), st.booleans(), st.integers(20, 160))


@given(TOKENS)
def test_pieces_fit_the_width_and_lose_nothing(sizes):
    columns, rows, pinned, is_compact, width = sizes
    names = [f"h{i}h" for i in range(columns)]
    cells = [[Cell(f"f{r}{c}f", f"small print {r}{c}s") for c in range(columns)] for r in range(rows)]
    lines = printed(Table(names, cells, title="T", pinned=pinned, is_compact=is_compact), width).splitlines()
    assert all(cell_len(line) <= width for line in lines)
    text = "\n".join(lines)
    pieces = text.count("h0h")
    for c in range(columns):
        repeats = pieces if c == 0 else text.count("h1h") if c == 1 and pinned == 2 else 1
        assert text.count(names[c]) == repeats
        assert all(text.count(f"f{r}{c}f") == repeats for r in range(rows))
        assert all(text.count(f"{r}{c}s") == repeats for r in range(rows))
    signs = [f"T ({i} of {pieces})" for i in range(1, pieces + 1)] if pieces > 1 else ["T"]
    assert [line.strip() for line in lines if line.startswith("T")] == signs


def test_a_baseline_stands_in_every_piece():
    names = ["full", *(f"robe {i}×" for i in range(8))]
    arms = Table(["", "AUC"], [[name, "0.7598 ± 0.0019"] for name in names]).transposed(pinned=2)
    heads = [line for line in printed(arms, 80).splitlines() if "robe" in line]
    assert len(heads) > 1
    assert all(head.split()[0] == "full" for head in heads)
    assert " ".join(heads).count("robe") == 8


def test_a_figure_is_not_folded_where_a_piece_can_hold_it():
    wide = Table(
        ["name"] + ["figure"] * 5, [["a name of several words, which may be folded"] + ["0.7598 ± 0.0019"] * 5]
    )
    assert printed(wide, 60).count("0.7598 ± 0.0019") == 5


def test_a_baseline_is_not_repeated_where_it_would_leave_no_room():
    two = Table(["name", "first figure", "other figure"], [["a", "0.7598 ± 0.0019", "0.7601 ± 0.0018"]], pinned=2)
    assert printed(two, 36).count("0.7598") == 1
    text = printed(two, 30)
    assert text.count("0.7598 ± 0.0019") == text.count("0.7601 ± 0.0018") == 1


def test_a_width_too_small_for_two_columns_folds_and_cuts_nothing():
    text = printed(Table(["name", "figure"], [["abcdefghijklmnop", "0123456789"]]), 9)
    assert all(cell_len(line) <= 9 for line in text.splitlines())
    letters = re.sub(r"\W|_", "", text)
    assert sorted(letters) == sorted("namefigureabcdefghijklmnop0123456789")


def test_small_print_stands_below_or_beside():
    below = Table(["a", "b"], [["x", Cell("1.0", "0.9–1.1")]])
    assert "1.0 0.9–1.1" not in printed(below)
    assert "1.0 0.9–1.1" in printed(replace(below, is_compact=True))


SAMPLE = Table(
    ["method", Column("AUC", unit="test"), Column("note", align="left")],
    [
        ["full", Cell("0.75 ± 0.01", "n = 3", 0.75), "50 %"],
        [Cell("robe_1", emphasis="bold"), Cell("–", "paper 0.74"), Cell("worse", emphasis="worse")],
    ],
    title="Table 4 · ε",
    sections=[1],
)


def test_markdown_is_githubs():
    assert SAMPLE.to_markdown() == (
        "**Table 4 · ε**\n\n"
        "| method | AUC, test | note |\n"
        "| --- | ---: | --- |\n"
        "| full | 0.75 ± 0.01 (n = 3) | 50 % |\n"
        "| **robe_1** | – (paper 0.74) | worse |"
    )
    assert (
        replace(SAMPLE, title="", rows=SAMPLE.rows[:1], notes=["a", "b"]).to_markdown().endswith("| 50 % |\n\n- a\n- b")
    )


def test_latex_is_booktabs_with_small_print_below():
    assert SAMPLE.to_latex("A paper. Table 4") == "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            r"\caption{A paper. Table 4}",
            r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
            r"\begin{tabular}{lrl}",
            r"\toprule",
            r"method & AUC, test & note \\",
            r"\midrule",
            r"full & 0.75 $\pm$ 0.01 & 50 \% \\[-3pt]",
            r" & \scriptsize n = 3 &  \\",
            r"\addlinespace[2pt]",
            r"\midrule",
            r"\textbf{robe\_1} & -- & worse \\[-3pt]",
            r" & \scriptsize paper 0.74 &  \\",
            r"\addlinespace[2pt]",
            r"\bottomrule",
            r"\end{tabular}}",
            r"\end{table}",
            "",
        ]
    )
    assert r"\caption{Table 4 $\cdot$ $\varepsilon$}" in SAMPLE.to_latex()
    assert r"\par\footnotesize 5 \%" in replace(SAMPLE, notes=["5 %"]).to_latex()


def test_latex_takes_no_bracket_for_an_option():
    assert "\n{}[0, 1] \\\\" in Table(["[a"], [["[0, 1]"], ["*"]]).to_latex()
    assert not re.search(r"\n[\[*]", Table(["[a"], [["[0, 1]"], ["*"]]).to_latex())


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="no pdflatex here")
def test_latex_compiles(tmp_path):
    every = "".join(SPECIAL) + "–…αβγδελμρσ≥≈→∞★³"
    hard = Table(["[a", every], [["[0, 1]", Cell(every, every, emphasis="bold")], ["*", "two\nlines"]], title=every)
    body = "\n".join([SAMPLE.to_latex(), replace(hard, sections=[1], notes=[every]).to_latex()])
    head = "\\documentclass{article}\\usepackage{booktabs,graphicx}\\begin{document}\n"
    (tmp_path / "t.tex").write_text(f"{head}{body}\\end{{document}}\n")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "Overfull" not in done.stdout


def test_html_sorts_by_numbers_and_by_words_where_there_are_none():
    cells = [["b", Cell("1.5 k", value=1500), "x"], ["a", Cell("never", value=math.inf), "–"], ["c", "–", "y"]]
    found = Reader(Table(["name", "number", "word"], cells).to_html())
    assert found.sorts[3:] == ["b", "1500", "x", "a", "Infinity", "", "c", "", "y"]
    assert Reader(Table(["n"], [[Cell("?", value=math.nan)]]).to_html()).sorts[1:] == [""]


def test_html_says_alignment_emphasis_sections_and_meaning():
    shown = Table(
        ["a", Column("b", "what b means", align="left")],
        [["x", Cell("1", emphasis="better")], ["y", Cell("2", meaning="why", style=Style("#d55e00", "dash"))]],
        sections=[1],
    ).to_html()
    assert '<th scope="col" class="left" title="what b means"><button type="button">b</button></th>' in shown
    assert '<td class="left better" data-sort="1">1</td>' in shown
    assert '<tr class="section"><th scope="row" class="left" data-sort="y">y</th>' in shown
    assert 'title="why"' in shown
    assert 'stroke="#d55e00" stroke-width="3" stroke-dasharray="6 3"' in shown


def test_links_are_links_and_never_scripts():
    def html(link):
        return Table(["a"], [[Cell("x", link=link)]]).to_html()

    assert '<a href="runs/a%20b?&amp;x">x</a>' in html("runs/a%20b?&x")
    assert '<a href="https://x.org/#y">x</a>' in html("https://x.org/#y")
    for link in ("javascript:alert(1)", "JavaScript:alert(1)", "data:text/html,x", "java\nscript:alert(1)"):
        assert "<a" not in html(link)
    table = Table(["a"], [[Cell("x|y", "small", link="a (b)|c")]])
    assert r"[x\|y](a%20%28b%29%7Cc) (small)" in table.to_markdown()


def test_columns_take_their_figures_from_items():
    columns = [
        Column("name", cell=lambda i: i[0]),
        Column("ms", "time", lambda i: Cell.of(i[1], three_digits, "small", "better"), unit="s"),
        Column("n", cell=lambda i: 1200),
        Column("x", cell=lambda i: 0.25),
    ]
    items = [("a", 1.0), ("a", None), ("b", 3.0)]
    found = Table.of(items, columns, section=lambda i: i[0], title="t")
    assert [[cell.text for cell in row] for row in found.rows][:2] == [
        ["a", "1.00", "1,200", "0.25"],
        ["a", "–", "1,200", "0.25"],
    ]
    assert found.rows[0][1] == Cell("1.00", "small", 1.0, "better")
    assert found.rows[1][1] == Cell("–", "small")
    assert (found.sections, found.title, found.columns[1].heading) == ((2,), "t", "ms, s")


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="table 'T', row 1: 1 cells under 2 columns"):
        Table(["a", "b"], [["x", "y"], ["z"]], title="T")


def test_figures_downwards_keep_headings_states_and_meanings():
    columns = [Column("arm"), Column("step", "how", unit="ms"), Column("AUC")]
    found = Table(columns, [[Cell("full", "killed"), "8", "0.7"], ["robe", "4", "0.6"]]).transposed()
    assert found.to_markdown().splitlines() == [
        "|  | full (killed) | robe |", "| --- | ---: | ---: |", "| step, ms | 8 | 4 |", "| AUC | 0.7 | 0.6 |",
    ]  # fmt: skip
    assert found.rows[0][0].meaning == "how"


def test_pieces_of_a_few_columns():
    wide = Table(["n", *"abcde"], [["x", *"12345"]])
    assert [[c.title for c in piece.columns] for piece in wide.split(2)] == [
        ["n", "a", "b"], ["n", "c", "d"], ["n", "e"],
    ]  # fmt: skip
    assert [[c.title for c in piece.columns] for piece in replace(wide, pinned=2).split(3)] == [
        ["n", "a", "b", "c", "d"], ["n", "a", "e"],
    ]  # fmt: skip
    assert [piece.align(1) for piece in wide.split(2)] == ["right"] * 3
    assert len(Table(["n"], [["x"]]).split(2)) == 1


def test_escaping_markdown_leaves_common_names_alone():
    assert escape_markdown("hashed_net 1,000× [−0.1, +0.2] 5 % (n = 3)") == "hashed_net 1,000× [−0.1, +0.2] 5 % (n = 3)"
