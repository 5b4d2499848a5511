"""The metrics of a run, each defined once: what it is called, how it is computed and how it is shown.

A metric is recorded as `group/name_unit`. Those that training measures on the way have a constant here. Metrics of
quality, computed from the scores of a split, are `QUALITY`: name -> `QualityMetric`. To add one, write its function
(here or in a file of its own) and add one line to `QUALITY`. From then on it is

- computed at every evaluation (`measure_quality`), recorded as `quality/<split>_<name>` (`quality_name`), and so in
  metrics.jsonl and in TensorBoard, where it also gets a chart and a column of the table of runs;
- in the run's summary (`best`, `last`), as `<split>_<name>`, and in what trackers are told;
- in the results frame of `recsys.report` as a column `<split>_<name>`, in the JSON, table and plots of a comparison:
  a reader iterates over `QUALITY` and takes title, unit, digits and text from its entry.

Quality is computed on one rank from the scores of all ranks, in float64: the AUC is exact (ties count one half), not a
histogram's or a mean over ranks. Readers of summaries need none of this: scipy is imported where it is used.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

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
    """Return the name of the bytes that a rank puts into a kind of collective, a step: 'comm/all_reduce_bytes'."""
    return f"comm/{kind}_bytes"


def phase_name(phase: str) -> str:
    """Return the name of a phase's time: 'backward/interaction' -> 'phase/backward_interaction_ms'."""
    return f"phase/{phase.replace('/', '_')}_ms"


def quality_name(split: str, metric: str) -> str:
    """Return the name under which a metric of `QUALITY` is recorded: ('test', 'auc') -> 'quality/test_auc'."""
    return f"quality/{split}_{metric}"


def log_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean binary cross-entropy in nats. logits, labels: (n,) float64, labels in {0, 1}."""
    return float(np.mean(np.logaddexp(0.0, logits) - labels * logits))


def normalised_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the log loss over the entropy of the mean label (He et al. 2014); 1 = as good as predicting the mean.

    logits, labels: (n,) float64, labels in {0, 1}, both present.
    """
    rate = float(labels.sum()) / len(labels)
    entropy = -(rate * math.log(rate) + (1 - rate) * math.log1p(-rate))
    return log_loss(logits, labels) / entropy


def calibration(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean prediction over the mean label. logits, labels: (n,) float64, labels in {0, 1}, one present."""
    rate = float(labels.sum()) / len(labels)
    # exp overflows above 709; a sigmoid is 0 or 1 to the last bit long before 500.
    predictions = 1.0 / (1.0 + np.exp(-np.clip(logits, -500, 500)))
    return float(predictions.mean()) / rate


def auc(logits: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Return the area under the ROC curve, and its standard error through the finite sample of rows.

    From mid-ranks (DeLong et al. 1988, in the form of Sun & Xu 2014). logits, labels: (n,), labels in {0, 1}, both
    present.
    """
    from scipy.stats import rankdata

    ranks, positive = rankdata(logits), labels == 1
    num_positive, num_negative = int(positive.sum()), int((~positive).sum())
    # For each positive the share of negatives below it, and for each negative the share of positives above it.
    below = (ranks[positive] - rankdata(logits[positive])) / num_negative
    above = 1 - (ranks[~positive] - rankdata(logits[~positive])) / num_positive
    variance = below.var() / num_positive + above.var() / num_negative
    return float(below.mean()), math.sqrt(variance)


@dataclass(frozen=True)
class QualityMetric:
    """A metric of quality: how it is computed from the scores of a split, and how it is shown.

    compute: (logits (n,), labels (n,)), float64 -> its value, or its value and standard error; both labels are present.
    title: as within a sentence. better: which values are; "one" = those near 1. unit: of an axis, where it has one.
    text: what it is, in a sentence or two, for legends. digits: after the point. is_plotted: whether its curves are
    worth a plot of a comparison.
    """

    compute: Callable[[np.ndarray, np.ndarray], float | tuple[float, float]]
    title: str
    better: Literal["higher", "lower", "one"]
    text: str
    unit: str = ""
    digits: int = 4
    is_plotted: bool = True

    @property
    def axis_title(self) -> str:
        """Return the title with its unit: 'log loss, nats'."""
        return f"{self.title}, {self.unit}" if self.unit else self.title


QUALITY: Mapping[str, QualityMetric] = {
    "auc": QualityMetric(auc, "AUC", "higher", "Area under the ROC curve."),
    "log_loss": QualityMetric(log_loss, "log loss", "lower", "Mean binary cross-entropy in nats.", unit="nats"),
    "ne": QualityMetric(
        normalised_entropy, "NE", "lower", "Normalised entropy: log loss over that of the mean label.", is_plotted=False
    ),
    "calibration": QualityMetric(
        calibration, "calibration", "one", "Mean prediction over the mean label.", is_plotted=False
    ),
}
"""Name -> metric, in the order of records and tables."""


def measure_quality(logits: np.ndarray, labels: np.ndarray) -> dict[str, int | float]:
    """Return every metric of `QUALITY` by name, `<name>_se` for a standard error, and the counts rows and positives.

    logits, labels: (n,), labels in {0, 1}. Raises ValueError when only one label is present.
    """
    logits, labels = logits.astype(np.float64), labels.astype(np.float64)
    positives = int(labels.sum())
    if positives in (0, len(labels)):
        raise ValueError(f"AUC needs both labels: {len(labels)} rows, {positives} positive")
    values: dict[str, int | float] = {}
    for name, metric in QUALITY.items():
        computed = metric.compute(logits, labels)
        values[name], *standard_error = computed if isinstance(computed, tuple) else (computed,)
        values |= {f"{name}_se": error for error in standard_error}
    return {**values, "rows": len(labels), "positives": positives}
