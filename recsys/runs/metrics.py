"""The names and units of everything a run measures, defined once, and the quality metrics themselves.

A metric is called `group/name_unit`. Quality is computed on one rank from the scores of all ranks, in float64: the AUC
is exact (ties count one half), not a histogram's or a mean over ranks.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

TRAIN_LOG_LOSS = "quality/train_log_loss"
STEP_MS = "time/step_ms"
STEP_P95_MS = "time/step_p95_ms"
DATA_MS = "time/data_ms"
TRAIN_S = "time/train_s"
SAMPLES_PER_S = "speed/samples_per_s"
PEAK_GIB = "memory/peak_gib"

COMPUTE_MS = "time/compute_ms"
EXPOSED_COMM_MS = "time/exposed_comm_ms"
EXPOSED_WAIT_MS = "time/exposed_wait_ms"
OVERLAP_MS = "time/overlap_ms"
WAIT_MS = "time/wait_ms"
OTHER_MS = "time/other_ms"
PROFILED_STEP_MS = "time/profiled_step_ms"
"""Parts of a step within a profiled window, means over ranks: see `recsys.profile.timing`."""


def bytes_name(kind: str) -> str:
    """Kind of collective -> name of the bytes that a rank puts in, a step."""
    return f"comm/{kind}_bytes"


def phase_name(phase: str) -> str:
    """'backward/interaction' -> 'phase/backward_interaction_ms'."""
    return f"phase/{phase.replace('/', '_')}_ms"


SHOWN_QUALITY = ("auc", "log_loss", "ne", "calibration")
"""The fields of `Quality` that are recorded at every evaluation."""


def quality_name(split: str, metric: str) -> str:
    """('test', 'auc') -> 'quality/test_auc'; metric is a field of `Quality`."""
    return f"quality/{split}_{metric}"


@dataclass(frozen=True)
class Quality:
    """How well scores predict labels.

    auc: area under the ROC curve. auc_se: its standard error through the finite sample of rows.
    log_loss: mean binary cross-entropy in nats. ne: normalised entropy, log loss over the entropy of the mean label
    (He et al. 2014); below 1 = better than predicting the mean. calibration: mean prediction / mean label.
    rows and positives: what it was measured on.
    """

    auc: float
    auc_se: float
    log_loss: float
    ne: float
    calibration: float
    rows: int
    positives: int


def measure_quality(logits: np.ndarray, labels: np.ndarray) -> Quality:
    """logits (n,), labels (n,) in {0, 1} -> Quality. Raises ValueError when only one label is present."""
    logits, labels = logits.astype(np.float64), labels.astype(np.float64)
    positives = float(labels.sum())
    if positives in (0.0, float(len(labels))):
        raise ValueError(f"AUC needs both labels: {len(labels)} rows, {positives:.0f} positive")
    rate = positives / len(labels)
    log_loss = float(np.mean(np.logaddexp(0.0, logits) - labels * logits))
    entropy = -(rate * math.log(rate) + (1 - rate) * math.log1p(-rate))
    auc, auc_se = _auc(logits, labels == 1)
    predictions = 1.0 / (1.0 + np.exp(-np.clip(logits, -500, 500)))
    return Quality(
        auc=auc,
        auc_se=auc_se,
        log_loss=log_loss,
        ne=log_loss / entropy,
        calibration=float(predictions.mean()) / rate,
        rows=len(labels),
        positives=int(positives),
    )


def _auc(scores: np.ndarray, positive: np.ndarray) -> tuple[float, float]:
    """AUC and its standard error from mid-ranks (DeLong et al. 1988, in the form of Sun & Xu 2014)."""
    ranks = rankdata(scores)
    num_positive, num_negative = int(positive.sum()), int((~positive).sum())
    # For each positive the share of negatives below it, and for each negative the share of positives above it.
    below = (ranks[positive] - rankdata(scores[positive])) / num_negative
    above = 1 - (ranks[~positive] - rankdata(scores[~positive])) / num_positive
    variance = below.var() / num_positive + above.var() / num_negative
    return float(below.mean()), math.sqrt(variance)
