"""Where sharded tables and where ROBE makes the faster step, over networks and batch sizes: from measured cells.

A cell is one network at one global batch size; the setups of its two or more ranks were measured in turns in one job,
ROBE in one process, which has no network, in a job of its own right before. A ratio is of median step times.
It has a range, from the lowest that the quartiles of both allow to the highest; where 1 lies within, both are "same".
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Side = Literal["sharded", "data_parallel", "single"]
ROBE_SIDES: dict[Side, str] = {"data_parallel": "data-parallel", "single": "in one process"}
PARTS = ("computing", "exposed communication", "waiting", "other")


@dataclass(frozen=True)
class Link:
    """A network as asked for: Mbit/s each way and one-way µs. Both None: this machine's loopback, not emulated."""

    rate_mbit: float | None
    delay_us: float | None

    @property
    def is_emulated(self) -> bool:
        return self.rate_mbit is not None

    @property
    def label(self) -> str:
        if self.rate_mbit is None or self.delay_us is None:
            return "loopback (measured)"
        rate = f"{self.rate_mbit / 1000:g} Gbit/s" if self.rate_mbit >= 1000 else f"{self.rate_mbit:g} Mbit/s"
        delay = f"{self.delay_us / 1000:g} ms" if self.delay_us >= 1000 else f"{self.delay_us:g} µs"
        return f"{rate}, {delay} (emulated)"


@dataclass(frozen=True)
class LinkAsFound:
    """What was measured of it before a cell. dropped: packets, in the cell; relay_cores: emulating took, 1 = a core."""

    rate_mbit: float
    round_trip_us: float
    is_as_asked: bool
    dropped: int
    relay_cores: float


@dataclass(frozen=True)
class Setup:
    """compression: asked for, 1 of sharded tables. parts_ms: by PARTS, their sum is the median; {}: not profiled.

    Where the time goes is known of a profiled window, whose shares are laid on the step that was not profiled.
    """

    label: str
    side: Side
    compression: float
    median_ms: float
    p25_ms: float
    p75_ms: float
    steps: int
    parts_ms: Mapping[str, float]
    sent_bytes: float


@dataclass(frozen=True)
class Ratio:
    """Of the median step times of two setups, and the range that their quartiles allow."""

    median: float
    low: float
    high: float

    @property
    def is_same(self) -> bool:
        return self.low <= 1 <= self.high


@dataclass(frozen=True)
class Cell:
    """One network at one batch size: its setups, and those of one process measured beside them."""

    link: Link
    found: LinkAsFound
    global_batch_size: int
    setups: Sequence[Setup]

    def best(self, side: Side, compression: float | None = None) -> Setup | None:
        """The fastest of a side, of those at a compression where one is given; None: none was measured."""
        of_side = [s for s in self.setups if s.side == side and compression in (None, s.compression)]
        return min(of_side, key=lambda setup: setup.median_ms, default=None)

    @property
    def fastest(self) -> Setup:
        return min(self.setups, key=lambda setup: setup.median_ms)

    @property
    def winners(self) -> list[Setup]:
        """The fastest setup, and those that are the same as it within the spread."""
        return [s for s in self.setups if compare(s, self.fastest).is_same]

    def over_sharded(self, setup: Setup) -> Ratio | None:
        """Of a setup to the best sharded one; below 1 it is faster."""
        best = self.best("sharded")
        return compare(setup, best) if best else None


@dataclass(frozen=True)
class Crossover:
    """Between two measured batch sizes the ratio to the best sharded setup passes 1.

    global_batch_size: where, on a straight line through the two in log-log. is_clear: neither of the two is "same".
    """

    global_batch_size: float
    robe_is_faster_above: bool
    is_clear: bool


def compare(one: Setup, other: Setup) -> Ratio:
    """Of step times, the one's over the other's."""
    return Ratio(one.median_ms / other.median_ms, one.p25_ms / other.p75_ms, one.p75_ms / other.p25_ms)


def read_cells(document: Mapping[str, Any]) -> list[Cell]:
    """The cells of a crossover.json, loopback first, then slower and slower networks; batch sizes rising."""
    alone = {
        (_read_link(cell["beside"]), cell["global_batch_size"]): cell["setups"]
        for cell in document["cells"]
        if cell["network"] is None
    }
    cells = []
    for cell in document["cells"]:
        if network := cell["network"]:
            link, batch_size = _read_link(network), cell["global_batch_size"]
            setups = [_read_setup(setup) for setup in (*cell["setups"], *alone.get((link, batch_size), ()))]
            cells.append(Cell(link, _read_found(network), batch_size, setups))
    return sorted(cells, key=lambda cell: (*_order(cell.link), cell.global_batch_size))


def _order(link: Link) -> tuple[float, float]:
    return -(link.rate_mbit or math.inf), link.delay_us or 0.0


def _read_link(network: Mapping[str, Any]) -> Link:
    return Link(network["rate_mbit"], network["delay_us"])


