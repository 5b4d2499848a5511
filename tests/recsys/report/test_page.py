"""The page of sections: whole, self-contained and safe, and usable in a browser at any width."""

import doctest
import json
import time
from html.parser import HTMLParser

import pytest
from markupsafe import Markup

from recsys.report import page as page_module
from recsys.report.page import (
    Code,
    Controls,
    Details,
    Grid,
    Lines,
    Notice,
    Page,
    Pairs,
    Plot,
    Section,
    Terms,
    meanings_of,
)  # fmt: skip
from recsys.report.palette import BASELINE, COLOURS, choose_style
from recsys.report.table import Cell, Column, Table
from tests.browser import needs_chromium, open_browser

HOSTILE = "</script><img src=x onerror=alert(1)>&amp;\"'"
NAMES = ["full", "robe"]
STYLES = [BASELINE, choose_style(0)]
MAIN_PARTS = 2  # plotly.js aside: the data of plots, and the page's own script


def draw(height, of_arms=True):
    """A line an arm, at another height for each figure."""
    lines = [{"type": "scatter", "name": name, "x": [1, 2], "y": [height, height]} for name in NAMES]
    if of_arms:
        lines = [line | {"meta": {"arm": i}} for i, line in enumerate(lines)]
    return {"data": lines, "layout": {"xaxis": {"title": {"text": "x"}}, "yaxis": {}}}


def build(text="word", **more):
    """A page with every kind of block, all of them saying `text`."""
    columns = [Column(text, text), *(Column(f"{text} {i}", unit="ms") for i in range(20))]
    rows = [
        [Cell(text, text, style=STYLES[1]), *(Cell(str(n), "small", n) for n in range(20))],
        [Cell("a", "first", style=STYLES[0]), *(Cell("–") for _ in range(20))],
        [Cell("b"), *(Cell(str(100 + n), "", 100 + n) for n in range(20))],
    ]
    both = Plot("both", text, text, {"validation": draw(1), "test": draw(2)})
    menus = {("a", "x"): draw(4, False), ("a", "y"): draw(5, False), ("b", "y"): draw(6, False)}
    sections = [
        Section("", [text, Lines([text], STYLES), Lines([text]), Notice(text, [text]), Notice("never shown", [])]),
        Section(text, [Table(columns, rows, title=text, notes=[text]), Table(["c"], [["d"]])], tags=["measured", text]),
        Section("Plots", [
            Controls(list(zip(NAMES, STYLES, strict=True)), ["validation", "test"]),
            Grid([both, Plot("one", "", "", {"": draw(3)}, is_wide=True)], 3),
            Plot("menus", text, text, menus, first=("a", "y")),
        ]),
        Section("More", [
            Details(text, [text, Plot("folded", text, text, {text: draw(7)})]), Code(text), Terms([(text, text)]),
            Pairs({text: text, "lines": [Cell(text, text), "second"], "none": None, "count": 1200}),
        ]),
    ]  # fmt: skip
    return Page(text, text, sections, kicker=text, origin=text, **more)


class Reader(HTMLParser):
    """Tags, scripts apart, and the text beside them."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.scripts, self.text = [("", {})], [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        where = self.tags[-1][0]
        if where == "script":
            self.scripts.append(data)
        elif where != "style":
            self.text += data


@pytest.fixture(scope="module")
def shown():
    return Reader(build().render())


def test_the_example_of_the_docstring_holds():
    assert doctest.testmod(page_module).failed == 0


def test_fetches_nothing(shown):
    for tag, attributes in shown.tags:
        assert "src" not in attributes
        assert tag != "link" or attributes["href"] == "data:,"
        assert tag != "a" or attributes["href"].startswith("#")
    assert all("http" not in script for script in [s for s in shown.scripts if s.strip()][-MAIN_PARTS:])
    (policy,) = [a["content"] for tag, a in shown.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")


def test_shows_every_block(shown):
    ids = [a["id"] for _, a in shown.tags if "id" in a]
    assert {"plot-both", "plot-one", "plot-menus", "plot-folded"} <= set(ids)
    assert len(ids) == len(set(ids))
    for piece in ("first", "second", "1,200", "What the columns mean", "validation", "Plots", "measured"):
        assert piece in shown.text
    assert shown.text.count("What the columns mean") == 1
    assert "never shown" not in shown.text


def test_text_is_shown_as_it_is_everywhere():
    plain, hostile = Reader(build().render()), Reader(build(HOSTILE).render())
    assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in plain.tags]
    assert hostile.text.count(HOSTILE) == plain.text.count("word")
    (data,) = [script for script in hostile.scripts if script.startswith("[")]
    assert "<" not in data
    assert {plot["title"] for plot in json.loads(data)} == {HOSTILE, ""}


def test_markup_stays_markup():
    html = Page("t", "a", [Section("s", [Markup("run <code>{}</code>").format("<x>")])]).render()
    assert "<p>run <code>&lt;x&gt;</code></p>" in html


def test_plots_of_the_same_id_are_refused():
    plot = Plot("same", "", "", {"": draw(1)})
    with pytest.raises(ValueError, match="page 't': plots of the same id: same"):
        Page("t", "a", [Section("s", [plot]), Section("r", [Details("d", [Grid([plot])])])])


def test_a_page_without_plots_is_small():
    html = Page("t", "a", [Section("s", [Table(["x"], [["y"]])])]).render()
    assert len(html) < 30_000


def test_an_unfinished_write_leaves_the_old_page(tmp_path):
    path = tmp_path / "deep" / "page.html"
    Page("old", "a", []).write(path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        Page(
            "new", "a", [Section("s", [Plot("p", "", "", {"": {"data": [{"y": [float("nan")]}], "layout": {}}})])]
        ).write(path)
    assert "old" in path.read_text()
    assert [file.name for file in path.parent.iterdir()] == ["page.html"]


def test_meanings_are_terms():
    table = Table([Column("a", "what a is"), Column("b"), Column("c", "what c is", unit="ms")], [])
    assert meanings_of(table).terms == [("a", "what a is"), ("c, ms", "what c is")]


def test_arms_differ_without_colour_once_colours_are_used_up():
    styles = [choose_style(i) for i in range(5 * len(COLOURS))]
    assert len(set(styles)) == len(styles)
    for first in styles[: len(COLOURS)]:
        same = [style for style in styles if style.colour == first.colour]
        assert len({style.dash for style in same}) == len({style.symbol for style in same}) == len(same)


@pytest.fixture(scope="module")
def browser():
    with open_browser() as opened:
        yield opened


def look(browser, tmp_path, width, theme="light"):
    path = tmp_path / "page.html"
    build().write(path)
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=theme)
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("console", lambda message: page.problems.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: None if request.url.startswith("file:") else page.problems.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_selector("#plot-menus .main-svg")
    return page


def wait_until(page, condition, timeout_s=20):
    """Poll from outside: the page's own policy forbids the evaluation that playwright waits with."""
    end = time.monotonic() + timeout_s
    while not page.evaluate(condition):
        assert time.monotonic() < end, f"not after {timeout_s} s: {condition}"
        page.wait_for_timeout(50)


