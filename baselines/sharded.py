"""The baseline: full tables divided over the ranks by TorchRec, looked up and updated by FBGEMM's fused kernels.

`build` makes the tables on the meta device; `shard` plans them with TorchRec's planner, wraps the model in
`DistributedModelParallel` (tables model-parallel with the optimizer fused into the backward pass, the rest DDP) and
copies the same initial rows into the shards that the unsharded tables start from.

Departures from TorchRec's defaults, each needed for a fair comparison:
- row-wise shardings are offered on CPU when asked for by name (gloo emulates their reduce-scatter by an all-reduce);
- fused optimizers are named explicitly with eps, never left to the kernel's defaults;
- a table that the plan places data-parallel has no fused update: `recsys.train.optim` gives it the embedding optimizer;
- a table of one column, a first-order weight, is stored in four, the least that FBGEMM takes: the first has the rows
  that the unsharded table starts from, the others start at zero and are for the model to ignore. Their memory, traffic
  and optimizer state count as what they are.
"""

import os
from collections.abc import Set
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder, ShardedEmbeddingBagCollection
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ShardingPlan
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from baselines.full import Options, check_uncompressed, fill_initial_rows
from pss.method import EmbeddingMethod, EmbeddingRequest

__all__ = ["METHOD", "FusedRule", "Options", "build", "cell", "describe_plan", "local_parts", "shard"]

_FUSED = {"sgd": EmbOptimType.EXACT_SGD, "adagrad": EmbOptimType.EXACT_ADAGRAD}
_MIN_COLUMNS = 4
"""FBGEMM's kernels want a multiple of four columns in every shard."""


@dataclass(frozen=True, kw_only=True)
class FusedRule:
    """The optimizer that the kernels run within the backward pass."""

    name: Literal["sgd", "adagrad"]
    learning_rate: float
    eps: float
    """Added to the root of Adagrad's accumulator."""


@dataclass
class _WidenedColumn(EmbeddingBagConfig):
    """A table of one column, with columns beside it that FBGEMM needs and nobody reads."""

    @classmethod
    def of(cls, table: EmbeddingBagConfig) -> "_WidenedColumn":
        """Return that table, widened."""
        return cls(**{**vars(table), "embedding_dim": _MIN_COLUMNS})


class _Sharder(EmbeddingBagCollectionSharder):
    """TorchRec's sharder, which on CPU too offers the shardings asked for."""

    def __init__(self, fused_params: dict[str, Any], sharding_types: list[str] | None) -> None:
        super().__init__(fused_params=fused_params)
        self._sharding_types = sharding_types

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """Return the shardings asked for, or those that TorchRec offers."""
        return self._sharding_types or super().sharding_types(compute_device_type)


def build(tables: list[EmbeddingBagConfig], options: Options, request: EmbeddingRequest) -> EmbeddingBagCollection:
    """Return tables without storage: `shard` gives every rank its part. Raises CompressionRefused for a
    compression other than 1."""
    check_uncompressed("sharded", request)
    tables = [_WidenedColumn.of(table) if table.embedding_dim == 1 else table for table in tables]
    return EmbeddingBagCollection(tables, is_weighted=request.is_weighted, device=torch.device("meta"))


def cell(module: ShardedEmbeddingBagCollection, table: int, row: int, col: int) -> float:
    """Return E_t[row, col], on a rank that holds it. Raises KeyError on any other rank."""
    name = list(module.embedding_bags)[table]
    for weight, row_offset, col_offset in local_parts(module.state_dict()[f"embedding_bags.{name}.weight"]):
        r, c = row - row_offset, col - col_offset
        if 0 <= r < weight.shape[0] and 0 <= c < weight.shape[1]:
            return weight[r, c].item()
    raise KeyError(f"row {row}, column {col} of table {name} is not on this rank")


def shard(
    model: nn.Module,
    *,
    sharding: str,
    optimizer: FusedRule,
    local_batch_size: int,
    init_scale: float,
    seed: int,
    device: torch.device,
) -> DistributedModelParallel:
    """Return the model with its (meta) EmbeddingBagCollections sharded over all ranks of the default group.

    `sharding`: one kind for every table, or "planner" for TorchRec's choice. Collective: every rank must call it.
    Raises what the planner raises (no plan fits, an impossible sharding) on every rank.
    """
    fused = {
        "optimizer": _FUSED[optimizer.name],
        "learning_rate": optimizer.learning_rate,
        "eps": optimizer.eps,
    }
    sharder = _Sharder(fused, None if sharding == "planner" else [sharding])
    world_size = dist.get_world_size()
    widened = {table.name for table in _tables(model) if isinstance(table, _WidenedColumn)}
    planner = EmbeddingShardingPlanner(
        topology=Topology(
            world_size=world_size,
            local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", world_size)),
            compute_device=device.type,
        ),
        batch_size=local_batch_size,
        constraints=_column_constraints(model, world_size) if "column" in sharding else None,
    )
    plan, obstacle = _plan_on_first_rank(planner, model, sharder)
    if plan is None:
        raise ValueError(f"parallelism.sharding = {sharding!r}: TorchRec's planner found no plan: {obstacle}")
    sharded = DistributedModelParallel(model, device=device, plan=plan, sharders=[sharder])  # type: ignore[list-item]
    for module in sharded.modules():
        if isinstance(module, ShardedEmbeddingBagCollection):
            _initialize(module, widened, seed=seed, init_scale=init_scale)
    return sharded


