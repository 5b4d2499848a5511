"""The summary of a run: what is written is what is read, in this version and from earlier ones."""

import json

import pytest
from pydantic import ValidationError

from tests.recsys.runs.summaries import summary_of

WINDOW = {
    "step": 11, "num_steps": 3, "clock_error_ms": 0.5,
    "ranks": [dict.fromkeys(
        ("step_ms", "compute_ms", "comm_ms", "exposed_comm_ms", "overlap_ms", "wait_ms", "exposed_wait_ms", "other_ms",
         "data_loading_ms", "wall_ms", "blocked_ms"), 1.0) | {"unmatched": 0, "collectives": {},
        "phases": {"other": {"ms": 1.0, "compute_ms": 0.5, "exposed_comm_ms": 0.25}}}],
}  # fmt: skip


def test_what_is_written_is_read():
    summary = summary_of(profiles=[WINDOW], best={"step": 10, "test_auc": 1.0}, target=None)
    text = json.dumps(summary.model_dump())
    assert type(summary).model_validate_json(text) == summary
    assert '"best": {"step": 10, "test_auc": 1.0}' in text, "steps are whole numbers, figures are not"


def test_a_summary_of_an_earlier_version_is_read():
    summary = summary_of(compression={"asked": 10.0, "obtained": 10.5}, once_written="ignored")
    assert (summary.compression.target, summary.compression.actual) == (10.0, 10.5)
    assert (summary.evaluation_time_s, summary.profiles, summary.error) == (None, [], None)


@pytest.mark.parametrize(
    "wrong",
    [
        {"status": "lost"},
        {"train_time_s": float("nan")},
        {"bytes_per_rank": {"embedding": [], "embedding_optimizer": []}},
        {"profiles": [WINDOW | {"ranks": []}]},
        {"profiles": [WINDOW | {"ranks": [WINDOW["ranks"][0] | {"step_ms": 0.0}]}]},
    ],
)
def test_what_is_no_summary_is_refused(wrong):
    with pytest.raises(ValidationError):
        summary_of(**wrong)
