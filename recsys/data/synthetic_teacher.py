"""Who clicks: the true probability behind every generated label.

    logit = bias + s₁·Σ_f a_f(id) + s₂·Σ_{i<j} ⟨v_i, v_j⟩ + s₃·Σ_j c_j·h_j        (v_i of 26 features and 13 integers)

    a_f(id) = g_f·ε₀ / √(1 + id / r_f)        v_f(id) = w_f³·(ε₁, ε₂, ε₃) / √(1 + id / r_f)
    h_j = 2x / (x + median_j) − 1             v_j = h_j·d_j / 2

ε₀..ε₃ are uniform with variance 1, from one 64-bit hash of (feature, id): effects exist for any table size without
being stored. Ids are numbered by falling frequency, and r_f is the rank seen once in `rare_id_rows` rows: rarer ids
matter less and less, as trained embeddings of rare ids have ever smaller norms. g_f in [½, 3/2), w_f in [0, 1) (cubed:
few features interact) and c_j, d_j in [−1, 1) are drawn once per seed. s₁, s₂, s₃ bring the three terms to the chosen
standard deviations and bias brings the mean probability to the chosen base rate, on rows that belong to no split.

A missing integer counts as 0, exactly as models see it, so the probability is a function of what a model is given and
the best possible quality is one that a model could reach.

All but the calibration's four numbers is made of exactly rounded operations in a fixed order, see `recsys.data.exact`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from recsys.data import exact
from recsys.data.dataset import BestPossible
from recsys.data.synthetic_columns import INTEGER_COLUMNS, Columns

LANES = 4  # of 16 bits in an id's hash: its main effect and three directions of interaction


class Effects:
    """Computes the three terms of the logit before scaling."""

    def __init__(self, columns: Columns, rare_id_rows: float, seed: int) -> None:
        num_features = len(columns.columns)
        self._keys = exact.random_keys(seed, "effects", num_features)[:, None]
        main = exact.unit_interval(exact.random_keys(seed, "main importance", num_features)) + 0.5
        interaction = exact.unit_interval(exact.random_keys(seed, "interaction importance", num_features))
        cubed = interaction * interaction * interaction
        # a lane is uniform on [−2^15, 2^15), whose standard deviation is 2^15 / √3
        amplitude = np.stack([main, cubed, cubed, cubed], axis=1) * (np.sqrt(3.0) / 2**15)
        self._amplitude = amplitude.astype(np.float32)[:, :, None]
        ranks = [
            c.rank_of_probability(n, 1 / rare_id_rows) for c, n in zip(columns.columns, columns.num_ids, strict=True)
        ]
        self._inverse_rank = (1 / np.array(ranks)).astype(np.float32)[:, None]
        medians = exact.exp(np.array([c.log_mean for c in INTEGER_COLUMNS]))
        self._medians = medians.astype(np.float32)[:, None]
        num_integers = len(INTEGER_COLUMNS)
        weights = exact.unit_interval(exact.random_keys(seed, "integers", LANES * num_integers)) * 2 - 1
        weights = weights.reshape(num_integers, LANES, 1) * np.array([[1], [0.5], [0.5], [0.5]])
        self._integer_weights = weights.astype(np.float32)

    def terms(self, integers: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Return (3, n) float32, main, interaction and numeric, of integers (13, n) and ids (26, n), int64.

        Sums run column by column, never along a numpy axis: its order of adding depends on the array's shape, and a
        row's bits must not depend on how many rows are asked for.
        """
        n = ids.shape[1]
        hashes = exact.mix(ids, self._keys)
        lanes = hashes.astype("<u8", copy=False).view("<i2").reshape(-1, n, LANES)
        effects = lanes.transpose(0, 2, 1).astype(np.float32, order="C")
        damping = ids.astype(np.float32) * self._inverse_rank
        damping += 1
        np.divide(1, np.sqrt(damping, out=damping), out=damping)
        total, squares, scratch = np.zeros((3, LANES, n), np.float32)
        for effect, damp, amplitude in zip(effects, damping, self._amplitude, strict=True):
            effect *= damp
            effect *= amplitude
            total += effect
            squares += np.multiply(effect, effect, out=scratch)
        main, numeric = total[0].copy(), np.zeros(n, np.float32)
        counts = np.maximum(integers, 0).astype(np.float32)
        saturations = 2 * counts / (counts + self._medians) - 1
        for saturation, weights in zip(saturations, self._integer_weights, strict=True):
            effect = np.multiply(saturation, weights, out=scratch)
            numeric += effect[0]
            total += effect
            squares += effect * effect
        total *= total
        total -= squares
        return np.stack([main, (total[1] + total[2] + total[3]) * np.float32(0.5), numeric])


@dataclass(frozen=True)
class Teacher:
    """Gives the probability of a click by calibrated effects."""

    effects: Effects
    scales: np.ndarray
    """(3,) float32: of the main, interaction and numeric term."""
    bias: np.float32

    def probabilities(self, integers: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Return (n,) float64 of integers (13, n) and ids (26, n), int64."""
        main, interaction, numeric = self.effects.terms(integers, ids)
        logits = self.scales[0] * main + self.scales[1] * interaction + self.scales[2] * numeric + self.bias
        return exact.sigmoid(logits.astype(np.float64))


def calibrate(effects: Effects, terms: np.ndarray, deviations: Sequence[float], base_rate: float) -> Teacher:
    """Return the teacher whose terms have these deviations and whose mean probability is base_rate, on some rows.

    deviations: standard ones, of the three terms. terms: (3, n), what the effects give for these rows.

    The four numbers are rounded to 4 digits: numpy's means differ between machines in the last bits.
    """
    scales = np.round(np.array(deviations) / terms.std(axis=1, dtype=np.float64), 4).astype(np.float32)
    logits = (scales[:, None] * terms).sum(axis=0, dtype=np.float64)
    low, high = -30.0, 30.0
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (middle, high) if exact.sigmoid(logits + middle).mean() < base_rate else (low, middle)
    return Teacher(effects, scales, np.float32(round((low + high) / 2, 4)))


def best_possible(probabilities: np.ndarray) -> BestPossible:
    """Return what true probabilities p, (n,) float64, score, each figure an expectation over the labels.

    log loss: mean entropy −p·ln p − (1 − p)·ln(1 − p). AUC: expected number of pairs (click above no click) over
    expected number of pairs, a row never being its own partner.
    """
    p = np.sort(probabilities)
    q = 1 - p
    below = np.cumsum(q) - q
    return BestPossible(
        auc=float((p * below).sum() / (p.sum() * q.sum() - (p * q).sum())),
        log_loss=float(-(p * np.log(p) + q * np.log(q)).mean()),
        base_rate=float(p.mean()),
    )
