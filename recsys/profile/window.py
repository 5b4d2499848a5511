"""Training steps under PyTorch's profiler, and what they say: the trace file, and `WindowTiming`.

A window is some steps of an ordinary training run. They are slower than the others by the profiler's overhead, so they
serve for shares, phases and bytes, and not for throughput. On CUDA the device is waited for at the end of each, so that
a step has an end: steps of a window do not overlap.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity, profile

from configs.schema import ProfileSection
from recsys.profile.timing import Joined, collectives_by_step, join, time_rank
from recsys.profile.trace import Collective, read_trace
from recsys.runs.phases import DATA_LOADING, STEP, mark, marked
from recsys.runs.ranks import Ranks, gather
from recsys.runs.window_timing import WindowTiming

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it writes a line at the start and end of every window

T = TypeVar("T")
_PINGS = 20
_SETTLE_S = 0.02
"""A gloo worker notes the end of its span after those who wait for it have gone on."""


class ProfilerSchedule:
    """When a run makes a profiled window: at every multiple of section.every_steps, or as soon after it as the window
    meets no evaluation, checkpoint or end."""

    def __init__(self, section: ProfileSection, intervals: Sequence[float]) -> None:
        """intervals: steps from one evaluation, checkpoint or end to the next."""
        self.section, self.intervals = section, intervals

    def describe_obstacle(self) -> str | None:
        """Why a run that is to make windows makes none."""
        if not self.section.every_steps or self.section.steps + 1 < min(self.intervals):
            return None
        return (
            f"profile.steps = {self.section.steps}, and one before them, do not fit between evaluations, checkpoints "
            f"and the end of training, {min(self.intervals):.0f} steps apart"
        )

    def is_due(self, step: int, made: int) -> bool:
        """After `step` steps and `made` windows."""
        if not self.section.every_steps or step < self.section.every_steps * (1 + made):
            return False
        return min(interval - step % interval for interval in self.intervals) > self.section.steps + 1


def profile_steps(
    model: nn.Module,
    phases: Mapping[str, str],
    ranks: Ranks,
    *,
    load: Callable[[], T],
    train: Callable[[T], object],
    num_steps: int,
    trace: Path,
    step: int = 0,
) -> WindowTiming:
    """Makes num_steps + 1 steps, the first of them unseen, and times the others. Collective.

    load: the next batch. train: one step on it. phases: submodule -> phase, see `recsys.runs.phases`. trace: file to
    write, .json or .json.gz, one for each rank. step: the number of the first step, for the record.
    """
    cuda = ranks.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    wall_s, cpu_s = 0.0, 0.0
    trace.parent.mkdir(parents=True, exist_ok=True)
    offset_us, error_us = _align_clocks(ranks)
    with marked(model, phases), profile(activities=activities, record_shapes=True) as profiler:
        train(load())
        for _ in range(num_steps):
            with mark(DATA_LOADING):
                batch = load()
            wall, cpu = time.perf_counter(), time.thread_time()
            with mark(STEP):
                train(batch)
                if cuda:
                    torch.cuda.synchronize()
            wall_s += time.perf_counter() - wall
            cpu_s += time.thread_time() - cpu
        time.sleep(_SETTLE_S)
    profiler.export_chrome_trace(str(trace))
    found = read_trace(trace)
    aligned = [(number, _moved(c, offset_us)) for number, c in collectives_by_step(found)]
    own, unmatched = join(gather(aligned, ranks))[ranks.rank]
    own = [Joined(_moved(j.collective, -offset_us), j.all_started - offset_us, j.all_ended - offset_us) for j in own]
    wall_ms, cpu_ms = 1e3 * wall_s / num_steps, 1e3 * cpu_s / num_steps
    timing = time_rank(found, own, unmatched, wall_ms, None if cuda else wall_ms - cpu_ms)
    return WindowTiming(step, num_steps, 1e-3 * max(gather(error_us, ranks)), gather(timing, ranks))


def _moved(collective: Collective, by_us: float) -> Collective:
    return collective._replace(start=collective.start + by_us, end=collective.end + by_us)


def _align_clocks(ranks: Ranks) -> tuple[float, float]:
    """(µs to add to this rank's clock to get rank 0's, how far off that may be): the quickest of several round trips
    with rank 0, which reads its clock halfway (Cristian 1989). Collective."""
    best = (0.0, 0.0)
    for rank in range(1, ranks.world_size):
        if ranks.rank == 0:
            for _ in range(_PINGS):
                dist.recv(torch.empty(1, dtype=torch.int64, device=ranks.device), rank)
                dist.send(torch.tensor([time.time_ns()], device=ranks.device), rank)
        elif ranks.rank == rank:
            trips = [_ping(ranks.device) for _ in range(_PINGS)]
            best = min(trips, key=lambda trip: trip[1])
    return best


def _ping(device: torch.device) -> tuple[float, float]:
    theirs = torch.empty(1, dtype=torch.int64, device=device)
    left = time.time_ns()
    dist.send(torch.zeros_like(theirs), 0)
    dist.recv(theirs, 0)
    read = int(theirs)
    came = time.time_ns()
    return 1e-3 * (read - (left + came) / 2), 1e-3 * (came - left) / 2
