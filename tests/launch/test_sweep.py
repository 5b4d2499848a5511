"""Many runs as one job: what is made, what is not made again, and what becomes of the rest when one ends badly."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from configs.load import ConfigError
from launch.runners.grid import build_trials
from launch.runners.processes import ProcessRunner
from launch.runners.trial import Trial, run_trials
from launch.sweep import main
from tests.launch.interruption import interrupt

ROOT = Path(__file__).parent.parent.parent
DEBUG = str(ROOT / "configs/debug.toml")
SMALL = (
    "data.synthetic.scale=0.001",
    "data.synthetic.train_rows=2000",
    "data.synthetic.validation_rows=200",
    "data.synthetic.test_rows=400",
    "training.global_batch_size=200",
    "evaluation.global_batch_size=200",
    "logging.every_steps=5",
    "logging.tensorboard=false",
)


SIX = ("parallelism.world_size=6", "training.global_batch_size=252", "evaluation.global_batch_size=252")


def trial(root, name, *overrides):
    return Trial(DEBUG, (*SMALL, f"run.dir={root}", *overrides), name)


def best(outcome):
    return outcome.run_dir.read_summary().best["test_log_loss"]


@pytest.fixture(scope="module")
def runner():
    with ProcessRunner(1) as runner:
        yield runner


@pytest.fixture(scope="module")
def swept(runner, tmp_path_factory):
    """A run, one that its method refuses, one that diverges, another, and the first again, all in one process."""
    root = tmp_path_factory.mktemp("swept")
    trials = [
        trial(root, "first", "run.seed=3"),
        trial(root, "refused", "embedding.method=full"),
        trial(root, "diverged", "optimizer.embedding_learning_rate=1e30"),
        trial(root, "other", "run.seed=4"),
        trial(root, "again", "run.seed=3"),
    ]
    return trials, run_trials(trials, runner)


@pytest.mark.slow
def test_a_failure_is_told_and_the_rest_goes_on(swept):
    trials, outcomes = swept
    assert [outcome.trial for outcome in outcomes] == trials
    assert [outcome.failure is None for outcome in outcomes] == [True, False, False, True, True]
    assert outcomes[1].failure.startswith("CompressionRefused: embedding.compression = 10: full")
    assert outcomes[2].failure.startswith("FloatingPointError: the training loss is nan")
    assert "Traceback" in (outcomes[2].run_dir.path / "log.txt").read_text()
    assert "training ended (epochs)" in (outcomes[3].run_dir.path / "log.txt").read_text()


@pytest.mark.slow
def test_runs_of_one_process_do_not_touch_each_other(swept):
    _, (first, _, _, other, again) = swept
    assert best(first) == best(again) != best(other)
    alone = subprocess.run(
        [sys.executable, "-m", "launch.train", DEBUG, *first.trial.overrides, "run.name=alone"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert alone.returncode == 0, alone.stderr
    summary = json.loads((first.run_dir.path.parent / "alone" / "summary.json").read_text())
    assert summary["best"]["test_log_loss"] == best(first)


@pytest.mark.slow
def test_a_finished_run_is_not_made_again(swept, runner):
    trials, outcomes = swept
    (outcomes[3].run_dir.path / "summary.json").unlink()
    before = (outcomes[0].run_dir.path / "summary.json").stat().st_mtime_ns
    again = run_trials([trials[0], trials[3]], runner)
    assert [outcome.seconds is None for outcome in again] == [True, False]
    assert (outcomes[0].run_dir.path / "summary.json").stat().st_mtime_ns == before
    assert again[1].run_dir.exists()


@pytest.mark.slow
def test_a_finished_run_of_another_config_is_in_the_way(swept, runner):
    _, outcomes = swept
    root = outcomes[0].run_dir.path.parent
    changed = trial(root, "again", "run.seed=3", "training.epochs=0.5", "logging.every_steps=6")
    with pytest.raises(ConfigError) as refused:
        run_trials([trial(root, "never"), changed], runner)
    assert "training.epochs: 1.0 there, 0.5 asked for" in str(refused.value)
    assert "logging" not in str(refused.value)
    assert not (root / "never").exists()
    allowed = Trial(changed.config, (*changed.overrides, "run.overwrite=true"), "again")
    (outcome,) = run_trials([allowed], runner)
    assert outcome.seconds > 0
    assert outcome.run_dir.read_summary().epochs == 0.5


@pytest.mark.slow
def test_ctrl_c_is_for_the_sweep_not_for_its_processes(swept, runner, tmp_path):
    (worker,) = runner._idle
    os.kill(worker.process.pid, signal.SIGINT)
    (outcome,) = run_trials([trial(tmp_path, "after")], runner)
    assert outcome.failure is None
    assert runner._idle == [worker]


@pytest.mark.slow
def test_a_killed_process_is_replaced_and_its_run_goes_on_from_its_checkpoint(tmp_path):
    long = trial(tmp_path, "long", "training.epochs=40", "checkpoint.every_steps=5", "evaluation.every_epochs=40")
    with ProcessRunner(1) as runner:
        killer = threading.Thread(target=kill_the_worker_of, args=(runner, tmp_path / "long"))
        killer.start()
        killed, after = run_trials([long, trial(tmp_path, "after")], runner)
        killer.join()
        assert killed.failure == "its process was killed by SIGKILL (out of memory?)"
        assert killed.run_dir.read_summary().error.message == killed.failure
        assert after.failure is None
        first_record = next(killed.run_dir.records())
        (idle,) = runner._idle
        idle.process.kill()
        idle.process.join()
        (resumed,) = run_trials([long], runner)
    assert resumed.failure is None
    assert resumed.run_dir.read_summary().steps == 400
    assert next(resumed.run_dir.records()) == first_record


def kill_the_worker_of(runner, run):
    deadline = time.time() + 120
    while not list((run / "checkpoints").glob("step_*")) and time.time() < deadline:
        time.sleep(0.05)
    (worker,) = runner._running
    os.kill(worker.process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_interrupting_ends_every_process_and_leaves_valid_runs(tmp_path):
    overrides = [*SMALL, f"run.dir={tmp_path}", "training.epochs=1000"]
    command = [sys.executable, "-m", "launch.sweep", DEBUG, *overrides, "--seeds", "0,1,2", "--jobs", "2"]
    ended = interrupt(command, lambda: len(list(tmp_path.glob("*/metrics.jsonl"))) == 2)
    assert ended.status == 130
    assert ended.said == "interrupted: the same command goes on from here\n"
    found = [json.loads(path.read_text())["status"] for path in tmp_path.glob("*/summary.json")]
    assert found == ["interrupted"] * 2
    assert len(ended.family) >= 2
    assert ended.left == []


def test_every_combination_has_a_name_that_tells_it_apart():
    trials = build_trials(
        ["a/one.toml", "two.toml"], ["run.dir=x"], ["m.rate=1e-3,3", "m.mlp=[64],[64,32]", "n.rate=5"], [0, 7]
    )
    assert len(trials) == len({c.name for c in trials}) == 16
    assert trials[3] == Trial(
        "a/one.toml", ("run.dir=x", "m.rate=1e-3", "m.mlp=[64,32]", "n.rate=5", "run.seed=7"),
        "one_m.rate1e-3_mlp64-32_n.rate5_s7",
    )  # fmt: skip
    assert [c.name for c in build_trials(["one.toml"], [], [], [2])] == ["one_s2"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["training.epochs=1"], "no config file is given"),
        ([DEBUG, "--set", "epochs"], "--set epochs: must look like"),
        ([DEBUG, "--set", "training.epochs="], "must look like section.key=A,B"),
        ([DEBUG, "training.epoch=1"], "unknown key (did you mean epochs?)"),
        ([DEBUG, "--seeds", "1,1"], "1,1: a value is given twice"),
        ([DEBUG, DEBUG], "two runs would be made in"),
        ([DEBUG, "--ranks-per-node", "2"], "--job and --ranks-per-node are for jobs: they need --scheduler"),
        ([DEBUG, "--scheduler", "slum"], "scheduler 'slum': torchx knows local_docker, local_cwd, slurm"),
        ([DEBUG, "--scheduler", "slurm", "--job", "mem=1"], "job option mem=1: unknown; known: image, h, gpu, memMB"),
        ([DEBUG, "--scheduler", "slurm", "--job", "gpu=one"], "job option gpu=one: a whole number is needed"),
        ([DEBUG, "--scheduler", "slurm", "--job", "gpu"], "--job gpu: must look like option=value"),
        ([DEBUG, "--scheduler", "slurm", "--ranks-per-node", "0"], "ranks per node = 0: must be at least 1"),
        (
            [DEBUG, *SIX, "--scheduler", "slurm", "--ranks-per-node", "4"],
            "debug_s0: 6 ranks are no whole number of nodes of 4",
        ),
        ([DEBUG, "--jobs", "0"], "jobs = 0"),
        (["nowhere.toml"], "nowhere.toml: cannot be read"),
    ],
)
def test_a_mistake_is_told_before_anything_runs(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