def names_drawn(page, plot):
    return page.evaluate(
        f"document.getElementById('plot-{plot}')._fullData.filter(t => t.visible === true).map(t => t.name)"
    )


def heights_drawn(page, plot):
    return page.evaluate(f"document.getElementById('plot-{plot}')._fullData[0].y[0]")


@needs_chromium
@pytest.mark.slow
class TestInABrowser:
    @pytest.mark.parametrize(("width", "theme"), [(390, "light"), (390, "dark"), (1440, "light"), (1440, "dark")])
    def test_nothing_is_wider_than_the_page(self, browser, tmp_path, width, theme):
        page = look(browser, tmp_path, width, theme)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        ink, ground = page.evaluate(
            "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
        )
        assert (ink == "rgb(229, 230, 227)") == (theme == "dark") != (ground == "rgb(251, 251, 249)")
        assert page.problems == []

    def test_a_wide_table_says_that_there_is_more(self, browser, tmp_path):
        page = look(browser, tmp_path, 390)
        wide, small = page.locator(".box").nth(0), page.locator(".box").nth(1)
        wait_until(page, "document.querySelector('.box.more-right') !== null")
        assert "more-right" not in small.get_attribute("class")
        page.evaluate("document.querySelector('.scroll').scrollLeft = 1e6")
        wait_until(page, "!document.querySelector('.box').classList.contains('more-right')")
        assert wide.locator("tbody th").first.bounding_box()["x"] < 40  # names stay in sight

    def test_headings_sort_and_what_is_missing_stays_last(self, browser, tmp_path):
        page = look(browser, tmp_path, 1440)

        def order():
            return [
                text.split("\n")[0] for text in page.locator(".sortable").first.locator("tbody th").all_inner_texts()
            ]

        head = page.get_by_role("button", name="word 3, ms")
        head.click()
        assert order() == ["word", "b", "a"]
        head.click()
        assert order() == ["b", "word", "a"]
        page.locator(".sortable").first.get_by_role("button", name="word", exact=True).click()
        assert order() == ["a", "b", "word"]

    def test_buttons_hide_arms_and_choose_views_in_all_plots(self, browser, tmp_path):
        page = look(browser, tmp_path, 1440)
        assert names_drawn(page, "both") == names_drawn(page, "one") == NAMES
        page.get_by_role("button", name="robe").click()
        assert names_drawn(page, "both") == names_drawn(page, "one") == ["full"]
        assert names_drawn(page, "menus") == NAMES
        assert heights_drawn(page, "both") == 1
        page.get_by_role("button", name="test", exact=True).click()
        assert heights_drawn(page, "both") == 2

    def test_menus_choose_figures_that_there_are(self, browser, tmp_path):
        page = look(browser, tmp_path, 1440)
        first, second = page.locator("#panel-menus select").nth(0), page.locator("#panel-menus select").nth(1)
        assert heights_drawn(page, "menus") == 5
        second.select_option("x")
        assert heights_drawn(page, "menus") == 4
        first.select_option("b")
        assert heights_drawn(page, "menus") == 6
        assert second.input_value() == "y"

    def test_a_folded_plot_has_its_size_once_it_is_opened(self, browser, tmp_path):
        page = look(browser, tmp_path, 1440)
        page.locator("summary", has_text="word").last.click()
        wait_until(page, "document.querySelector('#plot-folded .main-svg').clientWidth > 1000")
        assert page.evaluate("document.getElementById('plot-menus').layout.legend.orientation") is None
        page.set_viewport_size({"width": 390, "height": 800})
        wait_until(page, "document.querySelector('#plot-menus .main-svg').clientWidth < 390")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        wait_until(page, "document.getElementById('plot-menus').layout.legend.orientation === 'h'")  # above, not beside
        assert page.problems == []
