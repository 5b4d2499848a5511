"""Steps that others published, beside what the cost model says of them: how far off is a projection?

TorchRec's: throughput of its DLRM example on Criteo-TB, AWS p4d nodes (8 × A100 40 GB, 400 Gbit/s a node), d = 128,
records a second as printed in the example's README, in its first version (8, 16 and 80 GPUs, 2022) and a later one. Its
step on 8 GPUs at batch 2,048 gave `Assumptions.fixed_ms`; the others are predictions.

The PSS paper's: s per 1,000 iterations of Table 4 and Fig. 2b, batch 2,048; on which GPUs is not told, its inference
ran on Quadro RTX 8000. Only its ratios to full tables can be compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from recsys.cost.cost_model import robe_step, sharded_step
from recsys.cost.machines import MODELS, P4D, Assumptions, Model, build_cluster
from recsys.cost.table_placement import place_tables
from recsys.data.criteo_tsv import CARDINALITIES

_CAPPED = MODELS["criteo_tb"].rows
_README = (
    45833188, 36746, 17245, 7413, 20243, 3, 7114, 1441, 62, 29275261, 1572176, 345138, 10,
    2209, 11267, 128, 4, 974, 14, 48937457, 11316796, 40094537, 452104, 12606, 104, 35,
)  # fmt: skip
_TWICE = tuple(min(rows, 80_000_000) if rows > 40_000_000 else rows for rows in CARDINALITIES["criteo_tb"])
CALIBRATION = "8 GPUs, batch 2,048"


@dataclass(frozen=True)
class PublishedStep:
    label: str
    rows: Sequence[int]
    gpus: int
    local_batch_size: int
    records_per_s: float

    @property
    def step_ms(self) -> float:
        return 1e3 * self.gpus * self.local_batch_size / self.records_per_s


TORCHREC = (
    PublishedStep(CALIBRATION, _README, 8, 256, 284_615),
    PublishedStep("4 GPUs, batch 16,384", _README, 4, 4096, 1_458_176),
    PublishedStep("8 GPUs, batch 16,384", _README, 8, 2048, 1_671_168),
    PublishedStep("8 GPUs, batch 65,536", _README, 8, 8192, 5_373_952),
    PublishedStep("8 GPUs, batch 65,536, MLPerf's tables", _CAPPED, 8, 8192, 5_497_160),
    PublishedStep("16 GPUs, batch 65,536, 174 GiB", _TWICE, 16, 4096, 2_028_339),
    PublishedStep("80 GPUs, batch 65,520, 421 GiB", CARDINALITIES["criteo_tb"], 80, 819, 459_950),
)
PSS_SECONDS = {1: 50.6, 100: 31.04, 1000: 29.6, 10_000: 11.6}
"""Compression -> s per 1,000 iterations; 1 = full tables."""


@dataclass(frozen=True)
class Check:
    """unit: "ms" or "× full". is_calibration: the assumptions were set so that this comes out."""

    source: str
    label: str
    published: float
    projected: float
    unit: str
    is_calibration: bool = False

    @property
    def ratio(self) -> float:
        """projected / published."""
        return self.projected / self.published


def check_published(assumed: Assumptions) -> list[Check]:
    """All published steps by the cost model under these assumptions."""
    return [*_check_torchrec(assumed), *_check_pss(assumed)]


def _sharded_ms(rows: Sequence[int], gpus: int, local_batch_size: int, assumed: Assumptions) -> float:
    model = Model(name="published", rows=tuple(rows), source="")
    cluster = build_cluster(P4D, assumed, gpus, P4D.network_gbit)
    rank_bytes = 1e9 * P4D.memory_gb * assumed.usable_memory
    placement = place_tables(
        model, gpus, P4D.gpus_per_node, rank_bytes=rank_bytes, local_batch_size=local_batch_size
    )  # fmt: skip
    return sharded_step(model, P4D, assumed, cluster, placement, gpus * local_batch_size, "sgd").step_ms


def _check_torchrec(assumed: Assumptions) -> list[Check]:
    return [
        Check(
            "TorchRec's DLRM example, p4d",
            step.label,
            step.step_ms,
            _sharded_ms(step.rows, step.gpus, step.local_batch_size, assumed),
            "ms",
            step.label == CALIBRATION,
        )
        for step in TORCHREC
    ]


def _check_pss(assumed: Assumptions) -> list[Check]:
    """The paper's ratios beside those of 8 A100, ROBE data-parallel over as many."""
    batch_size, gpus = 2048, 8
    full = _sharded_ms(_CAPPED, gpus, batch_size // gpus, assumed)
    cluster = build_cluster(P4D, assumed, gpus, P4D.network_gbit)
    checks = [Check("PSS paper, Table 4", "full tables, batch 2,048", PSS_SECONDS[1], full, "ms")]
    for compression, seconds in PSS_SECONDS.items():
        if compression > 1:
            step = robe_step(MODELS["criteo_tb"], P4D, assumed, cluster, compression, batch_size, "sgd")
            label = f"{compression:,}× over full tables, batch 2,048"
            checks.append(
                Check("PSS paper, Table 4", label, seconds / PSS_SECONDS[1], step.step_ms / full, "× full")
            )  # fmt: skip
    return checks
