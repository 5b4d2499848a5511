"""The bench of methods: which rows, which learning rates, and the whole on a small data set."""

import json
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from baselines import full
from configs.load import ConfigError
from configs.request import CompressionRefused, EmbeddingRequest
from launch import bench_methods
from launch.bench_methods import (
    Bench,
    data_overrides,
    default_rates,
    initial_std,
    load_methods,
    main,
    plan_rows,
)
from launch.runners.trial import Outcome
from launch.runners.tuning import choose_rate, find_next_rate
from pss.methods import robe
from recsys.embedding.embeddings import METHODS
from recsys.runs.run_dir import RunDir
from recsys.studies.method_rows import MethodRow, RateTrial
from tests.launch.test_sweep import DEBUG, SMALL
from tests.recsys.report.fake_runs import write_run


def trials(**losses):
    return [RateTrial(float(name[1:].replace("_", ".")), loss, 1.0) for name, loss in losses.items()]


@pytest.mark.parametrize(
    ("tried", "best", "following"),
    [
        (trials(r1=0.5, r3=0.4, r10=0.6), 3.0, None),
        (trials(r1=0.5, r3=0.4, r10=0.3), 10.0, 30.0),
        (trials(r10=0.3, r1=0.5, r3=0.4), 10.0, 30.0),
        (trials(r1=0.3, r3=0.4, r10=0.5), 1.0, 0.3),
        (trials(r0_1=0.3, r0_2=0.4, r0_4=0.5), 0.1, 0.05),
        (trials(r1=0.3, r3=None, r10=None), 1.0, 0.3),
        (trials(r1=None, r3=None, r10=None), None, 0.3),
        (trials(r3=0.4), 3.0, None),
    ],
)
def test_the_rate_of_lowest_loss_and_one_step_beyond_the_end(tried, best, following):
    assert choose_rate(tried) == best
    assert find_next_rate(tried) == following


def test_the_grid_is_around_the_rate_of_the_config():
    assert default_rates(0.1) == [0.03, 0.1, 0.3]
    assert default_rates(3.0) == [0.9, 3.0, 9.0]


class FakeRuns:
    """Stands for `run_trials`: log loss is lowest at a row's best rate; rates above `limit` diverge."""

    def __init__(self, root, best, limit=1e9, failing=()):
        self.root, self.best, self.limit, self.failing, self.asked = root, best, limit, failing, []

    def __call__(self, cells, runs, title):
        self.asked.append((title, [cell.name for cell in cells]))
        return [self.make(cell) for cell in cells]

    def make(self, cell):
        values = dict(override.split("=", 1) for override in cell.overrides)
        rate, seed = float(values["optimizer.embedding_learning_rate"]), int(values["run.seed"])
        if rate > self.limit or cell.name in self.failing:
            return Outcome(cell, RunDir(self.root / cell.name), "FloatingPointError: nan", 2.0)
        auc = 0.78 - 0.001 * abs(rate - self.best) + 0.0001 * seed
        path = write_run(
            self.root, cell.name, seed=seed, compression=float(values["embedding.compression"]),
            config={"optimizer.embedding_learning_rate": rate}, evaluations=[(5.0, 400_000, 1.0, auc)],
            summary={"train_time_s": 7.0, "evaluation_time_s": 0.5},
        )  # fmt: skip
        return Outcome(cell, RunDir(path), None, 9.0)


def run_faked(monkeypatch, runs, rows, rates=(1.0, 3.0, 10.0), seeds=(4, 5, 6)):
    monkeypatch.setattr(bench_methods, "run_trials", runs)
    return Bench({"robe": DEBUG}, ["a.b=c"], seeds, runs=None).run(rows, rates)


def test_rates_are_tuned_on_the_first_seed_and_the_others_run_at_the_best(monkeypatch, tmp_path):
    runs = FakeRuns(tmp_path, best=3)
    (row, refused) = run_faked(monkeypatch, runs, [MethodRow("robe", 10.0, None, 1.0), MethodRow("robe", 99.0, 53.0)])
    assert runs.asked == [
        ("learning rates", ["robe_10x_lr1_s4", "robe_10x_lr3_s4", "robe_10x_lr10_s4"]),
        ("other runs", ["robe_10x_lr3_s5", "robe_10x_lr3_s6"]),
    ]
    assert [run.summary.seed for run in row.runs] == [4, 5, 6]
    assert (row.learning_rate, row.is_at_edge, row.errors) == (3.0, False, ())
    assert [(trial.learning_rate, trial.seconds) for trial in row.trials] == [(1.0, 7.5), (3.0, 7.5), (10.0, 7.5)]
    assert row.trials[1].log_loss == row.runs[0].summary.best["validation_log_loss"]
    assert (refused.runs, refused.trials) == ((), ())


