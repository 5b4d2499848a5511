"""The probabilities of the labels, and what they score, against brute force and the labels themselves."""

import math
from pathlib import Path

import numpy as np
import pytest

from recsys.data.synthetic import Options, SyntheticCriteo
from recsys.data.synthetic_teacher import best_possible
from recsys.runs.metrics import measure_quality


@pytest.fixture(scope="module")
def full():
    return SyntheticCriteo.build(Options(), Path())


@pytest.mark.parametrize(
    ("options", "auc", "log_loss"),
    [
        ({}, 0.804, 0.439),
        ({"scale": 0.1}, 0.804, 0.439),
        ({"cardinalities": "criteo_tb", "base_rate": 0.03}, 0.850, 0.103),
    ],
)
def test_labels_are_drawn_from_the_probabilities(options, auc, log_loss):
    dataset, indices = SyntheticCriteo.build(Options.model_validate(options), Path()), np.arange(100_000)
    best, rate = dataset.best_possible(), dataset.options.base_rate
    assert best.auc == pytest.approx(auc, abs=0.006)
    assert best.log_loss == pytest.approx(log_loss, abs=0.003)
    assert best.base_rate == pytest.approx(rate, rel=0.02)
    labels, p = dataset.read("test", indices).labels, dataset.probabilities("test", indices)
    realized = measure_quality(np.log(p / (1 - p)), labels)
    positives = int(labels.sum())
    assert abs(labels.mean() - p.mean()) < 4.5 * math.sqrt(rate * (1 - rate) / len(p))
    assert abs(realized["auc"] - best.auc) < 4.5 * math.sqrt(best.auc * (1 - best.auc) / positives)  # upper bound
    spread = np.std(np.log(p / (1 - p)) * np.sqrt(p * (1 - p)))
    assert abs(realized["log_loss"] - best.log_loss) < 4.5 * max(spread, 1.0) / math.sqrt(len(p))
    for part in np.array_split(np.argsort(p), 20):
        assert abs((labels[part] - p[part]).sum()) < 4.5 * math.sqrt((p[part] * (1 - p[part])).sum())


def test_labels_are_independent_given_the_probabilities(full):
    indices = np.arange(100_000)
    rows, p = full.read("train", indices), full.probabilities("train", indices)
    noise = (rows.labels - p) / np.sqrt(p * (1 - p))
    others = [noise[1:], noise[2:], *rows.dense.T, *(rows.ids.T & 1)]
    for other in others:
        assert abs(np.corrcoef(noise[: len(other)], other)[0, 1]) < 4.5 / math.sqrt(len(indices))


def test_best_possible_is_the_expectation_over_labels():
    p = np.random.default_rng(0).uniform(0.02, 0.9, 300)
    pairs = [(p[i] * (1 - p[j]), p[i] > p[j]) for i in range(300) for j in range(300) if i != j]
    best = best_possible(p)
    assert best.auc == pytest.approx(sum(w for w, right in pairs if right) / sum(w for w, _ in pairs), abs=1e-12)
    entropy = [-v * math.log(v) - (1 - v) * math.log(1 - v) for v in p.tolist()]
    assert best.log_loss == pytest.approx(sum(entropy) / 300, abs=1e-12)
    assert best.base_rate == pytest.approx(p.mean())


def test_probabilities_are_a_function_of_what_a_model_is_given(full):
    """Equal integers up to blank = 0, and equal ids, give equal probabilities."""
    integers, ids = full._columns.draw(full._row_hashes("train", np.arange(2000)))
    assert (integers < 0).any()
    known = full._teacher.probabilities(np.maximum(integers, 0), ids)
    assert np.array_equal(known, full._teacher.probabilities(integers, ids))
    assert np.array_equal(known, full.probabilities("train", np.arange(2000)))


def test_rare_ids_have_small_effects(full):
    """The standard deviation of an id's main effect declines as 1 / √(1 + id / r)."""
    effects, integers = full._teacher.effects, np.zeros((13, 4000), np.int64)
    deviations = []
    for first in (1, 10_000, 1_000_000):
        ids = np.zeros((26, 4000), np.int64)
        ids[2] = first + np.arange(4000)
        deviations.append(effects.terms(integers, ids)[0].std())
    assert deviations[0] > 2 * deviations[1] > 8 * deviations[2]
    assert deviations[1] / deviations[2] == pytest.approx(math.sqrt(1_002_000 / 12_000), rel=0.05)
