"""Whether one model ranks better than another: the difference of their AUCs on the same test rows, with its interval.

Two runs: DeLong, DeLong & Clarke-Pearson 1988. With m positives and n negatives, ψ(x, y) = 1, ½, 0 for x >, =, < y,

    V10[i] = Σ_j ψ(x_i, y_j) / n   for each positive,   V01[j] = Σ_i ψ(x_i, y_j) / m   for each negative,
    AUC = mean V10 = mean V01,     var(AUC_a − AUC_b) = var(V10_a − V10_b) / m + var(V01_a − V01_b) / n,

so what both runs find hard cancels. V10 and V01 come from mid-ranks (Sun & Xu 2014), O((m + n) log(m + n)).

Several seeds on both sides: AUC_as = θ_a + seed_as + rows_a, seeds independent of each other, the rows drawn once for
all. The difference of the means over k_a and k_b seeds then has the variance

    s_a² / k_a + s_b² / k_b + v,    v: DeLong's, of V10 and V01 averaged over the seeds of each side,

s² between seeds. What a seed and a row do together is in both terms: the interval is a little too wide, never too
narrow. Its t has Welch and Satterthwaite's degrees of freedom, v counting as known. Runs of the same seed on both sides
are taken for independent. One seed on a side says nothing of other seeds: the interval is then that of these runs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from scipy.stats import rankdata, t

Verdict = Literal["better", "same", "worse", "undecided"]
CONFIDENCE = 0.95


class Placements(NamedTuple):
    """Hold DeLong's placement values of one run's scores; the mean of either is the AUC.

    above: for each positive row the share of negatives below it, V10 (m,) float64. below: for each negative row the
    share of positives above it, V01 (n,) float64.
    """

    above: np.ndarray
    below: np.ndarray


@dataclass(frozen=True)
class AucDifference:
    """Hold the AUC of one model minus that of another, with its interval.

    low and high: ends of the 95 % interval. p: of no difference, two-sided. seeds: runs on both sides. covers_seeds:
    whether the interval holds for other seeds too, or for these runs alone.
    """

    difference: float
    standard_error: float
    low: float
    high: float
    p: float
    seeds: tuple[int, int]
    covers_seeds: bool

    def judge(self, epsilon: float) -> Verdict:
        """Return same where the whole interval is within ± epsilon, better or worse where all of it is beyond."""
        if -epsilon <= self.low and self.high <= epsilon:
            return "same"
        if self.low > epsilon:
            return "better"
        return "worse" if self.high < -epsilon else "undecided"


def place(scores: np.ndarray, labels: np.ndarray) -> Placements:
    """Return the placement values of scores (r,) for labels (r,) in {0, 1}.

    Raises ValueError where they do not belong together, for one label only, and for scores that are not finite.
    """
    positive = labels == 1
    m, n = int(positive.sum()), int((~positive).sum())
    if len(scores) != len(labels) or not m or not n:
        raise ValueError(f"AUC needs both labels: {len(scores)} scores, {len(labels)} labels, {m} positive")
    if not np.isfinite(scores).all():
        raise ValueError(f"{np.count_nonzero(~np.isfinite(scores))} of {len(scores)} scores are not finite")
    scores = scores.astype(np.float64)
    ranks = rankdata(scores)
    above = (ranks[positive] - rankdata(scores[positive])) / n
    below = 1 - (ranks[~positive] - rankdata(scores[~positive])) / m
    return Placements(above, below)


def compare_scores(first: Sequence[np.ndarray], second: Sequence[np.ndarray], labels: np.ndarray) -> AucDifference:
    """Return the AUC of the first model minus the second's, from the scores (r,) of each seed on the same rows."""
    return compare_placements([place(s, labels) for s in first], [place(s, labels) for s in second])


def compare_placements(first: Sequence[Placements], second: Sequence[Placements]) -> AucDifference:
    """Return the AUC of the first side's runs minus the second's, all on the same rows.

    Raises ValueError for a side without runs, and for runs on other rows.
    """
    if not first or not second:
        raise ValueError(f"a difference needs runs on both sides, not {len(first)} and {len(second)}")
    if len({(len(run.above), len(run.below)) for run in (*first, *second)}) > 1:
        raise ValueError("the runs were not evaluated on the same rows: they differ in how many are positive")
    difference = _mean_auc(first) - _mean_auc(second)
    above = _mean([run.above for run in first]) - _mean([run.above for run in second])
    below = _mean([run.below for run in first]) - _mean([run.below for run in second])
    rows = _variance_of_mean(above) + _variance_of_mean(below)
    covers_seeds = len(first) > 1 and len(second) > 1
    seeds = [_variance_of_mean(np.array([_mean_auc([r]) for r in side])) for side in (first, second) if covers_seeds]
    variance = rows + sum(seeds)
    freedom = _degrees_of_freedom(variance, seeds, [len(first) - 1, len(second) - 1])
    error = math.sqrt(variance)
    reach = float(t.ppf((1 + CONFIDENCE) / 2, freedom)) * error
    return AucDifference(
        difference=difference,
        standard_error=error,
        low=difference - reach,
        high=difference + reach,
        p=float(2 * t.sf(abs(difference) / error, freedom)) if error else float(difference == 0),
        seeds=(len(first), len(second)),
        covers_seeds=covers_seeds,
    )


def _mean(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.mean(np.stack(parts), axis=0)


def _mean_auc(runs: Sequence[Placements]) -> float:
    return float(np.mean([run.above.mean() for run in runs]))


def _variance_of_mean(values: np.ndarray) -> float:
    return float(values.var(ddof=1)) / len(values) if len(values) > 1 else 0.0


def _degrees_of_freedom(variance: float, seeds: Sequence[float], freedoms: Sequence[int]) -> float:
    """Return Welch and Satterthwaite's: total² / Σ part² / its freedom; infinite where the seeds do not vary."""
    parts = sum(part**2 / freedom for part, freedom in zip(seeds, freedoms, strict=False))
    return variance**2 / parts if parts > 0 else math.inf
