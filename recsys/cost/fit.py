"""The cost model's constants on this machine, fitted to measured steps, and how well it predicts steps it has not seen.

    step = fixed + computing·b + array·|M| + trips·messages·delay + wire·bytes/rate

of a kind of arm (table-wise, row-wise, ROBE data-parallel, ROBE in one process), with b rows a rank, one-way delay and
rate of the network, and messages and bytes that cross it by the formulas of `recsys.cost.cost_model`; the bytes are the
model's own, not those that the profile counted. fixed and computing are one number a kind, array, trips and wire one
number each: 11 constants for all networks, batch sizes and compressions.

None can be negative. Fitted is the relative error, its absolute value more than its square (weights 1/|error|, again
and again): a trial that something else on the machine disturbed shall not move them all.

TorchRec's EmbeddingPerfEstimator has constants for GPUs and for no CPU, and none that could be fitted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from scipy.optimize import nnls

from configs.load import ConfigError
from recsys.cost.cost_model import Cluster, Link
from recsys.cost.crossover import Arm, Network, Trial, load_crossover

Fold = Literal["network", "batch size"]
FOLDS: tuple[Fold, ...] = ("network", "batch size")
_ROUNDS, _LEAST_ERROR = 30, 0.02
_FLOAT, _ID = 4, 8
_A_MESSAGE, _A_BYTE = Link(1.0, 0.0), Link(0.0, 1.0)
"""Links over which a collective takes as long as it has messages, or bytes to send."""


@dataclass(frozen=True)
class MeasuredStep:
    """An arm over one network at one batch size, as the cost model sees it. network "": one process.

    rate: bytes a ms; delay_ms: one way; messages, wire_bytes: of one rank in sequence, across the network.
    counted_bytes: by the profile, of all collectives, None without one; stated_bytes: by formula. spread: of the
    quartiles over the median.
    """

    kind: str
    label: str
    network: str
    is_emulated: bool
    global_batch_size: int
    ranks: int
    array_parameters: float
    rate: float
    delay_ms: float
    messages: float
    wire_bytes: float
    stated_bytes: float
    counted_bytes: float | None
    step_ms: float
    spread: float

    @property
    def local_batch_size(self) -> float:
        """Return the rows of one rank."""
        return self.global_batch_size / self.ranks

    @property
    def origin(self) -> str:
        """Return what kind of figure it is."""
        return "emulated" if self.is_emulated else "measured"

    @property
    def where(self) -> str:
        """Return the network in words."""
        return self.network or "one process"


def read_steps(path: Path) -> list[MeasuredStep]:
    """Return the steps of all arms of a crossover.json. Raises ConfigError naming file and key."""
    trials = load_crossover(path).trials
    if unknown := {kind for t in trials for a in t.arms for kind in a.collectives_per_step} - _COLLECTIVES.keys():
        raise ConfigError(f"{path}: unknown collectives {sorted(unknown)}; known: {', '.join(_COLLECTIVES)}")
    networks: dict[str, list[Network]] = {}
    for trial in trials:
        networks.setdefault(_name(trial), []).extend([trial.network] if trial.network else [])
    speeds = {name: _speed_of(measured) for name, measured in networks.items()}
    return [_read_step(trial, arm, *speeds[_name(trial)]) for trial in trials for arm in trial.arms]


def _name(trial: Trial) -> str:
    network = trial.network
    if network is None:
        return ""
    return f"{network.rate_mbit:g} Mbit/s, {network.delay_us:g} µs" if network.is_emulated else "loopback"


def _speed_of(networks: Sequence[Network]) -> tuple[float, float]:
    """Return one (bytes a ms, one-way ms) for a network, whatever its single trials measured.

    The rate is the one requested where the median of the trials is within a quarter of it, else that median: a
    measurement lasts a moment, and something may disturb it.
    """
    if not networks:
        return np.inf, 0.0
    rate = float(np.median([network.measured_rate_mbit for network in networks]))
    asked = networks[0].rate_mbit
    if asked is not None and abs(rate / asked - 1) < 0.25:
        rate = asked
    return 1e3 / 8 * rate, float(np.median([network.measured_round_trip_us for network in networks])) / 2e3


def _collective_s(kind: str, size: float, ranks: int, link: Link) -> float:
    """size: what one rank puts in, of an all-gather too, as the profile counts it."""
    return _COLLECTIVES[kind](Cluster(ranks, 1, link, link), size)


_COLLECTIVES = {
    "all_to_all": Cluster.all_to_all_s,
    "reduce_scatter": Cluster.reduce_scatter_s,
    "all_gather": lambda cluster, own: cluster.reduce_scatter_s(cluster.ranks * own),
    "all_reduce": Cluster.all_reduce_s,
}


def _read_step(trial: Trial, arm: Arm, rate: float, delay_ms: float) -> MeasuredStep:
    ranks, stated, time = arm.world_size, count_bytes(arm), arm.step_ms
    counts = arm.collectives_per_step
    return MeasuredStep(
        kind=arm.sharding or ("data_parallel" if ranks > 1 else "single"),
        label=arm.label,
        network=_name(trial),
        is_emulated=bool(trial.network and trial.network.is_emulated),
        global_batch_size=arm.global_batch_size,
        ranks=ranks,
        array_parameters=arm.embedding_parameters if arm.placement == "replicate" else 0.0,
        rate=rate,
        delay_ms=delay_ms,
        messages=sum(count * _collective_s(kind, 0, ranks, _A_MESSAGE) for kind, count in counts.items()),
        wire_bytes=sum(_collective_s(kind, size, ranks, _A_BYTE) for kind, size in stated.items()),
        stated_bytes=sum(stated.values()),
        counted_bytes=arm.sent_bytes if arm.bytes_per_step is not None else None,
        step_ms=time.median,
        spread=(time.p75 - time.p25) / time.median,
    )


def count_bytes(arm: Arm) -> dict[str, float]:
    """Return what one rank puts into the collectives of a step, by the formulas of the cost model, as gloo has them.

    Lengths are sent as int64, to every rank where rows are over all; gloo's reduce-scatter is an all-reduce.
    """
    p = arm.world_size
    if p == 1:
        return {}
    layers = _FLOAT * arm.dense_parameters
    if arm.placement == "replicate":
        return {"all_reduce": layers + _FLOAT * arm.embedding_parameters}
    bags = arm.global_batch_size / p * arm.num_tables
    pooled = _FLOAT * arm.global_batch_size * arm.num_tables * arm.embedding_dim
    if arm.sharding == "row_wise":
        return {"all_to_all": bags * (_ID + _ID * p), "all_reduce": pooled + layers, "all_gather": pooled / p}
    return {"all_to_all": bags * 2 * _ID + 2 * pooled / p, "all_reduce": layers}


@dataclass(frozen=True)
class Constant:
    """A fitted constant of the cost model, 1 unit being what its name says."""

    name: str
    value: float
    unit: str
    meaning: str


@dataclass(frozen=True)
class Prediction:
    """A step that the fit has not seen, and what it predicts. fold: by what it was left out."""

    step: MeasuredStep
    fold: Fold
    predicted_ms: float

    @property
    def error(self) -> float:
        """Return the relative error: 0.1 = predicted 10 % too long."""
        return self.predicted_ms / self.step.step_ms - 1


class CostFit:
    """The constants that fit `steps` best."""

    def __init__(self, steps: Sequence[MeasuredStep]) -> None:
        """Fit at once. Raises ValueError where a kind of arm has fewer than two batch sizes."""
        self.kinds = list(dict.fromkeys(step.kind for step in steps))
        for kind in self.kinds:
            if len({step.local_batch_size for step in steps if step.kind == kind}) < 2:
                raise ValueError(f"{kind}: measured at one batch size only, at least two are needed to fit it")
        rows = np.array([self._row(step) for step in steps])
        self.values = _fit_relative(rows, np.array([step.step_ms for step in steps]))

    def predict_ms(self, step: MeasuredStep) -> float:
        """Return what the step should take. Raises ValueError for a kind of arm that was not fitted."""
        if step.kind not in self.kinds:
            raise ValueError(f"{step.kind} was not among the setups that were fitted")
        return float(np.dot(self._row(step), self.values))

    def constants(self) -> list[Constant]:
        """Return the constants with unit and meaning."""
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
    """Return (constants,) ≥ 0. rows: (steps, constants); times: (steps,)."""
    scaled = rows / times[:, None]
    weights = np.ones(len(times))
    values = np.zeros(rows.shape[1])
    for _ in range(_ROUNDS):
        values, _ = nnls(scaled * weights[:, None], weights)
        weights = 1 / np.sqrt(np.maximum(_LEAST_ERROR, np.abs(scaled @ values - 1)))
    return values


def predict_held_out(steps: Sequence[MeasuredStep], fold: Fold) -> list[Prediction]:
    """Return every step over a network, or of a batch size, from a fit to all others; [] where there is only one."""

    def key(step: MeasuredStep) -> str | int:
        return step.network if fold == "network" else step.global_batch_size

    predictions = []
    for left_out in dict.fromkeys(map(key, steps)):
        if left_out == "":  # one process has no network to leave out
            continue
        try:
            fit = CostFit([step for step in steps if key(step) != left_out])
            predictions += [Prediction(s, fold, fit.predict_ms(s)) for s in steps if key(s) == left_out]
        except ValueError:  # too little is left to fit
            continue
    return predictions


def describe_errors(predictions: Sequence[Prediction]) -> str:
    """Return 'median 8.1%, 90th percentile 23%, 60 steps; ratios of arms of a trial: …'."""
    if not predictions:
        return "nothing could be left out: measure two networks, and three batch sizes"
    errors, ratios = np.abs([prediction.error for prediction in predictions]), np.abs(ratio_errors(predictions))
    median, high = np.percentile(errors, [50, 90])
    words = f"median {median:.1%}, 90th percentile {high:.0%}, {len(errors)} steps"
    if len(ratios):
        median, high = np.percentile(ratios, [50, 90])
        words += f"; ratios of arms of a trial: median {median:.1%}, 90th percentile {high:.0%}"
    return words


def ratio_errors(predictions: Sequence[Prediction]) -> list[float]:
    """Return the relative errors of predicted ratios of two arms of a trial, of every arm to the first.

    A trial's arms are measured interleaved: what else the machine did meanwhile is in all of them, and drops out.
    """
    trials: dict[tuple[str, int], list[Prediction]] = {}
    for prediction in predictions:
        trials.setdefault((prediction.step.network, prediction.step.global_batch_size), []).append(prediction)
    return [(1 + p.error) / (1 + of_trial[0].error) - 1 for of_trial in trials.values() for p in of_trial[1:]]


def worst_byte_error(steps: Sequence[MeasuredStep]) -> float | None:
    """Return the largest relative difference between bytes by formula and as counted; None where none were counted."""
    errors = [abs(s.stated_bytes / s.counted_bytes - 1) for s in steps if s.counted_bytes]
    return max(errors, default=None)
