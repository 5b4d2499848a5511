"""Stacked bars: their parts are the step, each at its place, in one colour, and hidden with its arm."""

from collections import defaultdict

import plotly.graph_objects as go
import pytest

from recsys.compare.comparison import compare
from recsys.compare.time_plots import time_plots
from tests.recsys.report.fake_runs import phases, profiled_rank, profiled_window, write_demo, write_run, write_sweep


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return compare(write_demo(tmp_path_factory.mktemp("demo"), windows=2))


@pytest.fixture
def own_phase(tmp_path):
    """A comparison whose second run alone is profiled, of a model with a phase that no other has."""
    spent = phases({"backward/cross": 2.0, "backward/top_mlp": 1.0, "forward/cross": 3.0, "optimizer": 4.0})
    window = profiled_window(1, [profiled_rank(10.0, phases=spent)])
    plain = write_run(tmp_path, "plain", method="sharded")
    return compare([plain, write_run(tmp_path, "<b>own", compression=10.0, summary={"profiles": [window]})])


def data(comparison, name):
    (plot,) = [plot for plot in time_plots(comparison) if plot.id == name]
    return plot.figures[""]["data"]


def bars(traces):
    """Those of arms, without the entries of the legend."""
    return [trace for trace in traces if trace["type"] == "bar" and trace["meta"]["arm"] is not None]


@pytest.mark.parametrize("name", ["time-parts", "time-phases", "time-ranks"])
def test_the_bars_of_a_row_add_up_to_its_step(demo, name):
    rows = defaultdict(float)
    for bar in bars(data(demo, name)):
        rows[bar["y"][0]] += bar["x"][0]
    times = [arm.profiled for arm in demo.arms]
    steps = (
        [rank.step_ms for t in times for rank in t.ranks] if name == "time-ranks" else [t.mean.step_ms for t in times]
    )
    assert [rows[y] for y in range(len(steps))] == pytest.approx(steps, rel=1e-4)


def test_waiting_is_told_from_transfer(demo):
    widths = {bar["legendgroup"]: bar["x"][0] for bar in bars(data(demo, "time-ranks")) if bar["y"] == [0]}
    assert widths == pytest.approx(
        {"computing": 4.464, "exposed transfer": 3.348, "exposed waiting": 1.116, "other": 2.232}
    )


def test_hover_says_milliseconds_and_share(demo):
    (bar,) = [b for b in bars(data(demo, "time-parts")) if b["legendgroup"] == "computing" and b["y"] == [0]]
    assert (bar["text"], bar["hovertemplate"]) == (["45 %"], "computing: 5.02 ms, 45 % of the step")
    (phase,) = [b for b in bars(data(demo, "time-phases")) if b["legendgroup"] == "optimizer" and b["y"] == [0]]
    assert phase["hovertemplate"].endswith("<br>computing 0.11 ms, exposed communication 0.06 ms")


def test_phases_stand_in_the_order_of_a_step(own_phase):
    drawn = [trace["legendgroup"] for trace in bars(data(own_phase, "time-phases"))]
    assert drawn == ["forward: cross", "backward: cross", "backward: top mlp", "optimizer"]


def test_backward_is_hatched_in_the_colour_of_its_forward_phase(demo):
    looks = {b["legendgroup"]: b["marker"] for b in bars(data(demo, "time-phases"))}
    for phase in ("bottom mlp", "embedding lookup", "interaction", "top mlp"):
        assert looks[f"forward: {phase}"]["color"] == looks[f"backward: {phase}"]["color"]
    assert {name for name, marker in looks.items() if "pattern" in marker} == {n for n in looks if "backward" in n}
    plain = [marker["color"] for name, marker in looks.items() if "backward" not in name]
    assert len(set(plain)) == len(plain)


def test_a_part_has_one_colour_in_all_figures_that_no_other_has(demo, own_phase):
    colours = defaultdict(set)
    for comparison in (demo, own_phase):
        for name in ("time-parts", "time-ranks", "time-phases"):
            for trace in data(comparison, name):
                if trace["type"] == "bar":
                    colours[trace["legendgroup"].removeprefix("forward: ").removeprefix("backward: ")].add(
                        trace["marker"]["color"]
                    )
    assert [name for name, own in colours.items() if len(own) > 1] == []
    assert len(set.union(*colours.values())) == len(colours)


def test_a_bar_is_hidden_with_its_arm_and_the_legend_stays(own_phase):
    for name in ("time-parts", "time-phases", "time-ranks"):
        traces = data(own_phase, name)
        assert {trace["meta"]["arm"] for trace in traces} == {None, 1}
        shown = [trace["legendgroup"] for trace in traces if trace.get("showlegend", True)]
        assert len(shown) == len(set(shown))
        assert {trace["legendgroup"] for trace in traces} == set(shown)
        assert not any("<b>" in trace["name"] for trace in traces)


def test_the_step_that_is_not_profiled_is_marked(demo):
    marks = [t for t in data(demo, "time-parts") if t["type"] == "scatter" and t["meta"]["arm"] is not None]
    assert [(mark["meta"]["arm"], mark["x"]) for mark in marks] == [(0, [9.3]), (1, [6.6]), (2, [5.8])]
    assert all(mark["y"][0] == pytest.approx(i - 0.42) for i, mark in enumerate(marks))


def test_nothing_is_drawn_of_runs_that_were_not_profiled(tmp_path):
    assert time_plots(compare(write_demo(tmp_path))) == []


def test_every_figure_of_thirty_runs_is_valid_plotly(tmp_path):
    for plot in time_plots(compare(write_sweep(tmp_path, windows=1))):
        go.Figure(plot.figures[""])
        assert plot.height < 1200
