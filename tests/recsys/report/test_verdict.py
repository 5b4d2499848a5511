"""The interval of a difference of AUCs: DeLong's formula against a double loop, the bootstrap, and its coverage."""

import numpy as np
import pytest
from scipy.special import ndtr
from scipy.stats import t

from recsys.report.verdict import AucDifference, compare_placements, compare_scores, place
from recsys.runs.metrics import measure_quality


def random_scores(random, rows=60, ties=True, separation=1.0, shared=0.6, runs=1):
    """Labels, and the scores of some runs that see part of the same noise."""
    labels = (random.random(rows) < 0.4).astype(np.uint8)
    labels[:2] = 0, 1
    noise = random.normal(size=rows)
    own = random.normal(size=(runs, rows))
    scores = separation * labels + shared * noise + np.sqrt(1 - shared**2) * own
    return (np.round(scores, 1) if ties else scores).astype(np.float32), labels


def brute_force(a, b, labels):
    """Difference of the AUCs and DeLong's variance of it, by the definition: O(m n)."""

    def kernel(scores):
        x, y = scores[labels == 1].astype(float), scores[labels == 0].astype(float)
        return np.array([[1.0 if i > j else 0.5 if i == j else 0.0 for j in y] for i in x])

    psi_a, psi_b = kernel(a), kernel(b)
    m, n = psi_a.shape
    s10 = np.cov(psi_a.mean(1), psi_b.mean(1))
    s01 = np.cov(psi_a.mean(0), psi_b.mean(0))
    s = s10 / m + s01 / n
    return psi_a.mean() - psi_b.mean(), s[0, 0] + s[1, 1] - 2 * s[0, 1]


@pytest.mark.parametrize("seed", range(5))
def test_two_runs_are_delongs_by_the_definition(seed):
    (a, b), labels = random_scores(np.random.default_rng(seed), runs=2)
    difference, variance = brute_force(a, b, labels)
    result = compare_scores([a], [b], labels)
    assert result.difference == pytest.approx(difference, abs=1e-12)
    assert result.standard_error == pytest.approx(np.sqrt(variance), rel=1e-9)
    assert not result.covers_seeds
    half = 1.959963984540054 * result.standard_error
    assert (result.low, result.high) == pytest.approx((difference - half, difference + half), rel=1e-9)


def test_several_seeds_add_their_spread_to_the_variance_of_the_rows():
    runs, labels = random_scores(np.random.default_rng(4), rows=80, runs=5)
    first, second = list(runs[:3] + np.outer([0, 0.5, 1], labels)), list(runs[3:])
    result = compare_scores(first, second, labels)

    def placements(scores):
        x, y = scores[labels == 1], scores[labels == 0]
        psi = (x[:, None] > y) + 0.5 * (x[:, None] == y)
        return psi.mean(1), psi.mean(0)

    (v10_a, v01_a), (v10_b, v01_b) = (
        [np.mean(part, axis=0) for part in zip(*map(placements, side), strict=True)] for side in (first, second)
    )
    rows = (v10_a - v10_b).var(ddof=1) / len(v10_a) + (v01_a - v01_b).var(ddof=1) / len(v01_a)
    parts = [np.var([placements(s)[0].mean() for s in side], ddof=1) / len(side) for side in (first, second)]
    variance = rows + sum(parts)
    freedom = variance**2 / (parts[0] ** 2 / 2 + parts[1] ** 2 / 1)
    assert result.standard_error == pytest.approx(np.sqrt(variance), rel=1e-9)
    assert result.high - result.difference == pytest.approx(t.ppf(0.975, freedom) * np.sqrt(variance), rel=1e-6)
    assert result.p == pytest.approx(2 * t.sf(abs(result.difference) / np.sqrt(variance), freedom), rel=1e-6)


def test_the_mean_of_the_placements_is_the_auc():
    (scores,), labels = random_scores(np.random.default_rng(1))
    auc = measure_quality(scores, labels)["auc"]
    placed = place(scores, labels)
    assert (placed.above.mean(), placed.below.mean()) == pytest.approx((auc, auc), abs=1e-12)


