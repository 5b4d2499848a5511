"""Checkpoints: the best one survives a kill at any moment, and what may differ when a run is continued."""

import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from configs.load import load_config
from configs.schema import OptimizerSection
from recsys.runs.ranks import Ranks
from recsys.train.checkpoint import BEST, Checkpoints
from recsys.train.description import identity
from recsys.train.optim import build_optimizers
from recsys.train.registry import CHOICES
from tests.recsys.data.array_rows import ArrayRows, make_rows

DEBUG = Path(__file__).parents[3] / "configs" / "debug.toml"


class Killed(BaseException):
    """The process ends here: nobody catches it."""


@pytest.fixture
def checkpoints(tmp_path):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Checkpoints(tmp_path, {}, 2, Ranks(0, 1, torch.device("cpu")))
    dist.destroy_process_group()


def make_model():
    model = torch.nn.Sequential(torch.nn.Linear(2, 1))
    section = OptimizerSection(dense_learning_rate=0.1, embedding_learning_rate=0.1)
    return model, build_optimizers(model, [], section)


def kill_at(patch, nth):
    """The nth change of a directory from now on ends the process before it happens."""
    calls = iter(range(nth, -1, -1))

    def watched(change):
        def perform(*arguments, **keywords):
            if next(calls, None) == 0:
                raise Killed
            return change(*arguments, **keywords)

        return perform

    for owner, name in ((os, "replace"), (os, "rename"), (os, "symlink"), (shutil, "rmtree")):
        patch.setattr(owner, name, watched(getattr(owner, name)))
    for name in ("rename", "replace", "symlink_to", "unlink", "write_text"):
        patch.setattr(Path, name, watched(getattr(Path, name)))


def test_a_kill_at_any_moment_leaves_a_whole_best_checkpoint(checkpoints):
    model, optimizer = make_model()
    checkpoints.save_best(model, optimizer, {"step": 0})
    kills = 0
    while True:
        before = checkpoints.load(checkpoints.directory / BEST, model, optimizer)["step"]
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, kills)
            try:
                checkpoints.save_best(model, optimizer, {"step": before + 1})
                was_killed = False
            except (Killed, CheckpointException):  # DCP wraps what happens within
                was_killed = True
        found = checkpoints.load(checkpoints.directory / BEST, model, optimizer)["step"]
        assert found in (before, before + 1)
        if not was_killed:
            break
        kills += 1
    assert kills > 5, "the kills strike"
    assert found == before + 1
    assert len([path for path in checkpoints.directory.iterdir() if not path.is_symlink()]) == 1, "no old one is kept"


def test_a_best_checkpoint_that_is_a_directory_is_replaced_too(checkpoints):
    model, optimizer = make_model()
    checkpoints.save(7, model, optimizer, {"step": 7})
    (checkpoints.directory / "step_7").rename(checkpoints.directory / BEST)  # as earlier versions wrote it
    checkpoints.save_best(model, optimizer, {"step": 8})
    assert checkpoints.load(checkpoints.directory / BEST, model, optimizer) == {"step": 8}


def test_only_the_newest_are_kept_and_the_best_is_none_of_them(checkpoints):
    model, optimizer = make_model()
    checkpoints.save_best(model, optimizer, {})
    for step in (9, 10, 100):
        checkpoints.save(step, model, optimizer, {})
    assert sorted(path.name for path in checkpoints.directory.iterdir()) == ["best", "best_1", "step_10", "step_100"]
    assert checkpoints.newest() == checkpoints.directory / "step_100"


ROWS = ArrayRows(train=make_rows([0.0, 1.0], [[1], [2]]))


def identity_of(*overrides):
    return identity(load_config(DEBUG, ["embedding.method=robe", *overrides], CHOICES), ROWS)


@pytest.mark.parametrize(
    "override",
    [
        "embedding.robe.kernel=plain", "embedding.robe.gradient=sparse", "embedding.robe.fused_update=true",
        "parallelism.sharding=table_wise", "data.cache_dir=elsewhere", "training.epochs=7", "run.name=other",
    ],
)  # fmt: skip
def test_how_a_run_computes_may_change_when_it_is_continued(override):
    assert identity_of(override) == identity_of()


@pytest.mark.parametrize(
    "override",
    [
        "embedding.robe.block_size=4", "embedding.robe.signed=true", "embedding.compression=3", "run.seed=1",
        "optimizer.embedding=adagrad", "model.embedding_dim=4", "training.global_batch_size=128",
    ],
)  # fmt: skip
def test_what_a_run_computes_may_not(override):
    assert identity_of(override) != identity_of()
