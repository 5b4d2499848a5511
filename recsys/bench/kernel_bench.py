"""Runs a grid of kernel sizes within the memory there is, and keeps what was measured and what was left out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from recsys.bench.byte_bound import Operation
from recsys.bench.competitors import (
    COLLECTION,
    COMPETITORS,
    DENSE_SGD,
    EMBEDDING_BAG,
    FUSED_ADAGRAD,
    FUSED_SGD,
    PLAIN_DENSE,
    PLAIN_SGD,
    PLAIN_SPARSE,
    SPARSE_SGD,
    TBE_ADAGRAD,
    TBE_SGD,
    Lookup,
    Shared,
    reads_little,
)
from recsys.bench.kernel_sizes import KernelSize, format_mb
from recsys.bench.kernel_timing import KernelSettings, Measurement, Timing, measure_size

JSON_VERSION = 2
_TABLES = (TBE_SGD, TBE_ADAGRAD, EMBEDDING_BAG, COLLECTION)
_FILL_BLOCK = 1 << 20


@dataclass(frozen=True)
class Grid:
    """Describe what is timed at every size of a grid."""

    name: str
    competitors: Sequence[str]
    operations: Sequence[Operation]
    conditions: Mapping[str, Callable[[KernelSize], bool]] = field(default_factory=dict)
    """Competitor -> whether it is worth its time at a size; always, if it is not here."""

    def competitors_at(self, size: KernelSize) -> list[str]:
        """Return the names of the competitors that are worth their time at a size, in the grid's order."""
        return [name for name in self.competitors if name not in self.conditions or self.conditions[name](size)]


MODELS = Grid(
    "models",
    (FUSED_SGD, FUSED_ADAGRAD, DENSE_SGD, SPARSE_SGD, PLAIN_SGD, *_TABLES),
    ("forward", "step"),
    {SPARSE_SGD: reads_little},
)
PAPER = Grid("paper", (FUSED_SGD, DENSE_SGD, SPARSE_SGD, PLAIN_DENSE, PLAIN_SPARSE, *_TABLES), ("forward", "backward"))
GRIDS = {grid.name: grid for grid in (MODELS, PAPER)}


@dataclass
class KernelReport:
    """Hold a grid as far as it was measured.

    environment: of this process. notes: what else a reader must know. skipped: a line for each thing left out.
    """

    grid: Grid
    settings: KernelSettings
    environment: dict[str, Any]
    notes: list[str]
    status: str = "running"
    measurements: list[Measurement] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def skip(self, line: str) -> None:
        """Keep a line about what is left out, once however often it is said."""
        if line not in self.skipped:
            self.skipped.append(line)


