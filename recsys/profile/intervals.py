"""Sets of points on the time line as sorted, disjoint intervals: float64 arrays (n, 2) of [start, end).

Every function takes any intervals where it says so, and unions otherwise, and gives unions.
"""

from collections.abc import Iterable

import numpy as np

EMPTY = np.empty((0, 2))


def union(intervals: np.ndarray | Iterable[tuple[float, float]]) -> np.ndarray:
    """The points in any of the intervals: any order, overlaps allowed, empty ones dropped."""
    spans = np.asarray(intervals if isinstance(intervals, np.ndarray) else list(intervals), float).reshape(-1, 2)
    spans = spans[spans[:, 1] > spans[:, 0]]
    if not len(spans):
        return EMPTY
    spans = spans[np.argsort(spans[:, 0], kind="stable")]
    ends = np.maximum.accumulate(spans[:, 1])
    first = np.concatenate([[True], spans[1:, 0] > ends[:-1]])
    return np.stack([spans[first, 0], ends[np.append(np.flatnonzero(first)[1:] - 1, len(spans) - 1)]], axis=1)


def length(spans: np.ndarray) -> float:
    return float((spans[:, 1] - spans[:, 0]).sum())


def intersect(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The points in both unions."""
    return _where(a, b, lambda in_a, in_b: in_a & in_b)


def subtract(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The points of union a that are not in union b: a \\ b."""
    return _where(a, b, lambda in_a, in_b: in_a & ~in_b)


def _where(a: np.ndarray, b: np.ndarray, wanted) -> np.ndarray:
    """Between two neighbouring ends of either union, a point is in both, one or none of them throughout."""
    edges = np.unique(np.concatenate([a.ravel(), b.ravel()]))
    if len(edges) < 2:
        return EMPTY
    pieces = np.stack([edges[:-1], edges[1:]], axis=1)
    return union(pieces[wanted(_covers(a, edges[:-1]), _covers(b, edges[:-1]))])


def _covers(spans: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(n,) bool: which points lie in the union."""
    if not len(spans):
        return np.zeros(len(points), bool)
    index = np.searchsorted(spans[:, 0], points, side="right") - 1
    return (index >= 0) & (points < spans[np.maximum(index, 0), 1])
