"""The torchx components: what is submitted, on this machine and, dry, on Slurm and Kubernetes."""

import difflib
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torchx
from torchx.components.component_test_base import ComponentTestCase
from torchx.runner import get_runner
from torchx.specs import macros

from configs.load import ConfigError
from launch import components
from launch.runners import train_job
from recsys.runs.run_directory import RunDir

ROOT = Path(__file__).parent.parent.parent
GOLDENS = Path(__file__).parent / "goldens"
RENEW = "PSS_BENCH_RENEW_GOLDENS"


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("TORCHXCONFIG", str(ROOT / ".torchxconfig"))
    for name in ("LOGLEVEL", "PSS_BENCH_IMAGE", "TORCHX_TRACKERS", "TORCHX_PARENT_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


class TestComponents(ComponentTestCase):
    def test_torchx_accepts_them(self):
        for name in ("baseline", "compressed", "compare"):
            self.validate(components, name)


def torchrun_line(app):
    return app.roles[0].args[1]


def test_the_layout_follows_the_config():
    app = components.compressed(config="configs/demo/robe_single.toml")
    assert "--nnodes 1 --nproc_per_node 1 " in torchrun_line(app)
    assert app.roles[0].env["OMP_NUM_THREADS"] == "2"
    app = components.baseline("training.epochs=1", config="configs/demo/sharded.toml")
    assert "--nproc_per_node 2 " in torchrun_line(app)
    assert torchrun_line(app).endswith("-m launch.train configs/demo/sharded.toml training.epochs=1")
    assert app.roles[0].env["OMP_WAIT_POLICY"] == "PASSIVE"


def test_a_layout_asked_for_becomes_the_world_size():
    app = components.baseline(config="configs/criteo_tb/sharded.toml", j="2x8")
    assert "--nnodes 2 --nproc_per_node 8 " in torchrun_line(app)
    assert "parallelism.world_size=16" in torchrun_line(app)
    assert app.roles[0].num_replicas == 2


def test_gpus_are_asked_for_with_cuda():
    app = components.baseline("run.device=cuda", config="configs/demo/sharded.toml")
    assert app.roles[0].resource.gpu == 2


@pytest.mark.parametrize("j", ["2", "x2", "2x", "0x2", "axb"])
def test_a_malformed_layout_is_refused(j):
    with pytest.raises(ValueError, match="nodes x ranks per node"):
        components.baseline(config="configs/demo/sharded.toml", j=j)


@pytest.mark.parametrize(
    ("component", "arguments", "message"),
    [
        ("baseline", {"memMB": 0}, "memMB = 0: must be at least 1"),
        ("baseline", {"gpu": -1}, "gpu = -1: must be at least 0"),
        ("compressed", {"max_retries": -1}, "max_retries = -1"),
        ("compressed", {"rdzv_port": 0}, "rdzv_port = 0"),
        ("compressed", {"mounts": "type=volume,src=x"}, "mounts = 'type=volume,src=x': must look like .* 'dst'"),
        ("compare", {"runs": ""}, "runs = '': must be run directories"),
        ("compare", {"runs": "a,,b"}, "runs = 'a,,b': must be run directories"),
        ("compare", {"runs": "a", "memMB": 0}, "memMB = 0"),
    ],
)
def test_a_mistaken_argument_is_named(component, arguments, message):
    with pytest.raises(ValueError, match=message):
        getattr(components, component)(**arguments)


def test_a_mistake_in_the_config_is_told_before_submission():
    with pytest.raises(ConfigError, match="did you mean compression"):
        components.compressed("embedding.compresion=10", config="configs/demo/robe.toml")


def submitted(component, scheduler):
    """What the scheduler would be sent."""
    mounts = "type=volume,src=runs,dst=/runs"
    if component == "compare":
        app = components.compare("/runs/a,/runs/b", "/runs/compared", image="registry/image:1", mounts=mounts)
    else:
        app = getattr(components, component)(
            "run.dir=/runs",
            j={"baseline": "2x8", "compressed": ""}[component],
            image="registry/image:1",
            gpu={"baseline": 8, "compressed": 0}[component],
            memMB=64_000,
            max_retries=2,
            rdzv_port=29600,
            mounts=mounts,
        )
    cfg = {"slurm": {"partition": "main", "time": "1:00:00"}, "kubernetes": {"queue": "default"}}[scheduler]
    request = get_runner().dryrun(app, scheduler=scheduler, cfg=cfg)
    return str(request).replace(torchx.__version__, "<version>")


@pytest.mark.filterwarnings("ignore::UserWarning:torchx.schedulers.kubernetes_scheduler")
@pytest.mark.parametrize("scheduler", ["slurm", "kubernetes"])
@pytest.mark.parametrize("component", ["baseline", "compressed", "compare"])
def test_clusters_are_sent_what_they_were_sent_before(component, scheduler, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))  # torchx asks a Slurm that is installed here how much memory it has
    monkeypatch.setattr("torchx.schedulers.kubernetes_scheduler.make_unique", lambda name: f"{name}-unique")
    golden = GOLDENS / f"{component}.{scheduler}.txt"
    text = submitted(component, scheduler)
    if os.environ.get(RENEW) == "1":
        golden.write_text(text)
    before = golden.read_text() if golden.exists() else ""
    difference = difflib.unified_diff(before.splitlines(), text.splitlines(), golden.name, "now", lineterm="")
    assert text == before, (
        "\n".join(difference)
        + f"\nif that is meant: {RENEW}=1 python -m pytest tests/launch/test_components.py, and commit the difference"
    )


@pytest.mark.dist
def test_the_line_of_a_job_runs_without_torchx(tmp_path):
    keys = ["data.synthetic.train_rows=2000", "logging.tensorboard=false", f"run.dir={tmp_path}"]
    app = components.baseline(*keys, config="configs/debug.toml", j="1x2")
    line = shlex.split(torchrun_line(app).replace(macros.app_id, "any"))
    assert line[0] == "torchrun"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *line[1:]],
        env=os.environ | app.roles[0].env, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert RunDir(tmp_path / "debug").read_summary().status == "finished"
    assert RunDir(tmp_path / "debug").read_environment()["world_size"] == 2


def test_the_command_line_needs_neither_docker_nor_a_queue():
    """What .torchxconfig is for: without its workspace torchx wants a Docker daemon, without its queue it refuses."""
    command = [sys.executable, "-m", "torchx.cli.main", "run", "-s", "kubernetes", "--dryrun"]
    done = subprocess.run(
        [*command, "./launch/components.py:compare", "--runs", "a,b"], capture_output=True, text=True, timeout=60,
        env={name: value for name, value in os.environ.items() if name != "TORCHXCONFIG"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "queue: default" in done.stdout
    assert f"image: {train_job.DEFAULT_IMAGE}\n" in done.stdout
