"""Steps, totals and crossovers on machines that are not here: the cost model over GPUs, networks, models and batches.

Every figure of this file is projected: no step of it has been run.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

from configs.load import ConfigError, override_section
from recsys.cost.cost_model import Cluster, CostModel, Optimizer, StepCost, array_size
from recsys.cost.crossover import find_crossings
from recsys.cost.fit import FOLDS, Constant, CostFit, MeasuredStep, Prediction, predict_held_out, read_steps
from recsys.cost.machines import MACHINES, MODELS, Assumptions, Model, choose
from recsys.cost.published_steps import Check, check_published
from recsys.cost.table_placement import DoesNotFit, Placement, place_tables
from recsys.report.numbers import format_bytes

FULL = 1.0
_LEAST_BATCH, _DOUBLINGS, _GRID = 256, 14, 4
"""Batch sizes among which a crossover is looked for, and points for each doubling."""
_SECTIONS = ("machine", "assumed", "model")


@dataclass(frozen=True)
class Totals:
    """What it takes to reach the published target."""

    epochs: float
    hours: float
    gpu_hours: float
    kwh: float
    dollars: float


@dataclass(frozen=True)
class Place:
    """So many GPUs; network_gbit of each, None within one node."""

    gpus: int
    network_gbit: float | None = None

    def __str__(self) -> str:
        if self.gpus == 1:
            return "1 GPU"
        return f"{self.gpus:,} GPUs" + (f", {self.network_gbit:g} Gbit/s" if self.network_gbit else "")


ONE_GPU = Place(1)


@dataclass(frozen=True)
class Point:
    """One setup at one place and batch size. compression 1: sharded tables.

    cost None: it cannot be, refusal says why. stored_bytes: of the fullest GPU. devices: the fewest that hold it, None:
    no number does.
    """

    model: Model
    compression: float
    place: Place
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
        """Return the name of the setup."""
        return name_setup(self.compression, self.place.gpus)

    @property
    def step_ms(self) -> float | None:
        """Return the projected step, None where it cannot be."""
        return self.cost.step_ms if self.cost else None

    @property
    def samples_per_s(self) -> float | None:
        """Return the projected throughput, None where it cannot be."""
        return 1e3 * self.global_batch_size / self.cost.step_ms if self.cost else None


@dataclass(frozen=True)
class Crossover:
    """Who makes the faster step as the global batch grows from `lowest` to `highest`, as far as both fit.

    place: of the sharded tables. changes: (batch size, whether sharded tables are the faster above it), rising; before
    the first it is as `sharded_first` says.
    """

    model: Model
    setup: str
    place: Place
    sharded_first: bool
    changes: Sequence[tuple[float, bool]]
    lowest: float
    highest: float


@dataclass(frozen=True)
class Scenario:
    """What to project. networks: Gbit/s of one GPU; price: US dollars a GPU-hour."""

    cost_model: CostModel
    price: float
    models: Sequence[Model]
    gpus: Sequence[int]
    networks: Sequence[float]
    compressions: Sequence[float]
    batch_sizes: Sequence[int]

    def places(self) -> list[Place]:
        """Return the places of several GPUs; a single node has no network."""
        node = self.cost_model.machine.gpus_per_node
        return [Place(gpus, n) for gpus in self.gpus for n in (self.networks if gpus > node else [None])]

    def points(self) -> list[Point]:
        """Return every setup, by model, batch size, GPUs and network."""
        points = []
        for model, batch_size in itertools.product(self.models, self.batch_sizes):
            points += [self.project_robe(model, c, ONE_GPU, batch_size) for c in self.compressions]
            for place in self.places():
                if batch_size >= place.gpus:
                    points.append(self.project_sharded(model, place, batch_size))
                    points += [self.project_robe(model, c, place, batch_size) for c in self.compressions]
        return points

    def project_sharded(self, model: Model, place: Place, batch_size: int) -> Point:
        """Return the point of sharded tables."""
        least = self.cost_model.devices_needed(model)
        try:
            placement = self._place_tables(model, place.gpus, batch_size)
        except DoesNotFit as refusal:
            return Point(model, FULL, place, batch_size, max(least, refusal.devices), refusal=str(refusal))
        cost = self.cost_model.sharded_step(model, self._cluster(place), placement, batch_size)
        working = self.cost_model.working_bytes(model, batch_size / place.gpus)
        return Point(
            model, FULL, place, batch_size, least, cost,
            stored_bytes=float(placement.bytes_per_rank.max()) + working, placement=placement.source,
            imbalance=placement.imbalance, totals=self._totals(model, FULL, place.gpus, batch_size, cost),
        )  # fmt: skip

    def project_robe(self, model: Model, compression: float, place: Place, batch_size: int) -> Point:
        """Return the point of ROBE, data-parallel or on one GPU."""
        stored = self._robe_bytes(model, compression, place.gpus, batch_size)
        if stored > self.cost_model.usable_bytes:
            size = format_bytes(4 * array_size(model, compression))
            rows = batch_size // place.gpus
            refusal = f"M of {size}, what its training needs and {rows:,} rows do not fit a GPU"
            return Point(model, compression, place, batch_size, None, refusal=refusal)
        cost = self.cost_model.robe_step(model, self._cluster(place), compression, batch_size)
        totals = self._totals(model, compression, place.gpus, batch_size, cost)
        return Point(model, compression, place, batch_size, 1, cost, stored_bytes=stored, totals=totals)

    def steps_over_batch(self, model: Model, compression: float, place: Place) -> dict[int, float]:
        """Return by batch size the ms of a step, wherever every GPU has a row and it fits.

        The placement is that of the scenario's first batch size: planning anew for every one would take minutes.
        """
        cluster, cost_model = self._cluster(place), self.cost_model
        sizes = [size for size in batch_grid() if size >= place.gpus]
        if compression != FULL:
            return {
                size: cost_model.robe_step(model, cluster, compression, size).step_ms
                for size in sizes
                if self._robe_bytes(model, compression, place.gpus, size) <= cost_model.usable_bytes
            }
        try:
            placement = self._place_tables(model, place.gpus, self.batch_sizes[0])
        except DoesNotFit:
            return {}
        return {size: cost_model.sharded_step(model, cluster, placement, size).step_ms for size in sizes}

    def crossovers(self) -> list[Crossover]:
        """Return those of every ROBE setup against sharded tables on the same GPUs, and of one GPU against them."""
        crossovers = []
        for model, place in itertools.product(self.models, self.places()):
            sharded = self.steps_over_batch(model, FULL, place)
            for compression, owner in itertools.product(self.compressions, (ONE_GPU, place)):
                robe = self.steps_over_batch(model, compression, owner)
                ratios = {size: ms / robe[size] for size, ms in sharded.items() if size in robe}
                if ratios:
                    changes = [(crossing.batch_size, crossing.is_below_after) for crossing in find_crossings(ratios)]
                    lowest, highest = min(ratios), max(ratios)
                    setup, is_first = name_setup(compression, owner.gpus), ratios[lowest] < 1
                    crossovers.append(Crossover(model, setup, place, is_first, changes, lowest, highest))
        return crossovers

    def _cluster(self, place: Place) -> Cluster:
        return self.cost_model.cluster(place.gpus, place.network_gbit)

    def _place_tables(self, model: Model, gpus: int, global_batch_size: int) -> Placement:
        """Raises DoesNotFit."""
        local = global_batch_size / gpus
        free = self.cost_model.usable_bytes - self.cost_model.working_bytes(model, local)
        if free <= 0:
            raise DoesNotFit(f"activations of {local:,.0f} rows alone fill a GPU: use more GPUs", gpus + 1)
        return place_tables(
            model,
            gpus,
            self.cost_model.machine.gpus_per_node,
            rank_bytes=free,
            local_batch_size=max(1, int(local)),
            state=self.cost_model.state,
        )

    def _robe_bytes(self, model: Model, compression: float, gpus: int, batch_size: int) -> float:
        return self.cost_model.robe_rank_bytes(model, compression, batch_size / gpus, fused=gpus == 1)

    def _totals(self, model: Model, compression: float, gpus: int, batch_size: int, cost: StepCost) -> Totals | None:
        """None where no epochs to a target are published."""
        epochs, machine = model.epochs(compression), self.cost_model.machine
        if epochs is None:
            return None
        hours = epochs * model.samples_per_epoch / batch_size * cost.step_ms / 3.6e6
        gpu_kw = 1e-3 * machine.node_power_w * self.cost_model.assumed.power_share / machine.gpus_per_node
        return Totals(epochs, hours, gpus * hours, gpus * hours * gpu_kw, gpus * hours * self.price)


def name_setup(compression: float, gpus: int) -> str:
    """Return 'sharded' or 'ROBE 1,000×, one GPU'."""
    if compression == FULL:
        return "sharded"
    return f"ROBE {compression:,.0f}×, {'one GPU' if gpus == 1 else 'data-parallel'}"


def batch_grid() -> list[int]:
    """Return the batch sizes among which a crossover is looked for, rising."""
    return [int(_LEAST_BATCH * 2 ** (i / _GRID)) for i in range(_DOUBLINGS * _GRID + 1)]


def build_scenario(
    *,
    machine: str,
    models: Sequence[str] | None,
    gpus: Sequence[int],
    networks_gbit: Sequence[float],
    compressions: Sequence[float],
    batch_sizes: Sequence[int],
    optimizer: str,
    overrides: Sequence[str],
) -> Scenario:
    """Return what is projected: named machine and models with `section.key=value` laid over them, figures rising.

    models: None = all. Raises ConfigError naming option or key, and value.
    """
    for text in overrides:
        if text.partition(".")[0] not in _SECTIONS:
            raise ConfigError(f"{text}: neither a crossover.json nor a key of {', '.join(_SECTIONS)}")
    published = override_section(choose("--machine", MACHINES, machine), "machine", overrides)
    assumed = override_section(Assumptions(), "assumed", overrides)
    if optimizer not in get_args(Optimizer):
        raise ConfigError(f"--optimizer {optimizer}: unknown; known: {', '.join(get_args(Optimizer))}")
    for count in gpus:
        if count > published.gpus_per_node and count % published.gpus_per_node:
            raise ConfigError(f"--gpus {count}: does not fill nodes of {published.gpus_per_node} GPUs")
        if count > min(batch_sizes):
            raise ConfigError(f"--batch {min(batch_sizes)}: fewer rows than the {count} GPUs of --gpus")
    return Scenario(
        CostModel(published, assumed, cast(Optimizer, optimizer)),
        price=getattr(assumed, f"{machine}_price"),
        models=[override_section(choose("--model", MODELS, name), "model", overrides) for name in models or MODELS],
        gpus=sorted(gpus),
        networks=sorted(networks_gbit),
        compressions=sorted(compressions),
        batch_sizes=sorted(batch_sizes),
    )


@dataclass(frozen=True)
class Validation:
    """The cost model on measured steps: fitted to all, and what it predicts of those left out."""

    steps: Sequence[MeasuredStep]
    constants: Sequence[Constant]
    predictions: Sequence[Prediction]

    def of_fold(self, fold: str) -> list[Prediction]:
        """Return the predictions of one way of leaving out."""
        return [prediction for prediction in self.predictions if prediction.fold == fold]


def validate(path: Path) -> Validation:
    """Return how the model does on a crossover.json. Raises ValueError where that is none, or holds too little."""
    steps = read_steps(path)
    predictions = [prediction for fold in FOLDS for prediction in predict_held_out(steps, fold)]
    return Validation(steps, CostFit(steps).constants(), predictions)


@dataclass(frozen=True)
class Projection:
    """All that is projected of a scenario. validation None: no measurements were given."""

    scenario: Scenario
    points: Sequence[Point]
    crossovers: Sequence[Crossover]
    checks: Sequence[Check]
    validation: Validation | None

    @classmethod
    def of(cls, scenario: Scenario, validation: Validation | None = None) -> "Projection":
        """Compute the projection of a scenario; TorchRec's planner takes seconds to minutes."""
        checks = check_published(scenario.cost_model.assumed)
        return cls(scenario, scenario.points(), scenario.crossovers(), checks, validation)

    @property
    def models(self) -> list[Model]:
        """Return the models that have points."""
        return list(dict.fromkeys(point.model for point in self.points))

    def sharded_beside(self, point: Point) -> Point | None:
        """Return sharded tables at the same place and batch size."""
        key = (FULL, point.model, point.place, point.global_batch_size)
        return next((p for p in self.points if (p.compression, p.model, p.place, p.global_batch_size) == key), None)
