"""Steps, totals and crossovers on machines that are not here: the cost model over GPUs, networks, models and batches.

Every figure of this file is projected: no step of it has been run.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from recsys.cost.collective_cost import Cluster
from recsys.cost.cost_model import (
    STATE,
    Optimizer,
    StepCost,
    array_size,
    devices_needed,
    robe_rank_bytes,
    robe_step,
    sharded_step,
    working_bytes,
)
from recsys.cost.machines import Assumptions, Machine, Model, build_cluster
from recsys.cost.table_placement import DoesNotFit, Placement, place_tables
from recsys.report.numbers import format_bytes

StepOfBatch = Callable[[float], float | None]
"""Global batch size -> ms of a step, None where it does not fit."""
FULL = 1.0
_LEAST_BATCH, _MOST_BATCH, _GRID = 256, 1 << 22, 4
"""Batch sizes among which a crossover is looked for, and points for each doubling."""


@dataclass(frozen=True)
class Scenario:
    """What to project. networks: Gbit/s of one GPU; price: US dollars a GPU-hour."""

    machine: Machine
    assumed: Assumptions
    price: float
    models: Sequence[Model]
    gpus: Sequence[int]
    networks: Sequence[float]
    compressions: Sequence[float]
    batch_sizes: Sequence[int]
    optimizer: Optimizer = "sgd"

    @property
    def usable_bytes(self) -> float:
        return 1e9 * self.machine.memory_gb * self.assumed.usable_memory


@dataclass(frozen=True)
class Totals:
    """To the published target."""

    epochs: float
    hours: float
    gpu_hours: float
    kwh: float
    dollars: float


@dataclass(frozen=True)
class Point:
    """One setup on so many GPUs. compression 1: sharded tables; network_gbit None: within one node, or one GPU.

    cost None: it cannot be, refusal says why. stored_bytes: of the fullest GPU. devices: the fewest that hold it, None:
    no number does.
    """

    model: Model
    compression: float
    gpus: int
    network_gbit: float | None
    global_batch_size: int
    devices: int | None
    cost: StepCost | None = None
    refusal: str = ""
    stored_bytes: float = 0.0
    placement: str = ""
    imbalance: float = 1.0
    totals: Totals | None = None

    @property
    def setup(self) -> str:
        return name_setup(self.compression, self.gpus)

    @property
    def samples_per_s(self) -> float | None:
        return 1e3 * self.global_batch_size / self.cost.step_ms if self.cost else None


@dataclass(frozen=True)
class Crossover:
    """Who makes the faster step as the global batch grows from `lowest` to `highest`, as far as both fit.

    changes: (batch size, whether sharded tables are the faster above it), rising; before the first it is as
    `sharded_first` says.
    """

    model: Model
    setup: str
    gpus: int
    network_gbit: float | None
    sharded_first: bool
    changes: Sequence[tuple[float, bool]]
    lowest: float
    highest: float


@dataclass(frozen=True)
class Projector:
    """The points and crossovers of a scenario."""

    scenario: Scenario

    def cluster(self, gpus: int, network_gbit: float | None) -> Cluster:
        asked = self.scenario
        return build_cluster(asked.machine, asked.assumed, gpus, network_gbit or asked.machine.network_gbit)

    def placement(self, model: Model, gpus: int, global_batch_size: int) -> Placement:
        """Raises DoesNotFit."""
        asked, local = self.scenario, global_batch_size / gpus
        free = asked.usable_bytes - working_bytes(model, local, asked.optimizer)
        if free <= 0:
            raise DoesNotFit(f"activations of {local:,.0f} rows alone fill a GPU: use more GPUs", gpus + 1)
        return place_tables(
            model,
            gpus,
            asked.machine.gpus_per_node,
            rank_bytes=free,
            local_batch_size=max(1, int(local)),
            state=STATE[asked.optimizer],
        )

    def sharded(self, model: Model, gpus: int, network_gbit: float | None, batch_size: int) -> Point:
        asked = self.scenario
        least = devices_needed(model, asked.machine, asked.assumed, asked.optimizer)
        try:
            placement = self.placement(model, gpus, batch_size)
        except DoesNotFit as refusal:
            return Point(model, FULL, gpus, network_gbit, batch_size, max(least, refusal.devices), refusal=str(refusal))
        cost = sharded_step(
            model,
            asked.machine,
            asked.assumed,
            self.cluster(gpus, network_gbit),
            placement,
            batch_size,
            asked.optimizer,
        )
        return Point(
            model, FULL, gpus, network_gbit, batch_size, least, cost,
            stored_bytes=float(placement.bytes_per_rank.max()), placement=placement.source,
            imbalance=placement.imbalance, totals=self.totals(model, FULL, gpus, batch_size, cost),
        )  # fmt: skip

    def robe(self, model: Model, compression: float, gpus: int, network_gbit: float | None, batch_size: int) -> Point:
        asked = self.scenario
        stored = robe_rank_bytes(model, compression, batch_size / gpus, asked.optimizer, fused=gpus == 1)
        if stored > asked.usable_bytes:
            size = format_bytes(4 * array_size(model, compression))
            refusal = f"M of {size}, what its training needs and {batch_size // gpus:,} rows do not fit a GPU"
            return Point(model, compression, gpus, network_gbit, batch_size, None, refusal=refusal)
        cluster = self.cluster(gpus, network_gbit)
        cost = robe_step(model, asked.machine, asked.assumed, cluster, compression, batch_size, asked.optimizer)
        totals = self.totals(model, compression, gpus, batch_size, cost)
        return Point(model, compression, gpus, network_gbit, batch_size, 1, cost, "", stored, "", 1.0, totals)

    def totals(self, model: Model, compression: float, gpus: int, batch_size: int, cost: StepCost) -> Totals | None:
        """None where no epochs to a target are published."""
        asked, epochs = self.scenario, model.epochs(compression)
        if epochs is None:
            return None
        hours = epochs * model.samples_per_epoch / batch_size * cost.step_ms / 3.6e6
        node_kw = 1e-3 * asked.machine.node_power_w * asked.assumed.power_share
        gpu_hours = gpus * hours
        return Totals(
            epochs, hours, gpu_hours, gpu_hours * node_kw / asked.machine.gpus_per_node, gpu_hours * asked.price
        )

    def places(self) -> list[tuple[int, float | None]]:
        """(GPUs, Gbit/s) of the scenario; a single node has no network."""
        asked, node = self.scenario, self.scenario.machine.gpus_per_node
        return [
            (gpus, network)
            for gpus in asked.gpus
            for network in (asked.networks if gpus > node else [None])
            if gpus > 1
        ]  # fmt: skip

    def points(self) -> list[Point]:
        """Every setup of the scenario, by model, batch size, GPUs and network."""
        found = []
        asked = self.scenario
        for model in asked.models:
            for batch_size in asked.batch_sizes:
                found += [self.robe(model, c, 1, None, batch_size) for c in asked.compressions]
                for gpus, network in self.places():
                    if batch_size < gpus:
                        continue
                    found.append(self.sharded(model, gpus, network, batch_size))
                    found += [self.robe(model, c, gpus, network, batch_size) for c in asked.compressions]
        return found

    def step_over_batch(
        self, model: Model, compression: float, gpus: int, network: float | None, owner: int
    ) -> StepOfBatch:
        """owner: GPUs of the setup, 1 = one GPU.

        The placement is that of the scenario's first batch size: planning anew for every one would take minutes.
        """
        asked = self.scenario
        cluster = self.cluster(owner, network)
        if compression != FULL:

            def step(batch_size: float) -> float | None:
                local = batch_size / owner
                stored = robe_rank_bytes(model, compression, local, asked.optimizer, fused=owner == 1)
                if stored > asked.usable_bytes:
                    return None
                return robe_step(
                    model, asked.machine, asked.assumed, cluster, compression, int(batch_size), asked.optimizer
                ).step_ms

            return step
        try:
            placement = self.placement(model, gpus, asked.batch_sizes[0])
        except DoesNotFit:
            return lambda _: None
        return lambda batch_size: (
            sharded_step(
                model, asked.machine, asked.assumed, cluster, placement, int(batch_size), asked.optimizer
            ).step_ms
        )

    def crossovers(self) -> list[Crossover]:
        """Of every ROBE setup against sharded tables on the same GPUs, and of one GPU against all of them."""
        found = []
        for model, (gpus, network) in itertools.product(self.scenario.models, self.places()):
            sharded = self.step_over_batch(model, FULL, gpus, network, gpus)
            for compression, owner in itertools.product(self.scenario.compressions, (1, gpus)):
                robe = self.step_over_batch(model, compression, gpus, network, owner)
                ratios = [(size, ratio) for size in batch_grid() if (ratio := _ratio(sharded, robe, size)) is not None]
                if ratios:
                    changes = [
                        (_bisect(sharded, robe, low, high), after < 1)
                        for (low, before), (high, after) in itertools.pairwise(ratios)
                        if (before < 1) != (after < 1)
                    ]
                    setup = name_setup(compression, owner)
                    first, last = ratios[0], ratios[-1]
                    found.append(Crossover(model, setup, gpus, network, first[1] < 1, changes, first[0], last[0]))
        return found


def name_setup(compression: float, gpus: int) -> str:
    if compression == FULL:
        return "sharded"
    return f"ROBE {compression:,.0f}×, {'one GPU' if gpus == 1 else 'data-parallel'}"


def batch_grid() -> list[float]:
    doublings = (_MOST_BATCH // _LEAST_BATCH).bit_length() - 1
    return [_LEAST_BATCH * 2 ** (i / _GRID) for i in range(doublings * _GRID + 1)]


def _ratio(sharded: StepOfBatch, robe: StepOfBatch, batch_size: float) -> float | None:
    """Sharded over ROBE; None where one does not fit."""
    full, array = sharded(batch_size), robe(batch_size)
    return None if full is None or array is None else full / array


def _bisect(sharded: StepOfBatch, robe: StepOfBatch, low: float, high: float) -> float:
    """The batch size between low and high at which both take as long; the ratio passes 1 between them."""
    before = (_ratio(sharded, robe, low) or 1) < 1
    for _ in range(30):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if ((_ratio(sharded, robe, middle) or 1) < 1) == before else (low, middle)
    return high
