"""Where the tables of a big model live over many ranks, without allocating any: TorchRec's planner, or our own.

TorchRec's planner is asked with the tables on the meta device and a topology of as many GPUs; it takes seconds up to 64
ranks and minutes at 1,024, where it also leaves most nodes without a table. Above MAX_PLANNED ranks the placement is
ours: tables with fewer rows than the local batch on every rank, the others cut by columns until a part fits and every
node can have one, parts to the node (or the rank, within one node) that has least to look up so far.

Bytes are counted here, for TorchRec's EmbeddingStorageEstimator knows only what its planner can place. Where it can, on
the published steps, the two are within 1 % of each other; and the planner refuses by its own what does not fit.
"""

import functools
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from recsys.cost.machines import Model

MAX_PLANNED = 64
_LEAST_COLUMNS = 32
"""Columns of a part, where memory does not ask for narrower ones: TorchRec's own default."""
_FEWEST_COLUMNS = 4
"""FBGEMM's kernels want a multiple of four columns."""
_FLOAT = 4


class DoesNotFit(ValueError):
    """Raised where tables have too little memory. devices: the fewest GPUs whose memory would do."""

    def __init__(self, message: str, devices: int) -> None:
        super().__init__(message)
        self.devices = devices


@dataclass(frozen=True)
class Placement:
    """Columns of pooled embeddings by who looks them up; they sum to tables × embedding_dim.

    whole: (ranks,) tables or columns of them that one rank has; by_node: (nodes,) with rows over the ranks of a node;
    by_row: with rows over all ranks; replicated: on every rank, which looks up for its own samples.
    bytes_per_rank: (ranks,) tables with their optimizer state.
    """

    source: str
    whole: np.ndarray
    by_node: np.ndarray
    by_row: float
    replicated: float
    replicated_parameters: float
    bytes_per_rank: np.ndarray

    @property
    def columns(self) -> float:
        """Return all columns, each once."""
        return float(self.whole.sum() + self.by_node.sum() + self.by_row + self.replicated)

    @property
    def columns_per_rank(self) -> np.ndarray:
        """Return (ranks,) what a rank looks up for a whole batch; shared rows and copies count evenly."""
        ranks = len(self.whole)
        local_ranks = ranks // len(self.by_node)
        return self.whole + np.repeat(self.by_node / local_ranks, local_ranks) + (self.by_row + self.replicated) / ranks

    @property
    def imbalance(self) -> float:
        """Return what the busiest rank looks up, over the mean."""
        load = self.columns_per_rank
        return float(load.max() / load.mean())


