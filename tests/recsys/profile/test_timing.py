"""The parts of a step, from spans whose parts are known."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys.profile.intervals import EMPTY, union
from recsys.profile.timing import Joined, collectives_by_step, join, time_rank
from recsys.profile.trace import Collective, RankTrace
from recsys.runs.window_timing import WindowTiming


def collective(start, end, kind="all_reduce", size=0, group=""):
    return Collective(kind, group, float(start), float(end), size)


def made_trace(steps, compute, collectives, phases=None):
    spans = np.array(steps, float)
    return RankTrace(spans, union(compute), sorted(collectives, key=lambda c: c.start), phases or {}, EMPTY)


def timing_of(trace, peers=()):
    """Of rank 0, with the traces of the other ranks."""
    return time_rank(trace, *join([collectives_by_step(t) for t in (trace, *peers)])[0])


def test_computing_exposed_and_overlapping_communication():
    timing = timing_of(made_trace([(0, 1000)], [(0, 300), (500, 600)], [collective(200, 550)]))
    assert (timing.step_ms, timing.compute_ms, timing.comm_ms) == (1.0, 0.4, pytest.approx(0.35))
    assert timing.overlap_ms == pytest.approx(0.15)
    assert timing.exposed_comm_ms == pytest.approx(0.2)
    assert timing.other_ms == pytest.approx(0.4)


def test_waiting_for_a_late_rank_is_not_transfer():
    early = made_trace([(0, 1000)], [(0, 100)], [collective(100, 500)])
    late = made_trace([(0, 1000)], [(0, 380)], [collective(400, 520)])
    timing = timing_of(early, [late])
    assert timing.wait_ms == pytest.approx(0.3)
    assert timing.collectives["all_reduce"].wait_ms == pytest.approx(0.3)
    assert timing.collectives["all_reduce"].transfer_ms == pytest.approx(0.12)
    behind = timing_of(late, [early])
    assert (behind.wait_ms, behind.exposed_comm_ms) == (0, pytest.approx(0.12))


def test_who_waits_while_another_collective_moves_does_not_wait():
    trace = made_trace([(0, 1000)], [], [collective(0, 600, "all_reduce"), collective(100, 400, "all_to_all")])
    peer = made_trace([(0, 1000)], [], [collective(500, 600, "all_reduce"), collective(200, 400, "all_to_all")])
    timing = timing_of(trace, [peer])
    assert timing.comm_ms == pytest.approx(0.6)
    assert timing.wait_ms == pytest.approx(0.3), "0 to 200, and 400 to 500"


def test_waiting_beside_computing_is_not_exposed():
    early = made_trace([(0, 1000)], [(200, 300)], [collective(100, 500)])
    late = made_trace([(0, 1000)], [], [collective(400, 500)])
    timing = timing_of(early, [late])
    assert (timing.wait_ms, timing.exposed_wait_ms) == (pytest.approx(0.3), pytest.approx(0.2))


def test_collectives_are_matched_within_step_kind_and_group():
    mine = made_trace(
        [(0, 100), (100, 200)],
        [],
        [collective(10, 20), collective(30, 40), collective(50, 60, "all_to_all"), collective(110, 140, group="a")],
    )
    peer = made_trace(
        [(0, 100), (100, 200)],
        [],
        [collective(12, 20), collective(35, 40), collective(45, 60, "all_to_all"), collective(130, 140, group="a")],
    )
    parts, unmatched = join([collectives_by_step(mine), collectives_by_step(peer)])[0]
    assert [part.all_started for part in parts] == [12, 35, 50, 130]
    assert unmatched == 0


def test_a_collective_that_others_lack_is_counted_and_not_compared():
    mine = made_trace([(0, 100)], [], [collective(10, 20), collective(30, 40)])
    peer = made_trace([(0, 100)], [], [collective(15, 20)])
    parts, unmatched = join([collectives_by_step(mine), collectives_by_step(peer)])[0]
    assert unmatched == 2
    assert [part.all_started for part in parts] == [10, 30]


def test_what_begins_outside_of_a_step_is_left_out():
    trace = made_trace([(0, 100), (150, 200)], [(90, 160)], [collective(120, 160), collective(160, 170, size=8)])
    timing = timing_of(trace)
    assert timing.comm_ms == pytest.approx(0.005)
    assert timing.compute_ms == pytest.approx(0.010), "(90, 100) and (150, 160), over two steps"
    assert timing.collectives["all_reduce"].bytes == 4.0
    assert timing.collectives["all_reduce"].count == 0.5


def test_phases_split_into_computing_and_exposed():
    phases = {"forward/top_mlp": union([(0, 400)]), "other": union([(400, 1000)])}
    timing = timing_of(made_trace([(0, 1000)], [(0, 300)], [collective(200, 500)], phases))
    top, other = timing.phases["forward/top_mlp"], timing.phases["other"]
    assert (top.ms, top.compute_ms, top.exposed_comm_ms) == (0.4, 0.3, pytest.approx(0.1))
    assert other.exposed_comm_ms == pytest.approx(0.1)
    window = WindowTiming(1, 1, 0.0, [timing, timing])
    assert sum(window.phases().values()) == pytest.approx(window.mean("step_ms"))


SPANS = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)).map(sorted).map(tuple), max_size=10)


@given(SPANS, SPANS, SPANS)
def test_the_parts_always_sum_to_the_step(compute, mine, theirs):
    steps = [(0, 100), (100, 180), (200, 300)]
    trace = made_trace(steps, compute, [collective(*span) for span in mine])
    peer = made_trace(steps, [], [collective(*span) for span in theirs])
    timing = timing_of(trace, [peer])
    assert timing.step_ms == pytest.approx(timing.compute_ms + timing.exposed_comm_ms + timing.other_ms)
    assert timing.comm_ms == pytest.approx(timing.exposed_comm_ms + timing.overlap_ms)
    assert 0 <= timing.exposed_wait_ms <= timing.wait_ms + 1e-12
    assert timing.wait_ms <= timing.comm_ms + 1e-12
    assert timing.exposed_wait_ms <= timing.exposed_comm_ms + 1e-12


def test_a_joined_collective_keeps_the_order_of_its_rank():
    parts, _ = join([[(0, collective(5, 6)), (0, collective(1, 2))]])[0]
    assert [part.collective.start for part in parts] == [5, 1]
    assert isinstance(parts[0], Joined)
