"""A training step of a DLRM by formula: sharded tables, ROBE data-parallel, ROBE on one device; time and memory.

A collective takes α seconds a message and β seconds a byte; p ranks, n bytes. n is what one rank puts in, its own share
included, as the profile counts it (`recsys.profile.timing`); of an all-gather all that is gathered.

    all-to-all, reduce-scatter, all-gather   (p − 1)·α + n·(p − 1)/p·β          pairwise, or a ring
    all-reduce                               2·(p − 1)·α + 2·n·(p − 1)/p·β      ring: reduce-scatter, then all-gather
                                             2·log₂p·α  + 2·n·(p − 1)/p·β       halving and doubling, p a power of two

Sources: Thakur, Rabenseifner and Gropp, Optimization of Collective Communication Operations in MPICH, 2005, section 4;
Rabenseifner, Optimization of Collective Reduction Operations, 2004. Adding numbers up counts as computing.

A step of B samples over p ranks, b = B/p; F tables of dimension d, L ids a bag; the placement of the tables and its
imbalance are `recsys.cost.table_placement`'s.

    step       fixed + lookups + layers + update + exposed communication
    lookups    bytes of the kernel's byte bound (`recsys.bench.byte_bound`) / what the memory reaches; of the busiest
               rank
    layers     max(3 × flops of a forward pass / what the GPU reaches, activations to memory and back)
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

Ids are taken as all different, which is too many bytes for both sides: real ids repeat. The loading of data and
evaluation take no time here.

TorchRec's EmbeddingPerfEstimator is not used, though it is what its planner weighs placements with: it knows no ROBE,
and a comparison must cost both sides alike; it counts no messages, which are milliseconds over 1,024 GPUs. Within a
node the two agree within a factor of 1.5, and a test holds them to it. Between nodes it has no reduction within a node.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from recsys.cost.machines import Assumptions, Machine, Model
from recsys.cost.table_placement import Placement

Optimizer = Literal["sgd", "adagrad"]
_STATE: dict[Optimizer, float] = {"sgd": 0.0, "adagrad": 1.0}
BLOCK_SIZE = 16
_FLOAT = 4


@dataclass(frozen=True)
class Link:
    """α and β of one rank's way to others: seconds a message, seconds a byte."""

    alpha_s: float
    beta_s: float

    def exchange_s(self, size: float, ranks: int) -> float:
        """Return the seconds of an all-to-all, a reduce-scatter or an all-gather of `size` bytes."""
        return (ranks - 1) * self.alpha_s + size * (ranks - 1) / ranks * self.beta_s

    def all_reduce_s(self, size: float, ranks: int) -> float:
        """Return the seconds of a ring, or of halving and doubling where there are as many ranks as it needs."""
        is_power_of_two = ranks & (ranks - 1) == 0
        messages = 2 * math.log2(ranks) if is_power_of_two else 2 * (ranks - 1)
        return messages * self.alpha_s + 2 * size * (ranks - 1) / ranks * self.beta_s


