"""Arms, baseline and target of a comparison."""

import pytest

from recsys.compare.comparison import compare
from recsys.report.frame import Target
from tests.recsys.report.fake_runs import write_run


class TestArms:
    def test_runs_of_one_name_in_several_directories_are_one_arm_of_that_name(self, tmp_path):
        places = [tmp_path / str(seed) for seed in range(2)]
        for seed, place in enumerate(places):
            write_run(place, "full", method="sharded", seed=seed)
            write_run(place, "robe", seed=seed)
        comparison = compare([place / name for place in places for name in ("full", "robe")])
        assert [(arm.label, len(arm)) for arm in comparison.arms] == [("full", 2), ("robe", 2)]
        method = next(d for d in comparison.varied if d.key == "embedding.method")
        assert [labels for _, labels in method.values] == [("full",), ("robe",)]

    def test_what_differs_in_more_than_the_seed_or_repeats_it_is_apart(self, tmp_path):
        runs = [
            write_run(tmp_path, "a_s0"),
            write_run(tmp_path, "a_s1", seed=1),
            write_run(tmp_path, "again_s1", seed=1),
            write_run(tmp_path, "small", compression=10.0),
            write_run(tmp_path, "cut_s2", seed=2, summary={"status": "interrupted"}),
        ]
        comparison = compare(runs)
        expected = [["a_s0", "a_s1"], ["again_s1"], ["small"], ["cut_s2"]]
        assert [arm.values("run") for arm in comparison.arms] == expected
        assert [[run.label for run in comparison.runs_of(arm)] for arm in comparison.arms] == expected
        assert [arm.label for arm in comparison.arms] == ["a", "again_s1", "small", "cut_s2"]

    @pytest.mark.parametrize(
        ("names", "label"),
        [
            (("robe_seed1", "robe_seed2"), "robe"),
            (("robe-1000x.0", "robe-1000x.1"), "robe-1000x"),
            (("tables_1", "tables_2"), "tables"),
            (("1", "2"), "1"),
        ],
    )
    def test_an_arm_is_called_by_what_its_names_share(self, tmp_path, names, label):
        runs = [write_run(tmp_path, name, seed=seed) for seed, name in enumerate(names)]
        assert [arm.label for arm in compare(runs).arms] == [label]

    def test_the_baseline_is_the_first_arm_with_full_tables(self, tmp_path):
        robe = write_run(tmp_path, "robe", compression=10.0)
        full = write_run(tmp_path, "full", method="sharded", step_ms=20.0)
        comparison = compare([robe, full], target_auc=0.74)
        assert ([arm.label for arm in comparison.arms], comparison.baseline.label) == (["full", "robe"], "full")
        assert [run.label for run in comparison.runs] == ["full", "robe"]
        assert [comparison.ratios(arm).step_time for arm in comparison.arms] == [1.0, 0.5]
        assert compare([robe]).baseline.label == "robe"

    def test_only_others_are_ordered_against_the_baseline(self, tmp_path):
        full = write_run(tmp_path, "full", method="sharded", evaluations=[(10, 512, 0.5, 0.70), (20, 1024, 1.0, 0.76)])
        robe = write_run(tmp_path, "robe", compression=10.0, evaluations=[(10, 512, 0.5, 0.72), (20, 1024, 1.0, 0.73)])
        comparison = compare([full, robe])
        first, second = (comparison.order(arm) for arm in comparison.arms)
        assert first is None
        assert second is not None
        assert (second.ahead_at_first, second.changes_s) == (True, (pytest.approx(14.0),))


class TestTarget:
    def test_lowest_best_auc_of_finished_runs_with_full_tables(self, tmp_path):
        runs = [
            write_run(tmp_path, "robe", compression=10.0, evaluations=[(1, 512, 1, 0.70)]),
            write_run(tmp_path, "full_s0", method="sharded", evaluations=[(1, 512, 1, 0.77), (2, 1024, 2, 0.75)]),
            write_run(tmp_path, "full_s1", method="sharded", seed=1, evaluations=[(1, 512, 1, 0.76)]),
            write_run(
                tmp_path, "full_s2", method="sharded", evaluations=[(1, 512, 1, 0.72)], summary={"status": "running"}
            ),
        ]
        rule = "the lowest of the best validation AUCs of the 2 finished runs with full tables"
        assert compare(runs).target == Target(0.76, "validation", rule)

    def test_configured_and_given(self, tmp_path):
        runs = [write_run(tmp_path, str(i), seed=i, config={"training.target_auc": 0.75}) for i in range(2)]
        assert compare(runs).target == Target(0.75, "validation", "training.target_auc of every run")
        assert compare(runs, target_auc=0.6).target == Target(0.6, "validation", "given on the command line")

    def test_none_without_full_tables(self, tmp_path):
        assert compare([write_run(tmp_path, "robe", compression=10.0)]).target is None
