"""Sentences about a comparison follow from its figures."""

import pytest

from recsys.compare.comparison import compare
from recsys.compare.outcome import build_outcome
from tests.recsys.report.fake_runs import write_demo, write_run


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return build_outcome(compare(write_demo(tmp_path_factory.mktemp("demo"))))


def against_full(tmp_path, robe):
    """The outcome, and what it says of ROBE with these evaluations."""
    full = write_run(tmp_path, "full", method="sharded", evaluations=[(10, 512, 0.5, 0.70), (20, 1024, 1.0, 0.76)])
    run = write_run(tmp_path, "robe", compression=1000.0, evaluations=robe, step_ms=7.1)
    outcome = build_outcome(compare([full, run]))
    ((label, text),) = outcome.findings
    assert label == "robe"
    return outcome, text


def test_behind_and_not_reached(tmp_path):
    outcome, text = against_full(tmp_path, [(7, 512, 0.5, 0.68), (14, 1024, 1.0, 0.75)])
    assert outcome.title == "robe against full"
    assert "0.71× the step time" in text
    assert "test AUC 0.7488 ± 0.0021 against 0.7588 ± 0.0021" in text
    assert "within the ±" not in text
    assert "does not reach the target 0.7600 within 1 epoch" in text


def test_a_crossing_in_time_is_told(tmp_path):
    # Full stands at .724 at 14 s. robe: .72 against .70 at 10 s, .73 against .76 at 20 s: level at 14 s.
    _, text = against_full(tmp_path, [(10, 512, 0.5, 0.72), (20, 1024, 1.0, 0.73)])
    assert "At equal training time (10.0 s to 20.0 s) its validation AUC is ahead until 14.0 s, behind after." in text


def test_reached_and_within_the_noise(tmp_path):
    _, text = against_full(tmp_path, [(10, 512, 0.5, 0.71), (15, 1024, 1.0, 0.7615)])
    assert "a difference within the ±" in text
    assert "reaches the target 0.7600 after 15.0 s of training, 1 epoch (0.75× the baseline's time)" in text
    assert text.endswith("At equal training time (10.0 s to 15.0 s) its validation AUC is ahead throughout.")


def test_subject_names_model_data_threads_and_hardware(demo):
    for piece in ("3 arms of the same dlrm", "synthetic", "400 k training rows", "2 threads on Xeon", "demo_sharded"):
        assert piece in demo.subject


def test_shares_of_communication_stand_against_the_baselines(demo, tmp_path):
    profiled = build_outcome(compare(write_demo(tmp_path, windows=2)))
    assert "step 9.3 ms, 35 % of it exposed communication" in profiled.subject
    (_, robe), (_, single) = profiled.findings
    assert "25 % of its step is exposed communication, against 35 %" in robe
    assert "none of its step is exposed communication, against 35 %" in single
    assert "communication" not in demo.subject + demo.findings[0][1]


def test_a_baseline_that_was_not_profiled_has_no_share(tmp_path):
    runs = [write_run(tmp_path, "plain", method="sharded"), write_run(tmp_path, "timed", compression=10.0, windows=1)]
    ((_, text),) = build_outcome(compare(runs)).findings
    assert "25 % of its step is exposed communication;" in text