def place_tables(
    model: Model, ranks: int, ranks_per_node: int, *, rank_bytes: float, local_batch_size: int, state: float = 0.0
) -> Placement:
    """Return where the tables live. rank_bytes: usable of a rank; state: numbers of it for every parameter.

    Raises DoesNotFit where the ranks together, or every way of cutting the tables, have too little memory.
    """
    per_number = _FLOAT * (1 + state)
    total = model.table_parameters * per_number
    if total > ranks * rank_bytes:
        raise DoesNotFit(
            f"tables of {total / 1e9:,.0f} GB do not fit {ranks} GPUs of {rank_bytes / 1e9:.0f} GB usable",
            -(-int(total) // int(rank_bytes)),
        )
    local_ranks = min(ranks, ranks_per_node)
    if ranks <= MAX_PLANNED:
        planned = plan_tables(model, ranks, local_ranks, int(rank_bytes / (1 + state)), local_batch_size)  # type: ignore[arg-type]
        if planned:
            return replace(planned, bytes_per_rank=planned.bytes_per_rank * (1 + state))
    return spread_tables(model, ranks, local_ranks, rank_bytes, local_batch_size, per_number)


def spread_tables(
    model: Model, ranks: int, local_ranks: int, rank_bytes: float, local_batch_size: int, per_number: float = _FLOAT
) -> Placement:
    """Return our own placement, see above. per_number: bytes of a parameter with its optimizer state."""
    is_one_node = ranks == local_ranks
    owners = ranks if is_one_node else ranks // local_ranks  # the ranks of the only node, or nodes
    owner_bytes = rank_bytes * ranks / owners
    replicated = [rows for rows in model.rows if rows < local_batch_size]
    copies = sum(replicated) * model.embedding_dim
    free, load = np.full(owners, owner_bytes - copies * per_number * ranks / owners), np.zeros(owners)
    by_row = 0.0
    big = [rows for rows in model.rows if rows >= local_batch_size]
    for size, columns in sorted(_cut(big, model.embedding_dim, owners, owner_bytes, per_number), reverse=True):
        fits = np.flatnonzero(free >= size)
        if len(fits) == 0:
            by_row += columns
            free -= size / owners
            continue
        owner = fits[np.argmin(load[fits])]
        load[owner] += columns
        free[owner] -= size
    if free.min() < 0:
        devices = -(-int(model.table_parameters * per_number) // int(rank_bytes))
        raise DoesNotFit(f"no way was found to cut the tables over {ranks} GPUs", max(devices, ranks + 1))
    return Placement(
        source="ours",
        whole=load if is_one_node else np.zeros(ranks),
        by_node=np.zeros(1) if is_one_node else load,
        by_row=by_row,
        replicated=float(len(replicated) * model.embedding_dim),
        replicated_parameters=float(copies),
        bytes_per_rank=np.repeat(owner_bytes - free, ranks // owners) * owners / ranks,
    )


def _cut(
    rows: Sequence[int], embedding_dim: int, owners: int, owner_bytes: float, per_number: float
) -> Iterator[tuple[float, int]]:
    """Yield (bytes, columns) of the parts of every table: as few as let every owner have two, and each fit an owner."""
    wanted = 2 * owners / max(1, len(rows))
    for table in rows:
        columns = embedding_dim
        while columns % 2 == 0 and columns // 2 >= _FEWEST_COLUMNS:
            is_wide = embedding_dim / columns < wanted and columns // 2 >= _LEAST_COLUMNS
            if table * columns * per_number <= 0.9 * owner_bytes and not is_wide:
                break
            columns //= 2
        for _ in range(0, embedding_dim, columns):
            yield table * columns * per_number, columns


@functools.cache
def plan_tables(model: Model, ranks: int, local_ranks: int, rank_bytes: int, local_batch_size: int) -> Placement | None:
    """Return the placement of TorchRec's planner for CUDA, without optimizer state.

    None where it finds no plan, or only one with tables in the host's memory.
    """
    # Imported here: TorchRec takes two seconds, and machines above MAX_PLANNED ranks need none of it.
    import torch
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
    from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
    from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
    from torchrec.distributed.planner.types import PlannerError
    from torchrec.modules.embedding_configs import EmbeddingBagConfig
    from torchrec.modules.embedding_modules import EmbeddingBagCollection

    tables = [
        EmbeddingBagConfig(
            name=f"t{i}", embedding_dim=model.embedding_dim, num_embeddings=rows, feature_names=[f"f{i}"]
        )
        for i, rows in enumerate(model.rows)
    ]
    module = torch.nn.ModuleDict({"tables": EmbeddingBagCollection(tables=tables, device=torch.device("meta"))})
    with _silence():
        topology = Topology(ranks, local_world_size=local_ranks, compute_device="cuda", hbm_cap=rank_bytes)
        planner = EmbeddingShardingPlanner(
            topology=topology,
            batch_size=local_batch_size,
            storage_reservation=FixedPercentageStorageReservation(0.0),  # `rank_bytes` is usable already
        )
        try:
            plan = planner.plan(module, [EmbeddingBagCollectionSharder()])  # type: ignore[list-item]
        except PlannerError:
            return None
    return _read_plan(plan.plan["tables"], model, ranks, local_ranks)


def _read_plan(plan: Any, model: Model, ranks: int, local_ranks: int) -> Placement | None:
    whole, by_node, stored = np.zeros(ranks), np.zeros(ranks // local_ranks), np.zeros(ranks)
    by_row, replicated, copies = 0.0, 0.0, 0.0
    for name, table in plan.items():
        rows = model.rows[int(name[1:])]
        if "uvm" in table.compute_kernel:
            return None
        if table.sharding_type == "data_parallel":
            replicated += model.embedding_dim
            copies += rows * model.embedding_dim
            continue
        if table.sharding_type == "row_wise":
            by_row += model.embedding_dim
        for shard in table.sharding_spec.shards:
            rank, (height, width) = shard.placement.rank(), shard.shard_sizes
            stored[rank] += _FLOAT * height * width
            if table.sharding_type in ("table_wise", "column_wise"):
                whole[rank] += width
            elif table.sharding_type != "row_wise":
                by_node[rank // local_ranks] += width * height / rows
    return Placement("TorchRec's planner", whole, by_node, by_row, replicated, copies, stored + _FLOAT * copies)


@contextmanager
def _silence() -> Iterator[None]:
    """The planner warns that there is no such machine here, and that layers on the meta device have no size."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
