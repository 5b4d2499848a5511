"""Where the time of compared runs goes: the figures of their profiled windows."""

from typing import Any

import pytest

from recsys.report import comparison
from recsys.report.compared_runs import ComparisonError
from tests.recsys.report.fake_runs import collective, phases, profiled_rank, profiled_window, write_run

# What may be None is not in these cases.
compare: Any = comparison.compare


class TestTime:
    def of(self, tmp_path, *windows, **more):
        """The time figures of one run with these windows, each a list of ranks."""
        profiles = [profiled_window(100 * n, ranks, 0.01 * n) for n, ranks in enumerate(windows)]
        (setup,) = compare([write_run(tmp_path, "one", summary={"profiles": profiles}, **more)]).setups
        return setup.figures.time

    def test_means_over_windows_and_ranks(self, tmp_path):
        first = [
            profiled_rank(10.0, compute_ms=6.0, comm_ms=4.0, exposed_comm_ms=3.0, overlap_ms=1.0, exposed_wait_ms=2.0),
            profiled_rank(12.0, compute_ms=8.0, comm_ms=2.0, exposed_comm_ms=2.0),
        ]
        second = [
            profiled_rank(14.0, compute_ms=6.0, comm_ms=8.0, exposed_comm_ms=8.0, exposed_wait_ms=4.0),
            profiled_rank(16.0, compute_ms=10.0, comm_ms=2.0, exposed_comm_ms=2.0),
        ]
        time = self.of(tmp_path, first, second, step_ms=8.0)
        assert (time.windows, time.steps, time.clock_error_ms) == (2, 20, 0.01)
        assert [(rank.step_ms, rank.compute_ms, rank.exposed_wait_ms) for rank in time.ranks] == [
            (12.0, 6.0, 3.0), (14.0, 9.0, 0.0)
        ]  # fmt: skip
        assert (time.mean.step_ms, time.mean.compute_ms, time.mean.exposed_comm_ms) == (13.0, 7.5, 3.75)
        assert time.exposed_share == pytest.approx(3.75 / 13)
        assert time.exposed_share_lowest == pytest.approx(2.5 / 11)
        assert time.exposed_share_highest == pytest.approx(5 / 15)
        assert time.overlap_share == pytest.approx(1 / 16)
        assert time.overhead == pytest.approx(13 / (1.05 * 8)), "over the mean step, which is 1.05 of the p50"

    def test_a_kind_or_phase_that_a_rank_lacks_is_zero_there(self, tmp_path):
        one = profiled_rank(10.0, collectives={"all_reduce": collective(2, 600, 1.0, 3.0)}, phases=phases({"a": 8.0}))
        other = profiled_rank(10.0, collectives={"all_to_all": collective(4, 80, 0.0, 2.0)}, phases=phases({"b": 4.0}))
        mean = self.of(tmp_path, [one, other]).mean
        found = {kind: (c.count, c.bytes, c.wait_ms, c.transfer_ms) for kind, c in mean.collectives.items()}
        assert found == {"all_reduce": (1, 300, 0.5, 1.5), "all_to_all": (2, 40, 0, 1)}
        assert {name: (p.ms, p.compute_ms, p.exposed_comm_ms) for name, p in mean.phases.items()} == {
            "a": (4, 2, 1), "b": (2, 1, 0.5)
        }  # fmt: skip

    def test_what_was_not_measured_is_none(self, tmp_path):
        time = self.of(tmp_path, [profiled_rank(10.0, wall_ms=None, blocked_ms=None)], step_ms=None)
        assert (time.overhead, time.overlap_share, time.mean.wall_ms, time.mean.blocked_ms) == (None, None, None, None)
        assert time.exposed_share == 0

    def test_windows_of_all_seeds_count(self, tmp_path):
        runs = [
            write_run(tmp_path, f"s{i}", seed=i, summary={"profiles": [profiled_window(1, [profiled_rank(ms)])]})
            for i, ms in enumerate((10.0, 20.0))
        ]
        (setup,) = compare(runs).setups
        assert (setup.figures.time.windows, setup.figures.time.mean.step_ms) == (2, 15.0)
        assert setup.figures.time.overhead == pytest.approx(15 / 10.5)

    def test_runs_without_windows_and_summaries_older_than_them_have_none(self, tmp_path):
        assert self.of(tmp_path) is None
        (setup,) = compare([write_run(tmp_path, "old")]).setups
        assert setup.figures.time is None

    def test_unmatched_collectives_are_a_caveat(self, tmp_path):
        ranks = [profiled_rank(10.0, unmatched=2), profiled_rank(10.0, unmatched=1)]
        run = write_run(tmp_path, "one", summary={"profiles": [profiled_window(1, ranks)]})
        assert any("one: 3 collectives" in caveat for caveat in compare([run]).caveats)

    @pytest.mark.parametrize(
        ("ranks", "named"),
        [
            ([profiled_rank(10.0, wait_ms="long")], "profiles.0.ranks.0.wait_ms"),
            ([{"step_ms": 10.0}], "profiles.0.ranks.0.compute_ms"),
            ([profiled_rank(float("nan"))], "profiles.0.ranks.0.step_ms"),
            ([profiled_rank(0.0)], "profiles: value error, a profiled window has no ranks, or steps that took no time"),
            ([], "profiles: value error, a profiled window has no ranks"),
        ],
    )
    def test_a_window_that_is_none_is_refused_by_name(self, tmp_path, ranks, named):
        run = write_run(tmp_path, "one", summary={"profiles": [profiled_window(1, ranks)]})
        with pytest.raises(ComparisonError, match=named):
            compare([run])
