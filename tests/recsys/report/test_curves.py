"""Where curves reach a target, their mean, and which is ahead when, against cases worked out by hand."""

from typing import Any

import pytest

from recsys.report import curves
from recsys.report.curves import Point, Position, mean_curve

# What may be None is not in these cases.
time_to_target: Any = curves.time_to_target
order_curves: Any = curves.order_curves


def curve(*pairs):
    return [Point(time_s, 100 * time_s, time_s / 10, value) for time_s, value in pairs]


def test_the_target_is_reached_at_an_evaluation_and_between_two():
    reached = time_to_target([curve((10, 0.70), (20, 0.74), (30, 0.78))], 0.75)
    assert reached.observed == Position(30, 3000, 3)
    between = reached.interpolated  # a quarter of the way from 20 to 30
    assert (between.time_s, between.samples, between.epochs) == pytest.approx((22.5, 2250, 2.25))


def test_the_first_of_several_times_counts_and_equality_is_enough():
    assert time_to_target([curve((1, 0.6), (2, 0.75), (3, 0.7), (4, 0.8))], 0.75).observed.time_s == 2


def test_nothing_lies_before_the_first_evaluation():
    reached = time_to_target([curve((10, 0.8), (20, 0.9))], 0.75)
    assert (reached.observed.time_s, reached.interpolated) == (10, None)


def test_one_run_of_two_that_reaches_it_gives_no_position():
    reached = time_to_target([curve((10, 0.8)), curve((10, 0.7))], 0.75)
    assert (reached.runs, reached.observed, reached.interpolated) == (1, None, None)


def test_positions_of_seeds_are_averaged():
    reached = time_to_target([curve((10, 0.7), (20, 0.8)), curve((10, 0.7), (20, 0.72), (40, 0.8))], 0.75)
    assert reached.observed.time_s == 30
    assert reached.interpolated.time_s == pytest.approx((15 + 27.5) / 2)


def test_not_evaluated_is_not_the_same_as_not_reached():
    assert time_to_target([[]], 0.75) is None
    assert time_to_target([curve((1, 0.6))], 0.75).observed is None


def test_mean_is_taken_where_all_curves_have_points():
    a, b = curve((10, 0.7), (20, 0.8)), [Point(14, 1000, 1, 0.6), Point(99, 5000, 5, 0.9)]
    (point,) = mean_curve([a, b])
    assert (point.time_s, point.samples, point.epoch, point.value) == pytest.approx((12, 1000, 1, 0.65))


@pytest.mark.parametrize(
    ("first", "last", "ahead", "changes"),
    [
        (0.70, 0.72, True, ()),
        (0.60, 0.62, False, ()),
        (0.67, 0.69, True, (15,)),
        (0.60, 0.72, False, (10 + 10 * 5 / 6,)),
    ],
)
def test_order(first, last, ahead, changes):
    order = order_curves(curve((10, first), (20, last)), curve((10, 0.65), (20, 0.71)))
    assert (order.ahead_at_first, order.changes_s) == (ahead, pytest.approx(changes))


def test_order_is_read_between_points_of_different_times():
    # At 20 the baseline stands at .60 + .1 * 10/20 = .65: ahead by .05 there, by .05 at 10, behind by .02 at 30.
    order = order_curves(curve((10, 0.65), (20, 0.70), (40, 0.66)), curve((10, 0.60), (30, 0.70)))
    assert order.ahead_at_first
    assert order.changes_s == (pytest.approx(20 + 10 * 0.05 / 0.07),)
    assert (order.start_s, order.end_s) == (10, 30)


def test_points_of_the_baseline_alone_count_too():
    order = order_curves(curve((0, 0.6), (30, 0.6)), curve((0, 0.5), (10, 0.7), (30, 0.5)))
    assert (order.ahead_at_first, order.changes_s) == (True, pytest.approx((5, 20)))


def test_no_order_without_a_common_time():
    assert order_curves(curve((1, 0.6), (2, 0.7)), curve((3, 0.6), (4, 0.7))) is None
    assert order_curves([], curve((3, 0.6))) is None
