"""The process group of a job, and what it leaves behind."""

import os

import pytest
import torch
import torch.distributed as dist

from configs.schema import ParallelismSection
from recsys.runs.ranks import process_group

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


@pytest.mark.parametrize("fails", [False, True])
def test_a_job_of_one_process_leaves_the_environment_as_it_was(monkeypatch, fails):
    """Otherwise a later job of this process, or a child of it, takes itself for a rank of one that torchrun started."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    before = dict(os.environ)
    try:
        with process_group(ParallelismSection(), torch.device("cpu")) as ranks:
            assert (ranks.rank, ranks.world_size) == (0, 1)
            assert (os.environ["RANK"], os.environ["LOCAL_WORLD_SIZE"]) == ("0", "1")
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert dict(os.environ) == before
    assert not dist.is_initialized()
