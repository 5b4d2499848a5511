"""The command: what it prints in each form, where the page goes, and its exit status."""

import json
from pathlib import Path

import pytest

from launch.compare import main as command
from tests.recsys.report.fake_runs import write_demo, write_run

FIGURES = {
    "test_auc", "test_log_loss", "test_ne", "test_calibration", "target_split_auc", "best_epoch", "embedding_bytes",
    "embedding_optimizer_bytes", "step_ms_p50", "step_ms_p95", "data_ms_p50", "data_ms_p95", "samples_per_s",
    "time", "train_time_s", "epochs", "samples", "peak_memory_gib", "target",
}  # fmt: skip
TIME = {
    "windows", "steps", "exposed_share", "exposed_share_lowest", "exposed_share_highest", "overlap_share", "overhead",
    "clock_error_ms", "mean", "ranks",
}  # fmt: skip
RANK = {
    "step_ms", "compute_ms", "comm_ms", "exposed_comm_ms", "overlap_ms", "wait_ms", "exposed_wait_ms", "other_ms",
    "data_loading_ms", "wall_ms", "blocked_ms", "unmatched", "phases", "collectives",
}  # fmt: skip


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


def test_json_is_complete_and_alone_on_stdout(demo, capsys, tmp_path):
    main([*demo, "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert set(printed) == {
        "version", "baseline", "target", "best_possible", "setups", "runs", "varied", "differences", "caveats"
    }  # fmt: skip
    assert printed["baseline"] == "demo_sharded"
    assert set(printed["target"]) == {"auc", "split", "rule"}
    assert printed["best_possible"] == {"auc": 0.8041, "log_loss": 0.4389, "base_rate": 0.2531}
    for setup in printed["setups"]:
        assert set(setup["figures"]) == FIGURES
        assert set(setup["ratios"]) == {"step_time", "embedding_bytes", "time_to_target", "relative_time"}
        assert {"label", "method", "placement", "sharding", "seeds", "status", "parameters", "compression"} <= set(
            setup
        )
    assert set(printed["setups"][1]["figures"]["test_auc"]) == {"mean", "plus_minus", "source", "n"}
    assert printed["setups"][1]["ratios"]["step_time"] == pytest.approx(6.6 / 9.3)
    assert printed["setups"][1]["figures"]["target"] == {"runs": 0, "observed": None, "interpolated": None}
    assert [setup["figures"]["time"] for setup in printed["setups"]] == [None] * 3
    assert {run["label"] for run in printed["runs"]} == {"demo_sharded", "demo_robe", "demo_robe_single"}
    assert all(len(run["commit"]) == 40 for run in printed["runs"])
    assert not (tmp_path / "report.html").exists()


def test_json_of_profiled_runs_says_where_the_time_goes(tmp_path, capsys):
    main([*map(str, write_demo(tmp_path / "runs", windows=2)), "--json"])
    printed = json.loads(capsys.readouterr().out)
    times = [setup["figures"]["time"] for setup in printed["setups"]]
    assert [len(time["ranks"]) for time in times] == [2, 2, 1]
    for time in times:
        assert set(time) == TIME
        for rank in (time["mean"], *time["ranks"]):
            assert set(rank) == RANK
            assert all(set(phase) == {"ms", "compute_ms", "exposed_comm_ms"} for phase in rank["phases"].values())
            for kind in rank["collectives"].values():
                assert set(kind) == {"count", "bytes", "ms", "wait_ms", "transfer_ms"}
    assert set(times[0]["mean"]["collectives"]) == {"all_reduce", "all_to_all"}
    assert [len(run["profiles"]) for run in printed["runs"]] == [2, 2, 2]


def test_table_of_profiled_runs_has_the_exposed_share_and_the_bytes(tmp_path, capsys, demo):
    main([*map(str, write_demo(tmp_path / "profiled", windows=2)), "--markdown"])
    printed = capsys.readouterr().out
    assert "| exposed communication | 35 % (3.91 ms, waiting 0.56) | 25 % (1.98 ms, waiting 0.40) | none |" in printed
    assert "| 977 KiB (all_reduce 293 KiB in 1, all_to_all 684 KiB in 5) | 293 KiB (all_red" in printed
    main([*demo, "--markdown"])
    assert "communicat" not in capsys.readouterr().out


def test_json_of_a_run_without_evaluations(tmp_path, capsys):
    run = write_run(tmp_path, "fresh", step_ms=None, evaluations=[], summary={"status": "running"})
    main([str(run), "--json"])
    (setup,) = json.loads(capsys.readouterr().out)["setups"]
    assert (setup["status"], setup["figures"]["test_auc"], setup["figures"]["target"]) == (["running"], None, None)


def test_markdown(demo, capsys):
    main([*demo, "--markdown"])
    printed = capsys.readouterr().out
    assert printed.startswith("|  | demo_sharded | demo_robe | demo_robe_single |\n| --- | ---: |")
    assert "\n- Target: validation AUC" in printed


def test_target_auc(demo, capsys):
    main([*demo, "--json", "--target-auc", "0.74"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["target"] == {"auc": 0.74, "split": "validation", "rule": "given on the command line"}
    assert all(setup["figures"]["target"]["observed"] for setup in printed["setups"])


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
