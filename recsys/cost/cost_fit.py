"""The cost model's constants on this machine, fitted to measured steps, and how well it predicts steps it has not seen.

    step = fixed + computing·b + array·|M| + trips·messages·delay + wire·bytes/rate

of a kind of setup (table-wise, row-wise, ROBE data-parallel, ROBE in one process), with b rows a rank, one-way delay
and rate of the network, and messages and bytes that cross it by the formulas of `recsys.cost.collective_cost`; the
bytes are the model's own (`recsys.cost.measured_steps`), not those that the profile counted. fixed and computing are
one number a kind, array, trips and wire one number each: 11 constants for all networks, batch sizes and compressions.

None can be negative. Fitted is the relative error, its absolute value more than its square (weights 1/|error|, again
and again): a cell that something else on the machine disturbed shall not move them all.

A prediction is of cells that were left out of the fit: those of one network, or those of one batch size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.optimize import nnls

from recsys.cost.measured_steps import MeasuredStep

Fold = Literal["network", "batch size"]
FOLDS: tuple[Fold, ...] = ("network", "batch size")
_ROUNDS, _LEAST_ERROR = 30, 0.02


@dataclass(frozen=True)
class Constant:
    name: str
    value: float
    unit: str
    meaning: str


@dataclass(frozen=True)
class Prediction:
    """Of a step that the fit has not seen. fold: by what it was left out."""

    step: MeasuredStep
    fold: Fold
    predicted_ms: float

    @property
    def error(self) -> float:
        """Relative: 0.1 = predicted 10 % too long."""
        return self.predicted_ms / self.step.step_ms - 1


class CostFit:
    """The constants that fit `steps` best."""

    def __init__(self, steps: Sequence[MeasuredStep]) -> None:
        """Raises ValueError where a kind of setup has fewer than two batch sizes."""
        self.kinds = list(dict.fromkeys(step.kind for step in steps))
        for kind in self.kinds:
            sizes = {step.local_batch_size for step in steps if step.kind == kind}
            if len(sizes) < 2:
                raise ValueError(f"{kind}: measured at one batch size only, at least two are needed to fit it")
        rows = np.array([self._row(step) for step in steps])
        self.values = _fit_relative(rows, np.array([step.step_ms for step in steps]))

    def predict_ms(self, step: MeasuredStep) -> float:
        """Raises ValueError for a kind of setup that was not fitted."""
        if step.kind not in self.kinds:
            raise ValueError(f"{step.kind} was not among the setups that were fitted")
        return float(np.dot(self._row(step), self.values))

    def constants(self) -> list[Constant]:
        names = [kind.replace("_", "-") for kind in self.kinds]
        meanings = [
            *(("fixed, " + name, "ms", "of every step, whatever its size") for name in names),
            *(("computing, " + name, "ms / 1,000 rows", "of a rank, lookups, layers and update") for name in names),
            ("array", "ms / M numbers", "of ROBE, gradient and update of the whole array"),
            ("trips", "×", "times that a message of the formula takes the one-way delay"),
            ("wire", "×", "times that the bytes of the formula take at the network's rate"),
        ]
        return [Constant(n, float(v), u, m) for (n, u, m), v in zip(meanings, self.values, strict=True)]

    def _row(self, step: MeasuredStep) -> list[float]:
        own = [float(kind == step.kind) for kind in self.kinds]
        return [
            *own,
            *(1e-3 * step.local_batch_size * is_own for is_own in own),
            1e-6 * step.array_parameters,
            step.messages * step.delay_ms,
            step.wire_bytes / step.rate,
        ]


def _fit_relative(rows: np.ndarray, times: np.ndarray) -> np.ndarray:
    """(constants,) ≥ 0. rows: (steps, constants); times: (steps,)."""
    scaled = rows / times[:, None]
    weights = np.ones(len(times))
    values = np.zeros(rows.shape[1])
    for _ in range(_ROUNDS):
        values, _ = nnls(scaled * weights[:, None], weights)
        weights = 1 / np.sqrt(np.maximum(_LEAST_ERROR, np.abs(scaled @ values - 1)))
    return values


def predict_held_out(steps: Sequence[MeasuredStep], fold: Fold) -> list[Prediction]:
    """Every step over a network, or of a batch size, from a fit to all others. Empty where there is only one."""

    def key(step: MeasuredStep) -> str | int:
        return step.network if fold == "network" else step.global_batch_size

    found = []
    for left_out in dict.fromkeys(map(key, steps)):
        if left_out == "":  # one process has no network to leave out
            continue
        rest = [step for step in steps if key(step) != left_out]
        try:
            fit = CostFit(rest)
            found += [Prediction(s, fold, fit.predict_ms(s)) for s in steps if key(s) == left_out]
        except ValueError:
            continue
    return found


def describe_errors(predictions: Sequence[Prediction]) -> str:
    """'median 8.1%, 90th percentile 23%, 60 steps; ratios of setups of a cell: …'"""
    if not predictions:
        return "nothing could be left out: measure two networks, and three batch sizes"
    errors, ratios = np.abs([prediction.error for prediction in predictions]), np.abs(ratio_errors(predictions))
    median, high = np.percentile(errors, [50, 90])
    words = f"median {median:.1%}, 90th percentile {high:.0%}, {len(errors)} steps"
    if len(ratios):
        median, high = np.percentile(ratios, [50, 90])
        words += f"; ratios of setups of a cell: median {median:.1%}, 90th percentile {high:.0%}"
    return words


def ratio_errors(predictions: Sequence[Prediction]) -> list[float]:
    """Relative errors of predicted ratios of two setups of a cell, of every setup to the first.

    A cell's setups are measured in turns: what else the machine did in those minutes is in all of them, and drops out.
    """
    cells: dict[tuple[str, int], list[Prediction]] = {}
    for prediction in predictions:
        cells.setdefault((prediction.step.network, prediction.step.global_batch_size), []).append(prediction)
    return [(1 + p.error) / (1 + found[0].error) - 1 for found in cells.values() for p in found[1:]]
