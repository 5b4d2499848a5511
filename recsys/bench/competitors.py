"""The competitors of the kernel benchmark: ROBE in its forms, and what a full table is looked up with today.

A new one is a function that builds its `Lookup` and a line in COMPETITORS.

All competitors with full tables read and write the same tables, and all forms of ROBE the same array M: there is memory
for one of each, and none of them is placed better than another. Their updates go on from each other's.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from pss.methods.robe import RobeEmbeddingBagCollection
from pss.shared_array import sends_sparse_gradient
from recsys.bench.byte_bound import Storage, Traffic
from recsys.bench.kernel_sizes import KernelBatch, KernelSize

LEARNING_RATE = 1e-3
ADAGRAD_EPS = 1e-8


@dataclass(frozen=True)
class Shared:
    """Hold what all competitors of a size look up in.

    tables: all full tables, flat (rows · d,) float32. array: M (|M|,) float32. None where there is none.
    """

    tables: Tensor | None
    array: Tensor | None


@dataclass(frozen=True)
class Lookup:
    """Hold a competitor at one size, ready to look up and to train.

    forward: batch -> bags, B·F·d numbers; `(B, F·d)`, feature-major where `Competitor.meaning` says so.
    update: the optimizer's step, nothing where it is within the backward pass. clear: drops gradients unused.
    """

    forward: Callable[[KernelBatch], Tensor]
    update: Callable[[], None] = field(default=lambda: None)
    clear: Callable[[], None] = field(default=lambda: None)


@dataclass(frozen=True)
class Competitor:
    """Describe one way to look up and train.

    meaning: what it is, and in what it differs from the others. build: its Lookup; raises ValueError where it cannot.
    extra_bytes: at a size, besides array or tables: gradients, state and temporaries, generously. same_forward_as:
    another, whose forward is the same, so that it need not be timed again.
    """

    label: str
    meaning: str
    traffic: Traffic
    build: Callable[[KernelSize, Shared, torch.device], Lookup]
    extra_bytes: Callable[[KernelSize], float]
    same_forward_as: str | None = None

    @property
    def storage(self) -> Storage:
        """Return where its parameters are: in the array M or in full tables."""
        return self.traffic.storage


def table_configs(size: KernelSize) -> list[EmbeddingBagConfig]:
    """Return TorchRec's configs of a size's tables: `features` tables t0, t1, … of `rows_per_table` rows."""
    return [
        EmbeddingBagConfig(
            num_embeddings=size.rows_per_table, embedding_dim=size.embedding_dim, name=f"t{i}", feature_names=[f"f{i}"]
        )
        for i in range(size.features)
    ]


def _optimized(module: nn.Module, optimizer: torch.optim.Optimizer, forward: Callable[[KernelBatch], Tensor]) -> Lookup:
    def update() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    clear = partial(optimizer.zero_grad, set_to_none=True)
    return Lookup(forward, update, clear)


def _build_robe(
    size: KernelSize, shared: Shared, device: torch.device, *, gradient: str = "dense", kernel: str = "auto"
) -> Lookup:
    module = _robe_module(size, shared, gradient, kernel)
    if kernel == "auto" and not module._has_kernel(0):
        raise ValueError(f"there is no kernel for this lookup on {device.type}")
    optimizer = torch.optim.SGD(module.parameters(), lr=LEARNING_RATE)
    return _optimized(module, optimizer, lambda batch: module(batch.features).values())


def _build_fused_robe(
    size: KernelSize, shared: Shared, device: torch.device, *, rule: type[torch.optim.Optimizer]
) -> Lookup:
    module = _robe_module(size, shared, "dense", "auto")
    module.fuse_update(rule(module.parameters(), lr=LEARNING_RATE))  # pyright: ignore[reportCallIssue]
    return Lookup(lambda batch: module(batch.features).values())


def _robe_module(size: KernelSize, shared: Shared, gradient: str, kernel: str) -> RobeEmbeddingBagCollection:
    assert shared.array is not None
    module = RobeEmbeddingBagCollection(
        table_configs(size),
        device=torch.device("meta"),
        memory_size=size.memory_size,
        block_size=size.block_size,
        gradient=gradient,
        kernel=kernel,
    )
    module.memory = nn.Parameter(shared.array)
    return module


def _build_tbe(size: KernelSize, shared: Shared, device: torch.device, *, rule: EmbOptimType) -> Lookup:
    """Return FBGEMM's table-batched embeddings: update within the backward pass, ids unchecked, as ours are."""
    assert shared.tables is not None
    if size.embedding_dim % 4:
        raise ValueError(f"FBGEMM wants embedding_dim to be a multiple of 4, not {size.embedding_dim}")
    is_cpu = device.type == "cpu"
    location = EmbeddingLocation.HOST if is_cpu else EmbeddingLocation.DEVICE
    processor = ComputeDevice.CPU if is_cpu else ComputeDevice.CUDA
    module = SplitTableBatchedEmbeddingBagsCodegen(
        [(size.rows_per_table, size.embedding_dim, location, processor)] * size.features,
        optimizer=rule,
        learning_rate=LEARNING_RATE,
        eps=ADAGRAD_EPS,
        device=device,
        bounds_check_mode=BoundsCheckMode.NONE,
        preallocated_host_buffers=_host_buffers(size, shared.tables, rule) if is_cpu else None,
    )
    if not is_cpu:
        module.weights_dev.data = shared.tables
    return Lookup(lambda batch: module(batch.ids, batch.offsets))


