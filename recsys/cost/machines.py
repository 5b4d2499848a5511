"""Published machines and models, and what is assumed where nothing is published: data that `section.key=value` changes.

Every figure of a machine or a model has its source in `source`; what has none is in `Assumptions`, printed with every
projection. 1 GB is 10^9 bytes, Gbit/s are of one direction.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import Field, ValidationError

from configs.load import ConfigError
from configs.schema import Section
from recsys.cost.collective_cost import Cluster, Link
from recsys.data.criteo_tsv import CARDINALITIES, DENSE_NAMES

S = TypeVar("S", bound=Section)


class Machine(Section):
    """Nodes of GPUs: joined by `inside` within a node, by `network` between nodes."""

    name: str
    gpus_per_node: int = Field(default=8, ge=1)
    memory_gb: float = Field(gt=0)
    """Of one GPU."""
    memory_gb_per_s: float = Field(gt=0)
    """Peak bandwidth of one GPU's memory."""
    cache_mb: float = Field(ge=0)
    """L2: an array M that fits it is read from there."""
    peak_tflops: float = Field(gt=0)
    """Of matrix products at the precision of the layers: TF32 on A100 and H100, dense."""
    inside_gb_per_s: float = Field(gt=0)
    """One GPU to those of its node, one direction."""
    network_gbit: float = Field(gt=0)
    """One GPU's share of its node's network, one direction."""
    node_power_w: float = Field(gt=0)
    """A whole node at most, GPUs included."""
    source: str


class Assumptions(Section):
    """What no data sheet says. None of it has been measured on these machines by us."""

    memory_efficiency: float = Field(default=0.7, gt=0, le=1)
    """Share of the memory's peak bandwidth that lookups and updates reach."""
    flops_efficiency: float = Field(default=0.5, gt=0, le=1)
    """Share of the peak that the layers reach."""
    link_efficiency: float = Field(default=0.7, gt=0, le=1)
    """Share of a link's peak that collectives reach."""
    activation_passes: float = Field(default=6, ge=0)
    """Times that every activation of the layers goes to memory and back in a step."""
    fixed_ms: float = Field(default=6.9, ge=0)
    """Of every step, whatever its size: launching kernels, mostly. The same for all setups, since nothing is published
    for ROBE; what TorchRec's published step on 8 A100 at batch 2,048 leaves over (`recsys.cost.published_steps`)."""
    gradient_overlap: float = Field(default=0.0, ge=0, le=1)
    """Share of the gradients' all-reduce that the backward pass hides: none, since they are one bucket of DDP."""
    input_overlap: float = Field(default=1.0, ge=0, le=1)
    """Share of sending ids to the tables that TorchRec's pipeline hides behind the step before."""
    inside_latency_us: float = Field(default=1.9, ge=0)
    """α within a node: NCCL's own table of ring latencies (tuning.cc, LL128 over NVLink)."""
    network_latency_us: float = Field(default=4.0, ge=0)
    """α between nodes: the same table, LL128 over the network."""
    usable_memory: float = Field(default=0.85, gt=0, le=1)
    """Share of a GPU's memory that weights and buffers may take: TorchRec's planner reserves 15 %."""
    power_share: float = Field(default=1.0, gt=0, le=1)
    """Share of the node's most power that is drawn, so an upper bound; a lone GPU counts its share of a node."""
    a100_price: float = Field(default=4.10, ge=0)
    """US dollars a GPU-hour: AWS p4d.24xlarge, $32.77 for 8 on demand, 2024."""
    h100_price: float = Field(default=12.29, ge=0)
    """US dollars a GPU-hour: AWS p5.48xlarge, $98.32 for 8 on demand, 2024."""