class KernelBench:
    """Measure the sizes of a grid that fit the memory, and keep the results in a report.

    budget_bytes: of tables, array, gradients and temporaries together. cache_bytes: of the last cache.
    """

    def __init__(self, report: KernelReport, *, budget_bytes: float, cache_bytes: int) -> None:
        self.report, self.budget_bytes, self.cache_bytes = report, budget_bytes, cache_bytes
        self._device = report.settings.device
        self._tables: Tensor | None = None

    def run(self, sizes: Sequence[KernelSize], advance: Callable[[], None] = lambda: None):
        """Measure every size that fits, and yield its measurements, one for each thread count.

        The report holds them too. A size that does not fit yields an empty list. advance: called after each round.
        """
        # Tables are filled once, at the largest size that fits; every smaller size uses a part of them.
        self._largest = max((s.full_bytes for s in sizes if self._fitting(s)[1]), default=0)
        for size in sizes:
            lookups = self._build(size)
            measured: list[Measurement] = []
            if lookups:
                measured = measure_size(
                    size,
                    lookups,
                    self.report.grid.operations,
                    self.report.settings,
                    cache_bytes=self.cache_bytes,
                    advance=advance,
                )
            self.report.measurements += measured
            yield measured

    def _fitting(self, size: KernelSize) -> tuple[list[str], list[str]]:
        """Return the names of the competitors on M and of those on full tables that fit the budget.

        Those on M come first, tables beside them: tables alone are no comparison with ROBE.
        """
        wanted = self.report.grid.competitors_at(size)
        needs = {name: COMPETITORS[name].extra_bytes(size) for name in wanted}
        on_array = [
            name
            for name in wanted
            if COMPETITORS[name].storage == "array" and size.memory_bytes + needs[name] <= self.budget_bytes
        ]
        if not on_array:
            return [], []
        held = size.full_bytes + size.memory_bytes + max(needs[name] for name in on_array)
        on_tables = [
            name for name in wanted if COMPETITORS[name].storage == "tables" and held + needs[name] <= self.budget_bytes
        ]
        return on_array, on_tables

    def _build(self, size: KernelSize) -> dict[str, Lookup]:
        on_array, on_tables = self._fitting(size)
        self._say_what_does_not_fit(size, on_array, on_tables)
        shared = Shared(
            self._share_tables(size) if on_tables else self._drop_tables(),
            _filled(size.memory_size, self._device) if on_array else None,
        )
        lookups = {}
        for name in (*on_array, *on_tables):
            try:
                lookups[name] = COMPETITORS[name].build(size, shared, self._device)
            except ValueError as error:
                self.report.skip(f"{COMPETITORS[name].label} at Z = {size.block_size}: {error}")
        return lookups

    def _share_tables(self, size: KernelSize) -> Tensor:
        if self._tables is None or self._tables.nbytes < size.full_bytes:
            self._tables = None  # frees the smaller ones first: both would not fit
            self._tables = _filled(self._largest // 4, self._device)
        return self._tables[: size.full_bytes // 4]

    def _drop_tables(self) -> None:
        self._tables = None

    def _say_what_does_not_fit(self, size: KernelSize, on_array: Sequence[str], on_tables: Sequence[str]) -> None:
        budget = format_mb(self.budget_bytes)
        for name in self.report.grid.competitors_at(size):
            competitor = COMPETITORS[name]
            if name in on_array or name in on_tables:
                continue
            if competitor.storage == "tables" and on_array:
                what = f"{size.rows:,} rows of d = {size.embedding_dim}: full tables of {format_mb(size.full_bytes)}"
                self.report.skip(f"{what} beside an array of {format_mb(size.memory_bytes)} do not fit {budget}")
            elif competitor.storage == "array":
                need = format_mb(size.memory_bytes + competitor.extra_bytes(size))
                array = f"array of {format_mb(size.memory_bytes)}, Z = {size.block_size}"
                self.report.skip(
                    f"{competitor.label}, {array}: {need} with gradient and temporaries do not fit {budget}"
                )


def _filled(count: int, device: torch.device) -> Tensor:
    """Return numbers (count,) float32 in ± 0.01, the same block again and again.

    Every page is written: a page never touched has no memory behind it, and its first use would be timed.
    """
    numbers = torch.empty(count, device=device)
    block = torch.rand(min(count, _FILL_BLOCK), generator=torch.Generator().manual_seed(0)).sub_(0.5).mul_(0.02)
    block = block.to(device)
    for start in range(0, count, _FILL_BLOCK):
        part = numbers[start : start + _FILL_BLOCK]
        part.copy_(block[: len(part)])
    return numbers


def choose_rows(wanted: int, embedding_dim: int, budget_bytes: float, features: int) -> int:
    """Return the rows of the full tables together: as many as wanted, or what half of the budget holds."""
    return max(features, min(wanted, int(budget_bytes / 2 / 4 / embedding_dim)))


def to_json(report: KernelReport) -> dict[str, Any]:
    """Return everything measured as JSON holds it, with the milliseconds of every round."""
    settings = report.settings
    return {
        "version": JSON_VERSION,
        "grid": report.grid.name,
        "status": report.status,
        "environment": report.environment,
        "notes": report.notes,
        "settings": {"device": settings.device.type, "threads": list(settings.threads), "rounds": settings.rounds}
        | {"seconds_per_size": settings.seconds},
        "competitors": {name: COMPETITORS[name].meaning for name in report.grid.competitors},
        "measurements": [_measurement_to_json(m) for m in report.measurements],
        "skipped": report.skipped,
    }


def _measurement_to_json(measurement: Measurement) -> dict[str, Any]:
    size = measurement.size
    return {
        "size": {**vars(size), "memory_size": size.memory_size, "rows_per_table": size.rows_per_table}
        | {"full_bytes": size.full_bytes, "compression": size.compression, "label": size.label},
        "threads": measurement.threads,
        "rounds": measurement.rounds,
        "ids_per_batch": measurement.num_ids,
        "distinct_rows_per_batch": measurement.distinct,
        "cache_bytes": measurement.cache_bytes,
        "copy_gb_per_s": measurement.copy_gb_per_s,
        "fill": _timing_to_json(measurement.fill),
        "copy": _timing_to_json(measurement.copy) | {"bytes": measurement.copy_bytes},
        "timings": {
            name: {
                operation: _timing_to_json(timing) | {"bound_ms": measurement.bound_ms(name, operation)}  # pyright: ignore[reportArgumentType]
                for operation, timing in operations.items()
            }
            for name, operations in measurement.timings.items()
        },
    }


def _timing_to_json(timing: Timing) -> dict[str, Any]:
    low, high = timing.quartiles
    return {"median_ms": timing.median, "quartiles_ms": [low, high], "ms": list(timing.ms)}
