"""pss::robe_bags, the ROBE lookup of all features of a batch as one operator: hash, read, weight, pool.

    out[b, f·d : (f+1)·d] = Σ over the ids i of bag (b, f) of  w_i · E_f[i],  for mean pooling over the bag's length

with E the rows of `pss.methods.robe.robe_rows`, the reference. C++ serves the CPU (pss/kernels/cpu), Triton CUDA
(pss/kernels/triton_robe_bags.py). Its gradient for `memory` is dense, or sparse and coalesced; or there is none, and
the update is done instead where the gradient is known, as FBGEMM's table-batched kernels do it (`update_in_backward`).

Operators of PyTorch take tensors and numbers. Every op here has: memory (|M|,) float32; ids (V,) int32 or int64, of
all features of the batch, in the order of KeyedJaggedTensor; offsets (features of the batch · B + 1,); weights (V,),
if weighted; batch_size B; features, the position in the batch of each feature of ours; plan, see
`pss.kernels.plan.pack`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pss.kernels.build import load_cpu_kernels, load_cuda_kernels
from pss.kernels.plan import Number

_BATCH = "Tensor ids, Tensor offsets, Tensor? weights, SymInt batch_size, int[] features, int[] plan"
_LIBRARY = torch.library.Library("pss", "DEF")
for _schema in (
    f"robe_bags(Tensor memory, {_BATCH}, bool sparse_gradient) -> Tensor",
    f"robe_bags_backward(Tensor gradient, {_BATCH}) -> Tensor",
    f"robe_bags_backward_sparse(Tensor gradient, {_BATCH}) -> (Tensor slots, Tensor values)",
    f"robe_bags_weight_gradient(Tensor gradient, Tensor memory, {_BATCH}) -> Tensor",
    f"robe_bags_sgd_(Tensor(a!) memory, Tensor gradient, {_BATCH}, float learning_rate) -> ()",
    f"robe_bags_adagrad_(Tensor(a!) memory, Tensor(b!) squares, Tensor gradient, {_BATCH}, "
    "float learning_rate, float eps) -> ()",
):
    _LIBRARY.define(_schema)

_ready: dict[str, bool] = {}


def is_available(device_type: str) -> bool:
    """Return whether tensors of such a device have kernels; builds them where they are yet to be built, but not from
    within torch.compile."""
    if device_type not in _ready and not torch.compiler.is_compiling():
        _ready[device_type] = (
            load_cpu_kernels() if device_type == "cpu" else device_type == "cuda" and load_cuda_kernels()
        )
    return _ready.get(device_type, False)


@torch.library.register_fake("pss::robe_bags")
def _(memory: Tensor, ids: Any, offsets: Any, weights: Any, batch_size: Any, features: Any, plan: list[int], _: Any):
    return memory.new_empty(batch_size, plan[Number.FEATURES] * plan[Number.EMBEDDING_DIM])


@torch.library.register_fake("pss::robe_bags_backward")
def _(gradient: Tensor, ids: Any, offsets: Any, weights: Any, batch_size: Any, features: Any, plan: list[int]):
    return gradient.new_empty(plan[Number.MEMORY_SIZE], dtype=torch.float32)


@torch.library.register_fake("pss::robe_bags_backward_sparse")
def _(gradient: Tensor, ids: Any, offsets: Any, weights: Any, batch_size: Any, features: Any, plan: list[int]):
    touched = torch.library.get_ctx().new_dynamic_size()
    return gradient.new_empty(touched, dtype=torch.int64), gradient.new_empty(touched, dtype=torch.float32)


@torch.library.register_fake("pss::robe_bags_weight_gradient")
def _(gradient: Tensor, memory: Any, ids: Tensor, *_: Any):
    return gradient.new_empty(ids.numel(), dtype=torch.float32)


@torch.library.register_fake("pss::robe_bags_sgd_")
@torch.library.register_fake("pss::robe_bags_adagrad_")
def _(*_: Any) -> None:
    return None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    memory, ids, offsets, weights, *ctx.batch, ctx.is_sparse = inputs
    needs_memory = weights is not None and ctx.needs_input_grad[3]
    ctx.save_for_backward(ids, offsets, weights, memory if needs_memory else None)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    ids, offsets, weights, memory = ctx.saved_tensors
    batch, plan = (ids, offsets, weights, *ctx.batch), ctx.batch[-1]
    of_memory = of_weights = None
    if ctx.needs_input_grad[0] and ctx.is_sparse:
        slots, values = torch.ops.pss.robe_bags_backward_sparse(gradient, *batch)
        of_memory = torch.sparse_coo_tensor(
            slots.unsqueeze(0), values, (plan[Number.MEMORY_SIZE],), check_invariants=False, is_coalesced=True
        )
    elif ctx.needs_input_grad[0]:
        of_memory = torch.ops.pss.robe_bags_backward(gradient, *batch)
    if memory is not None:
        of_weights = torch.ops.pss.robe_bags_weight_gradient(gradient, memory, *batch).to(weights.dtype)
    return of_memory, None, None, of_weights, None, None, None, None


torch.library.register_autograd("pss::robe_bags", _backward, setup_context=_setup_context)


def _setup_backward_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ids, offsets, weights, *ctx.batch = inputs
    ctx.save_for_backward(ids, offsets, weights)


def _backward_of_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Apply the adjoint of the adjoint: the lookup itself. Weights get no second derivative."""
    of_gradient = torch.ops.pss.robe_bags(gradient, *ctx.saved_tensors, *ctx.batch, False)
    return of_gradient, None, None, None, None, None, None