def test_a_method_is_tuned_at_its_lowest_compression(monkeypatch, tmp_path):
    runs = FakeRuns(tmp_path, best=3)
    rows = [MethodRow("robe", 10.0, None, 1.0), MethodRow("robe", 20.0, None, 1.0), MethodRow("robe", 99.0, 53.0)]
    tuned, other, _ = run_faked(monkeypatch, runs, rows)
    assert [title for title, _ in runs.asked] == ["learning rates", "other runs"]
    assert runs.asked[1][1] == ["robe_10x_lr3_s5", "robe_10x_lr3_s6", *(f"robe_20x_lr3_s{s}" for s in (4, 5, 6))]
    assert (other.learning_rate, len(other.runs), other.trials) == (3.0, 3, ())
    assert len(tuned.trials) == 3


@pytest.mark.parametrize(("best", "chosen", "is_at_edge"), [(40, 30.0, True), (12, 10.0, False), (0.1, 0.3, True)])
def test_the_grid_is_extended_once_where_the_best_is_at_its_end(monkeypatch, tmp_path, best, chosen, is_at_edge):
    runs = FakeRuns(tmp_path, best)
    (row,) = run_faked(monkeypatch, runs, [MethodRow("robe", 1000.0, None, 1.0)])
    assert [title for title, _ in runs.asked] == ["learning rates", "beyond the grid", "other runs"]
    assert (row.learning_rate, row.is_at_edge, len(row.trials), len(row.runs)) == (chosen, is_at_edge, 4, 3)


def test_rates_that_diverge_are_passed_over_and_failing_seeds_are_told(monkeypatch, tmp_path):
    runs = FakeRuns(tmp_path, best=9, limit=5, failing=("robe_10x_lr3_s6",))
    (row,) = run_faked(monkeypatch, runs, [MethodRow("robe", 10.0, None, 1.0)])
    assert (row.learning_rate, len(row.runs)) == (3.0, 2)
    assert row.errors == (f"robe_10x_lr3_s6: FloatingPointError: nan (log: {tmp_path}/robe_10x_lr3_s6/log.txt)",)
    (row,) = run_faked(monkeypatch, FakeRuns(tmp_path / "b", best=3, limit=0), [MethodRow("robe", 10.0, None, 1.0)])
    assert (row.runs, row.learning_rate) == ((), None)
    assert [error.split(":")[0] for error in row.errors] == ["0.3", "1", "3", "10"]


@pytest.fixture
def configs(tmp_path, monkeypatch):
    """Configs of full tables, of ROBE, and of a method that reaches 53.14×, 4×."""

    def reaching(highest):
        def build(tables, options, request):
            if request.compression > highest:
                raise CompressionRefused("limited", request.compression, highest)
            return robe.build(tables, options, request)

        return SimpleNamespace(Options=robe.Options, placement="replicate", build=build)

    for name, highest in (("limited", 53.14), ("low", 4.0)):
        monkeypatch.setitem(METHODS, name, reaching(highest))
        monkeypatch.setitem(bench_methods.CHOICES["embedding"][1], name, robe.Options)
    keys = dict(override.split("=") for override in SMALL)
    tables = "".join(f"{key} = {value}\n" for key, value in keys.items())
    (tmp_path / "base.toml").write_text(f'base = "{DEBUG}"\nevaluation.patience = 1\n{tables}')
    for name in ("low", "robe", "limited", "full"):
        (tmp_path / f"synthetic_{name}.toml").write_text(f'base = "base.toml"\n[embedding]\nmethod = "{name}"\n')
    return {name: str(tmp_path / f"synthetic_{name}.toml") for name in ("low", "robe", "limited", "full")}


def test_every_method_is_run_where_it_reaches(configs):
    methods = load_methods(list(configs.values()), [])
    assert list(methods) == ["full", "robe", "limited", "low"]
    rows = plan_rows(methods, [100.0, 10.0, 53.0])
    assert [(row.name, row.compression, row.limit, row.initial_std is not None) for row in rows] == [
        ("full", 1.0, 1.0, True),
        *(("robe", compression, None, True) for compression in (10.0, 53.0, 100.0)),
        *(("limited", compression, None, True) for compression in (10.0, 53.0)),
        ("limited", 100.0, 53.14, False),
        ("low", 4.0, 4.0, True),
    ]
    assert all(row.initial_std == pytest.approx(1, abs=0.1) for row in rows if row.initial_std)