def _read_found(network: Mapping[str, Any]) -> LinkAsFound:
    return LinkAsFound(
        network["measured_rate_mbit"],
        network["measured_round_trip_us"],
        network["is_as_asked"],
        network["dropped_packets"],
        network["relay_cores"],
    )


def _read_setup(setup: Mapping[str, Any]) -> Setup:
    step = setup["step_ms"]
    return Setup(
        label=setup["label"],
        side=setup["side"],
        compression=setup["asked_compression"],
        median_ms=step["median"],
        p25_ms=step["p25"],
        p75_ms=step["p75"],
        steps=step["n"],
        parts_ms=_read_parts(setup),
        sent_bytes=sum(setup.get("bytes_per_step", {}).values()),
    )


def _read_parts(setup: Mapping[str, Any]) -> dict[str, float]:
    if "parts" not in setup:
        return {}
    found = setup["parts"]
    exposed, waiting = found["exposed_comm_ms"], found["exposed_wait_ms"]
    parts = dict(zip(PARTS, (found["compute_ms"], exposed - waiting, waiting, found["other_ms"]), strict=True))
    scale = setup["step_ms"]["median"] / sum(parts.values())
    return {name: ms * scale for name, ms in parts.items()}


def links_of(cells: Sequence[Cell]) -> list[Link]:
    """Every network once, in the order of the cells."""
    return list(dict.fromkeys(cell.link for cell in cells))


def batch_sizes_of(cells: Sequence[Cell]) -> list[int]:
    return sorted({cell.global_batch_size for cell in cells})


def compressions_of(cells: Sequence[Cell], side: Side = "data_parallel") -> list[float]:
    return sorted({setup.compression for cell in cells for setup in cell.setups if setup.side == side})


def ratios_over_batch(cells: Sequence[Cell], link: Link, side: Side, compression: float) -> dict[int, Ratio]:
    """Batch size -> ratio of that ROBE setup to the best sharded one over a network."""
    found = {}
    for cell in cells:
        setup = cell.best(side, compression) if cell.link == link else None
        if setup and (ratio := cell.over_sharded(setup)):
            found[cell.global_batch_size] = ratio
    return dict(sorted(found.items()))


def find_crossovers(ratios: Mapping[int, Ratio]) -> list[Crossover]:
    """Every place between two measured batch sizes where the ratio passes 1. ratios: by batch size, rising."""
    crossovers = []
    for (below, first), (above, second) in itertools.pairwise(ratios.items()):
        start, end = math.log(first.median), math.log(second.median)
        if (start > 0) == (end > 0):
            continue
        share = start / (start - end)
        crossovers.append(
            Crossover(below * (above / below) ** share, end < start, not (first.is_same or second.is_same))
        )
    return crossovers


def describe_ratios(ratios: Mapping[int, Ratio]) -> str:
    """'faster, 0.31 to 0.55×' or 'slower up to a batch of about 1,900, faster above, 0.70 to 1.19×'"""
    medians = [ratio.median for ratio in ratios.values()]
    span = " to ".join(f"{ratio:.2f}" for ratio in dict.fromkeys((min(medians), max(medians))))
    words = [
        f"{_word(not crossover.robe_is_faster_above)} up to a batch of about {_two_digits(crossover.global_batch_size)}"
        f"{'' if crossover.is_clear else ' (within the spread)'}"
        for crossover in find_crossovers(ratios)
    ]
    last = _word(medians[-1] <= 1) + " above" * bool(words)
    same = [f"{batch_size:,}" for batch_size, ratio in ratios.items() if ratio.is_same]
    within = f" (within the spread at {', '.join(same)})" if same and not words else ""
    return f"{', '.join([*words, last])}, {span}×{within}"


def _word(is_faster: bool) -> str:
    return "faster" if is_faster else "slower"


def _two_digits(value: float) -> str:
    return f"{round(value, 1 - math.floor(math.log10(value))):,.0f}"


def describe_outcome(cells: Sequence[Cell]) -> list[str]:
    """A line for every network and side of ROBE: each compression against the best sharded setup."""
    lines = []
    for link, (side, words) in itertools.product(links_of(cells), ROBE_SIDES.items()):
        found = {c: ratios_over_batch(cells, link, side, c) for c in compressions_of(cells, side)}
        parts = [f"{c:g}× {describe_ratios(ratios)}" for c, ratios in found.items() if ratios]
        if parts:
            lines.append(f"{link.label}, ROBE {words}: {'; '.join(parts)}")
    return lines


def describe_doubts(cells: Sequence[Cell]) -> list[str]:
    """Networks that were not what was asked for, and packets that were lost."""
    lines = []
    for cell in cells:
        found, where = cell.found, f"{cell.link.label}, batch size {cell.global_batch_size:,}"
        if not found.is_as_asked:
            lines.append(
                f"{where}: the network carried {found.rate_mbit:,.0f} Mbit/s each way and took "
                f"{found.round_trip_us:,.0f} µs there and back, more than 25 % off: read it as that network"
            )
        if found.dropped:
            lines.append(f"{where}: {found.dropped:,} packets were dropped by a full queue")
    return lines
