"""What torchx's trackers are told of a run, and that they never cost one."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from torchx.tracker.api import AppRun
from torchx.tracker.backend.fsspec import create

from configs.load import flatten
from launch.runners.tracking import figures, track_end, track_start
from recsys.runs.run_directory import RunDir
from tests.recsys.runs.summaries import summary_of

ROOT = Path(__file__).parents[3]
SMALL = ["data.synthetic.train_rows=2000", "data.synthetic.scale=0.001"]


@pytest.fixture(autouse=True)
def untracked(monkeypatch):
    AppRun.run_from_env.cache_clear()
    for name in ("TORCHX_TRACKERS", "TORCHX_TRACKER_FSSPEC_CONFIG", "TORCHX_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    yield
    AppRun.run_from_env.cache_clear()


@pytest.fixture
def run_dir(tmp_path):
    run_dir = RunDir(tmp_path / "run")
    run_dir.start("", {}, resume=False)
    run_dir.write_summary(
        summary_of(
            stop_reason="epochs",
            best={"test_auc": 0.75, "test_log_loss": 0.5},
            step_ms={"p50": 2.0, "p95": 3.0},
            samples_per_s=100.0,
            train_time_s=3.0,
            peak_memory_gib=[1.0, 2.0],
        )
    )
    return run_dir


def switch_on(monkeypatch, tmp_path):
    """The environment that torchx makes of a .torchxconfig with an fsspec tracker; its directory is not there yet."""
    config = tmp_path / "tracker.conf"
    config.write_text(f"protocol=file\nroot_path={tmp_path / 'tracker'}\n")
    monkeypatch.setenv("TORCHX_TRACKERS", "fsspec")
    monkeypatch.setenv("TORCHX_TRACKER_FSSPEC_CONFIG", str(config))
    monkeypatch.setenv("TORCHX_JOB_ID", "local_cwd://torchx/job")
    return config


def test_config_figures_and_files_are_recorded(monkeypatch, tmp_path, run_dir):
    config = switch_on(monkeypatch, tmp_path)
    (tmp_path / "tracker").mkdir()
    trace = run_dir.trace(step=20, rank=0)
    trace.parent.mkdir()
    for path in (run_dir.path / "events.out.1", trace):
        path.touch()
    track_start(run_dir, {"embedding": {"method": "robe", "robe": {"tiers": [1]}}})
    track_end(run_dir)
    tracker = create(str(config))
    assert tracker.run_ids() == ["local_cwd://torchx/job"]
    assert tracker.metadata("local_cwd://torchx/job") == {
        "embedding.method": "robe",
        "embedding.robe.tiers": [1],
        "status": "finished",
        "stop_reason": "epochs",
        "quality/test_auc": 0.75,
        "quality/test_log_loss": 0.5,
        "time/step_ms": 2.0,
        "speed/samples_per_s": 100.0,
        "time/train_s": 3.0,
        "memory/peak_gib": 2.0,
    }
    artifacts = tracker.artifacts("local_cwd://torchx/job")
    paths = {name: Path(artifact.path) for name, artifact in artifacts.items()}
    files = ("config.toml", "environment.json", "summary.json", f"profile/{trace.name}")
    assert paths == {name: run_dir.path / name for name in files} | {
        "run_dir": run_dir.path,
        "tensorboard": run_dir.path,
    }


def test_what_was_not_measured_is_left_out(run_dir):
    unmeasured = {"best": None, "step_ms": None, "samples_per_s": None, "peak_memory_gib": []}
    found = figures(run_dir.read_summary().model_copy(update=unmeasured))
    assert found == {"status": "finished", "stop_reason": "epochs", "time/train_s": 3.0}


@pytest.mark.parametrize("absent", ["TORCHX_TRACKERS", "TORCHX_JOB_ID"])
def test_without_a_tracker_or_a_job_nothing_is_done_and_nothing_imported(monkeypatch, tmp_path, run_dir, capfd, absent):
    switch_on(monkeypatch, tmp_path)
    monkeypatch.delenv(absent)
    monkeypatch.setitem(sys.modules, "torchx.tracker.api", None)  # an import would fail, and be warned of
    track_start(run_dir, {})
    track_end(run_dir)
    assert capfd.readouterr().err == ""


def test_a_tracker_that_fails_costs_a_warning(monkeypatch, tmp_path, run_dir, capfd):
    config = switch_on(monkeypatch, tmp_path)
    track_start(run_dir, {})
    said = capfd.readouterr().err
    assert said.startswith("warning: the start of the run is not tracked: AssertionError: ")
    assert f"'{tmp_path}/tracker' to exist" in said
    config.write_text("protocol=file\n")
    track_end(run_dir)
    assert (
        "the end of the run is not tracked: Exception: Please specify 'protocol' and 'root_path'"
        in capfd.readouterr().err
    )


@pytest.mark.dist
def test_a_run_goes_on_when_its_tracker_fails(monkeypatch, tmp_path):
    switch_on(monkeypatch, tmp_path)
    command = [sys.executable, "-m", "launch.train", "configs/debug.toml", f"run.dir={tmp_path}", *SMALL]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "warning: the start of the run is not tracked" in done.stderr
    assert RunDir(tmp_path / "debug").read_summary().status == "finished"


def torchx(directory, *arguments):
    command = [sys.executable, "-m", "torchx.cli.main", *arguments]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environ = os.environ | {"PYTHONPATH": str(ROOT), "PATH": path}
    done = subprocess.run(command, cwd=directory, env=environ, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.dist
@pytest.mark.slow
def test_torchx_finds_a_job_that_was_run_as_torchxconfig_says(tmp_path):
    """In a directory with the project's .torchxconfig, its four lines on tracking uncommented as it says."""
    marked = (ROOT / ".torchxconfig").read_text()
    uncommented = re.sub(r"^#(?=\S)", "", marked, flags=re.MULTILINE)
    assert len(set(uncommented.splitlines()) - set(marked.splitlines())) == 4
    (tmp_path / ".torchxconfig").write_text(uncommented)
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch/tracker.conf").write_text((ROOT / "launch/tracker.conf").read_text())
    (tmp_path / "runs/.torchx/tracker").mkdir(parents=True)
    component, config = f"{ROOT}/launch/components.py:compressed", f"{ROOT}/configs/debug.toml"
    job = torchx(tmp_path, "run", "-s", "local_cwd", component, "--config", config, "--j", "1x2", *SMALL).split()[-1]
    assert list(tmp_path.glob("runs/.torchx/logs/torchx/*/train/0/stdout.log")), "log_dir was not honoured"
    assert torchx(tmp_path, "tracker", "list", "jobs").splitlines()[-1] == job
    listed = torchx(tmp_path, "tracker", "list", "metadata", job)
    run_dir = RunDir(tmp_path / "runs/debug")
    shown = {key: value for key, _, value in (line.partition(" ") for line in listed.splitlines())}
    assert set(flatten(run_dir.read_config())) < set(shown)
    assert float(shown["quality/test_auc"]) == run_dir.read_summary().best["test_auc"]
    assert f"{run_dir.path}/summary.json" in torchx(tmp_path, "tracker", "list", "artifacts", job)
    # One entry for the start and one for the end: the second rank recorded nothing.
    entries = [json.loads(path.read_text()) for path in tmp_path.glob("runs/.torchx/tracker/*/metadata/*")]
    assert len(entries) == 2
