"""Optimizers: one rule for the dense layers, one for the embeddings, the same rules whatever the placement.

Embedding parameters of a replicated method, and tables that TorchRec placed data-parallel, are stepped here; tables
with a fused kernel are updated inside the backward pass by the same rule (`baselines.sharded`), as is a shared array
with `fused_update`, whose state and learning rate are here:

    SGD:      w ← w − lr·g                                  (no momentum, no weight decay)
    Adagrad:  a ← a + g²;  w ← w − lr·g / (√a + eps)        (element-wise, a starts at zero)
    Adam:     dense layers only, Kingma and Ba 2015 with its defaults (β = .9 and .999, eps = 1e-8)
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from configs.schema import DenseOptimizerName, OptimizerSection
from recsys.embedding.hooks import find_hooks
from recsys.train.parallelism import unwrapped

OptimizerFactory = Callable[[Any], torch.optim.Optimizer]


def optimizer_factory(name: DenseOptimizerName, learning_rate: float, adagrad_eps: float) -> OptimizerFactory:
    if name == "sgd":
        return lambda parameters: torch.optim.SGD(parameters, lr=learning_rate)
    if name == "adam":
        return lambda parameters: _build_adam(parameters, learning_rate)
    return lambda parameters: torch.optim.Adagrad(parameters, lr=learning_rate, eps=adagrad_eps)


def _build_adam(parameters: Any, learning_rate: float) -> torch.optim.Adam:
    """With its state made at once, as Adagrad's is: what a checkpoint restores must be there to be filled. Fused, since
    over a small model a step is mostly calls otherwise: a twelfth of a whole DLRM step at B = 1024 on a CPU."""
    optimizer = torch.optim.Adam(parameters, lr=learning_rate, fused=True)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}
    return optimizer


def build_optimizers(model: nn.Module, embedding_names: Iterable[str], section: OptimizerSection) -> CombinedOptimizer:
    """One optimizer over all parameters of a placed model.

    embedding_names: names of the embedding parameters in the model as built (before it was placed).
    """
    named = dict(in_backward_optimizer_filter(unwrapped(model).named_parameters()))
    embedding = {name: named.pop(name) for name in embedding_names if name in named}
    dense_rule = optimizer_factory(section.dense, section.dense_learning_rate, section.adagrad_eps)
    embedding_rule = optimizer_factory(section.embedding, section.embedding_learning_rate, section.adagrad_eps)
    parts: list[tuple[str, KeyedOptimizer]] = [
        (key, KeyedOptimizerWrapper(parameters, rule))
        for key, parameters, rule in (("dense", named, dense_rule), ("embedding", embedding, embedding_rule))
        if parameters
    ]
    for hooks in find_hooks(unwrapped(model)).values():
        if hooks.fused_update:
            wrapper = dict(parts)["embedding"]
            assert isinstance(wrapper, KeyedOptimizerWrapper)
            hooks.fuse_update(wrapper._optimizer)
    if isinstance(model, DistributedModelParallel) and model.fused_optimizer.params:
        parts.append(("fused", model.fused_optimizer))
    return CombinedOptimizer(parts)  # type: ignore[arg-type]


def local_bytes(values: Iterable[object]) -> int:
    """Bytes this rank holds of tensors and sharded tensors."""
    total = 0
    for value in values:
        if isinstance(value, ShardedTensor):
            total += sum(shard.tensor.numel() * shard.tensor.element_size() for shard in value.local_shards())
        elif isinstance(value, torch.Tensor):
            total += value.numel() * value.element_size()
    return total


def embedding_state_bytes(optimizer: CombinedOptimizer, embedding_names: Iterable[str]) -> int:
    """Bytes of optimizer state this rank holds for the embedding parameters; Adagrad's step counters excluded."""
    wanted = set(embedding_names)
    return sum(
        local_bytes(value for key, value in state.items() if key != "step")
        for _, part in optimizer.optimizers
        for name, state in part.state_dict()["state"].items()
        if name in wanted
    )
