"""From run directories to results.parquet to tables: every figure against one worked out by hand."""

import json
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from recsys.report.verdict import compare_scores
from recsys.runs.run_directory import RunDir
from recsys.studies.arms import build_arms
from recsys.studies.page import build_page
from recsys.studies.plan import PlannedArm
from recsys.studies.records import StudyRun, collect, load_results, save_results
from recsys.studies.spec import parse_study
from recsys.studies.tables import build_tables
from tests.recsys.report.fake_runs import write_run

BATCH, SEEDS = 500, (0, 1, 2)
METHODS = [
    {"name": "full", "title": "full tables", "compressions": [1], "overrides": {"embedding.method": "sharded"}},
    {"name": "robe", "title": "ROBE", "compressions": [100, 1000, 10000], "overrides": {"embedding.method": "robe"}},
]
PAPER = {"method": "robe", "target": 0.8, "epochs": {"1": 1.0, "100": 1.94, "10000": "not reached"}}
PAPER |= {"seconds": {"100": 31.04}, "relative_time": {"100": 1.19}, "auc": {"100": 0.8029}}
FACTS = {"name": "toy", "data": "generated", "shows": "Little.", "target": None, "best_possible_auc": {"": 0.81}}
FACTS |= {"rates": [1.0, 3.0], "settings": {"": {}}, "jobs": 2, "environment": {"cpu": "slow"}}
EVALUATIONS = {
    # time_s, samples, epoch, validation AUC; test AUC is 0.0012 lower.
    1.0: [(10.0, 200_000, 0.5, 0.74), (20.0, 400_000, 1.0, 0.76), (40.0, 800_000, 2.0, 0.75)],
    100.0: [(6.0, 200_000, 0.5, 0.73), (12.0, 400_000, 1.0, 0.75), (24.0, 800_000, 2.0, 0.77)],
    1000.0: [(5.0, 200_000, 0.5, 0.71), (10.0, 400_000, 1.0, 0.72), (20.0, 800_000, 2.0, 0.73)],
}
STEPS = {("dlrm", "full", 1.0): 20.0, ("dlrm", "robe", 100.0): 12.0}


def toy_study(layout="trade", **changes):
    values = {"title": "Toy & co", "reference": "a paper", "layout": layout, "architectures": ["dlrm"]}
    values |= {"methods": METHODS, "seeds": list(SEEDS), "paper": {"dlrm": PAPER}}
    source = {"config": "demo.toml", "rates": [1.0, 3.0], "shows": "Little."}
    return parse_study(values | {"data": {"generated": source}} | changes)


def scores(compression, seed):
    """Of 400 rows, the same labels for all; full tables separate them better."""
    labels = (np.random.default_rng(0).random(400) < 0.4).astype(np.uint8)
    random = np.random.default_rng((int(compression), seed))
    return (labels * (1.2 if compression == 1 else 0.4) + random.normal(size=400)).astype(np.float32), labels


