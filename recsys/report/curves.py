"""A metric over training: where a curve reaches a target, the mean of several, and which of two is ahead when."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean


@dataclass(frozen=True)
class Point:
    """Hold a value of a metric, and where in training it was measured."""

    time_s: float
    samples: float
    epoch: float
    value: float


@dataclass(frozen=True)
class Position:
    """Hold a place in training."""

    time_s: float
    samples: float
    epochs: float


@dataclass(frozen=True)
class TimeToTarget:
    """Hold where in training an arm's runs reach the target.

    runs: how many of them reach it. observed: the first evaluation at or above the target. interpolated: on the
    straight line from the evaluation before it, where there is one. Both are means over runs, None unless all reach it.
    """

    runs: int
    observed: Position | None
    interpolated: Position | None


@dataclass(frozen=True)
class CurveOrder:
    """Hold which of two learning curves is above the other at equal training time, and when they cross.

    start_s and end_s: the time in which both were measured. changes_s: the times of the crossings.
    """

    start_s: float
    end_s: float
    ahead_at_first: bool
    changes_s: tuple[float, ...]


def time_to_target(curves: Sequence[Sequence[Point]], target: float) -> TimeToTarget | None:
    """Return where the curves of an arm's runs first reach the target; None when a run was not evaluated at all."""
    if not all(curves):
        return None
    places = [place for curve in curves if (place := _first_reaching(curve, target)) is not None]
    if len(places) < len(curves):
        return TimeToTarget(len(places), None, None)
    between = [interpolated for _, interpolated in places if interpolated is not None]
    return TimeToTarget(
        runs=len(places),
        observed=_mean_position([observed for observed, _ in places]),
        interpolated=_mean_position(between) if len(between) == len(places) else None,
    )


def _first_reaching(curve: Sequence[Point], target: float) -> tuple[Position, Position | None] | None:
    index = next((i for i, point in enumerate(curve) if point.value >= target), None)
    if index is None:
        return None
    after = curve[index]
    observed = Position(after.time_s, after.samples, after.epoch)
    if index == 0:
        return observed, None
    before = curve[index - 1]
    part = (target - before.value) / (after.value - before.value)
    return observed, Position(
        time_s=before.time_s + part * (after.time_s - before.time_s),
        samples=before.samples + part * (after.samples - before.samples),
        epochs=before.epoch + part * (after.epoch - before.epoch),
    )


def _mean_position(positions: Sequence[Position]) -> Position:
    return Position(
        fmean(p.time_s for p in positions), fmean(p.samples for p in positions), fmean(p.epochs for p in positions)
    )


def mean_curve(curves: Sequence[Sequence[Point]]) -> list[Point]:
    """Return the mean of curves at the positions in samples that all of them have."""
    by_samples = [{point.samples: point for point in curve} for curve in curves]
    common = sorted(set.intersection(*(set(points) for points in by_samples)))
    rows = [[points[samples] for points in by_samples] for samples in common]
    return [
        Point(fmean(p.time_s for p in row), row[0].samples, fmean(p.epoch for p in row), fmean(p.value for p in row))
        for row in rows
    ]


def order_curves(curve: Sequence[Point], baseline: Sequence[Point]) -> CurveOrder | None:
    """Return when `curve` is above `baseline` at equal training time, both straight between points.

    None where they have no time in common, or never differ.
    """
    if not curve or not baseline:
        return None
    start, end = max(curve[0].time_s, baseline[0].time_s), min(curve[-1].time_s, baseline[-1].time_s)
    if start > end:
        return None
    times = sorted({start, end} | {p.time_s for p in (*curve, *baseline) if start <= p.time_s <= end})
    gaps = [(time_s, _value_at(curve, time_s) - _value_at(baseline, time_s)) for time_s in times]
    gaps = [(time_s, gap) for time_s, gap in gaps if gap]  # where curves touch, neither is ahead
    if not gaps:
        return None
    changes = [
        t0 + (t1 - t0) * g0 / (g0 - g1)
        for (t0, g0), (t1, g1) in pairwise(gaps)
        if math.copysign(1, g0) != math.copysign(1, g1)
    ]
    return CurveOrder(start, end, gaps[0][1] > 0, tuple(changes))


def _value_at(curve: Sequence[Point], time_s: float) -> float:
    for before, after in pairwise(curve):
        if before.time_s <= time_s <= after.time_s and after.time_s > before.time_s:
            part = (time_s - before.time_s) / (after.time_s - before.time_s)
            return before.value + part * (after.value - before.value)
    return min(curve, key=lambda point: abs(point.time_s - time_s)).value
