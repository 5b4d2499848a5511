"""Interval algebra against sets of whole numbers."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from recsys.profile.intervals import intersect, length, subtract, union

INTERVALS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)).map(sorted).map(tuple), max_size=12)


def points(intervals):
    return {p for start, end in intervals for p in range(int(start), int(end))}


def assert_is_union(spans):
    assert spans.shape[1:] == (2,)
    assert (spans[:, 0] < spans[:, 1]).all()
    assert (spans[1:, 0] > spans[:-1, 1]).all(), "sorted, disjoint, and none touches the next"


@given(INTERVALS, INTERVALS)
def test_the_algebra_is_that_of_sets(a, b):
    left, right = union(a), union(b)
    assert points(left) == points(a)
    assert points(intersect(left, right)) == points(a) & points(b)
    assert points(subtract(left, right)) == points(a) - points(b)
    assert length(left) == len(points(a))
    for spans in (left, intersect(left, right), subtract(left, right)):
        assert_is_union(spans)


@given(INTERVALS, st.integers(0, 30), st.integers(0, 30))
def test_a_clip_is_what_lies_within(a, start, end):
    assert points(intersect(union(a), union([(start, end)]))) == points(a) & set(range(start, end))


def test_no_intervals():
    assert length(union([])) == 0
    assert len(subtract(union([]), union([(0.0, 1.0)]))) == 0
    np.testing.assert_array_equal(union([(2.0, 2.0)]), np.empty((0, 2)))
