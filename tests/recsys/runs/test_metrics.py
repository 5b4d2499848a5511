import math

import numpy as np
import pytest

from recsys.runs.metrics import measure_quality


def test_quality_by_hand():
    logits = np.array([2.0, -1.0, 0.5, 0.5])
    labels = np.array([1.0, 0.0, 1.0, 0.0])
    quality = measure_quality(logits, labels)
    # Pairs (positive, negative): 2 > -1, 2 > .5, .5 > -1, .5 = .5 (a half)
    assert quality["auc"] == pytest.approx(3.5 / 4)
    p = 1 / (1 + np.exp(-logits))
    expected = -np.mean(labels * np.log(p) + (1 - labels) * np.log(1 - p))
    assert quality["log_loss"] == pytest.approx(expected)
    assert quality["ne"] == pytest.approx(expected / math.log(2))
    assert quality["calibration"] == pytest.approx(p.mean() / 0.5)
    assert (quality["rows"], quality["positives"]) == (4, 2)


def test_auc_counts_all_pairs_with_ties():
    rng = np.random.default_rng(0)
    logits = rng.integers(-5, 6, 400).astype(np.float32)
    labels = rng.integers(0, 2, 400).astype(np.float32)
    positive, negative = logits[labels == 1][:, None], logits[labels == 0][None, :]
    pairs = (positive > negative).mean() + 0.5 * (positive == negative).mean()
    assert measure_quality(logits, labels)["auc"] == pytest.approx(pairs, abs=1e-12)


def test_extreme_logits_stay_finite():
    quality = measure_quality(np.array([1e4, -1e4, -1e4, 1e4]), np.array([1.0, 0.0, 1.0, 0.0]))
    assert quality["log_loss"] == pytest.approx(5000)


def test_one_label_is_refused():
    with pytest.raises(ValueError, match=r"3 rows, 0 positive"):
        measure_quality(np.zeros(3), np.zeros(3))


def test_standard_error_of_the_auc_matches_resampling():
    rng = np.random.default_rng(1)
    labels = np.repeat([1.0, 0.0], [60, 140])
    draws = [np.concatenate([rng.normal(1, 1, 60), rng.normal(0, 2, 140)]) for _ in range(600)]
    found = [measure_quality(scores, labels) for scores in draws]
    spread = np.std([quality["auc"] for quality in found])
    assert np.mean([quality["auc_se"] for quality in found]) == pytest.approx(spread, rel=0.08)