def _host_buffers(size: KernelSize, tables: Tensor, rule: EmbOptimType) -> dict[str, Tensor]:
    buffers = {"weights": tables}
    if rule == EmbOptimType.EXACT_ROWWISE_ADAGRAD:
        buffers["momentum1"] = tables.new_zeros(size.features * size.rows_per_table)
    return buffers


def _build_embedding_bag(size: KernelSize, shared: Shared, device: torch.device) -> Lookup:
    assert shared.tables is not None
    weight = shared.tables.view(size.features * size.rows_per_table, size.embedding_dim)
    rows, dim = weight.shape
    module = nn.EmbeddingBag(rows, dim, mode="sum", sparse=True, include_last_offset=True, _weight=weight)
    optimizer = torch.optim.SGD(module.parameters(), lr=LEARNING_RATE)
    return _optimized(module, optimizer, lambda batch: module(batch.table_ids, batch.offsets))


def _build_collection(size: KernelSize, shared: Shared, device: torch.device) -> Lookup:
    assert shared.tables is not None
    module = EmbeddingBagCollection(table_configs(size), device=torch.device("meta"))
    weights = shared.tables.view(size.features, size.rows_per_table, size.embedding_dim)
    for bag, weight in zip(module.embedding_bags.values(), weights, strict=True):
        assert isinstance(bag, nn.EmbeddingBag)
        bag.weight, bag.sparse = nn.Parameter(weight), True
    optimizer = torch.optim.SGD(module.parameters(), lr=LEARNING_RATE)
    return _optimized(module, optimizer, lambda batch: module(batch.features).values())


def _output(size: KernelSize) -> float:
    """Return the bytes of the output and its gradient, twice: every competitor has them."""
    return 4.0 * size.output_bytes


def _dense(size: KernelSize) -> float:
    return _output(size) + 2.0 * size.memory_bytes


def _sparse(size: KernelSize) -> float:
    """Return the bytes of slots and values, before and after they are sorted."""
    return _output(size) + 24.0 * min(size.expected_ids * size.embedding_dim, size.memory_size)


def _plain(size: KernelSize) -> float:
    """Return the bytes of rows before they are pooled, of their gradient, and of their addresses."""
    return _dense(size) + 48.0 * size.expected_ids * size.embedding_dim


def _row_gradient(size: KernelSize) -> float:
    return _output(size) + 8.0 * size.expected_ids * size.embedding_dim


def reads_little(size: KernelSize) -> bool:
    """Return whether a batch reads so little of M that `gradient = "auto"` sends it sparse."""
    return sends_sparse_gradient("auto", size.expected_ids * size.embedding_dim, size.memory_size)


