"""How far off is a projection? Steps that others published (`published_steps.toml`), beside the cost model's."""

from dataclasses import dataclass
from typing import Any

from pydantic import Field

from configs.schema import Section
from recsys.cost.cost_model import CostModel
from recsys.cost.machines import MODELS, Assumptions, Machine, Model, read_data
from recsys.cost.table_placement import place_tables


class PublishedStep(Section):
    """A step of TorchRec's DLRM example. tables: a name in [tables]."""

    label: str
    tables: str
    gpus: int = Field(ge=1)
    local_batch_size: int = Field(ge=1)
    records_per_s: float = Field(gt=0)
    is_calibration: bool = False
    """The assumptions were set so that this step comes out."""

    @property
    def step_ms(self) -> float:
        """Return the length of a step at that throughput."""
        return 1e3 * self.gpus * self.local_batch_size / self.records_per_s


class PssSteps(Section):
    """Steps of the PSS paper. seconds: (compression, seconds per 1,000 iterations), compression 1 = full tables."""

    global_batch_size: int
    seconds: tuple[tuple[float, float], ...]


class Published(Section):
    """All steps, and what TorchRec's ran on."""

    machine: Machine
    tables: dict[str, Any]
    torchrec: tuple[PublishedStep, ...]
    pss: PssSteps

    def model(self, tables: str) -> Model:
        """Return a DLRM with the tables of that name."""
        return Model(name="published", rows=self.tables[tables], source="")


PUBLISHED = read_data(Published, "published_steps.toml")


@dataclass(frozen=True)
class Check:
    """A published figure beside the projected one. unit: "ms", or "× full" for a ratio to full tables.

    is_calibration: the assumptions were set so that this comes out.
    """

    source: str
    label: str
    published: float
    projected: float
    unit: str
    is_calibration: bool = False

    @property
    def ratio(self) -> float:
        """Return projected / published."""
        return self.projected / self.published


def sharded_ms(model: Model, gpus: int, local_batch_size: int, assumed: Assumptions) -> float:
    """Return the projected step of sharded tables on the machine of the published ones."""
    cost_model = CostModel(PUBLISHED.machine, assumed)
    placement = place_tables(
        model,
        gpus,
        PUBLISHED.machine.gpus_per_node,
        rank_bytes=cost_model.usable_bytes,
        local_batch_size=local_batch_size,
    )
    return cost_model.sharded_step(model, cost_model.cluster(gpus), placement, gpus * local_batch_size).step_ms


def check_published(assumed: Assumptions) -> list[Check]:
    """Return every published step with what the cost model makes of it under these assumptions.

    The paper's ratios stand beside those of 8 A100, ROBE data-parallel over as many.
    """
    checks = [
        Check(
            "TorchRec's DLRM example, p4d",
            step.label,
            step.step_ms,
            sharded_ms(PUBLISHED.model(step.tables), step.gpus, step.local_batch_size, assumed),
            "ms",
            step.is_calibration,
        )
        for step in PUBLISHED.torchrec
    ]
    cost_model, batch_size, gpus = CostModel(PUBLISHED.machine, assumed), PUBLISHED.pss.global_batch_size, 8
    source, batch = "PSS paper, Table 4", f"batch {batch_size:,}"
    (_, full_s), *compressed = PUBLISHED.pss.seconds
    full = sharded_ms(PUBLISHED.model("mlperf"), gpus, batch_size // gpus, assumed)
    checks.append(Check(source, f"full tables, {batch}", full_s, full, "ms"))
    for compression, seconds in compressed:
        step = cost_model.robe_step(MODELS["criteo_tb"], cost_model.cluster(gpus), compression, batch_size)
        label = f"{compression:,.0f}× over full tables, {batch}"
        checks.append(Check(source, label, seconds / full_s, step.step_ms / full, "× full"))
    return checks
