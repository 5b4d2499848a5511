"""The bars at each size, and their verdicts on made-up times."""

import json

import pytest

from recsys.bench.kernel_bench import to_json
from tests.recsys.bench.kernel_bars import bars_of, describe_verdicts, judge, judge_report, read_report
from tests.recsys.bench.made_measurements import MIDDLE, made, made_report

MB = 1_000_000


def labels(**changes):
    return [bar.label for bar in bars_of(made(1.0, **changes).size)]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ["≤ 0.2 TBE", "≤ 1 plain"]),
        ({"ids": "zipf", "block_size": 32, "memory_bytes": MB}, ["≤ 0.2 TBE", "≤ 1 plain"]),
        ({"block_size": 8}, ["≤ 0.25 TBE", "≤ 1 plain"]),
        ({"embedding_dim": 128}, ["≤ 0.25 TBE", "≤ 1 plain"]),
        ({"embedding_dim": 128, "block_size": 8}, ["≤ 0.25 TBE", "≤ 1 plain"]),
        ({"batch_size": 2_048}, ["≤ 0.4 TBE", "≤ 0.25 bag", "≤ 1 plain"]),
        ({"ids_per_bag": 10}, ["≤ 0.4 TBE", "≤ 0.25 bag", "≤ 1 plain"]),
        ({"embedding_dim": 16}, ["≤ 0.4 TBE", "≤ 0.25 bag", "≤ 1 plain"]),
        ({"memory_bytes": 100 * MB}, ["≤ 0.45 TBE", "≤ 1 plain"]),
        ({"memory_bytes": 100 * MB, "batch_size": 2_048, "ids_per_bag": 10}, ["≤ 0.45 TBE", "≤ 1 plain"]),
        ({"memory_bytes": 100 * MB, "block_size": 8}, ["≤ 1 plain"]),
        ({"memory_bytes": 1_000 * MB}, ["≤ 1 plain"]),
        ({"block_size": 1}, ["≤ 1 plain"]),
    ],
)
def test_bars_of_a_size(changes, expected):
    assert labels(**changes) == expected


def test_a_bar_is_met_up_to_its_value():
    assert [v.is_met for v in judge(made(20.0))] == [True, True]
    assert [v.is_met for v in judge(made(20.1))] == [False, True]
    assert [v.is_met for v in judge(made(301.0))] == [False, False]
    tbe, bag, plain = judge(made(45.0, batch_size=2_048))
    assert (tbe.ratio, bag.ratio, plain.ratio) == (0.45, 0.225, 0.15)
    assert (tbe.is_met, bag.is_met, plain.is_met) == (False, True, True)


def test_what_was_not_measured_is_not_judged():
    assert [v.bar.label for v in judge(made(20.0, tbe=None))] == ["≤ 1 plain"]
    assert judge(made(None)) == []


def test_the_worst_is_by_how_far_it_is_from_its_bar():
    # 0.39 of 0.4 is nearer to its bar than 0.15 of 0.2, and 0.22 of 0.2 is beyond it
    report = made_report(made(15.0), made(39.0, batch_size=2_048), made(22.0, threads=2))
    text = describe_verdicts(judge_report(report))
    assert text == f"bars met: 6 of 7, the worst: 0.220 ≤ 0.2 TBE ({MIDDLE.label}, 2 threads)"


def test_nothing_is_judged_on_another_device_or_without_a_measurement():
    assert judge_report(made_report(made(20.0), device="cuda")) == []
    assert describe_verdicts([]) == "bars met: none was measured"


def test_a_stored_report_is_read_back_as_it_was(tmp_path):
    report = made_report(made(20.0), made(22.0, threads=2))
    (tmp_path / "results.json").write_text(json.dumps(to_json(report)))
    read = read_report(tmp_path / "results.json")
    assert to_json(read) == to_json(report)
    assert [v.is_met for v in judge_report(read)] == [True, True, False, True]