torch.library.register_autograd("pss::robe_bags_backward", _backward_of_backward, setup_context=_setup_backward_context)

Update = Callable[[Tensor, Tensor, tuple[Any, ...]], None]
"""(memory, gradient of the output, the batch as every op takes it) -> None: updates memory in place."""


class _UpdateInBackward(torch.autograd.Function):
    """robe_bags whose backward pass updates memory and sends it no gradient."""

    @staticmethod
    def forward(ctx: Any, memory: Tensor, weights: Tensor | None, batch: tuple[Any, ...], update: Update) -> Tensor:
        ctx.memory, ctx.batch, ctx.update = memory, batch, update  # as in FBGEMM: it is written to, so not saved
        return torch.ops.pss.robe_bags(memory, *batch, False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor | None, None, None]:
        of_weights = None
        memory, gradient = ctx.memory.detach(), gradients[0].contiguous()
        if ctx.needs_input_grad[1]:
            of_weights = torch.ops.pss.robe_bags_weight_gradient(gradient, memory, *ctx.batch)
        ctx.update(memory, gradient, ctx.batch)
        return None, of_weights, None, None


def update_in_backward(memory: Tensor, batch: tuple[Any, ...], update: Update) -> Tensor:
    """Look up by `robe_bags` of a batch, (ids, offsets, weights, batch_size, features, plan), with `update` in its
    backward."""
    return _UpdateInBackward.apply(memory, batch[2], batch, update)


def fused_update(optimizer: torch.optim.Optimizer, memory: Tensor) -> Update:
    """Return the step of an optimizer over `memory`, to be done in the backward pass.

    It is the optimizer's own step with its own state, learning rate included, which may change between steps; the
    optimizer itself finds no gradient and does nothing. Where the parameters of a batch overlap, gradients are summed
    before they are squared, as without fusion.

    Raises ValueError for a rule other than SGD without momentum and element-wise Adagrad, and for weight decay: it acts
    on all of M, an update only on what a batch reads.
    """
    parameter = memory
    (group,) = (group for group in optimizer.param_groups if any(p is parameter for p in group["params"]))
    name = type(optimizer).__name__
    for key in ("weight_decay", "momentum", "lr_decay", "maximize", "nesterov"):
        if group.get(key):
            raise ValueError(f"fused_update: {name} with {key} = {group[key]} cannot be done in the backward pass")
    if isinstance(optimizer, torch.optim.SGD):
        return lambda memory, gradient, batch: torch.ops.pss.robe_bags_sgd_(memory, gradient, *batch, group["lr"])
    if isinstance(optimizer, torch.optim.Adagrad):
        return lambda memory, gradient, batch: torch.ops.pss.robe_bags_adagrad_(
            memory, optimizer.state[parameter]["sum"], gradient, *batch, group["lr"], group["eps"]
        )
    raise ValueError(f"fused_update knows SGD and Adagrad, not {name}")