def test_a_method_that_cannot_be_built_is_a_row_of_its_own(configs, monkeypatch):
    def build(tables, options, request):
        raise ValueError("embedding.limited.z = 3: no")

    monkeypatch.setattr(METHODS["limited"], "build", build)
    rows = plan_rows(load_methods([configs["limited"], configs["robe"]], []), [10.0])
    assert [(row.name, row.errors) for row in rows] == [("robe", ()), ("limited", ("embedding.limited.z = 3: no",))]


def test_initial_std_is_that_of_the_rows_read(tmp_path):
    tables = [
        EmbeddingBagConfig(name="a", embedding_dim=16, num_embeddings=5000, feature_names=["a"]),
        EmbeddingBagConfig(name="b", embedding_dim=16, num_embeddings=300, feature_names=["b", "c"]),
    ]
    module = full.build(tables, full.Options(), EmbeddingRequest(init_scale=0.3))
    assert initial_std(module, tables) == pytest.approx(0.3 / 3**0.5, rel=0.02)
    with torch.no_grad():
        module.embedding_bags["b"].weight.mul_(10)
    assert initial_std(module, tables) == pytest.approx(0.3 / 3**0.5 * (201 / 3) ** 0.5, rel=0.05)


def test_data_is_found_in_a_directory(tmp_path):
    for name in ("x_ratings.parquet", "movies.csv", "movies.html"):
        (tmp_path / name).touch()
    assert data_overrides(str(tmp_path)) == [
        f'data.movielens.ratings="{tmp_path}/x_ratings.parquet"', f'data.movielens.movies="{tmp_path}/movies.csv"'
    ]  # fmt: skip
    assert data_overrides(None) == []
    (tmp_path / "movies.csv").unlink()
    with pytest.raises(ConfigError, match="files of no dataset"):
        data_overrides(str(tmp_path))


def test_mistakes_are_told_before_anything_runs(configs, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "synthetic_robe.toml").write_text(
        Path(configs["robe"]).read_text().replace("base.", "../base.")
    )
    for arguments, said in (
        (["--data", str(tmp_path / "none")], "none: no such file or directory"),
        ([configs["robe"], str(tmp_path / "other" / "synthetic_robe.toml")], "are both called robe"),
        ([configs["robe"], "embedding.method=sharded"], "no config of a method is given"),
        ([configs["robe"], "training.epoch=1"], "unknown key"),
    ):
        refuse(capsys, arguments, tmp_path, said)
    assert not (tmp_path / "out").exists()


def refuse(capsys, arguments, tmp_path, said):
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left:
        main([*arguments, "--output", str(tmp_path / "out")])
    signal.signal(signal.SIGTERM, handler)
    assert left.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_on_a_small_data_set(configs, tmp_path, capsys):
    arguments = [
        configs["full"],
        configs["robe"],
        "--compressions",
        "5",
        "1e9",
        "--rates",
        "1",
        "3",
        "--seeds",
        "0",
        "1",
    ]
    output = tmp_path / "out"
    handler = signal.getsignal(signal.SIGTERM)
    for _ in range(2):
        with pytest.raises(SystemExit) as left:
            main([*arguments, "--jobs", "1", "--output", str(output)])
        signal.signal(signal.SIGTERM, handler)
        assert left.value.code == 0
    printed = capsys.readouterr()
    assert "learning rates: 4 of 4 are there already" in printed.err
    table = json.loads((output / "results.json").read_text())
    assert [(row["name"], row["compression"], len(row["runs"])) for row in table["rows"]] == [
        ("full", 1.0, 2), ("robe", 5.0, 2), ("robe", 1e9, 0)
    ]  # fmt: skip
    robe_row = table["rows"][1]
    best = min(robe_row["trials"], key=lambda trial: trial["log_loss"])
    assert best["learning_rate"] == robe_row["learning_rate"]
    assert best["log_loss"] == robe_row["runs"][0]["best"]["validation_log_loss"]
    assert "| robe | 5× | 5.00× |" in (output / "table.md").read_text()
    assert (output / "index.html").exists()
    assert len(list((output / "runs").iterdir())) == 2 * 3 + 2
