"""The loop on one rank, in this process: when it stops, what it records, and the golden run."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from configs.load import load_config
from launch.runners.rank import train
from recsys.data.registry import build_dataset
from recsys.runs.metrics import measure_quality
from recsys.runs.ranks import Ranks
from recsys.runs.run_directory import RunDir
from recsys.runs.summary import Target
from recsys.train.assemble import TrainStep
from recsys.train.registry import CHOICES

DEBUG = Path(__file__).parents[3] / "configs" / "debug.toml"


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def run(tmp_path):
    def run(*overrides):
        small = ["data.synthetic.train_rows=5120", "data.synthetic.scale=0.001", "logging.tensorboard=false"]
        config = load_config(DEBUG, [*small, f"run.dir={tmp_path}", *overrides], CHOICES)
        run_dir = RunDir(tmp_path / config.run.name)
        run_dir.start("", {}, resume=True)
        torch.set_num_threads(1)
        reason = train(config, build_dataset(config.data), run_dir, Ranks(0, 1, torch.device("cpu")))
        return reason, run_dir.read_summary(), list(run_dir.records())

    return run


def evaluations(records):
    return [r["step"] for r in records if "quality/test_auc" in r]


def test_golden_run(run):
    """Guards the whole path from data to AUC: these figures change only with a change of meaning."""
    _, summary, records = run("training.epochs=2")
    assert (summary.steps, summary.parameters.embedding) == (40, GOLDEN_PARAMETERS)
    assert summary.best["test_auc"] == pytest.approx(GOLDEN_AUC, abs=2e-4)
    assert summary.best["test_log_loss"] == pytest.approx(GOLDEN_LOG_LOSS, abs=2e-4)
    losses = [r["quality/train_log_loss"] for r in records if "quality/train_log_loss" in r]
    assert losses[-1] < losses[0] < math.log(2)


GOLDEN_PARAMETERS, GOLDEN_AUC, GOLDEN_LOG_LOSS = 55920, 0.63346, 0.55121


@pytest.mark.parametrize(
    ("overrides", "reason", "steps"),
    [
        (["training.epochs=0.5"], "epochs", 10),
        (["training.max_steps=7"], "max_steps", 7),
        (["training.epochs=9", "training.target_auc=0.501", "training.stop_at_target=true"], "target_auc", 10),
        (["training.epochs=99", "training.time_budget_s=0.05", "logging.every_steps=5"], "time_budget", None),
    ],
)
def test_when_training_stops(run, overrides, reason, steps):
    found, summary, records = run(*overrides)
    assert (found, summary.stop_reason, summary.status) == (reason, reason, "finished")
    if steps:
        assert summary.steps == steps
    assert evaluations(records)[-1] == summary.steps, "the last state is always evaluated"


def test_patience_counts_evaluations_without_a_better_validation_loss(run):
    reason, summary, records = run(
        "training.epochs=50", "evaluation.patience=2", "optimizer.embedding_learning_rate=40.0"
    )
    assert reason == "patience"
    losses = [r["quality/validation_log_loss"] for r in records if "quality/validation_log_loss" in r]
    best = losses.index(min(losses))
    assert len(losses) == best + 3
    assert summary.best["validation_log_loss"] == min(losses)
    assert summary.last["validation_log_loss"] == losses[-1]


def test_evaluation_comes_every_fraction_of_an_epoch_and_is_not_training_time(run):
    _, summary, records = run("evaluation.every_epochs=0.3")
    assert evaluations(records) == [6, 12, 18, 20]
    assert summary.evaluation_time_s > 0
    times = [r["time_s"] for r in records]
    assert times == sorted(times)
    assert summary.train_time_s == pytest.approx(times[-1], abs=0.05)


def test_without_validation_rows_the_test_rows_select_and_it_says_so(run):
    _, summary, _ = run("data.synthetic.validation_rows=0")
    assert summary.selected_on == "test"
    assert "validation_auc" not in summary.best


def test_the_target_is_reported_where_it_was_reached_first(run):
    _, summary, records = run("training.target_auc=0.501", "training.epochs=2")
    first = next(r for r in records if r.get("quality/validation_auc", 0) >= 0.501)
    assert summary.target == Target(
        auc=0.501, split="validation", time_s=first["time_s"], samples=first["samples"], epochs=first["epoch"]
    )
    _, summary, _ = run("training.target_auc=0.99", "run.overwrite=true")
    assert summary.target.time_s is None


def test_seeds_change_the_run_and_nothing_else_does(run):
    def curve(*overrides):
        records = run("run.overwrite=true", *overrides)[2]
        return json.dumps([{k: v for k, v in r.items() if k.startswith("quality")} for r in records])

    assert curve() == curve()
    assert curve() != curve("run.seed=1")


def test_what_is_dropped_follows_from_seed_rank_and_step(run):
    dropped = ["model.architecture=deepfm", "model.deepfm.dropout=0.5", "optimizer.embedding_learning_rate=0.5"]

    def last_losses(*overrides):
        torch.rand(7)  # whatever was drawn before
        records = run(*dropped, "logging.every_steps=1", *overrides)[2]
        return [r["quality/train_log_loss"] for r in records if "quality/train_log_loss" in r][-4:]

    whole = last_losses("run.name=whole", "training.max_steps=12")
    last_losses("run.name=stopped", "training.max_steps=8", "checkpoint.at_end=true")
    assert last_losses("run.name=stopped", "training.max_steps=12") == whole

    def drawn(seed, rank, step):
        model = torch.nn.Dropout()
        model.forward = lambda dense, ids: torch.nn.functional.dropout(dense)
        optimizer = SimpleNamespace(zero_grad=lambda **_: None, step=lambda: None)
        train_step = TrainStep(model, optimizer, 9, seed=seed, ranks=Ranks(rank, 2, torch.device("cpu")))
        rows = torch.linspace(0, 1, 64).unsqueeze(1).requires_grad_()
        return train_step(SimpleNamespace(dense_features=rows, sparse_features=None, labels=torch.ones(64)), step)

    places = [(0, 0, 1), (1, 0, 1), (0, 1, 1), (0, 0, 2)]
    assert [drawn(*place) for place in places] == [drawn(*place) for place in places]
    assert len({float(drawn(*place)) for place in places}) == 4


def test_profiled_windows_change_nothing_but_the_clock(run):
    _, plain, without = run("training.epochs=2", "run.name=plain")
    windows = ["profile.every_steps=10", "profile.steps=3"]
    _, summary, records = run("training.epochs=2", "run.name=profiled", *windows)
    assert summary.best["test_auc"] == plain.best["test_auc"]
    losses = [[r["step"], r["quality/train_log_loss"]] for r in records if "quality/train_log_loss" in r]
    assert losses == [[r["step"], r["quality/train_log_loss"]] for r in without if "quality/train_log_loss" in r]
    assert [window.step for window in summary.profiles] == [11, 21, 31], "after the evaluations of every tenth step"
    assert plain.profiles == []
    profiled = [r for r in records if "time/compute_ms" in r]
    assert [r["step"] for r in profiled] == [14, 24, 34]
    for record in profiled:
        parts = sum(record[f"time/{part}_ms"] for part in ("compute", "exposed_comm", "other"))
        assert parts == pytest.approx(record["time/profiled_step_ms"])
    before = {r["step"]: r["time_s"] for r in records if "quality/test_auc" in r}
    for record in profiled:  # four steps since the evaluation, of the mean length of others
        assert record["time_s"] - before[record["step"] - 4] > 4 * 1e-3 * summary.step_ms.mean / 3
    # 40 steps, whatever the profiler cost: starting and reading a profile takes seconds, a step milliseconds.
    assert summary.train_time_s < 40 * 1e-3 * summary.step_ms.mean * 3 + 0.5


def test_a_window_that_does_not_fit_is_told(run, capsys):
    _, summary, _ = run("profile.every_steps=5")
    assert "no profiled windows: profile.steps = 10" in capsys.readouterr().out
    assert summary.profiles == []


def test_the_scores_of_the_best_evaluation_are_kept(run, tmp_path):
    _, summary, _ = run("training.epochs=2")
    logits, labels = RunDir(tmp_path / "debug").read_scores()
    quality = measure_quality(logits, labels)
    assert quality["auc"] == pytest.approx(summary.best["test_auc"], abs=1e-12)
    assert quality["rows"] == 4000
    run("training.epochs=0.5", "run.name=without", "checkpoint.keep_scores=false")
    with pytest.raises(FileNotFoundError, match="without has no scores"):
        RunDir(tmp_path / "without").read_scores()


def test_a_run_that_is_ended_as_it_begins_has_a_summary(run, tmp_path, monkeypatch):
    def end(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("recsys.train.trainer.Recorder.start", end)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert RunDir(tmp_path / "debug").read_summary().status == "running"


def test_a_loss_that_is_not_finite_is_told_with_its_step(run):
    class Broken(TrainStep):
        def __call__(self, batch, step):
            loss = super().__call__(batch, step)
            return loss * float("nan") if step == 33 else loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("recsys.train.trainer.TrainStep", Broken)
        with pytest.raises(FloatingPointError, match="loss is nan at step 33, batch 13 of epoch 2"):
            run("training.epochs=2")
