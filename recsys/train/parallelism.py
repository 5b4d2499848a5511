"""Placing a model on the ranks of a job. Knows placements, not methods.

"replicate": every rank holds the whole model and DDP averages the gradients; on one rank, the plain module. DDP knows
no sparse gradients but those of `nn.Embedding`: a shared array that sends them is left out of it and averaged here.
"shard": TorchRec's `DistributedModelParallel`, see `baselines.sharded`.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed import DistributedModelParallel

from baselines import sharded
from configs.schema import OptimizerSection, ParallelismSection
from recsys.embedding.hooks import find_hooks


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
            optimizer=sharded.FusedRule(
                name=optimizer.embedding, learning_rate=optimizer.embedding_learning_rate, eps=optimizer.adagrad_eps
            ),
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
    for prefix, hooks in find_hooks(model).items():
        if hooks.choose_gradient(local_batch_size) == "sparse":
            found |= dict(model.get_submodule(prefix).named_parameters(prefix))
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
    kernels = [hooks.lookup_kernel for hooks in find_hooks(unwrapped(model)).values()]
    kernel = kernels[0] if kernels else "dense"
    return [{"table": "all", "sharding": placement, "kernel": kernel, "bytes_per_rank": bytes_per_rank}]