def _plan_on_first_rank(
    planner: EmbeddingShardingPlanner, model: nn.Module, sharder: _Sharder
) -> tuple[ShardingPlan | None, str]:
    """Return the plan that rank 0 makes, or None and why there is none, on every rank. Collective.

    TorchRec's `collective_plan` would leave the other ranks waiting where rank 0 finds no plan.
    """
    answer: list[Any] = [None, ""]
    if dist.get_rank() == 0:
        try:
            answer[0] = planner.plan(model, [sharder])  # type: ignore[list-item]
        except Exception as error:
            answer[1] = f"{type(error).__name__}: {error}"
    dist.broadcast_object_list(answer, src=0)
    return answer[0], answer[1]


def _column_constraints(model: nn.Module, world_size: int) -> dict[str, ParameterConstraints]:
    """Return column shards of embedding_dim / world_size columns; the planner's own minimum would keep small tables
    whole."""
    return {
        table.name: ParameterConstraints(min_partition=max(_MIN_COLUMNS, table.embedding_dim // world_size))
        for table in _tables(model)
    }


def _tables(model: nn.Module) -> list[EmbeddingBagConfig]:
    """Return the tables of a model not yet sharded."""
    collections = (module for module in model.modules() if isinstance(module, EmbeddingBagCollection))
    return [table for collection in collections for table in collection.embedding_bag_configs()]


def local_parts(weight: torch.Tensor | ShardedTensor) -> list[tuple[torch.Tensor, int, int]]:
    """Return (part, its first row, its first column) of what this rank holds of a table."""
    if not isinstance(weight, ShardedTensor):
        return [(weight, 0, 0)]
    return [(s.tensor, s.metadata.shard_offsets[0], s.metadata.shard_offsets[1]) for s in weight.local_shards()]


def _initialize(module: ShardedEmbeddingBagCollection, widened: Set[str], *, seed: int, init_scale: float) -> None:
    """Fill the shards with the initial rows. widened: names of the tables of which the first column alone counts."""
    state = module.state_dict()
    with torch.no_grad():
        for index, name in enumerate(module.embedding_bags):
            table = state[f"embedding_bags.{name}.weight"]
            embedding_dim = (table.metadata().size if isinstance(table, ShardedTensor) else table.shape)[1]
            for weight, row_offset, col_offset in local_parts(table):
                if name in widened:
                    weight.zero_()
                    weight, embedding_dim = weight[:, :1], 1
                fill_initial_rows(
                    weight, table=index, seed=seed, init_scale=init_scale, row_offset=row_offset,
                    col_offset=col_offset, embedding_dim=embedding_dim,
                )  # fmt: skip


def describe_plan(sharded: DistributedModelParallel) -> list[dict[str, Any]]:
    """Return a row per table: table, sharding, kernel, and the bytes of its weights on each rank that holds a part."""
    state = sharded.state_dict()
    rows = []
    for path, module_plan in sharded.plan.plan.items():
        assert isinstance(module_plan, EmbeddingModuleShardingPlan)
        for name, parameter in module_plan.items():
            bytes_per_rank: dict[int, int] = {}
            if parameter.sharding_spec is None:  # data-parallel: the whole table on every rank
                size: int = state[f"{path}.embedding_bags.{name}.weight"].nbytes
                bytes_per_rank = dict.fromkeys(range(dist.get_world_size()), size)
            else:
                for part in parameter.sharding_spec.shards:  # type: ignore[attr-defined]
                    rank = part.placement.rank()
                    bytes_per_rank[rank] = bytes_per_rank.get(rank, 0) + 4 * part.shard_sizes[0] * part.shard_sizes[1]
            rows.append(
                {
                    "table": name,
                    "sharding": parameter.sharding_type,
                    "kernel": parameter.compute_kernel,
                    "bytes_per_rank": bytes_per_rank,
                }
            )
    return rows


METHOD = EmbeddingMethod(
    Options=Options, build=build, cell=cell, placement="shard", max_compression=1.0, stores_every_row=True
)
