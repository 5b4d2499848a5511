"""The quality of a model on a split: exact, over the rows of all ranks, each row once."""

from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from recsys.data.batches import evaluation_batches
from recsys.data.dataset import Dataset
from recsys.runs.metrics import measure_quality
from recsys.runs.ranks import Ranks, on_first_rank
from recsys.train.parallelism import unwrapped

_NOT_A_ROW = -1.0
"""Label of the rows that fill up the last batches, so that every rank makes the same number of equal steps."""


class Scores(NamedTuple):
    """What a model says of every row of a split, in its order: logits (n,) float32, labels (n,) float32, 0 or 1."""

    logits: np.ndarray
    labels: np.ndarray


class Evaluation(NamedTuple):
    """quality: `measure_quality`, the same on every rank. scores: on rank 0, 8 bytes a row; None elsewhere."""

    quality: dict[str, int | float]
    scores: Scores | None


def evaluate(model: nn.Module, dataset: Dataset, split: str, global_batch_size: int, ranks: Ranks) -> Evaluation:
    """Return how well the model predicts every row of the split. Collective.

    Raises ValueError on every rank when a score is not finite.
    """
    scores = _collect_scores(model, dataset, split, global_batch_size, ranks)
    return Evaluation(on_first_rank(lambda: _measure(scores)), scores)


@torch.no_grad()
def _collect_scores(
    model: nn.Module, dataset: Dataset, split: str, global_batch_size: int, ranks: Ranks
) -> Scores | None:
    """Return the scores of all ranks on rank 0, None elsewhere. Collective."""
    inner = unwrapped(model)
    inner.eval()
    logits, labels = [], []
    for batch, count in evaluation_batches(
        dataset,
        split,
        global_batch_size=global_batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        device=ranks.device,
    ):
        logits.append(inner(batch.dense_features, batch.sparse_features).reshape(-1).float())
        batch.labels[count:] = _NOT_A_ROW
        labels.append(batch.labels)
    inner.train()
    # (2, steps, local): a global batch is one rank's share after the other's
    gathered = _gather_rows(torch.stack([torch.stack(logits), torch.stack(labels)]), ranks)
    return None if gathered is None else Scores(*gathered[:, gathered[1] != _NOT_A_ROW])


def _gather_rows(values: torch.Tensor, ranks: Ranks) -> np.ndarray | None:
    """(2, steps, local) of every rank -> (2, n) on rank 0 in the order of the rows, None elsewhere."""
    parts = [torch.empty_like(values) for _ in range(ranks.world_size)] if ranks.is_first else None
    dist.gather(values, parts, dst=0)
    return torch.stack(parts, dim=2).flatten(1).cpu().numpy() if parts is not None else None


def _measure(scores: Scores | None) -> dict[str, int | float]:
    assert scores is not None
    if not np.isfinite(scores.logits).all():
        raise ValueError(
            f"{np.count_nonzero(~np.isfinite(scores.logits))} of {len(scores.logits)} scores are not finite: the model "
            "diverged; lower optimizer.embedding_learning_rate or optimizer.dense_learning_rate"
        )
    return measure_quality(scores.logits, scores.labels)
