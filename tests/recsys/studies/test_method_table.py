"""The table of methods: each figure against one worked out here, rows that were not run, and the page."""

import json
import re

import numpy as np
import pytest
from plotly.offline import get_plotlyjs

from configs.load import load_config
from recsys.report.run import load_runs
from recsys.studies.method_page import auc_figure, write_method_page
from recsys.studies.method_rows import MethodRow, RateTrial, build_method_table, paired_difference, to_json
from recsys.studies.method_table import COLUMNS, describe_context, format_markdown
from recsys.train.registry import CHOICES
from tests.recsys.report.fake_runs import FULL_PARAMETERS, quality, write_run

SEEDS = (0, 1, 2)
AUCS = {"full": [0.79, 0.78, 0.785], "robe": [0.77, 0.775, 0.771], "better": [0.8, 0.79, 0.8]}


def seed_runs(root, method, compression, rate=3.0, seeds=SEEDS, **changes):
    """Runs whose test AUC at the evaluation of lowest validation log loss is the seed's in AUCS."""
    paths = []
    for seed in seeds:
        auc = AUCS[method][seed]
        better_on_test = {"validation_log_loss": 0.9, "test_auc": 0.99}
        best = {"step": 781, "samples": 400_000, "epoch": 1.0 + seed, "time_s": 5.0} | quality("validation", auc)
        best |= quality("test", auc) | {"test_auc": auc, "test_log_loss": 1 - auc}
        path = write_run(
            root, f"{method}_{compression}_{seed}", method=method, compression=compression, seed=seed,
            config={"optimizer.embedding_learning_rate": rate} | changes,
            summary={"best": best, "last": best | better_on_test, "stop_reason": "patience", "train_time_s": 2.0 + seed,
                     "step_ms": {"p50": 1.5 + seed, "p95": 9.0, "mean": 4.0}},
        )  # fmt: skip
        paths.append(path)
    return tuple(load_runs(paths))


@pytest.fixture
def rows(tmp_path):
    trials = (
        RateTrial(1.0, 0.6, 10.0),
        RateTrial(3.0, 0.5, 11.0),
        RateTrial(10.0, None, 1.0, "FloatingPointError: nan"),
    )
    full = MethodRow("full", 1.0, 1.0, 1.0, trials, seed_runs(tmp_path, "full", 1.0))
    robe = MethodRow("robe", 10.0, None, 0.98, trials, seed_runs(tmp_path, "robe", 10.0))
    refused = MethodRow("robe", 1000.0, limit=53.14)
    broken = MethodRow("odd", 10.0, errors=("embedding.odd: <5 rows",))
    return [full, robe, refused, broken]


def build(rows, seeds=SEEDS):
    configs = {name: load_config("configs/debug.toml", [], CHOICES) for name in ("full", "robe")}
    return build_method_table(rows, configs, seeds, (1.0, 3.0, 10.0), 2)


def shown(table, row):
    return {column.heading: column.cell(row, table).text for column in COLUMNS}


