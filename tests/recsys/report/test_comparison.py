"""Arms and target of a comparison, fairness, and every way a run directory can be wrong."""

import json
import shutil

import pytest

from recsys.report.comparison import compare
from recsys.report.fairness import find_differences, shared_facts
from recsys.report.frame import Target
from recsys.report.run import ComparisonError, load_runs
from tests.recsys.report.fake_runs import profiled_rank, profiled_window, write_run


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

    def test_configured_and_asked(self, tmp_path):
        runs = [write_run(tmp_path, str(i), seed=i, config={"training.target_auc": 0.75}) for i in range(2)]
        assert compare(runs).target == Target(0.75, "validation", "training.target_auc of every run")
        assert compare(runs, target_auc=0.6).target == Target(0.6, "validation", "given on the command line")

    def test_none_without_full_tables(self, tmp_path):
        assert compare([write_run(tmp_path, "robe", compression=10.0)]).target is None


class TestFairness:
    @pytest.mark.parametrize(
        ("change", "key"),
        [
            ({"config": {"data.synthetic.scale": 0.2}}, "data.synthetic.scale"),
            ({"config": {"model.dlrm.top_mlp": [8]}}, "model.dlrm.top_mlp"),
            ({"config": {"model.dlrm.path": "only [data] may name places"}}, "model.dlrm.path"),
            ({"config": {"optimizer.dense_learning_rate": 0.1}}, "optimizer.dense_learning_rate"),
            ({"config": {"training.global_batch_size": 1024}}, "training.global_batch_size"),
            ({"config": {"training.max_steps": 10}}, "training.max_steps"),
            ({"config": {"evaluation.patience": 3}}, "evaluation.patience"),
            ({"summary": {"data_fingerprint": "other"}}, "fingerprint of the data"),
            ({"summary": {"device": "cuda"}}, "device"),
            ({"summary": {"best_possible.auc": 0.9}}, "best possible AUC"),
            ({"summary": {"test_rows": 7}}, "test rows"),
            ({"environment": {"cpu": "another"}}, "hardware"),
            ({"threads": 2}, "threads in total"),
        ],
    )
    def test_what_must_be_shared_is_refused_with_both_values(self, tmp_path, change, key):
        runs = [write_run(tmp_path, "one"), write_run(tmp_path, "two", compression=10.0, **change)]
        with pytest.raises(ComparisonError) as refused:
            compare(runs)
        (line,) = [line for line in str(refused.value).splitlines() if line.startswith(f"  {key}:")]
        assert "(one)" in line
        assert "(two)" in line
        assert [d.key for d in compare(runs, allow_differences=True).differences if d.key == key] == [key]

    def test_every_difference_is_listed(self, tmp_path):
        changes = {"training.epochs": 3.0, "evaluation.patience": 2, "optimizer.dense": "sgd"}
        runs = load_runs([write_run(tmp_path, "one"), write_run(tmp_path, "two", config=changes)])
        assert {d.key for d in find_differences(runs, shared_facts)} == set(changes)

    def test_embedding_parallelism_seed_and_places_may_differ(self, tmp_path):
        other = {"data.cache_dir": "/elsewhere", "data.synthetic.path": "x", "embedding.robe.block_size": 8}
        runs = [
            write_run(tmp_path, "one", ranks=2, threads=1),
            write_run(tmp_path, "two", ranks=1, threads=2, seed=5, compression=10.0, config=other),
        ]
        comparison = compare(runs)
        assert comparison.differences == ()
        assert {d.key for d in comparison.varied} == {
            "embedding.compression", "embedding.robe.block_size", "parallelism.world_size",
            "parallelism.threads_per_rank", "seed",
        }  # fmt: skip

    def test_caveats(self, tmp_path):
        failed = {"status": "failed", "error": {"rank": 1, "message": "boom"}}
        runs = [
            write_run(tmp_path, "one", environment={"uncommitted_changes": True, "commit": "a" * 40}),
            write_run(tmp_path, "two", compression=10.0, summary=failed),
            write_run(tmp_path, "three", compression=100.0, environment={"commit": None, "packages.torch": "2.11.0"}),
        ]
        caveats = "\n".join(compare(runs).caveats)
        assert "uncommitted changes: one." in caveats
        assert "two is not finished but failed" in caveats
        assert "rank 1: boom" in caveats
        assert "commit unknown: three." in caveats
        assert "Commits differ" in caveats
        assert "2.11.0 (three)" in caveats
        assert compare([write_run(tmp_path, "fine")]).caveats == ()

    def test_unmatched_collectives_are_a_caveat(self, tmp_path):
        ranks = [profiled_rank(10.0, unmatched=2), profiled_rank(10.0, unmatched=1)]
        run = write_run(tmp_path, "one", summary={"profiles": [profiled_window(1, ranks)]})
        assert any("one: 3 collectives" in caveat for caveat in compare([run]).caveats)


