"""Measurements with milliseconds of the test's own."""

from dataclasses import replace

import torch

from recsys.bench.competitors import EMBEDDING_BAG, FUSED_SGD, PLAIN_SGD, TBE_SGD
from recsys.bench.kernel_bench import GRIDS, KernelReport, KernelSettings
from recsys.bench.kernel_sizes import KernelSize
from recsys.bench.kernel_timing import Measurement, Timing

MIDDLE = KernelSize(64, 16, 10_000_000, 10_240)
ENVIRONMENT = {
    "device": "cpu",
    "cpu": "Some <CPU>",
    "cpu_cores": 2,
    "commit": "0123456789ab",
    "started": "2026-01-02T03",
}
ENVIRONMENT |= {"uncommitted_changes": True}


def made(ours, tbe=100.0, bag=200.0, plain=300.0, *, threads=1, **changes):
    """The step of four lookups, one round; the copy runs at 2 GB/s."""
    steps = {FUSED_SGD: ours, TBE_SGD: tbe, EMBEDDING_BAG: bag, PLAIN_SGD: plain}
    return Measurement(
        size=replace(MIDDLE, **changes),
        threads=threads,
        timings={name: {"step": Timing((ms,))} for name, ms in steps.items() if ms is not None},
        fill=Timing((4.0,)),
        copy=Timing((1.0,)),
        copy_bytes=1_000_000,
        num_ids=266_240.0,
        distinct=250_000.0,
        cache_bytes=0,
    )


def made_report(*measurements, grid="models", device="cpu"):
    settings = KernelSettings(torch.device(device), sorted({m.threads for m in measurements} or {1}))
    report = KernelReport(GRIDS[grid], settings, ENVIRONMENT, ["a note"])
    report.measurements += measurements
    return report
