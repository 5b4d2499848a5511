"""Batches for the tests of the Triton kernels: what goes into an operator, and what must come out of it."""

import os
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchrec.modules.embedding_configs import PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from pss.kernels.plan import RobePlan, has_kernel, pack
from pss.methods.robe import RobeEmbeddingBagCollection, robe_rows
from tests.pss.jagged import random_kjt, table

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
BATCH = 1009 if DEVICE.type == "cuda" else 5
KEYS, POSITIONS = ["other", "b", "a"], [2, 1, 2]  # of the batch; of table t's features a and b and table u's a in it


class Batch(NamedTuple):
    module: RobeEmbeddingBagCollection
    features: KeyedJaggedTensor

    @property
    def group(self) -> RobePlan:
        return self.module._plan[0]

    @property
    def arguments(self) -> tuple[Any, ...]:
        """As every operator takes them."""
        features = self.features
        weights = features.weights_or_none()
        return features.values(), features.offsets(), weights, features.stride(), POSITIONS, pack(self.group)

    def gradient(self) -> Tensor:
        """Of the output, not contiguous."""
        shape = (self.features.stride(), 2 * len(POSITIONS) * self.group.embedding_dim)
        return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)[:, ::2]


CASES: dict[str, dict[str, Any]] = {
    "two chunks": {"dim": 8, "block_size": 4},
    "one chunk": {"dim": 8, "block_size": 8, "signed": True},
    "Z = 1": {"dim": 3, "block_size": 1},
    "short last chunk": {"dim": 7, "block_size": 3, "signed": True},
    "Z > d": {"dim": 5, "block_size": 8, "flattened": False},
    "flattened": {"dim": 6, "block_size": 3, "flattened": True, "signed": True},
    "flattened, Z > d": {"dim": 3, "block_size": 6, "signed": True},
    "affine": {"dim": 7, "block_size": 4, "hash_family": "affine"},
    "affine, signed": {"dim": 4, "block_size": 2, "hash_family": "affine", "signed": True},
    "affine, flattened": {"dim": 6, "block_size": 2, "hash_family": "affine", "flattened": True, "signed": True},
    "authors": {"dim": 3, "block_size": 8, "hash_family": "authors"},
    "tiers": {"dim": 5, "block_size": 2, "tiers": [[9, 0.3], [4, 0.2]]},
    "private rows": {"dim": 5, "block_size": 2, "private_share": 0.3, "hash_family": "affine", "signed": True},
    "both": {"dim": 8, "block_size": 4, "tiers": [[6, 0.3]], "private_share": 0.3},
}


def make_batch(
    name: str,
    pooling: PoolingType = PoolingType.SUM,
    weighted: bool = False,
    *,
    batch: int = BATCH,
    max_length: int = 4,
    dtype: torch.dtype = torch.int64,
    memory_size: int = 127,
) -> Batch:
    """Bags of 0 to max_length ids, some twice in a bag: of all numbers of the type, or each of the table and beyond it
    where M is divided by frequency."""
    options = dict(CASES[name])
    is_divided, dim = "tiers" in options or "private_share" in options, options.pop("dim")
    rows = 13 if is_divided else 1 << 40
    if is_divided:
        options["id_counts"] = [np.arange(13, 0, -1)] * 2
    tables = [table("t", rows, dim, ["a", "b"], pooling), table("u", rows, dim, ["a"], pooling)]
    module = RobeEmbeddingBagCollection(
        tables, weighted, memory_size=memory_size, kernel="plain", gradient="dense", init_scale=1.0, **options
    ).to(DEVICE)
    assert has_kernel(module._plan[0])
    features = random_kjt(KEYS, batch, max_length=max_length, weighted=weighted, seed=3)
    ids = features.values()
    wide = torch.randint(
        torch.iinfo(dtype).min, torch.iinfo(dtype).max, ids.shape, generator=torch.Generator().manual_seed(2)
    )
    ids = torch.arange(len(ids)) % 17 - 2 if is_divided else torch.where(ids < 3, ids, wide)
    ids = ids.to(dtype)
    offsets = features.offsets().to(dtype)
    return Batch(module, KeyedJaggedTensor(KEYS, ids, features.weights_or_none(), offsets=offsets).to(DEVICE))


def pooled_exactly(memory: Tensor, weights: Tensor | None, batch: Batch) -> Tensor:
    """The output in float64, (B, features · d)."""
    columns, (ids, offsets, _, batch_size, *_) = [], batch.arguments
    for place, position in enumerate(POSITIONS):
        bounds = offsets[position * batch_size : (position + 1) * batch_size + 1].long()
        mine, lengths = slice(int(bounds[0]), int(bounds[-1])), bounds.diff()
        rows = robe_rows(memory, ids[mine].long(), torch.tensor(place, device=DEVICE), batch.group)
        rows = rows if weights is None else rows * weights[mine].unsqueeze(-1)
        bag = torch.repeat_interleave(lengths)
        pooled = rows.new_zeros(batch_size, rows.size(-1)).index_add(0, bag, rows)
        columns.append(pooled / lengths.clamp(min=1).unsqueeze(-1) if batch.group.is_mean else pooled)
    return torch.cat(columns, 1)


class Expected(NamedTuple):
    out: Tensor
    memory: Tensor  # gradient
    weights: Tensor | None  # gradient


def expect(batch: Batch, gradient: Tensor) -> tuple[Expected, Expected]:
    """What the plain float32 module gives, and what is exact."""
    weights = batch.features.weights_or_none()
    both = []
    for dtype in (torch.float32, torch.float64):
        memory = batch.module.memory.detach().to(dtype).requires_grad_()
        of = None if weights is None else weights.to(dtype).requires_grad_()
        if dtype == torch.float32:
            batch.module.memory = torch.nn.Parameter(memory)
            memory = batch.module.memory
            features = batch.features
            out = batch.module(
                KeyedJaggedTensor(KEYS, features.values(), of, offsets=features.offsets(), stride=features.stride())
            ).values()
        else:
            out = pooled_exactly(memory, of, batch)
        inputs = [memory] if of is None else [memory, of]
        gradients = torch.autograd.grad(out, inputs, gradient.to(dtype))
        both.append(Expected(out.detach(), gradients[0], gradients[1] if of is not None else None))
    return both[0], both[1]


def check(got: Tensor, plain: Tensor | None, exact: Tensor | None, factor: float) -> None:
    """At most `factor` times the error of plain PyTorch, plus two units in the last place of the largest number."""
    assert plain is not None
    assert exact is not None
    assert got.shape == exact.shape
    assert got.dtype == torch.float32
    error, allowed = ((x.double() - exact).abs().max().item() if x.numel() else 0.0 for x in (got, plain))
    floor = 2 * torch.finfo(torch.float32).eps * exact.abs().max().item() if exact.numel() else 0.0
    assert error <= factor * allowed + floor


def elements_read(batch: Batch) -> Tensor:
    """Through the lookup of an array that holds its own addresses, from 1 on for the sign's sake."""
    addresses, (ids, offsets, _, batch_size, *_) = [], batch.arguments
    memory = torch.arange(1, batch.group.memory_size + 1, dtype=torch.float64, device=DEVICE)
    for place, position in enumerate(POSITIONS):
        mine = ids[int(offsets[position * batch_size]) : int(offsets[(position + 1) * batch_size])].long()
        addresses.append(robe_rows(memory, mine, torch.tensor(place, device=DEVICE), batch.group).abs() - 1)
    return torch.cat(addresses).long().unique()
