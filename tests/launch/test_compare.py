"""The command: where its page goes, what it refuses, and its exit status; what it prints: tests/golden."""

import json
from pathlib import Path

import pytest

from launch.compare import main as command
from tests.recsys.report.fake_runs import write_demo, write_run


@pytest.fixture
def demo(tmp_path):
    return [str(path) for path in write_demo(tmp_path / "runs")]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def main(arguments):
    assert command(arguments, standalone_mode=False) is None


def refuse(capsys, *arguments):
    with pytest.raises(SystemExit) as left:
        command(arguments)
    assert left.value.code == 2
    return capsys.readouterr().err


def test_table_and_page(demo, capsys, tmp_path):
    main(demo)
    printed = capsys.readouterr().out
    for piece in (
        "demo_sharded",
        "demo_robe_single",
        "54.0 M",
        "112 MiB",
        "not reached",
        "relative time A × B",
        "Target:",
    ):
        assert piece in printed
    assert "Differs: embedding.method" in printed
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")


def test_output_in_a_directory_yet_to_be_made(demo, tmp_path):
    main([*demo, "--output", str(tmp_path / "new")])
    assert (tmp_path / "new" / "report.html").stat().st_size > 4_000_000
    assert not (tmp_path / "report.html").exists()


def test_a_page_among_the_runs_is_passed_over(demo, tmp_path):
    page = tmp_path / "runs" / "report.html"
    main([*demo, "--output", str(page.parent)])
    main([*demo, str(page), "--output", str(page.parent)])


@pytest.mark.parametrize("form", ["--json", "--markdown"])
def test_no_page_is_written_beside_json_and_markdown_unless_asked_for(demo, capsys, tmp_path, form):
    main([*demo, form])
    assert capsys.readouterr().out.startswith({"--json": "{", "--markdown": "|  | demo_sharded |"}[form])
    assert not (tmp_path / "report.html").exists()
    main([*demo, form, "--output", str(tmp_path)])
    assert (tmp_path / "report.html").exists()


def test_target_auc(demo, capsys):
    main([*demo, "--json", "--target-auc", "0.74"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["target"] == {"auc": 0.74, "split": "validation", "rule": "given on the command line"}
    assert all(arm["figures"]["target"]["observed"] for arm in printed["arms"])


@pytest.mark.parametrize("value", ["0.4", "1", "76", "high", "nan"])
def test_an_impossible_target_is_refused(demo, capsys, value):
    assert "--target-auc" in refuse(capsys, *demo, "--target-auc", value)


def test_unlike_runs_are_refused_unless_allowed(demo, capsys, tmp_path):
    other = str(write_run(tmp_path, "other", config={"training.epochs": 3.0, "evaluation.patience": 1}))
    error = refuse(capsys, *demo, other)
    assert "training.epochs: 2.0 (demo_sharded, demo_robe, demo_robe_single), 3.0 (other)" in error
    assert "evaluation.patience: 0 (demo_sharded, demo_robe, demo_robe_single), 1 (other)" in error
    assert "--allow-differences" in error
    assert not Path("report.html").exists()
    main([*demo, other, "--allow-differences"])
    printed = capsys.readouterr().out
    assert printed.lstrip().startswith("Not a fair comparison")
    assert "runs differ in training.epochs" in printed


def test_bad_paths_are_named(demo, capsys, tmp_path):
    assert "nowhere does not exist" in refuse(capsys, *demo, "nowhere")
    assert "given twice" in refuse(capsys, demo[0], demo[0])
    (tmp_path / "runs" / "demo_robe" / "summary.json").write_text("{")
    assert f"{demo[1]}/summary.json is corrupt" in refuse(capsys, *demo)
    assert "Missing argument 'runs/<name>...'" in refuse(capsys)


def test_a_page_that_cannot_be_written_is_an_error(demo, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refuse(capsys, *demo, "--output", str(tmp_path / "file" / "directory"))
    assert "is a file" in refuse(capsys, *demo, "--output", str(tmp_path / "file"))
    assert "--json and --markdown" in refuse(capsys, *demo, "--json", "--markdown")


def test_unfinished_runs_are_shown_with_their_state(demo, capsys, tmp_path):
    cut = write_run(tmp_path, "cut", compression=10.0, summary={"status": "interrupted", "stop_reason": "interrupted"})
    main([*demo, str(cut)])
    printed = capsys.readouterr().out
    assert "interrupted" in printed
    assert "cut is not finished but interrupted" in printed