@dataclass(frozen=True)
class Cluster:
    """Nodes of `ranks_per_node` ranks; every rank has a link inside its node and a share of its node's network.

    Raises ValueError where the ranks do not fill their nodes.
    """

    ranks: int
    ranks_per_node: int
    inside: Link
    between: Link

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise ValueError(f"a cluster of {self.ranks} ranks: there must be at least one")
        if self.ranks > self.ranks_per_node and self.ranks % self.ranks_per_node:
            raise ValueError(f"{self.ranks} ranks do not fill nodes of {self.ranks_per_node}")

    @property
    def nodes(self) -> int:
        """Return the number of nodes, of which one may be partly used."""
        return -(-self.ranks // self.ranks_per_node)

    @property
    def local_ranks(self) -> int:
        """Return g, the ranks of one node."""
        return min(self.ranks, self.ranks_per_node)

    def all_to_all_s(self, size: float) -> float:
        """Return the seconds of the slower of two sides: messages inside and between nodes go on at the same time."""
        p, g = self.ranks, self.local_ranks
        inside = (g - 1) * self.inside.alpha_s + size * (g - 1) / p * self.inside.beta_s
        between = (p - g) * self.between.alpha_s + size * (p - g) / p * self.between.beta_s
        return max(inside, between)

    def reduce_scatter_s(self, size: float) -> float:
        """Return the seconds of one in the node, then of size/g between ranks of equal place; an all-gather's too."""
        g = self.local_ranks
        return self.inside.exchange_s(size, g) + self.between.exchange_s(size / g, self.nodes)

    def all_reduce_s(self, size: float) -> float:
        """Return the seconds of a reduce-scatter inside, an all-reduce of size/g between, an all-gather inside."""
        g = self.local_ranks
        return 2 * self.inside.exchange_s(size, g) + self.between.all_reduce_s(size / g, self.nodes)


@dataclass(frozen=True)
class StepCost:
    """One step in ms: compute_ms and comm_ms by part, where comm_ms is what nothing hides. sent_bytes: of one rank."""

    compute_ms: Mapping[str, float]
    comm_ms: Mapping[str, float] = field(default_factory=dict)
    sent_bytes: float = 0.0

    @property
    def computing_ms(self) -> float:
        """Return the sum of the computing parts."""
        return sum(self.compute_ms.values())

    @property
    def exposed_comm_ms(self) -> float:
        """Return the sum of the communication that nothing hides."""
        return sum(self.comm_ms.values())

    @property
    def step_ms(self) -> float:
        """Return the length of the step."""
        return self.computing_ms + self.exposed_comm_ms


def lookup_bytes(
    lookups: float, outputs: float, embedding_dim: int, state: float, *, reads: bool = True, writes: bool = True
) -> float:
    """Return what a forward and a backward pass move, every id different.

    lookups: rows read; outputs: numbers of pooled output, written and later read; state: numbers of optimizer state for
    every parameter. reads, writes: False where the rows are in the cache and need not move.
    """
    row = _FLOAT * embedding_dim
    return lookups * (2 * 8 + reads * row + writes * 2 * row * (1 + state)) + 2 * _FLOAT * outputs


def array_size(model: Model, compression: float) -> float:
    """Return |M|, in numbers. Raises ValueError for a compression below 1."""
    if compression < 1:
        raise ValueError(f"compression {compression:g}: must be at least 1")
    return model.table_parameters / compression


@dataclass(frozen=True)
class CostModel:
    """Time and memory of steps on machines of one kind, under stated assumptions."""

    machine: Machine
    assumed: Assumptions
    optimizer: Optimizer = "sgd"

    @property
    def state(self) -> float:
        """Return the numbers of optimizer state for every parameter of tables or M."""
        return _STATE[self.optimizer]

    @property
    def usable_bytes(self) -> float:
        """Return what weights and buffers may take of one GPU."""
        return 1e9 * self.machine.memory_gb * self.assumed.usable_memory

    def cluster(self, gpus: int, network_gbit: float | None = None) -> Cluster:
        """Return GPUs whose share of the network is network_gbit each. Raises ValueError where they fill no nodes."""
        inside = 1e9 * self.machine.inside_gb_per_s * self.assumed.link_efficiency
        between = 1e9 / 8 * (network_gbit or self.machine.network_gbit) * self.assumed.link_efficiency
        return Cluster(
            gpus,
            self.machine.gpus_per_node,
            Link(1e-6 * self.assumed.inside_latency_us, 1 / inside),
            Link(1e-6 * self.assumed.network_latency_us, 1 / between),
        )

    def sharded_step(self, model: Model, cluster: Cluster, placement: Placement, global_batch_size: int) -> StepCost:
        """Return the cost of a step with tables placed over the ranks of a cluster."""
        local = global_batch_size / cluster.ranks
        busiest = float(placement.columns_per_rank.max())
        lookups = global_batch_size * model.ids_per_bag * busiest / model.embedding_dim
        moved = lookup_bytes(lookups, global_batch_size * busiest, model.embedding_dim, self.state)
        dense = model.layer_parameters + placement.replicated_parameters
        ids = local * len(model.rows) * (8 * model.ids_per_bag + 8)
        pooled_s, pooled_bytes = _exchange_pooled(placement, cluster, global_batch_size)
        comm = {
            "ids": 1e3 * (1 - self.assumed.input_overlap) * cluster.all_to_all_s(ids),
            "embeddings": 1e3 * 2 * pooled_s,
            "gradients": self._gradients_ms(dense, cluster),
        }
        return StepCost(self._compute_ms(model, moved, local, dense), comm, ids + 2 * pooled_bytes + _FLOAT * dense)

    def robe_step(self, model: Model, cluster: Cluster, compression: float, global_batch_size: int) -> StepCost:
        """Return the cost of a data-parallel step; on a cluster of one rank nothing is sent and the update is fused."""
        memory_size, is_alone = array_size(model, compression), cluster.ranks == 1
        local, features = global_batch_size / cluster.ranks, len(model.rows)
        lookups = local * features * model.ids_per_bag
        # A gradient that is not updated in place is added up in an array of its own, as large as M, without state.
        fused_state, cache_bytes = self.state * is_alone, 1e6 * self.machine.cache_mb
        moved = lookup_bytes(
            lookups,
            local * features * model.embedding_dim,
            model.embedding_dim,
            fused_state,
            reads=_FLOAT * memory_size > cache_bytes,
            writes=_FLOAT * memory_size * (1 + fused_state) > cache_bytes,
        )
        compute = self._compute_ms(model, moved, local, model.layer_parameters)
        if is_alone:
            return StepCost(compute)
        touched = min(lookups * model.embedding_dim, memory_size)
        dense, sparse = _FLOAT * memory_size, touched * (_FLOAT + 8 / BLOCK_SIZE)
        ranks, accesses = cluster.ranks, 3 + 2 * self.state
        choices = [  # bytes put in, ms of the collective, ms of the update; a dense gradient is set to zero too
            (dense, 1e3 * cluster.all_reduce_s(dense), self._update_ms(memory_size, 1 + accesses)),
            (sparse, 1e3 * cluster.reduce_scatter_s(ranks * sparse), self._update_ms(ranks * touched, accesses)),
        ]
        sent, array_ms, update_ms = min(choices, key=lambda choice: choice[1] + choice[2])
        compute["update"] += update_ms
        comm = {"gradient of M": array_ms, "gradients": self._gradients_ms(model.layer_parameters, cluster)}
        return StepCost(compute, comm, sent + _FLOAT * model.layer_parameters)

    def robe_rank_bytes(self, model: Model, compression: float, local_batch_size: float, *, fused: bool) -> float:
        """Return what one rank holds: M with state, its gradient where the update is not fused, and working_bytes."""
        numbers = array_size(model, compression) * (1 + (not fused) + self.state)
        return _FLOAT * numbers + self.working_bytes(model, local_batch_size)

    def working_bytes(self, model: Model, local_batch_size: float) -> float:
        """Return what one rank holds beside tables or M.

        Layers with gradient and state, activations and their gradients, buffers of pooled embeddings both ways.
        """
        layers = _FLOAT * model.layer_parameters * (2 + self.state)
        pooled = 2 * len(model.rows) * model.embedding_dim
        return layers + _FLOAT * local_batch_size * (2 * model.activations + pooled)

    def devices_needed(self, model: Model) -> int:
        """Return the fewest GPUs whose usable memory holds the full tables with state, however they are cut."""
        stored = model.table_parameters * _FLOAT * (1 + self.state)
        return max(1, -(-int(stored) // int(self.usable_bytes)))

    def _compute_ms(self, model: Model, lookup: float, local: float, updated: float) -> dict[str, float]:
        """lookup: bytes that lookups move; updated: parameters that are updated apart from the lookups."""
        flops = 3 * model.forward_flops * local
        layers_bytes = self.assumed.activation_passes * _FLOAT * model.activations * local
        flops_ms = 1e-9 * flops / (self.machine.peak_tflops * self.assumed.flops_efficiency)
        return {
            "fixed": self.assumed.fixed_ms,
            "lookups": self._memory_ms(lookup),
            "layers": max(flops_ms, self._memory_ms(layers_bytes)),
            "update": self._update_ms(updated, 3),
        }

    def _memory_ms(self, moved: float) -> float:
        return 1e-6 * moved / (self.machine.memory_gb_per_s * self.assumed.memory_efficiency)

    def _update_ms(self, parameters: float, accesses: float) -> float:
        return self._memory_ms(accesses * _FLOAT * parameters)

    def _gradients_ms(self, parameters: float, cluster: Cluster) -> float:
        return 1e3 * (1 - self.assumed.gradient_overlap) * cluster.all_reduce_s(_FLOAT * parameters)


def _exchange_pooled(placement: Placement, cluster: Cluster, batch: float) -> tuple[float, float]:
    """Return (seconds, bytes that the busiest rank puts in) of one direction of pooled embeddings."""
    size = _FLOAT * batch
    seconds = sent = 0.0
    if placement.whole.any():
        whole = size * float(placement.whole.max())
        seconds += cluster.all_to_all_s(whole)
        sent += whole
    if placement.by_node.any():
        of_node = size * float(placement.by_node.max())
        seconds += cluster.reduce_scatter_s(of_node)
        sent += of_node + of_node / cluster.local_ranks
    if placement.by_row:
        seconds += cluster.reduce_scatter_s(size * placement.by_row)
        sent += size * placement.by_row
    return seconds, sent
