"""A training step of a DLRM by formula: sharded tables, ROBE data-parallel, ROBE on one device; time and memory.

B samples a step over p ranks, b = B/p; F tables of dimension d, L ids a bag; links and clusters as in
`recsys.cost.collective_cost`, the placement of the tables and its imbalance from `recsys.cost.table_placement`.

    step       fixed + lookups + layers + update + exposed communication
    lookups    bytes of the kernel's byte bound (`recsys.bench.byte_bound`) / what the memory reaches, of the busiest
    rank layers     max(3 × flops of a forward pass / what the GPU reaches, activations to memory and back)
    update     3 × what is updated, read with its gradient and written; ROBE under DDP: 4 × |M| where the gradient is
               dense, which is set to zero too; fused updates are in the lookups

    sharded tables, bytes that a rank puts in                          and the collective
      ids        b·F·(8·L + 8), lengths too                            all-to-all
      forward    4·B·c, c = columns of the busiest rank; back 4·b·Σc   all-to-all           whole tables, columns
                 4·B·c of a node, then 4·B/g·c                         reduce-scatter in it, all-to-all between nodes
                 4·B·c                                                 reduce-scatter       rows over all ranks
      backward   as forward, an all-gather for every reduce-scatter
      gradients  4 × layers and replicated tables                      all-reduce
    ROBE, data-parallel
      gradients  4 × layers, and of M what is faster with its update
                 dense    4·|M|                                        all-reduce
                 sparse   p·min(b·F·L·d, |M|)·(4 + 8/Z)                all-gather
    ROBE on one device: nothing; its update is fused

Ids are taken as all different, which is too many bytes for both sides: real ids repeat. Adding up within a collective,
the loading of data and evaluation take no time here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from recsys.cost.collective_cost import (
    Cluster,
    cluster_all_gather_s,
    cluster_all_reduce_s,
    cluster_all_to_all_s,
    cluster_reduce_scatter_s,
    reduce_scatter_s,
)
from recsys.cost.machines import Assumptions, Machine, Model
from recsys.cost.table_placement import Placement

Optimizer = Literal["sgd", "adagrad"]
STATE: dict[Optimizer, float] = {"sgd": 0.0, "adagrad": 1.0}
"""Numbers of optimizer state for every parameter."""
BLOCK_SIZE = 16
_FLOAT = 4


@dataclass(frozen=True)
class StepCost:
    """Of one step, ms. compute_ms and comm_ms by part; comm_ms is what nothing hides. sent_bytes: of one rank."""

    compute_ms: Mapping[str, float]
    comm_ms: Mapping[str, float] = field(default_factory=dict)
    sent_bytes: float = 0.0

    @property
    def computing_ms(self) -> float:
        return sum(self.compute_ms.values())

    @property
    def exposed_comm_ms(self) -> float:
        return sum(self.comm_ms.values())

    @property
    def step_ms(self) -> float:
        return self.computing_ms + self.exposed_comm_ms


def table_lookup_bytes(lookups: float, samples_columns: float, embedding_dim: int, state: float) -> float:
    """Of a forward and a fused backward pass on full tables, every id different.

    lookups: rows read, in rows of embedding_dim; samples_columns: numbers of pooled output, written and later read.
    """
    row = _FLOAT * embedding_dim
    return lookups * (2 * 8 + row + 2 * row * (1 + state)) + 2 * _FLOAT * samples_columns


def array_lookup_bytes(
    lookups: float, samples_columns: float, embedding_dim: int, *, memory_size: float, cache_bytes: float, fused: bool,
    state: float,
) -> float:  # fmt: skip
    """The same on an array M of memory_size numbers: what fits the cache does not move; the gradient, where the update
    is not fused, is added up in an array of its own."""
    row = _FLOAT * embedding_dim
    reads = 0.0 if _FLOAT * memory_size <= cache_bytes else lookups * row
    state = state if fused else 0.0
    writes = 0.0 if _FLOAT * memory_size * (1 + state) <= cache_bytes else 2 * lookups * row * (1 + state)
    return lookups * 2 * 8 + reads + writes + 2 * _FLOAT * samples_columns


def layers_ms(model: Model, machine: Machine, assumed: Assumptions, local_batch_size: float) -> float:
    flops = 3 * model.forward_flops * local_batch_size
    moved = assumed.activation_passes * _FLOAT * model.activations * local_batch_size
    return max(1e-9 * flops / (machine.peak_tflops * assumed.flops_efficiency), _memory_ms(moved, machine, assumed))


def _memory_ms(moved: float, machine: Machine, assumed: Assumptions) -> float:
    return 1e-6 * moved / (machine.memory_gb_per_s * assumed.memory_efficiency)


def _update_ms(parameters: float, accesses: float, machine: Machine, assumed: Assumptions) -> float:
    return _memory_ms(accesses * _FLOAT * parameters, machine, assumed)


def sharded_step(
    model: Model,
    machine: Machine,
    assumed: Assumptions,
    cluster: Cluster,
    placement: Placement,
    global_batch_size: int,
    optimizer: Optimizer,
) -> StepCost:
    batch, state = global_batch_size, STATE[optimizer]
    local = batch / cluster.ranks
    busiest = float(placement.columns_per_rank.max())
    lookups = batch * model.ids_per_bag * busiest / model.embedding_dim
    moved = table_lookup_bytes(lookups, batch * busiest, model.embedding_dim, state)
    compute = {
        "fixed": assumed.fixed_ms,
        "lookups": _memory_ms(moved, machine, assumed),
        "layers": layers_ms(model, machine, assumed, local),
        "update": _update_ms(model.layer_parameters + placement.replicated_parameters, 3, machine, assumed),
    }
    ids = local * len(model.rows) * (8 * model.ids_per_bag + 8)
    pooled_s, pooled_bytes = _exchange_pooled(placement, cluster, batch)
    gradients = _FLOAT * (model.layer_parameters + placement.replicated_parameters)
    comm = {
        "ids": 1e3 * (1 - assumed.input_overlap) * cluster_all_to_all_s(ids, cluster),
        "embeddings": 1e3 * 2 * pooled_s,
        "gradients": 1e3 * (1 - assumed.gradient_overlap) * cluster_all_reduce_s(gradients, cluster),
    }
    return StepCost(compute, comm, ids + 2 * pooled_bytes + gradients)


def _exchange_pooled(placement: Placement, cluster: Cluster, batch: float) -> tuple[float, float]:
    """(seconds, bytes that the busiest rank puts in) of one direction of pooled embeddings."""
    seconds = sent = 0.0
    if placement.whole.any():
        size = _FLOAT * batch * max(float(placement.whole.max()), float(placement.whole.mean()))
        seconds += cluster_all_to_all_s(size, cluster)
        sent += size
    if placement.by_node.any():
        size = _FLOAT * batch * float(placement.by_node.max())
        between = size / cluster.local_ranks
        seconds += reduce_scatter_s(size, cluster.local_ranks, cluster.inside)
        seconds += (cluster.nodes - 1) * cluster.between.alpha_s
        seconds += between * (cluster.nodes - 1) / cluster.nodes * cluster.between.beta_s
        sent += size + between
    if placement.by_row:
        size = _FLOAT * batch * placement.by_row
        seconds += cluster_reduce_scatter_s(size, cluster)
        sent += size
    return seconds, sent


def robe_step(
    model: Model,
    machine: Machine,
    assumed: Assumptions,
    cluster: Cluster,
    compression: float,
    global_batch_size: int,
    optimizer: Optimizer,
) -> StepCost:
    """Data-parallel over the cluster; on one device, a cluster of one rank, with the update fused."""
    state, memory_size = STATE[optimizer], array_size(model, compression)
    local, is_alone = global_batch_size / cluster.ranks, cluster.ranks == 1
    columns = len(model.rows) * model.embedding_dim
    lookups = local * len(model.rows) * model.ids_per_bag
    moved = array_lookup_bytes(
        lookups, local * columns, model.embedding_dim, memory_size=memory_size, cache_bytes=1e6 * machine.cache_mb,
        fused=is_alone, state=state,
    )  # fmt: skip
    compute = {
        "fixed": assumed.fixed_ms,
        "lookups": _memory_ms(moved, machine, assumed),
        "layers": layers_ms(model, machine, assumed, local),
        "update": _update_ms(model.layer_parameters, 3, machine, assumed),
    }
    if is_alone:
        return StepCost(compute)
    touched = min(lookups * model.embedding_dim, memory_size)
    dense, sparse = _FLOAT * memory_size, touched * (_FLOAT + 8 / BLOCK_SIZE)
    choices = [
        (dense, cluster_all_reduce_s(dense, cluster), _update_ms(memory_size, 4 + 2 * state, machine, assumed)),
        (
            sparse,
            cluster_all_gather_s(cluster.ranks * sparse, cluster),
            _update_ms(cluster.ranks * touched, 3 + 2 * state, machine, assumed),
        ),
    ]
    sent, seconds, update_ms = min(choices, key=lambda choice: 1e3 * choice[1] + choice[2])
    compute["update"] += update_ms
    layers = _FLOAT * model.layer_parameters
    comm = {
        "gradient of M": 1e3 * seconds,
        "gradients": 1e3 * (1 - assumed.gradient_overlap) * cluster_all_reduce_s(layers, cluster),
    }
    return StepCost(compute, comm, sent + layers)


def array_size(model: Model, compression: float) -> float:
    """|M|, numbers. Raises ValueError for a compression below 1."""
    if compression < 1:
        raise ValueError(f"compression {compression:g}: must be at least 1")
    return model.table_parameters / compression


def robe_rank_bytes(
    model: Model, compression: float, local_batch_size: float, optimizer: Optimizer, *, fused: bool
) -> float:
    """Of one rank: M with optimizer state, its gradient where the update is not fused, layers, activations."""
    numbers = array_size(model, compression) * (1 + (not fused) + STATE[optimizer])
    return _FLOAT * numbers + working_bytes(model, local_batch_size, optimizer)


def working_bytes(model: Model, local_batch_size: float, optimizer: Optimizer) -> float:
    """Of one rank beside tables or M: layers with gradient and state, activations and their gradients, buffers of
    pooled embeddings both ways."""
    layers = _FLOAT * model.layer_parameters * (2 + STATE[optimizer])
    pooled = 2 * len(model.rows) * model.embedding_dim
    return layers + _FLOAT * local_batch_size * (2 * model.activations + pooled)


def devices_needed(model: Model, machine: Machine, assumed: Assumptions, optimizer: Optimizer) -> int:
    """The fewest GPUs whose usable memory holds the full tables with optimizer state, however they are cut."""
    stored = model.table_parameters * _FLOAT * (1 + STATE[optimizer])
    return max(1, -(-int(stored) // int(1e9 * machine.memory_gb * assumed.usable_memory)))
