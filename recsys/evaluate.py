"""Quality of a model on a split, exact over all ranks."""

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from recsys.data import Dataset, evaluation_batches
from recsys.metrics import Quality, measure_quality
from recsys.parallelism import Ranks, on_first_rank, unwrapped

_NOT_A_ROW = -1.0
"""Label of the rows that fill up the last batches."""


@torch.no_grad()
def evaluate(model: nn.Module, dataset: Dataset, split: str, global_batch_size: int, ranks: Ranks) -> Quality:
    """Quality over every row of the split, once; the same object on every rank. Collective.

    Scores (float32) and labels of all ranks are gathered on rank 0: 8 bytes a row there.
    Raises ValueError when a score is not finite.
    """
    inner = unwrapped(model)
    inner.eval()
    scores, labels = [], []
    for batch, count in evaluation_batches(
        dataset,
        split,
        global_batch_size=global_batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        device=ranks.device,
    ):
        scores.append(inner(batch.dense_features, batch.sparse_features).reshape(-1).float())
        batch.labels[count:] = _NOT_A_ROW
        labels.append(batch.labels)
    inner.train()
    gathered = _gather(torch.stack([torch.cat(scores), torch.cat(labels)]), ranks)
    return on_first_rank(lambda: _measure(gathered))


def _gather(values: torch.Tensor, ranks: Ranks) -> np.ndarray | None:
    """(2, n) of every rank -> (2, n·R) on rank 0, None elsewhere."""
    parts = [torch.empty_like(values) for _ in range(ranks.world_size)] if ranks.is_first else None
    dist.gather(values, parts, dst=0)
    return torch.cat(parts, dim=1).cpu().numpy() if parts is not None else None


def _measure(gathered: np.ndarray | None) -> Quality:
    assert gathered is not None
    scores, labels = gathered[:, gathered[1] != _NOT_A_ROW]
    if not np.isfinite(scores).all():
        raise ValueError(
            f"{np.count_nonzero(~np.isfinite(scores))} of {len(scores)} scores are not finite: the model diverged; "
            "lower optimizer.embedding_learning_rate or optimizer.dense_learning_rate"
        )
    return measure_quality(scores, labels)
