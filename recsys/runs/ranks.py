"""The ranks of a job: the process group, this process's place in it, and what ranks tell each other."""

import contextlib
import gc
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from baselines.sharded import on_first_rank as on_first_rank
from configs.schema import ParallelismSection

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among the others."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def choose_device(name: str) -> torch.device:
    """'auto' | 'cpu' | 'cuda' -> this rank's device. Raises ValueError for cuda on a machine without it."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(f"run.device = {name!r}: PyTorch sees no CUDA device on this machine")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"local rank {local_rank} has no CUDA device, this machine has {torch.cuda.device_count()}: "
            "start fewer ranks (parallelism.world_size) or set run.device=cpu"
        )
    return torch.device("cuda", local_rank)


@contextlib.contextmanager
def process_group(section: ParallelismSection, device: torch.device) -> Iterator[Ranks]:
    """The default process group of a job started by torchrun (or of this process alone), and its end.

    Raises ValueError when the job's size is not parallelism.world_size.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != section.world_size:
        raise ValueError(
            f"parallelism.world_size = {section.world_size}, but {launched} rank(s) were started: "
            f"start {section.world_size} or set parallelism.world_size={launched}"
        )
    torch.set_num_threads(section.threads_per_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", WORLD_SIZE="1")
        options: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1}  # type: ignore[attr-defined]
    else:
        options = {}
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=section.timeout_s), **options)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), device)
    finally:
        gc.collect()  # a DistributedDataParallel that outlives the group can wait for ever when it is freed
        dist.destroy_process_group()


def gather(value: T, ranks: Ranks) -> list[T]:
    """The value of every rank, by rank, on every rank. Collective."""
    values: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(values, value)
    return values