def test_figures_are_means_and_deviations_over_seeds(rows):
    table = build(rows)
    found = shown(table, rows[1])
    aucs, full = np.array(AUCS["robe"]), np.array(AUCS["full"])
    assert found["test AUC"] == f"{aucs.mean():.4f} ± {np.std(aucs, ddof=1):.4f}"
    assert found["test log loss"] == f"{1 - aucs.mean():.4f} ± {np.std(aucs, ddof=1):.4f}"
    assert found["AUC − full"] == f"−{(full - aucs).mean():.4f} ± {np.std(full - aucs, ddof=1):.4f}"
    assert (found["compression"], found["obtained"]) == ("10×", "10.00×")
    assert (found["best epoch"], found["step, ms"], found["training time"]) == ("2.0", "2.50", "3.00 s")
    assert (found["learning rate"], found["parameters"], found["initial std"]) == ("3", "5.40 M", "0.98×")
    assert rows[1].stored_bytes == 4 * (FULL_PARAMETERS // 10)
    assert shown(table, rows[0])["AUC − full"] == "–"


def test_differences_to_full_are_taken_at_the_same_seed(tmp_path):
    full = MethodRow("full", 1.0, runs=seed_runs(tmp_path, "full", 1.0, seeds=(0, 1)))
    robe = MethodRow("robe", 10.0, runs=seed_runs(tmp_path, "robe", 10.0, seeds=(1, 2)))
    found = paired_difference(robe, full)
    assert (found.mean, found.n) == (pytest.approx(0.775 - 0.78), 1)
    assert COLUMNS[8].cell(robe, build([full, robe])).detail == "2 of 3 seeds"


def test_a_gain_over_full_tables_has_a_sign(rows, tmp_path):
    better = MethodRow("better", 10.0, runs=seed_runs(tmp_path, "better", 10.0))
    assert shown(build([rows[0], better]), better)["AUC − full"].startswith("+0.0117 ± ")


def test_what_was_not_run_says_why(rows):
    table = build(rows)
    assert rows[2].is_refused
    assert shown(table, rows[2])["obtained"] == "reaches 53.14×"
    assert shown(table, rows[3])["obtained"] == "failed"
    assert {shown(table, row)["test AUC"] for row in rows[2:]} == {"–"}
    assert COLUMNS[2].cell(rows[0], table).detail == "its most"
    assert "Failed: odd 10×: embedding.odd: <5 rows" in describe_context(table)


def test_a_row_is_at_the_edge_where_no_rate_beyond_its_own_was_tried(rows, tmp_path):
    assert not rows[1].is_at_edge
    row = MethodRow("robe", 20.0, None, 1.0, rows[1].trials, seed_runs(tmp_path, "robe", 20.0, rate=10.0))
    assert row.is_at_edge
    assert "The best learning rate is the last one tried: robe 20×." in build([row]).caveats


def test_cost_of_tuning_and_what_differs_are_told(rows):
    said = "\n".join(describe_context(build(rows)))
    assert "6 runs, 44.0 s in all, 2 of them among the results" in said
    assert "robe: method = robe, init_scale = 0.01" in said
    assert "Some learning rates failed, such as by a loss that is not finite: full 1×, robe 10×." in said
    assert "Not stopped by patience" not in said


def test_runs_that_differ_in_more_than_rate_seed_and_embedding_are_no_fair_comparison(rows, tmp_path):
    assert build(rows).differences == ()
    unlike = MethodRow("robe", 30.0, runs=seed_runs(tmp_path, "robe", 30.0, rate=1.0, **{"training.epochs": 7.0}))
    (difference,) = build([*rows, unlike]).differences
    assert difference.startswith("training.epochs: 2.0 (")
    assert any(line.startswith("Not a fair comparison") for line in describe_context(build([*rows, unlike])))


def test_markdown_has_a_cell_for_every_column(rows):
    lines = format_markdown(build(rows)).splitlines()
    assert len(lines) == 2 + len(rows)
    assert {line.count("|") for line in lines} == {len(COLUMNS) + 1}
    assert lines[2].startswith("| full | 1× | 1.00× (its most) |")


def test_json_leaves_no_key_out(rows):
    found = json.loads(json.dumps(to_json(build(rows)), allow_nan=False))
    assert len({frozenset(row) for row in found["rows"]}) == 1
    assert [run["best"]["test_auc"] for run in found["rows"][1]["runs"]] == AUCS["robe"]
    assert found["rows"][1]["trials"][2] == {
        "learning_rate": 10.0, "log_loss": None, "seconds": 1.0, "error": "FloatingPointError: nan"
    }  # fmt: skip
    assert {"seeds", "rates", "options", "environment", "differences", "caveats"} <= set(found)


def test_page_draws_rows_with_their_deviation_and_full_tables_as_a_level(rows, tmp_path):
    table = build(rows)
    drawn = auc_figure(table)
    (trace,) = drawn["data"]
    assert trace["y"] == [pytest.approx(np.mean(AUCS["robe"]), abs=1e-6)]
    assert trace["error_y"]["array"] == [pytest.approx(np.std(AUCS["robe"], ddof=1))]
    assert trace["x"] == [pytest.approx(10, rel=0.11)]
    assert drawn["layout"]["shapes"][1]["y0"] == pytest.approx(0.785)
    write_method_page(table, tmp_path / "new" / "index.html")
    page = (tmp_path / "new" / "index.html").read_text()
    assert "&lt;5 rows" in page
    body = page[page.index('<table id="figures">') : page.index("</table>")]
    assert len(re.findall(r"<tr", body)) == 1 + len(rows)
    assert not re.search(r'(src|href)="(http|//)', page.replace(get_plotlyjs(), ""))
