"""The ranks of a job: the process group, this process's place in it, and what ranks tell each other.

Nothing below `recsys.runs` knows of ranks but the sharded baseline, which asks the process group itself.
"""

import contextlib
import gc
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from configs.schema import ParallelismSection

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among the others of its job."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which alone writes the run directory."""
        return self.rank == 0


def choose_device(name: str) -> torch.device:
    """Return this rank's device: name is 'auto', 'cpu' or 'cuda'.

    Raises ValueError for cuda on a machine without it, and for more ranks than the machine has devices.
    """
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
    """Open the default process group of a job started by torchrun, or of this process alone, and close it again.

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
    is_alone = "RANK" not in os.environ
    options: dict[str, Any] = {}
    if is_alone:  # a process without torchrun is its own job: no port, no rendezvous
        options = {"store": dist.HashStore(), "rank": 0, "world_size": 1}  # type: ignore[attr-defined]
    backend = "nccl" if device.type == "cuda" else "gloo"
    with _environment(_ALONE if is_alone else {}):
        dist.init_process_group(backend, timeout=timedelta(seconds=section.timeout_s), **options)
        try:
            yield Ranks(dist.get_rank(), dist.get_world_size(), device)
        finally:
            gc.collect()  # a DistributedDataParallel that outlives the group can wait for ever when it is freed
            dist.destroy_process_group()


_ALONE = {"RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "WORLD_SIZE": "1"}
"""What torchrun would set for a job of one process: TorchRec reads it."""


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets the variables while open; afterwards the environment is as before, so that no later job is mistaken."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def gather(value: T, ranks: Ranks) -> list[T]:
    """Return the value of every rank, by rank, on every rank. Collective; the value must be picklable."""
    values: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(values, value)
    return values


def on_first_rank(compute: Callable[[], T]) -> T:
    """Return on every rank what `compute` returns on rank 0, and raise its error on every rank too. Collective.

    So no rank waits for one that failed. The result must be picklable; an error arrives as the ValueError of its text.
    """
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer = [compute(), None]
        except Exception as error:
            answer = [None, f"{type(error).__name__}: {error}"]
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise ValueError(answer[1])
    return answer[0]
