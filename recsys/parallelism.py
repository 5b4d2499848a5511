"""Ranks: the process group, and placing a model on it. Knows placements, not methods.

"replicate": every rank holds the whole model and DDP averages the gradients; on one rank, the plain module. DDP knows
no sparse gradients but those of `nn.Embedding`: a shared array that sends them is left out of it and averaged here.
"shard": TorchRec's `DistributedModelParallel`, see `baselines.sharded`.
"""

import contextlib
import gc
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed import DistributedModelParallel

from baselines import sharded
from baselines.sharded import on_first_rank as on_first_rank
from configs.schema import OptimizerSection, ParallelismSection

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


def apply_parallelism(
    model: nn.Module,
    placement: str,
    section: ParallelismSection,
    optimizer: OptimizerSection,
    *,
    local_batch_size: int,
    init_scale: float,
    seed: int,
    device: torch.device,
) -> nn.Module:
    """The model, placed. Collective. optimizer: fused into the backward pass where tables are sharded."""
    if placement == "shard":
        return sharded.shard(
            model,
            sharding=section.sharding,
            optimizer=optimizer,
            local_batch_size=local_batch_size,
            init_scale=init_scale,
            seed=seed,
            device=device,
        )
    assert placement == "replicate", placement
    if dist.get_world_size() == 1:
        return model
    sparse = _parameters_with_sparse_gradients(model, local_batch_size)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(sparse))
    for parameter in sparse.values():
        parameter.register_post_accumulate_grad_hook(_average_sparse_gradient)
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
        static_graph=True,
    )


def _parameters_with_sparse_gradients(model: nn.Module, local_batch_size: int) -> dict[str, nn.Parameter]:
    """Of the modules that choose the form of their gradient, and now have to; equal on all ranks."""
    found = {}
    for prefix, module in model.named_modules():
        if hasattr(module, "settle_gradient"):
            module.settle_gradient(local_batch_size)  # type: ignore[operator]
            if module.gradient == "sparse":
                found |= dict(module.named_parameters(prefix))
    return found


@torch.no_grad()
def _average_sparse_gradient(parameter: torch.Tensor) -> None:
    """parameter.grad = its mean over the ranks, coalesced. Collective: every slot that any rank touched, summed."""
    gradient = parameter.grad
    assert gradient is not None
    gradient = gradient.coalesce()
    world_size = dist.get_world_size()
    count = torch.tensor([gradient.values().numel()], device=gradient.device)
    counts = [torch.empty_like(count) for _ in range(world_size)]
    dist.all_gather(counts, count)
    sizes = [int(n) for n in counts]
    indices = _gather_ragged(gradient.indices()[0], sizes)
    values = _gather_ragged(gradient.values(), sizes) / world_size
    summed = torch.sparse_coo_tensor(indices.unsqueeze(0), values, gradient.shape, check_invariants=False)
    parameter.grad = summed.coalesce()


def _gather_ragged(values: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Rank r's values (sizes[r],), one rank after the other, on every rank."""
    padded = values.new_zeros(max(sizes))
    padded[: values.numel()] = values
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def unwrapped(model: nn.Module) -> nn.Module:
    """The model as it was built, whatever it was wrapped in: names of parameters are the same for every placement."""
    return model.module if isinstance(model, DistributedDataParallel | DistributedModelParallel) else model


def describe_placement(model: nn.Module, placement: str, embedding_bytes: int) -> list[dict]:
    """One row per table or shared array: table, sharding, kernel, bytes on each rank."""
    if isinstance(model, DistributedModelParallel):
        return sharded.describe_plan(model)
    ranks = range(dist.get_world_size())
    bytes_per_rank = dict.fromkeys(ranks, embedding_bytes)
    kernels = [m.lookup_kernel for m in unwrapped(model).modules() if hasattr(m, "lookup_kernel")]
    kernel = kernels[0] if kernels else "dense"
    return [{"table": "all", "sharding": placement, "kernel": kernel, "bytes_per_rank": bytes_per_rank}]


def gather(value: T, ranks: Ranks) -> list[T]:
    """The value of every rank, by rank, on every rank. Collective."""
    values: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(values, value)
    return values
