"""Where sharded tables and where ROBE makes the faster step, over networks and batch sizes: from measured trials.

A trial is one network at one global batch size, as a crossover.json has it. Its arms on two or more ranks were measured
interleaved in one job, ROBE in one process, which has no network, in a job of its own right before. A ratio is of
median step times. It has a range, from the lowest that the quartiles of both allow to the highest; where 1 lies within,
both are "same".
"""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from configs.load import ConfigError
from recsys.report.numbers import format_rounded

Side = Literal["sharded", "data_parallel", "single"]
ROBE_SIDES: dict[Side, str] = {"data_parallel": "data-parallel", "single": "in one process"}
PARTS = ("computing", "exposed communication", "waiting", "other")


class Record(BaseModel):
    """A part of a crossover.json. Keys that nobody reads here are left out."""

    model_config = ConfigDict(frozen=True)


class Link(Record):
    """A network as requested: Mbit/s each way and one-way µs. Both None: this machine's loopback, not emulated."""

    rate_mbit: float | None
    delay_us: float | None

    @property
    def is_emulated(self) -> bool:
        """Return whether a relay makes the network."""
        return self.rate_mbit is not None

    @property
    def label(self) -> str:
        """Return '1 Gbit/s, 50 µs (emulated)' or 'loopback (measured)'."""
        if self.rate_mbit is None or self.delay_us is None:
            return "loopback (measured)"
        rate = f"{self.rate_mbit / 1000:g} Gbit/s" if self.rate_mbit >= 1000 else f"{self.rate_mbit:g} Mbit/s"
        delay = f"{self.delay_us / 1000:g} ms" if self.delay_us >= 1000 else f"{self.delay_us:g} µs"
        return f"{rate}, {delay} (emulated)"


class Network(Link):
    """A link with what was measured of it before a trial.

    dropped_packets: in the trial; relay_cores: what emulating took, 1 = a core.
    """

    measured_rate_mbit: float
    measured_round_trip_us: float
    is_as_asked: bool
    dropped_packets: int
    relay_cores: float

    @property
    def link(self) -> Link:
        """Return the network as requested."""
        return Link(rate_mbit=self.rate_mbit, delay_us=self.delay_us)


class Quartiles(Record):
    """Step times in ms."""

    median: float = Field(gt=0)
    p25: float
    p75: float


class Parts(Record):
    """Where a profiled step goes, in ms."""

    compute_ms: float
    exposed_comm_ms: float
    exposed_wait_ms: float
    other_ms: float


class Arm(Record):
    """What was compared in a trial: one side at one compression. parts None: it was not profiled.

    asked_compression: 1 for sharded tables; bytes and collectives of one rank and step, by kind.
    """

    label: str
    side: Side
    asked_compression: float
    placement: Literal["shard", "replicate"]
    sharding: str | None
    world_size: int
    num_tables: int
    embedding_dim: int
    embedding_parameters: int
    dense_parameters: int
    global_batch_size: int
    step_ms: Quartiles
    parts: Parts | None = None
    bytes_per_step: dict[str, float] | None = None
    collectives_per_step: dict[str, float] = {}

    @property
    def median_ms(self) -> float:
        """Return the median step."""
        return self.step_ms.median

    @property
    def sent_bytes(self) -> float:
        """Return what one rank puts into the collectives of a step, 0 where it was not profiled."""
        return sum((self.bytes_per_step or {}).values())

    @property
    def parts_ms(self) -> dict[str, float]:
        """Return the median step by PARTS, {} where it was not profiled.

        Only a profiled window tells where time goes: its shares are laid on the step that was not profiled.
        """
        if not (p := self.parts):
            return {}
        times = (p.compute_ms, p.exposed_comm_ms - p.exposed_wait_ms, p.exposed_wait_ms, p.other_ms)
        return {name: ms * self.median_ms / sum(times) for name, ms in zip(PARTS, times, strict=True)}


@dataclass(frozen=True)
class Ratio:
    """A ratio of two median step times, and the range that their quartiles allow."""

    median: float
    low: float
    high: float

    @property
    def is_same(self) -> bool:
        """Return whether both arms may take as long."""
        return self.low <= 1 <= self.high


class Trial(Record):
    """Arms of one batch size over a network, or of one process measured `beside` those."""

    global_batch_size: int
    network: Network | None
    beside: Link | None = None
    arms: tuple[Arm, ...] = Field(alias="setups")

    @property
    def link(self) -> Link:
        """Return the network that the trial is about."""
        link = self.network.link if self.network else self.beside
        assert link is not None
        return link

    @property
    def label(self) -> str:
        """Return '1 Gbit/s, 50 µs (emulated), batch size 512'."""
        return f"{self.link.label}, batch size {self.global_batch_size:,}"

    def best(self, side: Side, compression: float | None = None) -> Arm | None:
        """Return the fastest arm of a side, at a compression where one is given; None where none was measured."""
        of_side = [a for a in self.arms if a.side == side and compression in (None, a.asked_compression)]
        return min(of_side, key=lambda arm: arm.median_ms, default=None)

    @property
    def fastest(self) -> Arm:
        """Return the arm with the shortest median step."""
        return min(self.arms, key=lambda arm: arm.median_ms)

    @property
    def winners(self) -> list[Arm]:
        """Return the fastest arm, and those that are the same as it within the spread."""
        return [arm for arm in self.arms if compare(arm, self.fastest).is_same]

    def over_sharded(self, arm: Arm) -> Ratio | None:
        """Return the ratio of an arm to the best sharded one; below 1 it is faster."""
        best = self.best("sharded")
        return compare(arm, best) if best else None


