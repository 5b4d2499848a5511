"""Every way a run directory can be wrong is refused by name."""

import json
import shutil

import pytest

from recsys.report.run import ComparisonError, load_runs
from tests.recsys.report.fake_runs import profiled_rank, profiled_window, write_run


def refuse(*paths) -> str:
    with pytest.raises(ComparisonError) as error:
        load_runs(paths)
    return str(error.value)


def test_missing_and_not_a_directory(tmp_path):
    assert f"{tmp_path}/nothing does not exist" in refuse(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    assert f"{tmp_path}/file is not a directory" in refuse(tmp_path / "file")


@pytest.mark.parametrize("missing", ["summary.json", "config.toml", "environment.json"])
def test_not_a_run_directory(tmp_path, missing):
    run = write_run(tmp_path, "one")
    (run / missing).unlink()
    assert f"{run} is not a run directory: {missing} is missing" in refuse(run)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("summary.json", "{"),
        ("summary.json", "[]"),
        ("environment.json", "nonsense"),
        ("environment.json", "[1]"),
        ("config.toml", "a = = 1"),
        ("metrics.jsonl", '{"step": 1, "samples": 1, "epoch": 1, "time_s": 1}\n{"step":\n'),
        ("metrics.jsonl", "[]\n"),
        ("metrics.jsonl", '{"step": 1}\n'),
    ],
)
def test_corrupt_file_is_named(tmp_path, name, text):
    run = write_run(tmp_path, "one")
    (run / name).write_text(text)
    message = refuse(run)
    assert str(run / name) in message
    if name == "metrics.jsonl":
        assert f"line {text.count(chr(10))}" in message


def test_summary_without_a_key_or_of_a_wrong_type_names_it(tmp_path):
    run = write_run(tmp_path, "one", summary={"parameters.embedding": "many"})
    assert "parameters.embedding" in refuse(run)
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({k: v for k, v in summary.items() if k != "method"}))
    assert "method" in refuse(run)


def test_given_twice(tmp_path):
    run = write_run(tmp_path, "one")
    assert "given twice" in refuse(run, run)
    assert "also as" in refuse(run, run / ".." / "one")


def test_a_last_line_cut_off_is_left_out_and_no_records_are_none(tmp_path):
    run = write_run(tmp_path, "one")
    whole = len(load_runs([run])[0].records)
    with (run / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 99')
    assert len(load_runs([run])[0].records) == whole
    (run / "metrics.jsonl").unlink()
    (run / "plan.txt").unlink()
    (again,) = load_runs([run])
    assert (list(again.records), again.plan) == ([], None)


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path):
    run = write_run(tmp_path / "a", "one")
    shutil.copytree(run, tmp_path / "b" / "one")
    labels = [r.label for r in load_runs([run, tmp_path / "b" / "one"])]
    assert labels == [str(run), str(tmp_path / "b" / "one")]


@pytest.mark.parametrize(
    ("ranks", "named"),
    [
        ([profiled_rank(10.0, wait_ms="long")], "profiles.0.ranks.0.wait_ms"),
        ([{"step_ms": 10.0}], "profiles.0.ranks.0.compute_ms"),
        ([profiled_rank(float("nan"))], "profiles.0.ranks.0.step_ms"),
        ([profiled_rank(0.0)], "profiles: value error, a profiled window has no ranks, or steps that took no time"),
        ([], "profiles: value error, a profiled window has no ranks"),
    ],
)
def test_a_window_that_is_none_is_refused_by_name(tmp_path, ranks, named):
    run = write_run(tmp_path, "one", summary={"profiles": [profiled_window(1, ranks)]})
    with pytest.raises(ComparisonError, match=named):
        load_runs([run])
