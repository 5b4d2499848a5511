"""The bars that our kernels are to meet: how long a fused SGD step may take against the alternatives, on a CPU.

    python -m tests.recsys.bench.kernel_bars runs/microbench/results.json

judges what `pss-bench bench kernels` measured; status 1 where a bar is missed.

A bar holds at one size, at every thread count, for uniform and for Zipf ids:

    × TBE fused SGD                   ≤ 0.20  B = 10240, d = 64, Z in {16, 32}, M ≤ 10 MB, one id a bag
                                      ≤ 0.25  B = 10240, d = 128 at any Z and d = 64 at Z = 8, M ≤ 10 MB, one id a bag
                                      ≤ 0.40  the rest at Z ≥ 8 and M ≤ 10 MB, bags of several ids included
                                      ≤ 0.45  M ≤ 100 MB and Z ≥ 16
    × nn.EmbeddingBag, sparse + SGD   ≤ 0.25  that rest
    × plain PyTorch                   ≤ 1     everywhere, Z = 1 included
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from recsys.bench.competitors import EMBEDDING_BAG, FUSED_SGD, PLAIN_SGD, TBE_SGD
from recsys.bench.kernel_bench import GRIDS, KernelReport, KernelSettings
from recsys.bench.kernel_sizes import KernelSize
from recsys.bench.kernel_timing import Measurement, Timing

_SMALL, _LARGE = 10_000_000, 100_000_000
_SHORT_NAMES = {TBE_SGD: "TBE", EMBEDDING_BAG: "bag", PLAIN_SGD: "plain"}


@dataclass(frozen=True)
class Bar:
    """The step of ROBE fused SGD takes at most `most` times that of `against`."""

    against: str
    most: float

    @property
    def label(self) -> str:
        return f"≤ {self.most:g} {_SHORT_NAMES[self.against]}"


@dataclass(frozen=True)
class Verdict:
    """A bar at a measured size."""

    bar: Bar
    measurement: Measurement
    ratio: float

    @property
    def is_met(self) -> bool:
        return self.ratio <= self.bar.most

    @property
    def margin(self) -> float:
        """Ratio over bar: above 1 is a bar not met."""
        return self.ratio / self.bar.most


def bars_of(size: KernelSize) -> list[Bar]:
    """The bars of a size, none of them of a device other than the CPU."""
    bars = [Bar(PLAIN_SGD, 1.0)]
    if size.block_size < 8:
        return bars
    if size.memory_bytes > _SMALL:
        is_claimed = size.memory_bytes <= _LARGE and size.block_size >= 16
        return [Bar(TBE_SGD, 0.45), *bars] if is_claimed else bars
    dim, block_size = size.embedding_dim, size.block_size
    if size.batch_size == 10_240 and size.ids_per_bag == 1:
        if dim == 64 and block_size in (16, 32):
            return [Bar(TBE_SGD, 0.20), *bars]
        if dim == 128 or (dim == 64 and block_size == 8):
            return [Bar(TBE_SGD, 0.25), *bars]
    return [Bar(TBE_SGD, 0.40), Bar(EMBEDDING_BAG, 0.25), *bars]


def judge(measurement: Measurement) -> list[Verdict]:
    """Of every bar whose both sides were measured."""
    found = [(bar, measurement.ratio(FUSED_SGD, "step", bar.against)) for bar in bars_of(measurement.size)]
    return [Verdict(bar, measurement, ratio) for bar, ratio in found if ratio is not None]


def describe_verdicts(verdicts: Sequence[Verdict]) -> str:
    """'bars met: 40 of 42, the worst: ...'"""
    if not verdicts:
        return "bars met: none was measured"
    worst = max(verdicts, key=lambda verdict: verdict.margin)
    met = sum(verdict.is_met for verdict in verdicts)
    threads = f"{worst.measurement.threads} thread{'s' * (worst.measurement.threads > 1)}"
    return (
        f"bars met: {met} of {len(verdicts)}, the worst: {worst.ratio:.3f} {worst.bar.label} "
        f"({worst.measurement.size.label}, {threads})"
    )


def judge_report(report: KernelReport) -> list[Verdict]:
    """Of every bar there is at what was measured; none on another device than the CPU, or in the paper's grid."""
    if report.settings.device.type != "cpu" or report.grid.name != "models":
        return []
    return [verdict for measurement in report.measurements for verdict in judge(measurement)]


def read_report(path: Path) -> KernelReport:
    """A results.json of `pss-bench bench kernels` as the report that wrote it."""
    stored = json.loads(path.read_text())
    settings = stored["settings"]
    kernel_settings = KernelSettings(
        torch.device(settings["device"]), settings["threads"], settings["rounds"], settings["seconds_per_size"]
    )
    report = KernelReport(GRIDS[stored["grid"]], kernel_settings, stored["environment"], stored["notes"])
    report.status, report.skipped = stored["status"], stored["skipped"]
    report.measurements = [_read_measurement(measurement) for measurement in stored["measurements"]]
    return report


def _read_measurement(stored: dict[str, Any]) -> Measurement:
    timings = {
        name: {operation: Timing(tuple(timing["ms"])) for operation, timing in operations.items()}
        for name, operations in stored["timings"].items()
    }
    names = ("embedding_dim", "block_size", "memory_bytes", "batch_size", "ids_per_bag", "ids", "features", "rows")
    return Measurement(
        size=KernelSize(**{name: stored["size"][name] for name in names}),
        threads=stored["threads"],
        timings=timings,
        fill=Timing(tuple(stored["fill"]["ms"])),
        copy=Timing(tuple(stored["copy"]["ms"])),
        copy_bytes=stored["copy"]["bytes"],
        num_ids=stored["ids_per_batch"],
        distinct=stored["distinct_rows_per_batch"],
        cache_bytes=stored.get("cache_bytes", 32 << 20),  # version 1 did not say
    )


if __name__ == "__main__":
    verdicts = judge_report(read_report(Path(sys.argv[1])))
    for verdict in sorted(verdicts, key=lambda verdict: -verdict.margin):
        if not verdict.is_met:
            print(f"not met: {verdict.ratio:.3f} {verdict.bar.label}, {verdict.measurement.size.label}")
    print(describe_verdicts(verdicts))
    sys.exit(not all(verdict.is_met for verdict in verdicts))
