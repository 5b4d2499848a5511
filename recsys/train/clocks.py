"""Clocks of a run. Steps are timed without stopping the device: wall clock on CPU, CUDA events read later on GPUs."""

import contextlib
import time
from collections.abc import Iterator

import numpy as np
import torch

from recsys.runs.summary import Times


class StepTimer:
    """Times of intervals in ms; `take` gives those finished since it was last called."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._intervals: list[tuple] = []
        self._start = None

    def start(self) -> None:
        self._start = self._now()

    def stop(self) -> None:
        self._intervals.append((self._start, self._now()))

    def take(self) -> np.ndarray:
        """(n,) float64 ms. On CUDA this waits for the device."""
        intervals, self._intervals = self._intervals, []
        if self._cuda:
            torch.cuda.synchronize()
            return np.array([start.elapsed_time(stop) for start, stop in intervals])
        return np.array([1e3 * (stop - start) for start, stop in intervals])

    def _now(self):
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Stopwatch:
    """Seconds on the wall clock while running; the device is waited for when it starts and stops."""

    def __init__(self, device: torch.device, elapsed_s: float = 0.0) -> None:
        self._device = device
        self._elapsed_s = elapsed_s
        self._since: float | None = None

    def start(self) -> None:
        self._wait()
        self._since = time.perf_counter()

    def stop(self) -> None:
        self._wait()
        self._elapsed_s = self.read_s()
        self._since = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is not counted; a watch that stood still stands still afterwards."""
        running = self._since is not None
        if running:
            self.stop()
        yield
        if running:
            self.start()

    def credit(self, seconds: float) -> None:
        """Counts time that has not passed on this watch."""
        self._elapsed_s += seconds

    def read_s(self) -> float:
        return self._elapsed_s + (time.perf_counter() - self._since if self._since is not None else 0.0)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()


class StepTimes:
    """What the steps of a run took: percentiles without the first steps, where caches and allocators warm up."""

    WARM_UP_STEPS = 10

    def __init__(self) -> None:
        self._all: list[np.ndarray] = []

    def add(self, times_ms: np.ndarray) -> None:
        self._all.append(times_ms)

    def summary(self) -> Times | None:
        """Return p50, p95 and mean in ms; None before any step."""
        times = np.concatenate(self._all) if self._all else np.empty(0)
        times = times[self.WARM_UP_STEPS :] if len(times) > self.WARM_UP_STEPS else times
        if not len(times):
            return None
        p50, p95 = float(np.median(times)), float(np.percentile(times, 95))
        return Times(p50=p50, p95=p95, mean=float(times.mean()))
