"""Where the steps of a profiled window went, as numbers: filled by `recsys.profile`, kept in the summary of a run."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from statistics import fmean
from typing import Any

import numpy as np

from recsys.runs.metrics import (
    COMPUTE_MS,
    EXPOSED_COMM_MS,
    EXPOSED_WAIT_MS,
    OTHER_MS,
    OVERLAP_MS,
    PROFILED_STEP_MS,
    WAIT_MS,
    bytes_name,
    phase_name,
)


@dataclass(frozen=True)
class PhaseTiming:
    """A phase of the step in ms a step: all of it, and the parts in which the rank computes or only communicates."""

    ms: float
    compute_ms: float
    exposed_comm_ms: float


@dataclass(frozen=True)
class CollectiveTiming:
    """The collectives of one kind, summed over a step: how many, the bytes this rank puts in, and times in ms."""

    count: float
    bytes: float
    ms: float
    wait_ms: float
    transfer_ms: float


@dataclass(frozen=True)
class RankTiming:
    """The parts of a step on one rank: means over the steps of a window, in ms a step.

    wall_ms: the step by the wall clock, and blocked_ms: that − CPU time of the thread that makes it (None on CUDA): two
    clocks that know nothing of the profile. data_loading_ms is not part of the step. unmatched: collectives that not
    all ranks of their group took part in within the window.
    """

    step_ms: float
    compute_ms: float
    comm_ms: float
    exposed_comm_ms: float
    overlap_ms: float
    wait_ms: float
    exposed_wait_ms: float
    other_ms: float
    data_loading_ms: float
    wall_ms: float | None
    blocked_ms: float | None
    unmatched: int
    phases: Mapping[str, PhaseTiming]
    collectives: Mapping[str, CollectiveTiming]

    @property
    def exposed_transfer_ms(self) -> float:
        """Return the exposed communication in which the rank does not wait for others, in ms a step."""
        return self.exposed_comm_ms - self.exposed_wait_ms


@dataclass(frozen=True)
class WindowTiming:
    """One profiled window. clock_error_ms: how far apart the ranks' clocks may be after they were aligned."""

    step: int
    num_steps: int
    clock_error_ms: float
    ranks: Sequence[RankTiming]

    def mean(self, field: str) -> float:
        """Return the mean over ranks of a field of `RankTiming`, in ms a step."""
        return float(np.mean([getattr(rank, field) for rank in self.ranks]))

    def collective(self, field: str) -> dict[str, float]:
        """Return kind -> the mean over ranks of a field of `CollectiveTiming`; a rank without the kind counts as 0."""
        kinds = sorted({kind for rank in self.ranks for kind in rank.collectives})
        return {k: float(np.mean([getattr(r.collectives.get(k), field, 0.0) for r in self.ranks])) for k in kinds}

    def phases(self, field: str = "ms") -> dict[str, float]:
        """Return phase -> the mean over ranks of a field of `PhaseTiming`; a rank without the phase counts as 0."""
        names = dict.fromkeys(name for rank in self.ranks for name in rank.phases)
        return {n: float(np.mean([getattr(r.phases.get(n), field, 0.0) for r in self.ranks])) for n in names}

    def metrics(self) -> dict[str, float]:
        """Return the window as a run records it, by the names of `recsys.runs.metrics`: means over ranks."""
        return {
            PROFILED_STEP_MS: self.mean("step_ms"),
            COMPUTE_MS: self.mean("compute_ms"),
            EXPOSED_COMM_MS: self.mean("exposed_comm_ms"),
            EXPOSED_WAIT_MS: self.mean("exposed_wait_ms"),
            OVERLAP_MS: self.mean("overlap_ms"),
            WAIT_MS: self.mean("wait_ms"),
            OTHER_MS: self.mean("other_ms"),
            **{bytes_name(kind): size for kind, size in self.collective("bytes").items()},
            **{phase_name(phase): ms for phase, ms in self.phases().items()},
        }


def average(values: Sequence[Any]) -> Any:
    """Return the mean of numbers, or of dataclasses and mappings part by part.

    A number that is None is left out; a part of a mapping that some do not have counts as zeros there.
    """
    known = [value for value in values if value is not None]
    if not known:
        return None
    if isinstance(known[0], Mapping):
        return {key: average([value.get(key) for value in known]) for key in dict.fromkeys(itertools.chain(*known))}
    if is_dataclass(kind := type(known[0])):
        return kind(**{f.name: average([getattr(value, f.name, 0.0) for value in values]) for f in fields(kind)})
    return fmean(known)
