"""Machines and models as published (`machines.toml`), and what is assumed where nothing is published.

Every figure of a machine or a model has its source beside it; what has none is in `Assumptions`, printed with every
projection. 1 GB is 10^9 bytes, Gbit/s are of one direction. `section.key=value` changes any of them.
"""

import itertools
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, field_validator

from configs.load import ConfigError
from configs.schema import Section
from recsys.data.criteo_tsv import CARDINALITIES, DENSE_NAMES

S = TypeVar("S", bound=Section)
T = TypeVar("T")


class Published(Section, allow_inf_nan=False):
    """Finite figures, each with a meaning."""


class Machine(Published):
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


class Assumptions(Published):
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


class Model(Published):
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

    @field_validator("rows", mode="before")
    @classmethod
    def _of_criteo(cls, rows: Any) -> Any:
        """Take {most, times} for Criteo-TB's tables, capped and then multiplied."""
        if not isinstance(rows, Mapping):
            return tuple(rows) if isinstance(rows, list) else rows
        capped = (min(count, rows.get("most", count)) for count in CARDINALITIES["criteo_tb"])
        return tuple(rows.get("times", 1) * count for count in capped)

    @property
    def table_parameters(self) -> int:
        """Return the numbers of all full tables."""
        return sum(self.rows) * self.embedding_dim

    @property
    def layer_sizes(self) -> list[tuple[int, int]]:
        """Return (inputs, outputs) of every linear layer."""
        vectors = len(self.rows) + 1
        interactions = self.embedding_dim + vectors * (vectors - 1) // 2
        bottom = [self.num_dense, *self.bottom_mlp, self.embedding_dim]
        top = [interactions, *self.top_mlp, 1]
        return [*itertools.pairwise(bottom), *itertools.pairwise(top)]

    @property
    def layer_parameters(self) -> int:
        """Return the weights and biases of all layers."""
        return sum(inputs * outputs + outputs for inputs, outputs in self.layer_sizes)

    @property
    def forward_flops(self) -> float:
        """Return the operations of one sample in layers and interaction."""
        vectors = len(self.rows) + 1
        return 2 * sum(i * o for i, o in self.layer_sizes) + 2 * vectors**2 * self.embedding_dim

    @property
    def activations(self) -> int:
        """Return how many numbers layers and interaction pass on for one sample."""
        return sum(outputs for _, outputs in self.layer_sizes) + (len(self.rows) + 1) * self.embedding_dim

    def epochs(self, compression: float) -> float | None:
        """Return the published epochs to the target, None where none are published."""
        return dict(self.epochs_to_target).get(compression)


class _Catalogue(Section):
    machines: dict[str, Machine]
    models: dict[str, Model]


def read_data(kind: type[S], name: str) -> S:
    """Return a data file of this folder as a checked model."""
    # Through JSON: strict there still takes an array for a tuple, which TOML cannot write otherwise.
    return kind.model_validate_json(json.dumps(tomllib.loads(Path(__file__).with_name(name).read_text())))


_CATALOGUE = read_data(_Catalogue, "machines.toml")
MACHINES, MODELS = _CATALOGUE.machines, _CATALOGUE.models


def choose(option: str, known: Mapping[str, T], name: str) -> T:
    """Return what is known by that name. Raises ConfigError that lists all names."""
    if name not in known:
        raise ConfigError(f"{option} {name}: unknown; known: {', '.join(known)}")
    return known[name]
