"""Timing of competitors against each other: all of them in every round, on the same ids, in one process.

The speed of a machine drifts by half within minutes. So a round gives every operation of every competitor a turn, at
every thread count, in an order drawn anew; a turn is a pass that is not timed, which finds the caches as somebody else
left them, and one that is, on another batch. A figure is the median over rounds, its spread the quartiles. A fill of an
array like the output and a copy between two arrays larger than the caches are timed among them.

Threads are set by `torch.set_num_threads`, which PyTorch's operators and ours follow. FBGEMM's CPU wheel (1.8.0) is
built without OpenMP: its lookups take one thread at every count.
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from recsys.bench.byte_bound import Operation, bytes_moved
from recsys.bench.competitors import COMPETITORS, Lookup
from recsys.bench.kernel_sizes import KernelBatch, KernelSize, build_batches

BATCHES = 4
LEAST_ROUNDS = 3
_WARM_UP_ROUNDS = 1  # at every thread count
_COPY_OVER_CACHE = 4
_LEAST_COPY_BYTES = 64 << 20


@dataclass(frozen=True)
class Timing:
    """Milliseconds of every round."""

    ms: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.ms))

    @property
    def quartiles(self) -> tuple[float, float]:
        low, high = np.percentile(self.ms, (25, 75))
        return float(low), float(high)


class Task(NamedTuple):
    """An operation of a competitor. run: milliseconds of one pass over a batch."""

    name: str
    operation: str
    run: Callable[[KernelBatch], float]


@dataclass(frozen=True)
class Measurement:
    """One size at one thread count. timings: competitor -> operation -> Timing; num_ids, distinct: means of a batch."""

    size: KernelSize
    threads: int
    timings: dict[str, dict[str, Timing]]
    fill: Timing
    copy: Timing
    copy_bytes: int
    num_ids: float
    distinct: float
    cache_bytes: int

    @property
    def rounds(self) -> int:
        return len(self.fill.ms)

    @property
    def copy_gb_per_s(self) -> float:
        """Read and written, 10^9 bytes a second."""
        return 2e-6 * self.copy_bytes / self.copy.median

    def timing(self, name: str, operation: str) -> Timing | None:
        return self.timings.get(name, {}).get(operation)

    def ratio(self, name: str, operation: str, against: str) -> float | None:
        """Median over median."""
        own, other = self.timing(name, operation), self.timing(against, operation)
        return own.median / other.median if own and other else None

    def bound_ms(self, name: str, operation: Operation) -> float:
        """Least time of the operation by the bytes it must move."""
        moved = bytes_moved(
            self.size,
            operation,
            COMPETITORS[name].traffic,
            num_ids=self.num_ids,
            distinct=self.distinct,
            cache_bytes=self.cache_bytes,
        )
        return 1e-6 * moved / self.copy_gb_per_s

    def over_bound(self, name: str, operation: Operation) -> float | None:
        own = self.timing(name, operation)
        return own.median / self.bound_ms(name, operation) if own else None


class Clock:
    """Milliseconds of a call: of the device's own events on CUDA, of the wall clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def time(self, call: Callable[[], object]) -> float:
        if self.device.type != "cuda":
            started = time.perf_counter()
            kept = call()
            elapsed = time.perf_counter() - started
            del kept  # freed after the clock has stopped
            return 1e3 * elapsed
        torch.cuda.synchronize(self.device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        kept = call()
        end.record()
        torch.cuda.synchronize(self.device)
        del kept
        return start.elapsed_time(end)


def build_task(name: str, lookup: Lookup, operation: Operation, gradient: Tensor, clock: Clock) -> Task:
    """gradient: of the output, any shape of as many numbers."""

    def forward(batch: KernelBatch) -> float:
        with torch.no_grad():
            return clock.time(lambda: lookup.forward(batch))

    def backward(batch: KernelBatch) -> float:
        bags = lookup.forward(batch)
        given = gradient.view_as(bags)
        ms = clock.time(lambda: bags.backward(given))
        lookup.clear()
        return ms

    def step(batch: KernelBatch) -> float:
        def run() -> Tensor:
            bags = lookup.forward(batch)
            bags.backward(gradient.view_as(bags))
            lookup.update()
            return bags

        return clock.time(run)

    return Task(name, operation, {"forward": forward, "backward": backward, "step": step}[operation])


def _build_fill(gradient: Tensor, clock: Clock) -> Task:
    return Task("fill", "", lambda _: clock.time(lambda: torch.empty_like(gradient).fill_(1.0)))


def _build_copy(copy_bytes: int, device: torch.device, clock: Clock) -> Task:
    source, target = (torch.ones(copy_bytes // 4, device=device) for _ in range(2))
    return Task("copy", "", lambda _: clock.time(lambda: target.copy_(source)))


def measure_size(
    size: KernelSize,
    lookups: dict[str, Lookup],
    operations: Sequence[Operation],
    *,
    threads: Sequence[int],
    rounds: int,
    seconds: float,
    cache_bytes: int,
    device: torch.device,
    advance: Callable[[], None] = lambda: None,
) -> list[Measurement]:
    """One measurement for each thread count.

    rounds: at most; fewer, but LEAST_ROUNDS at least, where they have taken `seconds`. advance: called after each.
    """
    clock, batches = Clock(device), build_batches(size, BATCHES, device)
    generator = torch.Generator().manual_seed(0)
    gradient = torch.rand(size.output_bytes // 4, generator=generator).to(device).view(size.batch_size, -1)
    copy_bytes = max(_LEAST_COPY_BYTES, _COPY_OVER_CACHE * cache_bytes)
    tasks = [_build_fill(gradient, clock), _build_copy(copy_bytes, device, clock)]
    tasks += [
        build_task(name, lookup, operation, gradient, clock)
        for name, lookup in lookups.items()
        for operation in operations
        if operation != "forward" or COMPETITORS[name].same_forward_as not in lookups
    ]
    samples = run_rounds(tasks, batches, threads=threads, rounds=rounds, seconds=seconds, advance=advance)
    facts = {
        "copy_bytes": copy_bytes,
        "num_ids": float(np.mean([batch.ids.numel() for batch in batches])),
        "distinct": float(np.mean([batch.distinct for batch in batches])),
        "cache_bytes": cache_bytes,
    }
    return [_collect(size, count, tasks, samples[count], facts) for count in threads]


def _collect(size: KernelSize, threads: int, tasks: Sequence[Task], samples: list[list[float]], facts) -> Measurement:
    timed = [(task, Timing(tuple(ms))) for task, ms in zip(tasks, samples, strict=True)]
    (_, fill), (_, copy), *others = timed
    timings: dict[str, dict[str, Timing]] = {}
    for task, timing in others:
        timings.setdefault(task.name, {})[task.operation] = timing
    return Measurement(size=size, threads=threads, timings=timings, fill=fill, copy=copy, **facts)


def run_rounds(
    tasks: Sequence[Task],
    batches: Sequence[KernelBatch],
    *,
    threads: Sequence[int],
    rounds: int,
    seconds: float,
    advance: Callable[[], None] = lambda: None,
) -> dict[int, list[list[float]]]:
    """Thread count -> for every task the milliseconds of every round. Leaves the thread count as it was."""
    order = random.Random(0)
    samples: dict[int, list[list[float]]] = {count: [[] for _ in tasks] for count in threads}
    before, started = torch.get_num_threads(), time.perf_counter()
    try:
        for number in range(-_WARM_UP_ROUNDS, rounds):
            before_it, batch = batches[(number - 1) % len(batches)], batches[number % len(batches)]
            for count in threads:
                torch.set_num_threads(count)
                for index in order.sample(range(len(tasks)), len(tasks)):
                    tasks[index].run(before_it)
                    ms = tasks[index].run(batch)
                    if number >= 0:
                        samples[count][index].append(ms)
            advance()
            if number + 1 >= LEAST_ROUNDS and time.perf_counter() - started > seconds:
                break
    finally:
        torch.set_num_threads(before)
    return samples
