"""The torchx components: what is submitted, on this machine and, dry, on Slurm and Kubernetes."""

from pathlib import Path

import pytest
from torchx.components.component_test_base import ComponentTestCase
from torchx.runner import get_runner

from configs.load import ConfigError
from launch import components

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch):
    monkeypatch.chdir(ROOT)


class TestComponents(ComponentTestCase):
    def test_torchx_accepts_them(self):
        for name in ("baseline", "compressed"):
            self.validate(components, name)


def torchrun_line(app):
    return app.roles[0].args[1]


def test_the_layout_follows_the_config():
    app = components.compressed(config="configs/demo_robe_single.toml")
    assert "--nnodes 1 --nproc_per_node 1 " in torchrun_line(app)
    assert app.roles[0].env["OMP_NUM_THREADS"] == "2"
    app = components.baseline("training.epochs=1", config="configs/demo_sharded.toml")
    assert "--nproc_per_node 2 " in torchrun_line(app)
    assert torchrun_line(app).endswith("-m launch.train configs/demo_sharded.toml training.epochs=1")
    assert app.roles[0].env["OMP_WAIT_POLICY"] == "PASSIVE"


def test_a_layout_asked_for_becomes_the_world_size():
    app = components.baseline(config="configs/criteo_tb_sharded.toml", j="2x8")
    assert "--nnodes 2 --nproc_per_node 8 " in torchrun_line(app)
    assert "parallelism.world_size=16" in torchrun_line(app)
    assert app.roles[0].num_replicas == 2


def test_gpus_are_asked_for_with_cuda():
    app = components.baseline("run.device=cuda", config="configs/demo_sharded.toml")
    assert app.roles[0].resource.gpu == 2


@pytest.mark.parametrize("j", ["2", "x2", "2x", "0x2", "axb"])
def test_a_malformed_layout_is_refused(j):
    with pytest.raises(ValueError, match="nodes x ranks per node"):
        components.baseline(config="configs/demo_sharded.toml", j=j)


def test_a_mistake_in_the_config_is_told_before_submission():
    with pytest.raises(ConfigError, match="did you mean compression"):
        components.compressed("embedding.compresion=10", config="configs/demo_robe.toml")


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [("slurm", ["sbatch", "srun", "launch.train"]), ("kubernetes", ["launch.train", "kind: Job"])],
)
def test_clusters_get_the_same_job(scheduler, words):
    app = components.baseline(config="configs/demo_sharded.toml", j="2x2", image="an/image:1")
    cfg = {"slurm": {}, "kubernetes": {"queue": "default", "namespace": "default"}}[scheduler]
    with get_runner() as runner:
        text = str(runner.dryrun(app, scheduler=scheduler, cfg=cfg))
    for word in words:
        assert word in text, text
