"""Training as a user starts it, through torchrun: what it leaves behind, and how it ends when something goes wrong."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recsys.runs.run_directory import RunDir
from recsys.runs.summary import Failure
from tests.launch.interruption import interrupt

ROOT = Path(__file__).parent.parent.parent
SMALL = [
    "data.synthetic.scale=0.001",
    "data.synthetic.train_rows=4000",
    "data.synthetic.validation_rows=400",
    "data.synthetic.test_rows=600",
    "training.global_batch_size=200",
    "evaluation.global_batch_size=200",
    "evaluation.every_epochs=0.5",
    "logging.every_steps=5",
    "logging.tensorboard=false",
]
STEPS = 20


def command(config, run_dir, *overrides, ranks=2, script=None):
    program = [str(script)] if script else ["-m", "launch.train"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    parts = [f"run.dir={run_dir}", "training.epochs=1", *SMALL, *overrides]
    return [*torchrun, *program, f"configs/{config}.toml", *parts]


def run(*args, fault="", check=True, **kwargs):
    done = subprocess.run(
        command(*args, **kwargs), cwd=ROOT, capture_output=True, text=True, timeout=120,
        env=os.environ | {"FAULT": fault, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


FAULTY = ROOT / "tests/launch/faulty_train.py"

pytestmark = [pytest.mark.dist, pytest.mark.slow]


@pytest.mark.parametrize(("config", "rank"), [("demo/sharded", 1), ("demo/robe", 0)])
def test_the_error_of_the_first_failing_rank_is_what_the_user_sees(tmp_path, config, rank):
    started = time.time()
    done = run(config, tmp_path, fault=f"{rank}:7:raise", script=FAULTY, check=False)
    assert done.returncode != 0
    assert time.time() - started < 60
    root_cause = done.stderr[done.stderr.index("Root Cause") :]
    assert f"rank      : {rank} " in root_cause
    assert "ZeroDivisionError: the planted fault" in root_cause
    summary = RunDir(tmp_path / config.replace("/", "_")).read_summary()
    assert summary.status == "failed"
    assert summary.error == Failure(rank=rank, message="ZeroDivisionError: the planted fault")


def test_a_loss_that_is_not_finite_ends_the_run_with_step_and_advice(tmp_path):
    done = run("demo/robe", tmp_path, fault="0:7:nan", script=FAULTY, check=False)
    assert done.returncode != 0
    message = RunDir(tmp_path / "demo_robe").read_summary().error.message
    assert "training loss is nan" in message
    assert "at step 8, batch 8 of epoch 1" in message
    assert "learning_rate" in message


def test_a_killed_run_continues_to_the_same_numbers(tmp_path):
    keys = ["checkpoint.every_steps=6", "optimizer.embedding=adagrad", "optimizer.embedding_learning_rate=0.1"]
    run("demo/sharded", tmp_path, "run.name=whole", *keys)
    done = run("demo/sharded", tmp_path, "run.name=killed", *keys, fault="1:15:kill", script=FAULTY, check=False)
    assert done.returncode != 0
    killed = RunDir(tmp_path / "killed")
    assert sorted(path.name for path in killed.checkpoints.iterdir()) == ["step_12", "step_6"]
    run("demo/sharded", tmp_path, "run.name=killed", *keys)
    whole = RunDir(tmp_path / "whole")

    def numbers(run_dir):
        timeless = ("time", "speed", "memory")
        return [{k: v for k, v in r.items() if not k.startswith(timeless)} for r in run_dir.records()]

    # The loss record at step 15 covers steps 11 to 15 in one run and 13 to 15 in the resumed one.
    assert numbers(killed)[-2:] == numbers(whole)[-2:]
    assert killed.read_summary().best["test_auc"] == whole.read_summary().best["test_auc"]
    assert [r["step"] for r in killed.records()] == [r["step"] for r in whole.records()]


def test_a_checkpoint_of_another_hash_is_refused_with_the_difference(tmp_path):
    run("demo/robe_single", tmp_path, "checkpoint.at_end=true", ranks=1)
    done = run("demo/robe_single", tmp_path, "embedding.robe.block_size=4", ranks=1, check=False)
    assert done.returncode != 0
    assert "embedding.robe.block_size: the checkpoint has 8, this run 4" in done.stderr


def test_a_checkpoint_is_continued_on_another_number_of_ranks(tmp_path):
    keys = ["run.name=moved", "checkpoint.every_steps=10"]
    run("demo/sharded", tmp_path, *keys, "training.max_steps=10")
    run("demo/sharded", tmp_path, *keys, "parallelism.world_size=1", "run.overwrite=true", ranks=1)
    run("demo/sharded", tmp_path, "run.name=whole")
    moved, whole = (RunDir(tmp_path / name).read_summary().best["test_log_loss"] for name in ("moved", "whole"))
    assert moved == pytest.approx(whole, rel=1e-5)


def test_interrupting_ends_all_ranks_and_leaves_a_valid_run(tmp_path):
    run_dir = RunDir(tmp_path / "demo_sharded")
    ended = interrupt(command("demo/sharded", tmp_path, "training.epochs=1000"), lambda: any(run_dir.records()))
    assert ended.status != 0
    assert run_dir.read_summary().status == "interrupted"
    assert list(run_dir.records())
    assert len(ended.family) >= 2
    assert ended.left == []


def test_a_mistake_is_told_before_anything_starts(tmp_path):
    done = run("demo/robe_single", tmp_path, "embedding.robe.blok_size=4", ranks=1, check=False)
    assert done.returncode != 0
    assert "error: override 'embedding.robe.blok_size=4': embedding.robe.blok_size = 4: unknown key" in done.stderr
    assert not (tmp_path / "demo_robe_single").exists()


def test_the_wrong_number_of_ranks_is_refused(tmp_path):
    done = run("demo/sharded", tmp_path, ranks=1, check=False)
    assert done.returncode != 0
    assert "parallelism.world_size = 2, but 1 rank(s) were started" in done.stderr


def test_a_finished_run_is_not_overwritten_unasked(tmp_path):
    keys = ["run.overwrite=false"]
    run("demo/robe_single", tmp_path, *keys, ranks=1)
    done = run("demo/robe_single", tmp_path, *keys, ranks=1, check=False)
    assert done.returncode != 0
    assert "holds a finished run" in done.stderr
    assert RunDir(tmp_path / "demo_robe_single").read_summary().status == "finished"


def test_a_run_leaves_everything_a_comparison_needs(tmp_path):
    run("demo/robe", tmp_path, "training.target_auc=0.51", "logging.tensorboard=true", "embedding.compression=999.7")
    run_dir = RunDir(tmp_path / "demo_robe")
    summary = run_dir.read_summary()
    assert (summary.status, summary.stop_reason, summary.steps) == ("finished", "epochs", STEPS)
    parameters = summary.parameters
    assert summary.compression.actual == parameters.embedding_full / parameters.embedding > 999.7
    assert summary.bytes_per_rank.embedding == [4 * summary.parameters.embedding] * 2
    assert len(summary.peak_memory_gib) == 2
    assert summary.target.samples in (2000, 4000)
    assert summary.best["test_rows"] == 600
    assert [r["step"] for r in run_dir.records() if "quality/test_auc" in r] == [10, 20]
    environment = run_dir.read_environment()
    assert environment["packages"]["torch"]
    assert environment["threads_per_rank"] == 1
    assert run_dir.read_config()["training"]["target_auc"] == 0.51
    assert "rank 1 bytes" in run_dir.read_plan()
    assert list(run_dir.path.glob("events.out.*"))
    assert json.loads((run_dir.path / "summary.json").read_text()) == summary.model_dump()
