"""The page of a comparison has what its reader needs, and its plots show what was measured."""

import json
import re

import plotly.graph_objects as go
import pytest

from recsys.compare.comparison import compare
from recsys.compare.page import build_page
from recsys.compare.plots import build_plots
from tests.recsys.report.fake_runs import write_demo, write_run, write_sweep

PLOTS = ["auc-time", "auc-samples", "log-loss-time", "log-loss-samples", "training-loss", "step-time", "memory"]
PLOTS += ["size-step", "size-epochs", "size-time"]
HOSTILE = "</script><img src=x onerror=alert(1)>"
UNFAIR = "Not a fair comparison"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return compare(write_demo(tmp_path_factory.mktemp("demo")))


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    return compare(write_sweep(tmp_path_factory.mktemp("sweep")))


def body(comparison) -> str:
    """The page without its scripts, and with names as they are."""
    text = build_page(comparison).render()
    return text[: text.index("<script>")].replace("&lt;", "<").replace("&gt;", ">")


class TestPage:
    def test_has_every_run_every_plot_and_what_made_them(self, demo):
        text = body(demo)
        for run in demo.runs:
            assert text.count(run.label) >= 4
        for piece in ("5f0c7d0f4d", "Xeon Gold 6230", "2.13.0+cpu", "train.py configs/demo_robe.toml", "<table_wise>"):
            assert piece in text
        assert "training.global_batch_size" in text
        assert UNFAIR not in text
        page = build_page(demo)
        assert [plot.id for plot in page.plots] == PLOTS
        assert list(page.plots[0].figures) == ["validation", "test"]
        assert page.title == "demo_robe and demo_robe_single against demo_sharded"
        assert page.answer.startswith("3 arms of the same dlrm")

    def test_escapes_what_others_wrote(self, tmp_path):
        runs = [
            write_run(tmp_path, "hostile", summary={"name": HOSTILE}, environment={"cpu": HOSTILE}, windows=1),
            write_run(tmp_path, "two", compression=10.0, config={"training.epochs": 3.0}, environment={"cpu": "x"}),
        ]
        page = build_page(compare(runs, allow_differences=True))
        text = page.render()
        assert "<img" not in text[: text.index("<script>")]
        assert len(re.findall("</script>", text)) == 3
        names = [trace["name"] for plot in page.plots for figure in plot.figures.values() for trace in figure["data"]]
        assert not any("<" in name for name in names)

    def test_differences_are_prominent(self, tmp_path):
        runs = [write_run(tmp_path, "one"), write_run(tmp_path, "two", config={"training.epochs": 3.0})]
        text = body(compare(runs, allow_differences=True))
        assert text.index(UNFAIR) < text.index("training.epochs: 2.0 (one), 3.0 (two)") < text.index("<table")

    def test_caveats_stand_before_the_table(self, tmp_path):
        text = body(compare([write_run(tmp_path, "cut", summary={"status": "interrupted"})]))
        assert text.index("Keep in mind") < text.index("cut is not finished but interrupted") < text.index("<table")

    def test_one_run_and_a_run_not_yet_evaluated(self, tmp_path):
        assert "auc-time" in [plot.id for plot in build_page(compare([write_run(tmp_path, "one")])).plots]
        new = compare([write_run(tmp_path, "new", step_ms=None, evaluations=[], summary={"status": "running"})])
        assert [plot.id for plot in build_page(new).plots] == ["memory"]
        assert "No run has been evaluated yet" in body(new)

    def test_thirty_runs(self, sweep):
        text = body(sweep)
        for run in sweep.runs:
            assert run.label in text
        assert "1 of 17 reach the target" in text
        assert "running" in text
        assert len(build_page(sweep).render()) < 7_000_000

    def test_what_differs_has_a_row_an_arm_and_what_is_shared_stands_below(self, demo):
        text = body(demo)
        table = text[text.index("What differs, what is shared") : text.index("Shared by all runs")]
        assert "embedding.compression" in table
        assert "training.epochs" not in table
        shared = text[text.index("Shared by all runs") : text.index("<h2>Environment")]
        assert ("training.epochs" in shared, "embedding.compression" in shared) == (True, False)
        assert re.search(r'demo_robe</th>.*?">1000\.0<', table, re.DOTALL)

    def test_an_environment_that_differs_names_the_runs(self, tmp_path):
        runs = [write_run(tmp_path, "one"), write_run(tmp_path, "two", seed=1, environment={"python": "3.12.1"})]
        text = body(compare(runs))
        shown = text[text.index("<h2>Environment") :]
        assert re.search(r"3\.12\.1 <small>two</small>", shown)
        assert re.search(r"2\.13\.0\+cpu</div>", shown)