class Model(Section):
    """A DLRM. rows: of every table."""

    name: str
    rows: tuple[int, ...] = Field(min_length=1)
    embedding_dim: int = Field(default=128, ge=4)
    ids_per_bag: float = Field(default=1, gt=0)
    num_dense: int = Field(default=len(DENSE_NAMES), ge=1)
    bottom_mlp: tuple[int, ...] = (512, 256)
    top_mlp: tuple[int, ...] = (1024, 1024, 512, 256)
    samples_per_epoch: float = Field(default=4_195_197_692, gt=0)
    """Criteo 1TB click logs, 23 days, as MLPerf trains on them."""
    epochs_to_target: tuple[tuple[float, float], ...] = ()
    """(compression, published epochs to the target AUC), compression 1 = full tables; what is not published is not
    here."""
    source: str

    @property
    def table_parameters(self) -> int:
        return sum(self.rows) * self.embedding_dim

    @property
    def layer_sizes(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of every linear layer."""
        vectors = len(self.rows) + 1
        interactions = self.embedding_dim + vectors * (vectors - 1) // 2
        bottom = [self.num_dense, *self.bottom_mlp, self.embedding_dim]
        top = [interactions, *self.top_mlp, 1]
        return [*itertools.pairwise(bottom), *itertools.pairwise(top)]

    @property
    def layer_parameters(self) -> int:
        return sum(inputs * outputs + outputs for inputs, outputs in self.layer_sizes)

    @property
    def forward_flops(self) -> float:
        """Of one sample in layers and interaction."""
        vectors = len(self.rows) + 1
        return 2 * sum(i * o for i, o in self.layer_sizes) + 2 * vectors**2 * self.embedding_dim

    @property
    def activations(self) -> int:
        """Numbers of one sample that layers and interaction pass on."""
        return sum(outputs for _, outputs in self.layer_sizes) + (len(self.rows) + 1) * self.embedding_dim

    def epochs(self, compression: float) -> float | None:
        """Published epochs to the target; None: not published."""
        return dict(self.epochs_to_target).get(compression)


MACHINES = {
    "a100": Machine(
        name="A100 80 GB",
        memory_gb=80, memory_gb_per_s=2039, cache_mb=40, peak_tflops=156, inside_gb_per_s=300, network_gbit=200,
        node_power_w=6500,
        source="NVIDIA A100 data sheet (SXM, TF32, NVLink 600 GB/s both ways); DGX A100: 8 × 200 Gbit/s, 6.5 kW",
    ),
    "h100": Machine(
        name="H100 80 GB",
        memory_gb=80, memory_gb_per_s=3350, cache_mb=50, peak_tflops=494, inside_gb_per_s=450, network_gbit=400,
        node_power_w=10_200,
        source="NVIDIA H100 data sheet (SXM, TF32 without sparsity, NVLink 900 GB/s both ways); DGX H100: 8 × 400 "
        "Gbit/s, 10.2 kW",
    ),
}  # fmt: skip

P4D = Machine(
    name="A100 40 GB, AWS p4d",
    memory_gb=40, memory_gb_per_s=1555, cache_mb=40, peak_tflops=156, inside_gb_per_s=300, network_gbit=50,
    node_power_w=6500,
    source="NVIDIA A100 data sheet (40 GB SXM); AWS p4d.24xlarge: 400 Gbit/s a node of 8",
)  # fmt: skip
"""What TorchRec's published steps ran on."""

_CAPPED = tuple(min(rows, 40_000_000) for rows in CARDINALITIES["criteo_tb"])
_SCALED = "Criteo-TB's DLRM with {times} times the rows in every table, layers and ids unchanged: {what}"

MODELS = {
    "criteo_tb": Model(
        name="Criteo-TB, 97 GiB",
        rows=_CAPPED,
        epochs_to_target=((1, 1.00), (100, 1.94), (1000, 1.90), (10_000, 4.55)),
        source="MLPerf DLRM: 26 tables capped at 40 M rows, d = 128; epochs to AUC 0.8025 at batch 2,048 with SGD: "
        "PSS paper, Table 4",
    ),
    "1tb": Model(
        name="scaled to 1 TB",
        rows=tuple(10 * rows for rows in _CAPPED),
        source=_SCALED.format(times=10, what="1.05 TB; no quality is published"),
    ),
    "50tb": Model(
        name="scaled to 50 TB",
        rows=tuple(478 * rows for rows in _CAPPED),
        source=_SCALED.format(
            times=478, what="50 TB, the size that the PSS paper quotes of Mudigere et al. 2021; no quality is published"
        ),
    ),
}


def build_cluster(machine: Machine, assumed: Assumptions, gpus: int, network_gbit: float) -> Cluster:
    """network_gbit: of one GPU. Raises ValueError where the GPUs do not fill their nodes."""
    inside = 1e9 * machine.inside_gb_per_s * assumed.link_efficiency
    between = 1e9 / 8 * network_gbit * assumed.link_efficiency
    return Cluster(
        gpus,
        machine.gpus_per_node,
        Link(1e-6 * assumed.inside_latency_us, 1 / inside),
        Link(1e-6 * assumed.network_latency_us, 1 / between),
    )


def find(kind: str, known: Mapping[str, Any], name: str) -> Any:
    """Raises ConfigError naming what is known."""
    if name not in known:
        raise ConfigError(f"{kind} {name}: unknown; known: {', '.join(known)}")
    return known[name]


def override(section: S, prefix: str, overrides: Sequence[str]) -> S:
    """The section with every `prefix.key=value` among the overrides. Raises ConfigError naming key and value."""
    fields = type(section).model_fields
    values = section.model_dump()
    for text in overrides:
        where, _, value = text.partition("=")
        key = where.strip().removeprefix(f"{prefix}.")
        if not where.strip().startswith(f"{prefix}."):
            continue
        if key not in fields:
            raise ConfigError(f"{text}: unknown key; known: {', '.join(f'{prefix}.{name}' for name in fields)}")
        values[key] = _parse(text, value, values[key])
    try:
        return type(section).model_validate(values)
    except ValidationError as error:
        found = error.errors()[0]
        key = ".".join(str(part) for part in found["loc"])
        raise ConfigError(f"{prefix}.{key}={found['input']}: {found['msg']}") from None


def _parse(text: str, value: str, current: Any) -> Any:
    if isinstance(current, str):
        return value
    if isinstance(current, tuple):
        raise ConfigError(f"{text}: only numbers and text can be set here")
    try:
        number = float(value)
    except ValueError:
        raise ConfigError(f"{text}: {value!r} is not a number") from None
    if not math.isfinite(number):
        raise ConfigError(f"{text}: must be finite")
    if isinstance(current, int):
        if number != int(number):
            raise ConfigError(f"{text}: must be a whole number")
        return int(number)
    return number
