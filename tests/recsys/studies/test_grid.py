"""The study of methods, a row a method and compression: each figure against one worked out here, and the page."""

import json
import re

import numpy as np
import pytest

from configs.load import ConfigError
from recsys.runs.run_directory import RunDir
from recsys.studies.arms import build_arms
from recsys.studies.notes import UNFAIR
from recsys.studies.page import build_page
from recsys.studies.plan import PlannedArm
from recsys.studies.plots import draw_sizes
from recsys.studies.records import StudyRun, collect
from recsys.studies.spec import load_study, parse_study
from recsys.studies.tables import GRID_COLUMNS, build_tables
from tests.recsys.report.fake_runs import FULL_PARAMETERS, quality, write_run

SEEDS = (0, 1, 2)
RATES = (1.0, 3.0, 10.0)
AUCS = {"full": [0.79, 0.78, 0.785], "robe": [0.77, 0.775, 0.771], "better": [0.8, 0.79, 0.8]}
METHODS = [
    {"name": name, "title": name, "compressions": compressions, "overrides": {"embedding.method": method}}
    for name, method, compressions in (
        ("full", "full", [1]), ("robe", "robe", [10, 20, 1000]), ("better", "robe", [10]), ("odd", "robe", [10]),
    )
]  # fmt: skip
STUDY = parse_study(
    {
        "title": "Toy", "reference": "", "layout": "grid", "unreachable": "highest", "architectures": ["dlrm"],
        "methods": METHODS, "seeds": list(SEEDS),
        "data": {"generated": {"config": "demo/base.toml", "rates": list(RATES), "shows": "Little."}},
    }
)  # fmt: skip
FACTS = {"name": "toy", "data": "generated", "shows": "Little.", "target": None, "best_possible_auc": {}}
FACTS |= {"rates": list(RATES), "settings": {"": {}}, "jobs": "2 at a time", "environment": {"cpu": "slow"}}


def plan(method, compression, **known):
    laid = (f"embedding.method={'full' if method == 'full' else 'robe'}", "embedding.compression=1")
    return PlannedArm("", "dlrm", method, compression, "configs/demo/base.toml", laid, **known)


def finish(root, arm, rate, seed, best_rate=3.0, **changes):
    """A run whose test AUC at the evaluation of lowest validation log loss is the seed's in AUCS."""
    auc = AUCS[arm.method][seed] - (0.01 if rate != best_rate else 0)
    name = f"{arm.name}_lr{rate:g}_s{seed}"
    best = {"step": 781, "samples": 400_000, "epoch": 1.0 + seed, "time_s": 5.0} | quality("validation", auc)
    best |= quality("test", auc) | {"test_auc": auc, "test_log_loss": 1 - auc}
    path = write_run(
        root, name, method="full" if arm.method == "full" else "robe", compression=arm.compression, seed=seed,
        config={"optimizer.embedding_learning_rate": rate} | changes,
        summary={
            "best": best, "last": best | {"validation_log_loss": 0.9, "test_auc": 0.99}, "stop_reason": "patience",
            "train_time_s": 2.0 + seed, "evaluation_time_s": 0.5,
            "step_ms": {"p50": 1.5 + seed, "p95": 9.0, "mean": 4.0},
        },
    )  # fmt: skip
    return StudyRun(arm, rate, seed, seed == 0, rate == best_rate, RunDir(path), None)


def tuned(root, arm, best_rate=3.0, seeds=SEEDS):
    """All runs of an arm: the grid at the first seed, of which the highest rate failed, and the other seeds."""
    runs = [finish(root, arm, rate, 0, best_rate) for rate in RATES if rate != 10.0 or best_rate == 10.0]
    if best_rate != 10.0:
        failure = "FloatingPointError: nan (log: l)"
        runs.append(StudyRun(arm, 10.0, 0, True, False, RunDir(root / f"{arm.name}_lr10_s0"), failure))
    return [*runs, *(finish(root, arm, best_rate, seed, best_rate) for seed in seeds if seed)]


@pytest.fixture
def study(tmp_path):
    """Full tables and ROBE at 10×, ROBE refused at 1,000×, and a method that could not be built."""
    arms = [
        plan("full", 1.0, limit=1.0, initial_std=1.0),
        plan("robe", 10.0, initial_std=0.98),
        plan("robe", 1000.0, limit=53.14),
        plan("odd", 10.0, problem="embedding.odd: <5 rows"),
    ]
    return arms, [*tuned(tmp_path, arms[0]), *tuned(tmp_path, arms[1])]