class TestTime:
    def test_the_section_is_there_where_a_run_was_profiled(self, demo, tmp_path):
        assert "Where the time goes" not in body(demo)
        profiled = compare(write_demo(tmp_path, windows=2))
        text = body(profiled)
        assert [plot.id for plot in build_page(profiled).plots][len(PLOTS) :] == [
            "time-parts", "time-phases", "time-ranks"
        ]  # fmt: skip
        for piece in ("Where the time goes", "which makes them slower", "waiting 0.56, transfer 1.12 ms", "Perfetto"):
            assert piece in text
        for run in profiled.runs:
            assert f"{run.path}/profile/step_201_rank_0.json.gz" in text

    def test_only_profiled_arms_have_a_row(self, tmp_path):
        runs = [
            write_run(tmp_path, "plain", method="sharded"),
            write_run(tmp_path, "timed", compression=10.0, windows=1),
        ]
        text = body(compare(runs))
        section = text[text.index("<h2>Where the time goes") : text.index("<h2>What differs")]
        assert "timed" in section
        assert "plain" not in section


class TestPlots:
    def test_every_figure_is_valid_plotly(self, sweep, demo):
        for comparison in (sweep, demo):
            for plot in build_plots(comparison):
                for figure in plot.figures.values():
                    go.Figure(figure)

    def test_an_arm_has_one_colour_in_all_plots_and_its_own(self, demo):
        colours = {}
        for plot in build_plots(demo):
            for figure in plot.figures.values():
                for trace in figure["data"]:
                    colours.setdefault(trace["meta"]["arm"], set()).add(trace["marker"]["color"])
        assert [len(own) for own in colours.values()] == [1, 1, 1]
        assert len(set.union(*colours.values())) == 3

    def test_arms_beyond_the_palette_differ_in_dash(self, sweep):
        (auc, *_) = build_plots(sweep)
        looks = {}
        for trace in auc.figures["validation"]["data"]:
            looks.setdefault((trace["line"]["color"], trace["line"]["dash"]), set()).add(trace["meta"]["arm"])
        assert all(len(arms) == 1 for arms in looks.values())

    def test_target_and_best_possible_are_drawn_where_they_apply(self, demo):
        plots = {plot.id: plot.figures for plot in build_plots(demo)}
        drawn = {
            (name, split): [a["text"].split(" 0.")[0] for a in plots[name][split]["layout"]["annotations"]]
            for name in ("auc-time", "log-loss-time")
            for split in ("validation", "test")
        }
        assert drawn == {
            ("auc-time", "validation"): ["target", "best possible"],
            ("auc-time", "test"): ["best possible"],
            ("log-loss-time", "validation"): ["best possible"],
            ("log-loss-time", "test"): ["best possible"],
        }

    def test_long_training_curves_are_thinned_without_losing_the_mean(self, tmp_path):
        run = write_run(tmp_path, "long")
        points = [
            {"step": i, "samples": i, "epoch": i, "time_s": i, "quality/train_log_loss": i % 2} for i in range(9000)
        ]
        (run / "metrics.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points))
        (plot,) = [plot for plot in build_plots(compare([run])) if plot.id == "training-loss"]
        (trace,) = plot.figures[""]["data"]
        assert len(trace["y"]) == 300
        assert set(trace["y"]) == {0.5}