class CrossoverFile(Record):
    """A crossover.json of `launch.netlab`. trials: of one process and of several ranks, as they were measured."""

    status: str = "finished"
    environment: dict[str, Any] = {}
    trials: tuple[Trial, ...] = Field(alias="cells")

    def joined(self) -> list[Trial]:
        """Return a trial for each network and batch size, with the arms of one process measured beside it.

        Loopback comes first, then slower and slower networks; batch sizes rise.
        """
        alone = {(trial.link, trial.global_batch_size): trial.arms for trial in self.trials if not trial.network}
        joined = [
            trial.model_copy(update={"arms": trial.arms + alone.get((trial.link, trial.global_batch_size), ())})
            for trial in self.trials
            if trial.network
        ]
        return sorted(joined, key=lambda trial: (*_order(trial.link), trial.global_batch_size))


def _order(link: Link) -> tuple[float, float]:
    return -(link.rate_mbit or math.inf), link.delay_us or 0.0


def load_crossover(path: Path) -> CrossoverFile:
    """Return what a crossover.json holds. Raises ConfigError naming file and key."""
    try:
        return CrossoverFile.model_validate(json.loads(path.read_text()))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "top"
        raise ConfigError(f"{path}: not a crossover.json of netlab: {where}: {first['msg']}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from None


def compare(one: Arm, other: Arm) -> Ratio:
    """Return the ratio of step times, the one's over the other's."""
    a, b = one.step_ms, other.step_ms
    return Ratio(a.median / b.median, a.p25 / b.p75, a.p75 / b.p25)


@dataclass(frozen=True)
class Crossing:
    """Between two batch sizes a ratio passes 1.

    batch_size: where, on a straight line through the two in log-log. is_below_after: the ratio is below 1 above it.
    """

    batch_size: float
    is_below_after: bool
    between: tuple[float, float]


def find_crossings(ratios: Mapping[int, float]) -> list[Crossing]:
    """Return every place where a ratio passes 1. ratios: by batch size, rising."""
    crossings = []
    for (below, first), (above, second) in itertools.pairwise(ratios.items()):
        start, end = math.log(first), math.log(second)
        if (start > 0) != (end > 0):
            batch_size = below * (above / below) ** (start / (start - end))
            crossings.append(Crossing(batch_size, end < start, (below, above)))
    return crossings


def links_of(trials: Sequence[Trial]) -> list[Link]:
    """Return every network once, in the order of the trials."""
    return list(dict.fromkeys(trial.link for trial in trials))


def batch_sizes_of(trials: Sequence[Trial]) -> list[int]:
    """Return the batch sizes, rising."""
    return sorted({trial.global_batch_size for trial in trials})


def compressions_of(trials: Sequence[Trial], side: Side = "data_parallel") -> list[float]:
    """Return the compressions of a side, rising."""
    return sorted({arm.asked_compression for trial in trials for arm in trial.arms if arm.side == side})


def ratios_over_batch(trials: Sequence[Trial], link: Link, side: Side, compression: float) -> dict[int, Ratio]:
    """Return by batch size the ratio of a ROBE arm to the best sharded one over a network."""
    ratios = {}
    for trial in trials:
        arm = trial.best(side, compression) if trial.link == link else None
        if arm and (ratio := trial.over_sharded(arm)):
            ratios[trial.global_batch_size] = ratio
    return dict(sorted(ratios.items()))


def describe_ratios(ratios: Mapping[int, Ratio]) -> str:
    """Return 'faster, 0.31 to 0.55×' or 'slower up to a batch of about 1,900, faster above, 0.70 to 1.19×'."""
    medians = {batch_size: ratio.median for batch_size, ratio in ratios.items()}
    span = " to ".join(f"{ratio:.2f}" for ratio in dict.fromkeys((min(medians.values()), max(medians.values()))))
    words = []
    for crossing in find_crossings(medians):
        is_clear = not any(ratios[int(batch_size)].is_same for batch_size in crossing.between)
        words.append(
            f"{'slower' if crossing.is_below_after else 'faster'} up to a batch of about "
            f"{format_rounded(crossing.batch_size)}{'' if is_clear else ' (within the spread)'}"
        )
    last = ("faster" if list(medians.values())[-1] <= 1 else "slower") + " above" * bool(words)
    same = [f"{batch_size:,}" for batch_size, ratio in ratios.items() if ratio.is_same]
    within = f" (within the spread at {', '.join(same)})" if same and not words else ""
    return f"{', '.join([*words, last])}, {span}×{within}"


def describe_outcome(trials: Sequence[Trial]) -> list[str]:
    """Return a line for every network and side of ROBE: each compression against the best sharded arm."""
    lines = []
    for link, (side, words) in itertools.product(links_of(trials), ROBE_SIDES.items()):
        by_compression = {c: ratios_over_batch(trials, link, side, c) for c in compressions_of(trials, side)}
        parts = [f"{c:g}× {describe_ratios(ratios)}" for c, ratios in by_compression.items() if ratios]
        if parts:
            lines.append(f"{link.label}, ROBE {words}: {'; '.join(parts)}")
    return lines


def describe_doubts(trials: Sequence[Trial]) -> list[str]:
    """Return a line for every network that was not as requested, and for packets that were lost."""
    lines = []
    for trial in trials:
        network = trial.network
        if network and not network.is_as_asked:
            lines.append(
                f"{trial.label}: the network carried {network.measured_rate_mbit:,.0f} Mbit/s each way and took "
                f"{network.measured_round_trip_us:,.0f} µs there and back, more than 25 % off: read it as that network"
            )
        if network and network.dropped_packets:
            lines.append(f"{trial.label}: {network.dropped_packets:,} packets were dropped by a full queue")
    return lines