FUSED_SGD, FUSED_ADAGRAD = "robe_fused_sgd", "robe_fused_adagrad"
DENSE_SGD, SPARSE_SGD = "robe_dense_sgd", "robe_sparse_sgd"
PLAIN_SGD, PLAIN_DENSE, PLAIN_SPARSE = "robe_plain_sgd", "robe_plain_dense", "robe_plain_sparse"
TBE_SGD, TBE_ADAGRAD = "tbe_sgd", "tbe_rowwise_adagrad"
EMBEDDING_BAG, COLLECTION = "embedding_bag_sgd", "collection_sgd"

COMPETITORS: dict[str, Competitor] = {
    FUSED_SGD: Competitor(
        "ROBE fused SGD",
        "our kernels, SGD within the backward pass",
        Traffic("array"),
        partial(_build_fused_robe, rule=torch.optim.SGD),
        _dense,
    ),
    FUSED_ADAGRAD: Competitor(
        "ROBE fused Adagrad",
        "our kernels, element-wise Adagrad within the backward pass; its forward is that of ROBE fused SGD",
        Traffic("array", state="element"),
        partial(_build_fused_robe, rule=torch.optim.Adagrad),
        _dense,
        FUSED_SGD,
    ),
    DENSE_SGD: Competitor(
        "ROBE dense + SGD",
        "our kernels, gradient an array like M, then torch.optim.SGD",
        Traffic("array", "dense"),
        _build_robe,
        _dense,
        FUSED_SGD,
    ),
    SPARSE_SGD: Competitor(
        "ROBE sparse + SGD",
        "our kernels, coalesced sparse gradient, then torch.optim.SGD; in the grid models only where a batch reads "
        "less than 1/40 of M",
        Traffic("array", "sparse"),
        partial(_build_robe, gradient="sparse"),
        _sparse,
        FUSED_SGD,
    ),
    PLAIN_SGD: Competitor(
        "ROBE plain PyTorch",
        "the same in PyTorch's own operators, kernel = 'plain', gradient = 'auto', then torch.optim.SGD",
        Traffic("array", "dense"),
        partial(_build_robe, gradient="auto", kernel="plain"),
        _plain,
    ),
    PLAIN_DENSE: Competitor(
        "ROBE plain, dense",
        "the same in PyTorch's own operators, gradient an array like M",
        Traffic("array", "dense"),
        partial(_build_robe, kernel="plain"),
        _plain,
    ),
    PLAIN_SPARSE: Competitor(
        "ROBE plain, sparse",
        "the same in PyTorch's own operators, coalesced sparse gradient",
        Traffic("array", "sparse"),
        partial(_build_robe, gradient="sparse", kernel="plain"),
        _plain,
        PLAIN_DENSE,
    ),
    TBE_SGD: Competitor(
        "TBE fused SGD",
        "FBGEMM's table-batched embeddings on full tables, EXACT_SGD within the backward pass, ids unchecked",
        Traffic("tables"),
        partial(_build_tbe, rule=EmbOptimType.EXACT_SGD),
        _output,
    ),
    TBE_ADAGRAD: Competitor(
        "TBE rowwise Adagrad",
        "the same with EXACT_ROWWISE_ADAGRAD, one number of state a row; its forward is that of TBE fused SGD",
        Traffic("tables", state="row"),
        partial(_build_tbe, rule=EmbOptimType.EXACT_ROWWISE_ADAGRAD),
        lambda size: _output(size) + 4.0 * size.rows,
        TBE_SGD,
    ),
    EMBEDDING_BAG: Competitor(
        "nn.EmbeddingBag",
        "one nn.EmbeddingBag over the rows of all tables, sparse gradient, then torch.optim.SGD; its output stays "
        "feature-major, and its ids come with the table's first row added",
        Traffic("tables", "sparse"),
        _build_embedding_bag,
        _row_gradient,
    ),
    COLLECTION: Competitor(
        "TorchRec EBC",
        "TorchRec's EmbeddingBagCollection with its bags set to sparse gradients (as built they send dense ones, of "
        "all rows), then torch.optim.SGD",
        Traffic("tables", "sparse"),
        _build_collection,
        _row_gradient,
    ),
}
