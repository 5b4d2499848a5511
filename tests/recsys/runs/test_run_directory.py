import json

import pytest

from recsys.runs.run_directory import RunDir
from recsys.runs.summary import Failure
from tests.recsys.runs.summaries import summary_of


@pytest.fixture
def run_dir(tmp_path):
    return RunDir(tmp_path / "run")


def finished(run_dir, status="finished"):
    run_dir.start("[run]\n", {}, resume=True)
    run_dir.write_summary(summary_of(status))
    for step in (10, 20, 30):
        run_dir.append_record({"step": step})


def open_and_close(run_dir, **how):
    with run_dir.open_for_writing(**how):
        pass


def test_a_finished_run_is_kept_unless_asked_and_others_may_go(run_dir):
    open_and_close(run_dir, overwrite=False, resume=True)
    finished(run_dir)
    with pytest.raises(ValueError, match="holds a finished run"):
        open_and_close(run_dir, overwrite=False, resume=True)
    open_and_close(run_dir, overwrite=True, resume=True)
    (run_dir.checkpoints / "step_30").mkdir(parents=True)
    open_and_close(run_dir, overwrite=False, resume=True)  # there is something to continue from
    with pytest.raises(ValueError, match=r"run\.overwrite=true"):
        open_and_close(run_dir, overwrite=False, resume=False)
    run_dir.write_summary(summary_of("failed"))
    open_and_close(run_dir, overwrite=False, resume=False)


@pytest.mark.parametrize(
    ("resume", "checkpoints", "kept"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_a_new_run_finds_nothing_of_an_old_one_but_what_it_continues(run_dir, resume, checkpoints, kept):
    """Otherwise a start that fails early would leave the old figures under the new config."""
    finished(run_dir)
    if checkpoints:
        (run_dir.checkpoints / "step_30").mkdir(parents=True)
    run_dir.start("[run]\n", {}, resume=resume)
    assert run_dir.exists() == kept
    assert run_dir.checkpoints.exists() == kept
    assert len(list(run_dir.records())) == (3 if kept else 0)


def test_the_first_rank_to_say_how_it_ended_is_believed(run_dir):
    finished(run_dir, "running")
    run_dir.mark_ended("failed", Failure(rank=1, message="the cause"))
    run_dir.mark_ended("failed", Failure(rank=0, message="connection closed by peer"))
    summary = run_dir.read_summary()
    assert (summary.status, summary.stop_reason) == ("failed", "failed")
    assert summary.error == Failure(rank=1, message="the cause")


def test_marking_the_end_of_a_run_that_never_began_or_has_finished_changes_nothing(run_dir):
    run_dir.mark_ended("failed", Failure(rank=0, message="too early"))
    assert not run_dir.exists()
    finished(run_dir)
    run_dir.mark_ended("interrupted", Failure(rank=0, message="too late"))
    assert run_dir.read_summary() == summary_of("finished")


def test_records_survive_a_crash_in_the_middle_of_a_line(run_dir):
    finished(run_dir)
    with (run_dir.path / "metrics.jsonl").open("a") as lines:
        lines.write(json.dumps({"step": 40})[:-3])
    assert [record["step"] for record in run_dir.records()] == [10, 20, 30]
    run_dir.keep_records_until(20)
    assert [record["step"] for record in run_dir.records()] == [10, 20]


def test_another_directory_is_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is not a run directory: summary.json is missing"):
        RunDir(tmp_path).read_summary()
