"""A shared array that kernels look up: the choice between them and plain PyTorch, and the update in the backward pass.

A subclass says which elements of `memory` an id reads twice: in `_rows`, plain PyTorch, and as a `RobePlan` for every
group of features. Where `pss.kernels` has that lookup on this device, the operator takes the place of rows and pooling.
"""

from typing import Literal

import torch
from pydantic import model_validator
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from pss.kernels import robe_bags
from pss.kernels.plan import RobePlan, has_kernel, pack
from pss.shared_array import SharedArrayEmbeddingBagCollection, SharedArrayOptions, sends_sparse_gradient


class KernelOptions(SharedArrayOptions):
    """Options of the methods that the kernels of `pss.kernels` serve."""

    EXECUTION_ONLY = SharedArrayOptions.EXECUTION_ONLY | {"kernel", "fused_update"}

    kernel: Literal["auto", "plain"] = "auto"
    """auto = the fused kernels where this device and these blocks have them; plain = PyTorch's own operators."""
    fused_update: bool = False
    """Update the shared array within the backward pass instead of sending it a gradient: on one rank only."""

    @model_validator(mode="after")
    def _fused_update_has_a_kernel(self) -> "KernelOptions":
        if self.fused_update and self.kernel == "plain":
            raise ValueError("fused_update is done by the kernels: it needs kernel = 'auto'")
        return self

    def check_world_size(self, world_size: int) -> None:
        """Raise ValueError for a fused update on several ranks."""
        if self.fused_update and world_size > 1:
            raise ValueError(
                f"fused_update: gradients of parallelism.world_size = {world_size} ranks are averaged before they are "
                "used"
            )


class KernelEmbeddingBagCollection(SharedArrayEmbeddingBagCollection):
    """Looks up by `pss::robe_bags` what it can. A subclass sets `_plan` in `_lay_out`."""

    OPTIONS = KernelOptions
    _plan: list[RobePlan]

    def _allocate(self, device: torch.device | None) -> None:
        super()._allocate(device)
        self._packed = [pack(plan) if has_kernel(plan) else None for plan in self._plan]
        self._update: robe_bags.Update | None = None
        robe_bags.is_available(self.memory.device.type)  # built now, not within the first step

    def _pooled(self, group: int, features: KeyedJaggedTensor) -> Tensor:
        if torch.jit.is_scripting():  # pyright: ignore[reportPrivateImportUsage]
            return self._pooled_rows(group, features)
        else:  # not compiled by TorchScript
            if isinstance(features, torch.fx.Proxy) or not self._has_kernel(group):
                return self._pooled_rows(group, features)
            if features.variable_stride_per_key():
                return self._pooled_rows(group, features)
            return self._pooled_by_kernel(group, features)

    @property
    def fused_update(self) -> bool:
        """Return whether the backward pass is to do the optimizer's step: the option of that name."""
        return self.options.fused_update

    @torch.jit.unused
    def fuse_update(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the backward pass do the optimizer's step on `memory`, which then gets no gradient.

        For one process without gradient accumulation: gradients of several ranks, or batches, are to be summed before
        they are used. The optimizer keeps state and learning rate, and its own step does nothing.

        Raises ValueError without a kernel, for a rule that cannot be fused (`pss.kernels.robe_bags.fused_update`), and
        for Adagrad over tables of several dimensions or poolings, which come as several gradients.
        """
        if not all(self._has_kernel(group) for group in range(len(self._groups))):
            raise ValueError("fused_update needs the kernels, which these blocks, this device or kernel = 'plain' lack")
        if len(self._groups) > 1 and not isinstance(optimizer, torch.optim.SGD):
            raise ValueError(
                f"fused_update of {type(optimizer).__name__} needs tables of one embedding_dim and pooling, not "
                f"{len(self._groups)}"
            )
        self._update = robe_bags.fused_update(optimizer, self.memory)

    @property
    def lookup_kernel(self) -> str:
        """Return what this device makes of `kernel`: robe_bags, with its update or without, or plain PyTorch."""
        if not all(self._has_kernel(group) for group in range(len(self._groups))):
            return "plain"
        return "robe_bags, fused update" if self._update is not None else "robe_bags"

    @torch.jit.unused
    def _has_kernel(self, group: int) -> bool:
        is_wanted = self.options.kernel == "auto" and self.memory.dtype == torch.float32
        return is_wanted and self._packed[group] is not None and robe_bags.is_available(self.memory.device.type)

    @torch.jit.unused
    def _pooled_by_kernel(self, group: int, features: KeyedJaggedTensor) -> Tensor:
        """Pool as `_pooled_rows`, as one operator, which reads the ids where they are."""
        position_of = {key: position for position, key in enumerate(features.keys())}
        positions: list[int] = []
        for name in self._groups[group].feature_names:
            if name not in position_of:
                raise KeyError(f"feature {name} is not in the batch, which has {features.keys()}")
            positions.append(position_of[name])
        weights = features.weights() if self._is_weighted else None
        batch = (features.values(), features.offsets(), weights, features.stride(), positions, self._packed[group])
        if self._update is not None and torch.is_grad_enabled():
            return robe_bags.update_in_backward(self.memory, batch, self._update)
        return torch.ops.pss.robe_bags(self.memory, *batch, self._sends_sparse_gradient(features.values()))

    @torch.jit.unused
    def _sends_sparse_gradient(self, ids: Tensor) -> bool:
        if torch.compiler.is_compiling():
            return False
        return sends_sparse_gradient(self.gradient, ids.numel() * max(self._embedding_dims), self.memory_size)
