"""The operators of pss.kernels.robe_bags for CUDA, in Triton: hash, read, weight and pool in one kernel each.

In the lookup no address is stored, no id is copied and nothing waits for the GPU; the output is written in its order.
The gradient is added to M's by atomic operations, which the L2 cache does, where M stays; SGD adds it to M itself,
scaled by -learning_rate. For the sparse form, and where `torch.use_deterministic_algorithms` asks for it, the same sums
are taken in order, from a sorted list of all chunks (triton_ordered_sum).

Adagrad squares sums, so they must be complete: they are made in an array like M, the dense gradient, and a second
kernel passes over it, which reads and writes M and its squares only where a sum is not zero. A list of the touched
elements would save these 8 |M| bytes of traffic where M is much larger than what a batch reads; but the host would have
to wait for its length, and M is small, being compressed: so no step waits, and CUDA graphs can hold it.

Every function takes the arguments of its operator. On CPU tensors they run in Triton's interpreter, TRITON_INTERPRET=1.
"""

from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING or find_spec("triton") is not None:
    from pss.kernels.triton_kernels import add_gradient, dot_rows, pool_bags, step_adagrad
    from pss.kernels.triton_lookup import Lookup, launch
    from pss.kernels.triton_ordered_sum import find_slots, sort_entries, sum_entries

_ADAGRAD_ELEMENTS = 1024  # of a program: 8 a thread

_libraries: list[torch.library.Library] = []  # what is registered goes with its library


@cache
def register() -> bool:
    """Make these functions the operators' implementations for CUDA. False: there is no Triton here."""
    if find_spec("triton") is None:
        return False
    _libraries.append(torch.library.Library("pss", "IMPL"))
    for implementation in (
        robe_bags,
        robe_bags_backward,
        robe_bags_backward_sparse,
        robe_bags_weight_gradient,
        robe_bags_sgd_,
        robe_bags_adagrad_,
    ):
        _libraries[0].impl(implementation.__name__, implementation, "CUDA")
    return True


def robe_bags(memory: Tensor, *batch_and_form: Any) -> Tensor:
    """Return (B, features · embedding_dim) float32. The form of the gradient is for its backward pass."""
    lookup = Lookup(*batch_and_form[:-1])
    memory = lookup.check_memory(memory)
    out = torch.empty(lookup.shape, dtype=torch.float32, device=memory.device)
    lookup.launch(pool_bags, out, memory)
    return out


def robe_bags_backward(gradient: Tensor, *batch: Any) -> Tensor:
    """Return the gradient of memory, (|M|,) float32."""
    lookup = Lookup(*batch)
    return _sum_gradient(lookup, lookup.check_gradient(gradient))


def robe_bags_backward_sparse(gradient: Tensor, *batch: Any) -> tuple[Tensor, Tensor]:
    """Return the elements of M that the batch reads, (n,) int64, each once, rising; their gradients, (n,) float32."""
    lookup = Lookup(*batch)
    gradient = lookup.check_gradient(gradient)
    entries = sort_entries(lookup)
    slots = find_slots(entries, lookup)
    return slots, sum_entries(entries, gradient, lookup, slots)


def robe_bags_weight_gradient(gradient: Tensor, memory: Tensor, *batch: Any) -> Tensor:
    """Return the gradient of the weights, (V,) float32; zero for ids of features that the plan does not read."""
    lookup = Lookup(*batch)
    gradient, memory = lookup.check_gradient(gradient), lookup.check_memory(memory)
    num_ids = lookup.batch.ids.numel()
    dots = torch.zeros(lookup.most_copies, num_ids, dtype=torch.float32, device=memory.device)
    lookup.launch(dot_rows, dots, gradient, memory, num_ids, units_per_bag=1)
    return dots.sum(0) if lookup.most_copies > 1 else dots[0]


def robe_bags_sgd_(memory: Tensor, gradient: Tensor, *batch_and_rate: Any) -> None:
    """Update memory by SGD: memory -= learning_rate · gradient of memory."""
    *batch, learning_rate = batch_and_rate
    lookup = Lookup(*batch)
    gradient, memory = lookup.check_gradient(gradient), lookup.check_updated_memory(memory)
    if torch.are_deterministic_algorithms_enabled():
        memory.sub_(_sum_gradient(lookup, gradient), alpha=learning_rate)
    else:
        lookup.launch(add_gradient, memory, gradient, -learning_rate)


def robe_bags_adagrad_(memory: Tensor, squares: Tensor, gradient: Tensor, *batch_and_rates: Any) -> None:
    """Update memory by Adagrad: squares += sums², memory -= learning_rate · sums / (√squares + eps), with sums the
    gradient of memory."""
    *batch, learning_rate, eps = batch_and_rates
    lookup = Lookup(*batch)
    memory, squares = lookup.check_updated_memory(memory), lookup.check_updated_memory(squares)
    sums, size = _sum_gradient(lookup, lookup.check_gradient(gradient)), memory.numel()
    arguments = (memory, squares, sums, size, learning_rate, eps)
    launch(step_adagrad, -(-size // _ADAGRAD_ELEMENTS), *arguments, ELEMENTS=_ADAGRAD_ELEMENTS)


def _sum_gradient(lookup: "Lookup", gradient: Tensor) -> Tensor:
    """Return the gradient of memory, (|M|,) float32."""
    if torch.are_deterministic_algorithms_enabled():
        return sum_entries(sort_entries(lookup), gradient, lookup)
    sums = torch.zeros(lookup.group.memory_size, dtype=torch.float32, device=gradient.device)
    lookup.launch(add_gradient, sums, gradient, 1.0)
    return sums