def tables_of(arms, runs):
    return build_tables(collect(STUDY, arms, runs, {}, FACTS))


def shown(tables, place):
    (table,) = tables.shown
    return {column.heading: cell.text for column, cell in zip(table.columns, table.rows[place], strict=True)}


def cell_of(tables, place, heading):
    (table,) = tables.shown
    return table.rows[place][[column.heading for column in table.columns].index(heading)]


def test_figures_are_means_and_deviations_over_seeds(study):
    tables = tables_of(*study)
    found = shown(tables, 1)
    aucs, full = np.array(AUCS["robe"]), np.array(AUCS["full"])
    assert found["test AUC"] == f"{aucs.mean():.4f} ± {np.std(aucs, ddof=1):.4f}"
    assert found["test log loss"] == f"{1 - aucs.mean():.4f} ± {np.std(aucs, ddof=1):.4f}"
    assert found["AUC − full"] == f"−{(full - aucs).mean():.4f} ± {np.std(full - aucs, ddof=1):.4f}"
    assert (found["compression"], found["actual"]) == ("10×", "10.00×")
    assert (found["best epoch"], found["step, ms"], found["training time"]) == ("2.0", "2.50", "3.00 s")
    assert (found["learning rate"], found["parameters"], found["initial std"]) == ("3", "5.40 M", "0.98×")
    assert (found["optimizer state"], found["stored"]) == ("0 B", "20.6 MiB")
    assert tables.arms[1].stored_bytes == 4 * (FULL_PARAMETERS // 10)
    assert shown(tables, 0)["AUC − full"] == "–"


def test_differences_to_full_are_taken_at_the_same_seed(tmp_path):
    full, robe = plan("full", 1.0), plan("robe", 10.0)
    runs = [*tuned(tmp_path, full, seeds=(0, 1)), *(finish(tmp_path, robe, 3.0, seed) for seed in (1, 2))]
    tables = tables_of([full, robe], runs)
    found = tables.arms[1].paired_difference()
    assert (found.mean, found.n) == (pytest.approx(0.775 - 0.78), 1)
    assert cell_of(tables, 1, "test AUC").detail == "2 of 3 seeds"


def test_a_gain_over_full_tables_has_a_sign(tmp_path):
    full, better = plan("full", 1.0), plan("better", 10.0)
    tables = tables_of([full, better], [*tuned(tmp_path, full), *tuned(tmp_path, better)])
    assert shown(tables, 1)["AUC − full"].startswith("+0.0117 ± ")


def test_what_was_not_run_says_why(study):
    tables = tables_of(*study)
    assert tables.arms[2].is_refused
    assert shown(tables, 2)["actual"] == "reaches 53.14×"
    assert shown(tables, 3)["actual"] == "cannot"
    assert {shown(tables, place)["test AUC"] for place in (2, 3)} == {"–"}
    assert cell_of(tables, 0, "actual").detail == "its most"
    assert "dlrm odd 10×: embedding.odd: <5 rows" in tables.failures
    assert not any("robe 1,000×" in failure for failure in tables.failures)  # a figure of the method, no failure


def test_an_arm_is_at_the_edge_where_no_rate_beyond_its_own_was_tried(study, tmp_path):
    arms, runs = study
    at_edge, inside = plan("robe", 20.0), plan("better", 10.0)
    more = [*tuned(tmp_path, at_edge, best_rate=10.0), *(finish(tmp_path, inside, rate, 0) for rate in RATES)]
    tables = tables_of([*arms, at_edge, inside], [*runs, *more])
    # Of the first two the highest rate failed, which leaves theirs the highest.
    assert [arm.is_at_edge for arm in tables.arms if len(arm.runs)] == [True, True, True, False]
    assert cell_of(tables, 4, "learning rate").detail == "edge"
    assert "The best learning rate is the lowest or highest that was tried:" in "".join(tables.caveats)


def test_cost_of_tuning_and_what_differs_are_told(study):
    tables = tables_of(*study)
    assert "4 runs and 10.0 s of training and evaluation in all" in "".join(tables.notes)
    assert tables.results.facts["options"]["robe"].startswith("method = robe, init_scale = 0.01")
    assert [f.split(":")[:2] for f in tables.failures[:2]] == [
        ["dlrm full", " dlrm_full_1x_lr10_s0"], ["dlrm robe 10×", " dlrm_robe_10x_lr10_s0"],
    ]  # fmt: skip
    assert not any("Not stopped by patience" in caveat for caveat in tables.caveats)


def test_runs_that_differ_in_more_than_rate_seed_and_embedding_are_no_fair_comparison(study, tmp_path):
    arms, runs = study
    assert tables_of(arms, runs).results.facts["differences"] == []
    unlike = plan("better", 10.0)
    tables = tables_of([*arms, unlike], [*runs, finish(tmp_path, unlike, 3.0, 0, **{"training.epochs": 7.0})])
    (difference,) = tables.results.facts["differences"]
    assert difference.startswith("training.epochs: 2.0 (")
    assert tables.caveats[0].startswith(f"{UNFAIR}: training.epochs: 2.0 (")


def test_markdown_has_a_cell_for_every_column(study):
    lines = tables_of(*study).shown[0].to_markdown().splitlines()[2:]
    assert len(lines) == 2 + 4
    assert {line.count("|") for line in lines} == {len(GRID_COLUMNS) + 1}
    assert lines[2].startswith("| full | 1× | 1.00× (its most) |")


def test_json_leaves_no_key_out(study):
    found = json.loads(json.dumps(tables_of(*study).to_json(), allow_nan=False))
    assert len({frozenset(arm) for arm in found["arms"]}) == 1
    robe = found["arms"][1]
    loss = quality("validation", 0.77)["validation_log_loss"]
    assert robe["trials"][1] == {"run": "dlrm_robe_10x_lr3_s0", "learning_rate": 3.0, "log_loss": loss}
    assert (robe["stored_bytes"], robe["initial_std"], found["arms"][2]["limit"]) == (21601144, 0.98, 53.14)
    assert {"options", "environment", "differences", "caveats"} <= set(found["facts"])


def test_the_page_draws_arms_with_their_deviation_and_full_tables_as_a_level(study, tmp_path):
    tables = tables_of(*study)
    (drawn,) = draw_sizes(build_arms(tables.results)).values()
    (trace,) = drawn["data"]
    assert trace["y"] == [pytest.approx(np.mean(AUCS["robe"]), abs=1e-6)]
    assert trace["error_y"]["array"] == [pytest.approx(np.std(AUCS["robe"], ddof=1))]
    assert trace["x"] == [pytest.approx(10, rel=0.11)]
    assert drawn["layout"]["shapes"][1]["y0"] == pytest.approx(0.785)
    build_page(tables).write(tmp_path / "new" / "index.html")
    page = (tmp_path / "new" / "index.html").read_text()
    assert "&lt;5 rows" in page
    assert "<5 rows" not in page
    assert "block_size = 8" in page
    assert not re.search(r'(src|href)="(http|//)', page[: page.index("<script")])


def test_compressions_are_written_once_and_methods_keep_their_own(tmp_path):
    methods = """
[[methods]]
name = "full"
title = "full tables"
compressions = [1]
overrides = { "embedding.method" = "full" }
[[methods]]
name = "signed"
title = "ROBE with signs"
overrides = { "embedding.method" = "robe", "embedding.robe.signed" = true }
[data.generated]
config = "demo/base.toml"
rates = [1.0]
shows = "Nothing."
"""
    head = 'title = "T"\nreference = ""\nlayout = "grid"\narchitectures = ["dlrm"]\nseeds = [0]\n'
    path = tmp_path / "toy.toml"
    path.write_text(head + "compressions = [10, 100]\n" + methods)
    assert {method.name: method.compressions for method in load_study(path).methods} == {
        "full": (1.0,), "signed": (10.0, 100.0)
    }  # fmt: skip
    path.write_text(head + "compressions = [10]\nevery_method = true\n" + methods)
    found = {method.name: method.compressions for method in load_study(path).methods}
    assert (found["cafe"], "robe" in found, "sharded" in found) == ((10.0,), False, False)
    path.write_text(head + methods)
    with pytest.raises(ConfigError, match=r"methods\.1\.compressions: Field required"):
        load_study(path)
