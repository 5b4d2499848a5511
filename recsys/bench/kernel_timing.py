"""Timing of competitors against each other: all of them in every round, on the same ids, in one process.

The speed of a machine drifts by half within minutes. So a round interleaves every operation of every competitor, at
every thread count, in an order drawn anew: each is a pass that is not timed, which meets the caches as somebody else
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
class KernelSettings:
    """Hold where and how long every size is timed.

    threads: counts to time at. rounds: at most. seconds: of a size, after which no further round begins. Raises
    ValueError for no threads, and for fewer than LEAST_ROUNDS rounds.
    """

    device: torch.device
    threads: Sequence[int]
    rounds: int = 9
    seconds: float = 18.0

    def __post_init__(self) -> None:
        if not self.threads or min(self.threads) < 1:
            raise ValueError(f"threads must be at least 1, not {list(self.threads)}")
        if self.rounds < LEAST_ROUNDS:
            raise ValueError(f"rounds must be at least {LEAST_ROUNDS}, not {self.rounds}")


@dataclass(frozen=True)
class Timing:
    """Hold the milliseconds of every round."""

    ms: tuple[float, ...]

    @property
    def median(self) -> float:
        """Return the median over rounds, in ms."""
        return float(np.median(self.ms))

    @property
    def quartiles(self) -> tuple[float, float]:
        """Return the first and third quartile over rounds, in ms."""
        low, high = np.percentile(self.ms, (25, 75))
        return float(low), float(high)


class Task(NamedTuple):
    """Hold an operation of a competitor. run: a pass over a batch -> its milliseconds."""

    name: str
    operation: str
    run: Callable[[KernelBatch], float]


@dataclass(frozen=True)
class Measurement:
    """Hold one size at one thread count.

    timings: competitor -> operation -> Timing. fill, copy: the machine's own speed in the same rounds. copy_bytes: what
    one copy reads, and writes too. num_ids, distinct: means of a batch.
    """

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
        """Return the number of rounds that were timed."""
        return len(self.fill.ms)

    @property
    def copy_gb_per_s(self) -> float:
        """Return the bandwidth of the copy, bytes read and written, in 10^9 a second."""
        return 2e-6 * self.copy_bytes / self.copy.median

    def timing(self, name: str, operation: str) -> Timing | None:
        """Return the timing of a competitor's operation; None where it was not measured."""
        return self.timings.get(name, {}).get(operation)

    def ratio(self, name: str, operation: str, against: str) -> float | None:
        """Return a competitor's median over another's for the same operation; None without one of them."""
        own, other = self.timing(name, operation), self.timing(against, operation)
        return own.median / other.median if own and other else None

    def bound_ms(self, name: str, operation: Operation) -> float:
        """Return the least time of the operation in ms: the bytes it must move, at the speed of the copy."""
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
        """Return a competitor's median over the byte bound; None where it was not measured."""
        own = self.timing(name, operation)
        return own.median / self.bound_ms(name, operation) if own else None


class Clock:
    """Measure a call in milliseconds, by the device's own events on CUDA and by the wall clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def time(self, call: Callable[[], object]) -> float:
        """Return the milliseconds of a call; what it returns is freed after the clock has stopped."""
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
    """Return the task that times an operation of a lookup.

    gradient: of the output, in any shape of as many numbers.
    """

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
    settings: KernelSettings,
    *,
    cache_bytes: int,
    advance: Callable[[], None] = lambda: None,
) -> list[Measurement]:
    """Measure a size, and return one measurement for each thread count.

    Fewer rounds than `settings.rounds`, but LEAST_ROUNDS at least, where they have taken `settings.seconds`. advance:
    called after each round.
    """
    device = settings.device
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
    samples = run_rounds(
        tasks, batches, threads=settings.threads, rounds=settings.rounds, seconds=settings.seconds, advance=advance
    )
    facts = {
        "copy_bytes": copy_bytes,
        "num_ids": float(np.mean([batch.ids.numel() for batch in batches])),
        "distinct": float(np.mean([batch.distinct for batch in batches])),
        "cache_bytes": cache_bytes,
    }
    return [_collect(size, count, tasks, samples[count], facts) for count in settings.threads]


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
    """Return for every thread count and task the milliseconds of every round.

    The thread count of the process is afterwards what it was before.
    """
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
