"""What runs of a fair comparison share, and what a reader must know of them."""

import pytest

from recsys.compare.comparison import compare
from recsys.report.fairness import find_differences, shared_facts
from recsys.report.run import ComparisonError, load_runs
from tests.recsys.report.fake_runs import profiled_rank, profiled_window, write_run


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
def test_what_must_be_shared_is_refused_with_both_values(tmp_path, change, key):
    runs = [write_run(tmp_path, "one"), write_run(tmp_path, "two", compression=10.0, **change)]
    with pytest.raises(ComparisonError) as refused:
        compare(runs)
    (line,) = [line for line in str(refused.value).splitlines() if line.startswith(f"  {key}:")]
    assert "(one)" in line
    assert "(two)" in line
    assert [d.key for d in compare(runs, allow_differences=True).differences if d.key == key] == [key]


def test_every_difference_is_listed(tmp_path):
    changes = {"training.epochs": 3.0, "evaluation.patience": 2, "optimizer.dense": "sgd"}
    runs = load_runs([write_run(tmp_path, "one"), write_run(tmp_path, "two", config=changes)])
    assert {d.key for d in find_differences(runs, shared_facts)} == set(changes)


def test_embedding_parallelism_seed_and_places_may_differ(tmp_path):
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


def test_caveats(tmp_path):
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


def test_unmatched_collectives_are_a_caveat(tmp_path):
    ranks = [profiled_rank(10.0, unmatched=2), profiled_rank(10.0, unmatched=1)]
    run = write_run(tmp_path, "one", summary={"profiles": [profiled_window(1, ranks)]})
    assert any("one: 3 collectives" in caveat for caveat in compare([run]).caveats)
