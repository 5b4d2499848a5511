"""The demo on 2,000 rows, generated and read back from a TSV: three runs, a table, a page."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch.demo import device_overrides
from recsys.runs.run_directory import RunDir
from tests.launch.interruption import interrupt

ROOT = Path(__file__).parent.parent.parent
SMALL = [
    "data.synthetic.scale=0.01",
    "data.synthetic.train_rows=2000",
    "data.synthetic.validation_rows=500",
    "data.synthetic.test_rows=1000",
    "training.global_batch_size=100",
    "evaluation.global_batch_size=500",
    "evaluation.every_epochs=1.0",
]
RUNS = ["demo_sharded", "demo_robe", "demo_robe_single"]

pytestmark = [pytest.mark.dist, pytest.mark.slow]


def demo(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "launch.demo", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
        timeout=180,
    )  # fmt: skip


def test_three_runs_a_table_and_a_page(tmp_path):
    done = demo("--output", tmp_path, *SMALL)
    assert done.returncode == 0, done.stderr
    summaries = [RunDir(tmp_path / name).read_summary() for name in RUNS]
    assert [s.status for s in summaries] == ["finished"] * 3
    assert len({s.data_fingerprint for s in summaries}) == 1
    # Two ranks and one process see the same global batches: ROBE's two runs end at the same quality.
    assert summaries[1].best["test_log_loss"] == pytest.approx(summaries[2].best["test_log_loss"], rel=1e-4)
    page = (tmp_path / "report.html").read_text()
    for name in RUNS:
        assert name in done.stdout
        assert name in page


def test_a_failing_run_shows_its_first_error_and_where_the_logs_are(tmp_path):
    broken = tmp_path / "broken.tsv"
    broken.write_text("0\t1\n" * 100)
    done = demo("--output", tmp_path / "runs", "--data", broken)
    assert done.returncode == 1
    assert "error: criteo_sample_sharded failed" in done.stderr
    assert "malformed" in done.stderr
    assert str(broken) in done.stderr
    assert "logs: " in done.stderr
    assert not (tmp_path / "runs" / "criteo_sample_robe").exists()


@pytest.mark.parametrize(("gpus", "keys"), [(0, []), (1, ["parallelism.world_size=1"]), (4, [])])
def test_one_gpu_takes_one_rank(monkeypatch, gpus, keys):
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    assert device_overrides("auto") == ["run.device=auto", *keys]
    assert device_overrides("cpu") == ["run.device=cpu"]


def test_interrupting_ends_the_job_and_leaves_a_valid_run(tmp_path):
    run_dir = RunDir(tmp_path / RUNS[0])
    command = [sys.executable, "-m", "launch.demo", "--output", str(tmp_path), *SMALL, "training.epochs=10000"]
    ended = interrupt(command, lambda: any(run_dir.records()))
    assert (ended.status, ended.said.splitlines()[-1]) == (130, "interrupted")
    summary = run_dir.read_summary()
    assert summary.status == "interrupted"
    assert summary.steps >= 20
    assert not (tmp_path / RUNS[1]).exists()
    assert ended.left == []


def test_a_mistake_in_an_override_starts_nothing(tmp_path):
    done = demo("--output", tmp_path / "runs", "training.epoch=1")
    assert done.returncode == 2
    assert "did you mean epochs?" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_generated_rows_written_as_tsv_train_the_same_way(tmp_path):
    """The generator's TSV through the TSV reader: the same labels and integers, ids renamed one to one."""
    from configs.load import load_config
    from recsys.data.registry import build_dataset
    from recsys.train.registry import CHOICES

    config = load_config(ROOT / "configs/demo/base.toml", SMALL, CHOICES)
    dataset = build_dataset(config.data)
    path = tmp_path / "rows.tsv.gz"
    dataset.write_tsv(path, "train")
    done = demo("--output", tmp_path / "runs", "--data", path, "training.global_batch_size=100", "training.epochs=1")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "runs" / "criteo_sample_robe" / "summary.json").read_text())
    assert summary["train_rows"] + summary["test_rows"] + 100 == 2000
