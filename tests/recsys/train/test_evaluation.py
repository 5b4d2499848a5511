"""Evaluation equals the metrics of all rows at once, on any number of ranks, though batches are filled up."""

import numpy as np
import pytest
import torch

from recsys.runs.metrics import measure_quality
from recsys.runs.ranks import Ranks
from recsys.train.evaluation import evaluate
from tests.ranks import run_ranks
from tests.recsys.data.array_rows import ArrayRows, make_rows

ROWS = 45


class Scored(ArrayRows):
    """The dense value of row i is its score, and the score says something about the label."""

    def __init__(self):
        rng = np.random.default_rng(4)
        self.labels = rng.integers(0, 2, ROWS).astype(np.float32)
        self.scores = (self.labels + rng.normal(size=ROWS)).astype(np.float32)
        # The last row is the one that fills up: were it counted again, every metric would move.
        self.scores[-1], self.labels[-1] = 9.0, 0.0
        super().__init__(test=make_rows(self.labels, np.arange(ROWS)[:, None], self.scores[:, None]))


class FirstDense(torch.nn.Module):
    def forward(self, dense_features, sparse_features):
        return dense_features


def _evaluate(rank, world_size):
    return evaluate(FirstDense(), Scored(), "test", 8, Ranks(rank, world_size, torch.device("cpu")))


@pytest.mark.dist
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_row_counts_once_and_scores_come_in_the_order_of_the_rows(world_size):
    data = Scored()
    expected = measure_quality(data.scores, data.labels)
    assert expected["rows"] == ROWS
    (_, found), *others = evaluations = run_ranks(_evaluate, world_size)
    for quality, _ in evaluations:
        assert quality == pytest.approx(expected, rel=1e-12)  # sums in another order
    np.testing.assert_array_equal(found.logits, data.scores)
    np.testing.assert_array_equal(found.labels, data.labels)
    assert [scores for _, scores in others] == [None] * (world_size - 1)


def _diverged(rank, world_size):
    class Diverged(FirstDense):
        def forward(self, dense_features, sparse_features):
            return dense_features * (float("nan") if rank == 1 else 1)

    try:
        evaluate(Diverged(), Scored(), "test", 8, Ranks(rank, world_size, torch.device("cpu")))
    except ValueError as error:
        return str(error)


@pytest.mark.dist
def test_scores_that_are_not_finite_fail_on_every_rank_with_advice():
    for message in run_ranks(_diverged, 2):
        assert "21 of 45 scores are not finite" in message
        assert "optimizer.embedding_learning_rate" in message