def test_the_paired_bootstrap_agrees():
    random = np.random.default_rng(7)
    (a, b), labels = random_scores(random, rows=600, runs=2)
    result = compare_scores([a], [b], labels)
    draws = []
    for _ in range(400):
        rows = random.integers(0, len(labels), len(labels))
        draws.append(place(a[rows], labels[rows]).above.mean() - place(b[rows], labels[rows]).above.mean())
    assert np.std(draws) == pytest.approx(result.standard_error, rel=0.1)
    assert np.quantile(draws, (0.025, 0.975)) == pytest.approx(
        (result.low, result.high), abs=0.25 * (result.high - result.low)
    )


def test_the_interval_over_seeds_covers_the_true_difference():
    """Binormal scores whose separation varies by seed, all on the same rows: the true difference is of the means over
    infinitely many seeds. 95 % is the aim; the standard error of the share here is .011."""
    random, rows, sd, k = np.random.default_rng(3), 300, 0.15, 3
    nodes, weights = np.polynomial.hermite_e.hermegauss(31)

    def true_auc(separation):
        return float((weights * ndtr((separation + sd * nodes) / np.sqrt(2))).sum() / weights.sum())

    covered = without_seeds = 0
    for _ in range(400):
        labels = (random.random(rows) < 0.4).astype(np.uint8)
        noise = random.normal(size=rows)

        def runs(separation, labels=labels, noise=noise):
            each = separation + sd * random.normal(size=(k, 1))
            return each * labels + 0.8 * noise + 0.6 * random.normal(size=(k, rows))

        a, b, truth = runs(1.2), runs(1.0), true_auc(1.2) - true_auc(1.0)
        result = compare_scores(list(a), list(b), labels)
        covered += result.low <= truth <= result.high
        single = compare_scores([a[0]], [b[0]], labels)
        without_seeds += single.low <= truth <= single.high
    assert 0.925 <= covered / 400 <= 0.99
    assert without_seeds / 400 < 0.9  # one run a side does not know how seeds vary, and says so


def test_seeds_that_do_not_vary_leave_the_rows_alone():
    (a, b), labels = random_scores(np.random.default_rng(2), runs=2)
    one, three = compare_scores([a], [b], labels), compare_scores([a] * 3, [b] * 3, labels)
    assert (three.low, three.high) == pytest.approx((one.low, one.high), rel=1e-9)
    assert three.covers_seeds
    assert three.seeds == (3, 3)


def test_the_same_scores_do_not_differ():
    (a,), labels = random_scores(np.random.default_rng(2))
    result = compare_scores([a], [a], labels)
    assert (result.difference, result.standard_error, result.p) == (0.0, 0.0, 1.0)
    assert result.judge(0.001) == "same"


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (-0.001, 0.001, "same"),
        (0.0002, 0.0009, "same"),
        (0.0011, 0.004, "better"),
        (0.0005, 0.004, "undecided"),
        (-0.004, -0.0011, "worse"),
        (-0.003, 0.003, "undecided"),
    ],
)
def test_verdicts(low, high, verdict):
    result = AucDifference((low + high) / 2, 1e-3, low, high, 0.5, (3, 3), True)
    assert result.judge(0.001) == verdict


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([1.0, 2.0], [1, 1], "AUC needs both labels: 2 scores, 2 labels, 2 positive"),
        ([1.0], [1, 0], "1 scores, 2 labels"),
        ([1.0, float("nan")], [1, 0], "1 of 2 scores are not finite"),
    ],
)
def test_what_has_no_auc_is_refused(scores, labels, message):
    with pytest.raises(ValueError, match=message):
        place(np.array(scores), np.array(labels))


def test_other_rows_and_missing_runs_are_refused():
    placed = [place(np.arange(4.0), np.array(labels)) for labels in ([0, 1, 0, 1], [0, 1, 1, 1])]
    with pytest.raises(ValueError, match="not evaluated on the same rows"):
        compare_placements(placed[:1], placed[1:])
    with pytest.raises(ValueError, match="not 1 and 0"):
        compare_placements(placed[:1], [])
