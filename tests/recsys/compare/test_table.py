"""The tables of a comparison: their cells, in Markdown and as figures of profiled steps."""

import json
from typing import cast

import pytest

from recsys.compare.comparison import compare
from recsys.compare.output import format_document
from recsys.compare.page import build_page
from recsys.compare.table import build_profiled_table, build_table
from recsys.runs.metrics import QUALITY, QualityMetric
from tests.recsys.report.fake_runs import phases, profiled_rank, profiled_window, write_demo, write_run, write_sweep


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return compare(write_demo(tmp_path_factory.mktemp("demo"), windows=2))


def test_markdown_has_every_arm_and_figure_in_rows_of_equal_length(tmp_path):
    sweep = compare(write_sweep(tmp_path))
    tables = [part for part in format_document(sweep).split("\n\n") if part.startswith("|")]
    assert len(tables) == 4  # 18 arms, five at a time
    headings = [column.heading for column in build_table(sweep).columns][1:]
    for table in tables:
        assert len({line.count(" | ") for line in table.splitlines()}) == 1
        assert [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()[2:]] == headings
    assert all(arm.label in format_document(sweep) for arm in sweep.arms)


def test_communication_has_columns_only_where_a_run_was_profiled(demo, tmp_path):
    headings = [column.heading for column in build_table(demo).columns]
    assert "exposed communication" in headings
    plain = [column.heading for column in build_table(compare(write_demo(tmp_path))).columns]
    assert [heading for heading in headings if heading not in plain] == [
        "exposed communication",
        "communicated per step",
    ]


def test_a_metric_of_the_registry_appears_everywhere(tmp_path, monkeypatch):
    brier = QualityMetric(lambda logits, labels: 0.0, "Brier score", "lower", "Mean squared error.", digits=3)
    monkeypatch.setitem(cast(dict, QUALITY), "brier", brier)
    run = write_run(tmp_path, "one", summary={"best.test_brier": 0.18765})
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    records[-1] |= {"quality/test_brier": 0.18765, "quality/validation_brier": 0.19}
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    comparison = compare([run])
    assert "| test Brier score | 0.188 |" in format_document(comparison)
    (arm,) = comparison.to_json()["arms"]
    assert arm["figures"]["test_brier"]["mean"] == 0.18765
    page = build_page(comparison)
    assert {"brier-time", "brier-samples"} <= {plot.id for plot in page.plots}
    assert "test Brier score" in page.render()


def test_a_metric_that_no_run_recorded_changes_nothing(demo, monkeypatch):
    before = demo.to_json(), format_document(demo)
    brier = QualityMetric(lambda logits, labels: 0.0, "Brier score", "lower", "Mean squared error.")
    monkeypatch.setitem(cast(dict, QUALITY), "brier", brier)
    assert (demo.to_json(), format_document(demo)) == before


def test_cells(demo):
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in format_document(demo).splitlines()}
    assert "| 9.30 (p95 12.1) | 6.60 (p95 8.58) | 5.80 (p95 7.54) |" in lines["step, ms"]
    assert "| 1.00× (baseline) | 0.71× | 0.62× |" in lines["step, × baseline"]
    assert lines["time to target"].count("not reached (in 2 epochs)") == 2


def test_a_pipe_in_a_name_does_not_break_the_table(tmp_path):
    run = write_run(tmp_path, "x", summary={"name": "a|b", "status": "interrupted"})
    assert "a\\|b (interrupted)" in format_document(compare([run]))


def test_figures_of_profiled_steps(demo):
    table = build_profiled_table(demo)
    headings = [column.heading for column in table.columns]
    assert headings[-2:] == ["all_reduce", "all_to_all"]
    sharded, robe, single = (dict(zip(headings, row, strict=True)) for row in table.rows)
    assert {name: (cell.text, cell.detail) for name, cell in sharded.items()} == {
        "arm": ("demo_sharded", ""),
        "windows": ("2", "20 steps"),
        "profiled step, ms": ("11.2", ""),
        "× not profiled": ("1.14×", "mean 9.77 ms"),
        "exposed communication": ("35 %", "35 % to 35 %"),
        "of it waiting": ("14 %", ""),
        "overlap": ("8 %", "of 4.24 ms"),
        "clock error, ms": ("0.05", ""),
        "all_reduce": ("293 KiB in 1", "waiting 0.56, transfer 1.12 ms"),
        "all_to_all": ("684 KiB in 5", "waiting 0.00, transfer 2.23 ms"),
    }
    assert robe["all_to_all"].text == "none"
    alone = [single[name].text for name in ("exposed communication", "of it waiting", "overlap", "clock error, ms")]
    assert alone == ["none", "–", "–", "–"]


def test_an_arm_that_was_not_profiled_has_no_row_there_and_dashes_in_the_main_table(tmp_path):
    window = profiled_window(1, [profiled_rank(10.0, phases=phases({"optimizer": 4.0}))])
    timed = write_run(tmp_path, "timed", compression=10.0, summary={"profiles": [window]})
    comparison = compare([write_run(tmp_path, "plain", method="sharded"), timed])
    assert [row[0].text for row in build_profiled_table(comparison).rows] == ["timed"]
    table = build_table(comparison)
    place = [column.heading for column in table.columns].index("exposed communication")
    assert [row[place].text for row in table.rows] == ["–", "none"]