def make_run(root, arm, rate, seed):
    shift = 0.001 * seed
    evaluations = [(t, n, e, auc + shift) for t, n, e, auc in EVALUATIONS[arm.compression]]
    reason = "patience" if arm.compression == 1000 and seed == 1 else "epochs"
    path = write_run(
        root, f"{arm.name}_lr{rate:g}_s{seed}", method="sharded" if arm.method == "full" else "robe", seed=seed,
        compression=arm.compression, ranks=1, step_ms=50.0, evaluations=evaluations,
        summary={"global_batch_size": BATCH, "evaluation_time_s": 2.5, "stop_reason": reason},
        config={"optimizer.embedding_learning_rate": rate},
    )  # fmt: skip
    logits, labels = scores(arm.compression, seed)
    np.savez(path / "test_scores.npz", logits=logits, labels=labels)
    return RunDir(path)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Full tables and ROBE at 100x and 1,000x; 1,000x lost its last seed, 10,000x was too large."""
    root = tmp_path_factory.mktemp("runs")
    arms = [
        PlannedArm("", "dlrm", name, compression, "demo.toml", (), parameters=int(1e6 / compression), problem=problem)
        for name, compression, problem in (
            ("full", 1.0, None), ("robe", 100.0, None), ("robe", 1000.0, None), ("robe", 10000.0, "needs 9 bytes"),
        )
    ]  # fmt: skip
    made = []
    for arm in arms[:3]:
        for rate, seed in ((1.0, 0), (3.0, 0), (3.0, 1), (3.0, 2)):
            error = "FloatingPointError: nan" if arm.compression == 1000 and seed == 2 else None
            run_dir = RunDir(root / "gone") if error else make_run(root, arm, rate, seed)
            made.append(StudyRun(arm, rate, seed, seed == 0, rate == 3.0, run_dir, error))
    path = root / "out" / "results.parquet"
    save_results(collect(toy_study(), arms, made, STEPS, FACTS), path)
    return load_results(path)


@pytest.fixture(scope="module")
def arms(results):
    return build_arms(results)


def test_the_file_has_a_row_an_evaluation_and_one_for_what_failed(results):
    assert len(results.frame.evaluations) == 11 * 3
    assert len(results.frame.runs) == 11 + 1
    assert results.frame.runs["failure"].drop_nulls().to_list() == ["FloatingPointError: nan"]
    assert [arm["problem"] for arm in results.arms] == [None, None, None, "needs 9 bytes"]
    assert results.frame.evaluations.filter(pl.col("is_best"))["run"].n_unique() == 11


def test_figures_are_over_the_chosen_rate_alone(arms):
    full, robe, lost, _ = arms
    assert [len(g.runs) for g in arms] == [3, 3, 2, 0]
    assert [len(g.trials) for g in arms] == [2, 2, 2, 0]
    # Best validation log loss is at the highest AUC: epoch 1 for full tables.
    assert full.auc.mean == pytest.approx(0.7598)
    assert full.auc.plus_minus == pytest.approx(0.001)
    assert (full.best_epoch, robe.best_epoch, lost.auc.n) == (1.0, 2.0, 2)
    assert full.tuning_seconds == pytest.approx(2 * (40.0 + 2.5))


def test_the_target_is_the_lowest_best_of_full_tables_and_time_to_it_is_epochs_times_steps(arms):
    full, robe, lost, _ = arms
    assert full.target.auc == robe.target.auc == pytest.approx(0.7588)
    assert full.epochs_to_target == pytest.approx(1.0)
    # ROBE reaches .7688 at epoch 2, coming from .7488.
    assert robe.epochs_to_target == pytest.approx(2.0)
    assert robe.time_to_target.interpolated.epochs == pytest.approx(1 + (0.7588 - 0.7498) / 0.02)
    assert robe.seconds_to_target == pytest.approx(0.012 * 800_000 / BATCH)
    assert robe.relative_time == pytest.approx(2.0 * 12 / 20)
    assert full.relative_time == pytest.approx(1.0)
    assert (lost.time_to_target.runs, lost.epochs_to_target, lost.relative_time) == (0, None, None)


def test_equal_time_is_that_of_the_fastest_group(arms):
    full, robe, _, _ = arms
    assert full.budget_s == robe.budget_s == 20.0
    assert full.equal_time_auc.mean == pytest.approx(0.7598)
    assert robe.equal_time_auc.mean == pytest.approx(0.7498)  # its evaluation at 24 s is too late


def test_the_difference_is_that_of_the_scores_on_the_same_rows(arms):
    _, robe, lost, _ = arms
    labels = scores(1, 0)[1]
    expected = compare_scores([scores(100, s)[0] for s in SEEDS], [scores(1, s)[0] for s in SEEDS], labels)
    assert (robe.difference.low, robe.difference.high) == pytest.approx((expected.low, expected.high))
    assert robe.judge(0.001) == "worse"
    assert lost.difference.seeds == (2, 3)


def test_a_given_target_replaces_that_of_full_tables(results):
    given = build_arms(replace(results, facts={**results.facts, "target": 0.7}))
    assert [arm.target.auc for arm in given] == [0.7] * 4
    assert given[2].epochs_to_target == 0.5


def test_steps_are_those_of_the_runs_where_none_were_measured_alone(arms):
    assert (arms[1].step_ms, arms[2].step_ms) == (12.0, 50.0)


def cells_of(table):
    return {row[0].text: [(cell.text, cell.detail) for cell in row[1:]] for row in table.rows}


def test_table_4_has_the_papers_rows_and_columns(results):
    (table,) = build_tables(results).shown
    assert [column.heading for column in table.columns] == ["", "full", "100×", "1,000×", "10,000×"]
    cells = cells_of(table)
    assert cells["A: epochs to test AUC 0.7588"] == [
        ("1.00", "n = 3, paper 1.00"), ("2.00", "n = 3, paper 1.94"), ("not in 2", "stopped early"),
        ("cannot", "paper: not reached"),
    ]  # fmt: skip
    assert cells["B: s for 1,000 iterations"][:2] == [("20.0", ""), ("12.0", "paper 31.04")]
    assert cells["relative time A × B"][:2] == [("1.00×", ""), ("1.20×", "paper 1.19")]
    assert cells["verdict, ε = 0.001"][1][0] == "worse"


def test_only_runs_that_lost_patience_were_stopped_early(arms):
    assert [arm.is_stopped_early for arm in arms] == [False, False, True, False]


def test_table_3_has_a_row_a_model(results):
    shaped = replace(results, study=toy_study("models"))
    (table,) = build_tables(shaped).shown
    assert [column.heading for column in table.columns][:3] == ["", "AUC full", "AUC 100×"]
    (row,) = cells_of(table).values()
    assert row[0] == ("0.7598 ± 0.0010", "n = 3")
    assert row[1] == ("0.7698 ± 0.0010", "n = 3, worse, paper 0.8029")
    assert row[2][1] == "n = 2, worse"
    assert row[4] == ("0.7588", "paper 0.8000")
    assert row[-2][0] == "not in 2"


def test_table_1_has_a_row_a_method(results):
    shaped = replace(results, study=toy_study("methods"))
    (table,) = build_tables(shaped).shown
    assert [row[1].text for row in table.rows] == ["full", "100×", "1,000×", "10,000×"]


def test_every_cell_of_quality_has_its_n(results):
    found = build_tables(results)
    column = [column.heading for column in found.every.columns].index("test AUC")
    assert [row[column].detail for row in found.every.rows] == ["n = 3", "n = 3", "n = 2", ""]
    assert any("Fewer than 3 seeds" in caveat for caveat in found.caveats)
    assert found.failures[0].endswith("gone: FloatingPointError: nan")
    assert found.failures[1] == "dlrm robe 10,000×: needs 9 bytes"


def test_exports(results, tmp_path):
    found = build_tables(results)
    markdown, latex = found.to_markdown(), found.to_latex()
    assert "| B: s for 1,000 iterations | 20.0 | 12.0 (paper 31.04) |" in markdown
    assert r"\caption{Toy \& co. ROBE}" in latex
    assert r"relative time A $\times$ B & 1.00$\times$ & 1.20$\times$ & -- & -- \\[-3pt]" in latex
    assert "\\\\[-3pt]\n &  & \\scriptsize paper 1.19 &  &  \\\\\n\\addlinespace[2pt]\n" in latex
    numbers = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert numbers["arms"][1]["relative_time"] == pytest.approx(1.2)
    assert numbers["arms"][3]["problems"] == ["needs 9 bytes"]
    build_page(found).write(tmp_path / "index.html")
    page = (tmp_path / "index.html").read_text()
    assert "Toy &amp; co" in page
    assert "dlrm robe 10,000×: needs 9 bytes" in page
    assert "http://" not in page.split("<script>")[0]


def test_runs_without_scores_have_no_verdict(results, tmp_path):
    arm = PlannedArm("", "dlrm", "robe", 100.0, "demo.toml", ())
    base = PlannedArm("", "dlrm", "full", 1.0, "demo.toml", ())
    made = [StudyRun(g, 3.0, 0, False, True, make_run(tmp_path, g, 3.0, 0), None) for g in (base, arm)]
    (made[1].run_dir.path / "test_scores.npz").unlink()
    save_results(collect(toy_study(), [base, arm], made, {}, FACTS), tmp_path / "r.parquet")
    assert build_arms(load_results(tmp_path / "r.parquet"))[1].judge(0.001) is None


def test_full_tables_that_cannot_be_run_leave_the_rest_without_a_target(tmp_path):
    arms = [
        PlannedArm("", "dlrm", "full", 1.0, "demo.toml", (), problem="needs more"),
        PlannedArm("", "dlrm", "robe", 100.0, "demo.toml", ()),
    ]
    made = [StudyRun(arms[1], 3.0, 0, False, True, make_run(tmp_path, arms[1], 3.0, 0), None)]
    save_results(collect(toy_study(), arms, made, {}, FACTS), tmp_path / "r.parquet")
    found = build_tables(load_results(tmp_path / "r.parquet"))
    assert found.arms[1].target is None
    assert cells_of(found.shown[0])["A: epochs to test AUC –"][0] == ("cannot", "paper 1.00")
    build_page(found).write(tmp_path / "index.html")


def test_another_file_is_refused(tmp_path, results):
    pl.DataFrame({"run": ["a"]}).write_parquet(tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="does not hold results in the format"):
        load_results(tmp_path / "other.parquet")
    replace(results.frame, facts={}).save(tmp_path / "comparison.parquet")
    with pytest.raises(ValueError, match="does not hold the results of a study"):
        load_results(tmp_path / "comparison.parquet")
