"""Summaries of runs for tests that care for a field or two."""

from typing import Any

from recsys.runs.summary import RunSummary

FACTS: dict[str, Any] = {
    "name": "run", "architecture": "dlrm", "method": "robe", "placement": "replicate", "sharding": None,
    "dataset": "synthetic", "data_fingerprint": "8c1f", "seed": 0, "device": "cpu", "world_size": 2,
    "threads_per_rank": 1, "global_batch_size": 512, "train_rows": 1000, "test_rows": 200,
    "parameters": {"dense": 10, "embedding": 20, "embedding_full": 200},
    "compression": {"target": 10.0, "actual": 10.0},
    "bytes_per_rank": {"embedding": [80, 80], "embedding_optimizer": [0, 0]}, "selected_on": "validation",
}  # fmt: skip


def summary_of(status: str = "finished", **changes: Any) -> RunSummary:
    return RunSummary.model_validate(FACTS | {"status": status} | changes)
