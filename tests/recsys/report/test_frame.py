"""The results frame: figures of an arm against cases worked out by hand, and the file they are stored in."""

import copy
from typing import Any

import polars as pl
import pytest

from recsys.report.frame import Measured, Results, Target, build_results
from recsys.report.run import load_runs
from tests.recsys.report.fake_runs import collective, phases, profiled_rank, profiled_window, write_run

RISING = [(10.0, 1024, 0.5, 0.70), (20.0, 2048, 1.0, 0.74), (30.0, 3072, 1.5, 0.78)]


def results_of(*paths) -> Results:
    return build_results((run, {"arm": run.summary.method}) for run in load_runs(paths))


def arm_of(*paths) -> Any:
    (arm,) = results_of(*paths).arms()
    return arm


class TestArm:
    def test_seeds_give_mean_and_standard_deviation(self, tmp_path):
        aucs = (0.75, 0.76, 0.78)
        arm = arm_of(
            *(
                write_run(tmp_path, f"robe_s{i}", seed=i, step_ms=10.0 + i, summary={"best.test_auc": auc})
                for i, auc in enumerate(aucs)
            )
        )
        auc = arm.at_best("test_auc", sampling_error=True)
        assert (len(arm), arm.values("seed"), auc.n, auc.source) == (3, [0, 1, 2], 3, "seeds")
        assert auc.mean == pytest.approx(0.763333, abs=1e-6)
        assert auc.plus_minus == pytest.approx(0.0152753, abs=1e-7)  # sqrt((.01333² + .00333² + .01667²) / 2)
        assert (arm.mean("step_ms.p50").mean, arm.step_ms) == pytest.approx((11.0, 11.0))

    def test_one_seed_has_the_sampling_error_it_was_recorded_with(self, tmp_path):
        arm = arm_of(write_run(tmp_path, "robe", summary={"best.test_auc": 0.75}))
        assert arm.at_best("test_auc", sampling_error=True) == Measured(0.75, 0.0021, "sampling", 1)
        assert arm.at_best("test_auc") == Measured(0.75, None, None, 1)

    def test_relative_time_is_epochs_times_step_over_the_baselines(self, tmp_path):
        full = write_run(tmp_path, "full", method="sharded", evaluations=RISING, step_ms=10.0)
        slow = [(t / 2, samples, epoch, auc - 0.04) for t, samples, epoch, auc in RISING]
        robe = write_run(tmp_path, "robe", compression=10.0, evaluations=slow, step_ms=4.0)
        base, other = results_of(full, robe).arms()
        target = Target(0.74, "validation", "")
        ratios = other.ratios(base, target)
        assert ratios.step_time == pytest.approx(0.4)
        assert ratios.relative_time == pytest.approx((1.5 * 4) / (1.0 * 10))
        assert ratios.time_to_target == pytest.approx(15 / 20)
        # Every rank holds a tenth of the parameters, against the larger shard, 6/11 of them.
        assert ratios.embedding_bytes == pytest.approx(0.1 / (6 / 11), rel=1e-3)
        assert (base.ratios(base, target).relative_time, base.ratios(base, target).step_time) == (1, 1)
        assert other.ratios(base, None).relative_time is None

    def test_a_step_time_measured_interleaved_goes_before_that_of_the_runs(self, tmp_path):
        (run,) = load_runs([write_run(tmp_path, "robe", step_ms=10.0)])
        (arm,) = build_results([(run, {"arm": "robe", "interleaved_step_ms": 8.0})]).arms()
        assert (arm.step_ms, arm.fact("step_ms.p50")) == (8.0, 10.0)

    def test_not_reached_is_a_result(self, tmp_path):
        full = write_run(tmp_path, "full", method="sharded", evaluations=RISING)
        robe = write_run(tmp_path, "robe", compression=10.0, evaluations=RISING[:2])
        base, other = results_of(full, robe).arms()
        lowest = base.lowest_best("validation_auc")
        assert lowest == 0.78
        reached: Any = other.time_to_target(Target(lowest, "validation", ""))
        assert (reached.runs, reached.observed) == (0, None)

    def test_a_run_without_evaluations_has_figures_none(self, tmp_path):
        arm = arm_of(write_run(tmp_path, "new", step_ms=None, evaluations=[], summary={"status": "running"}))
        target = Target(0.75, "validation", "")
        assert (arm.at_best("test_auc"), arm.time_to_target(target), arm.step_ms) == (None, None, None)
        assert (arm.ratios(arm, target).step_time, arm.lowest_best("test_auc"), arm.unfinished) == (
            None, None, ["running"]
        )  # fmt: skip

    def test_memory_is_of_the_rank_that_holds_most(self, tmp_path):
        held = {"embedding": [100, 300, 200], "embedding_optimizer": [500, 10, 200]}
        summary = {"bytes_per_rank": held, "peak_memory_gib": [1.5, 2.5, 2.0]}
        arm = arm_of(write_run(tmp_path, "x", summary=summary))
        assert (arm.embedding_bytes, arm.peak_memory_gib) == ((100, 500), 2.5)

    def test_what_every_run_reaches_is_the_lowest_of_their_best(self, tmp_path):
        falling = [(10.0, 1024, 0.5, 0.77), (20.0, 2048, 1.0, 0.72)]
        arm = arm_of(
            write_run(tmp_path, "a", evaluations=RISING),
            write_run(tmp_path, "b", seed=1, evaluations=falling),
            write_run(tmp_path, "new", seed=2, evaluations=[]),
        )
        assert arm.lowest_best("validation_auc") == 0.77

    def test_at_equal_time_the_evaluation_is_chosen_within_it(self, tmp_path):
        arm = arm_of(write_run(tmp_path, "x", evaluations=RISING))
        assert arm.at_equal_time("validation_auc", 25.0).mean == 0.74
        assert arm.at_equal_time("validation_auc", 5.0) is None

    def test_a_metric_that_only_some_record_is_a_column(self, tmp_path):
        run = write_run(tmp_path, "robe", evaluations=RISING)
        lines = (run / "metrics.jsonl").read_text().splitlines()
        lines[-1] = lines[-1].replace("{", '{"quality/test_new": 0.5, ', 1)
        (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        arm = arm_of(run)
        assert arm.at_best("test_new") == Measured(0.5, None, None, 1)
        assert [len(points) for points in arm.curves("test_new")] == [1]
        assert arm.at_best("test_other") is None


class TestProfiled:
    def of(self, tmp_path, *windows, **more) -> Any:
        """The profiled steps of one run with these windows, each a list of ranks."""
        profiles = [profiled_window(100 * n, ranks, 0.01 * n) for n, ranks in enumerate(windows)]
        return arm_of(write_run(tmp_path, "one", summary={"profiles": profiles}, **more)).profiled

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
        sums = {kind: (c.count, c.bytes, c.wait_ms, c.transfer_ms) for kind, c in mean.collectives.items()}
        assert sums == {"all_reduce": (1, 300, 0.5, 1.5), "all_to_all": (2, 40, 0, 1)}
        assert {name: (p.ms, p.compute_ms, p.exposed_comm_ms) for name, p in mean.phases.items()} == {
            "a": (4, 2, 1), "b": (2, 1, 0.5)
        }  # fmt: skip

    def test_what_was_not_measured_is_none(self, tmp_path):
        time = self.of(tmp_path, [profiled_rank(10.0, wall_ms=None, blocked_ms=None)], step_ms=None)
        assert (time.overhead, time.overlap_share, time.mean.wall_ms, time.mean.blocked_ms) == (None, None, None, None)
        assert time.exposed_share == 0

    def test_windows_of_all_seeds_count(self, tmp_path):
        time = arm_of(
            *(
                write_run(tmp_path, f"s{i}", seed=i, summary={"profiles": [profiled_window(1, [profiled_rank(ms)])]})
                for i, ms in enumerate((10.0, 20.0))
            )
        ).profiled
        assert (time.windows, time.mean.step_ms) == (2, 15.0)
        assert time.overhead == pytest.approx(15 / 10.5)

    def test_runs_without_windows_and_summaries_older_than_them_have_none(self, tmp_path):
        assert self.of(tmp_path) is None
        assert arm_of(write_run(tmp_path, "old")).profiled is None


class TestResults:
    @pytest.fixture
    def results(self, tmp_path) -> Results:
        paths = [
            write_run(tmp_path, "full", method="sharded", windows=1),
            write_run(tmp_path, "robe_s0", compression=10.0),
            write_run(tmp_path, "new", compression=10.0, seed=1, step_ms=None, evaluations=[]),
        ]
        rows: list[Any] = [(run, {"arm": run.summary.method, "setting": "a"}) for run in load_runs(paths)]
        failed = {"run": "failed", "arm": "robe", "setting": "b", "problem": "out of memory"}
        return build_results([*rows, (None, failed)], {"title": "×", "seeds": [0, 1]})

    def test_arms_in_the_order_of_their_runs(self, results):
        assert [(arm.label, arm.values("run")) for arm in results.arms()] == [
            ("sharded", ["full"]), ("robe", ["robe_s0", "new", "failed"])
        ]  # fmt: skip
        assert [arm.label for arm in results.arms(("setting", "arm"))] == ["a sharded", "a robe", "b robe"]

    def test_what_is_saved_is_loaded(self, results, tmp_path):
        results.save(tmp_path / "there" / "results.parquet")
        loaded = Results.load(tmp_path / "there" / "results.parquet")
        assert loaded.runs.equals(results.runs)
        assert loaded.evaluations.equals(results.evaluations)
        assert loaded.facts == {"title": "×", "seeds": [0, 1]}
        assert [path.name for path in (tmp_path / "there").iterdir()] == ["results.parquet"]
        before, after = results.arms()[0], loaded.arms()[0]
        assert (before.profiled, before.curves("test_auc")) == (after.profiled, after.curves("test_auc"))
        assert before.profiled is not None

    def test_saving_that_fails_leaves_what_was_there(self, results, tmp_path, monkeypatch):
        path = tmp_path / "results.parquet"
        results.save(path)
        whole = path.read_bytes()

        def fail(self, target, **options):
            target.write_bytes(b"half")
            raise OSError("disk full")

        monkeypatch.setattr(pl.DataFrame, "write_parquet", fail)
        with pytest.raises(OSError, match="disk full"):
            copy.copy(results).save(path)
        assert path.read_bytes() == whole

    def test_a_filter_takes_the_evaluations_along(self, results):
        full = results.filter(pl.col("run") == "full")
        assert set(full.evaluations["run"]) == {"full"}
        assert results.filter(pl.col("problem").is_not_null()).runs["run"].to_list() == ["failed"]

    def test_another_file_is_refused_by_name(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"nothing\.parquet"):
            Results.load(tmp_path / "nothing.parquet")
        (tmp_path / "text").write_text("text")
        with pytest.raises(ValueError, match="text is not a parquet file"):
            Results.load(tmp_path / "text")
        pl.DataFrame({"a": [1]}).write_parquet(tmp_path / "other")
        with pytest.raises(ValueError, match="other does not hold results in the format"):
            Results.load(tmp_path / "other")

    def test_runs_of_one_name_are_a_mistake_of_ours(self, tmp_path):
        (run,) = load_runs([write_run(tmp_path, "one")])
        with pytest.raises(AssertionError, match="one name"):
            build_results([(run, {"arm": "a"}), (run, {"arm": "b"})])