class TestBadInput:
    def refuse(self, *paths):
        with pytest.raises(ComparisonError) as error:
            load_runs(paths)
        return str(error.value)

    def test_missing_and_not_a_directory(self, tmp_path):
        assert f"{tmp_path}/nothing does not exist" in self.refuse(tmp_path / "nothing")
        (tmp_path / "file").write_text("")
        assert f"{tmp_path}/file is not a directory" in self.refuse(tmp_path / "file")

    @pytest.mark.parametrize("missing", ["summary.json", "config.toml", "environment.json"])
    def test_not_a_run_directory(self, tmp_path, missing):
        run = write_run(tmp_path, "one")
        (run / missing).unlink()
        assert f"{run} is not a run directory: {missing} is missing" in self.refuse(run)

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("summary.json", "{"),
            ("summary.json", "[]"),
            ("environment.json", "nonsense"),
            ("environment.json", "[1]"),
            ("config.toml", "a = = 1"),
            ("metrics.jsonl", '{"step": 1, "samples": 1, "epoch": 1, "time_s": 1}\n{"step":\n'),
            ("metrics.jsonl", "[]\n"),
            ("metrics.jsonl", '{"step": 1}\n'),
        ],
    )
    def test_corrupt_file_is_named(self, tmp_path, name, text):
        run = write_run(tmp_path, "one")
        (run / name).write_text(text)
        message = self.refuse(run)
        assert str(run / name) in message
        if name == "metrics.jsonl":
            assert f"line {text.count(chr(10))}" in message

    def test_summary_without_a_key_or_of_a_wrong_type_names_it(self, tmp_path):
        run = write_run(tmp_path, "one", summary={"parameters.embedding": "many"})
        assert "parameters.embedding" in self.refuse(run)
        summary = json.loads((run / "summary.json").read_text())
        (run / "summary.json").write_text(json.dumps({k: v for k, v in summary.items() if k != "method"}))
        assert "method" in self.refuse(run)

    def test_given_twice(self, tmp_path):
        run = write_run(tmp_path, "one")
        assert "given twice" in self.refuse(run, run)
        assert "also as" in self.refuse(run, run / ".." / "one")

    def test_a_last_line_cut_off_is_left_out_and_no_records_are_none(self, tmp_path):
        run = write_run(tmp_path, "one")
        whole = len(load_runs([run])[0].records)
        with (run / "metrics.jsonl").open("a") as lines:
            lines.write('{"step": 99')
        assert len(load_runs([run])[0].records) == whole
        (run / "metrics.jsonl").unlink()
        (run / "plan.txt").unlink()
        (again,) = load_runs([run])
        assert (list(again.records), again.plan) == ([], None)

    def test_runs_of_one_name_are_told_apart_by_their_paths(self, tmp_path):
        run = write_run(tmp_path / "a", "one")
        shutil.copytree(run, tmp_path / "b" / "one")
        labels = [r.label for r in load_runs([run, tmp_path / "b" / "one"])]
        assert labels == [str(run), str(tmp_path / "b" / "one")]

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
            load_runs([run])
