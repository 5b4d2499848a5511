"""The cells of a sweep over networks: which setups each holds, how one is measured, and what is kept of it."""

import contextlib
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from configs.load import dump_config, load_config
from launch.netlab.emulated_network import Network, emulated_network, local_network
from launch.netlab.network_ranks import run_ranks
from recsys.cost.crossover import ROBE_SIDES, Link, Side
from recsys.runs.run_dir import write_atomically
from recsys.train.registry import CHOICES

ENTRY = (sys.executable, "-m", "launch.runners.measure_steps")
VERSION = 1
LOOPBACK = Link(rate_mbit=None, delay_us=None)
_TIMEOUT_S = 1800


@dataclass(frozen=True)
class Sweep:
    """What is measured. family: directory of sharded.toml, robe.toml and robe_single.toml.

    links: loopback aside, which is always measured; overrides: section.key=value, of all setups.
    """

    links: Sequence[Link]
    batch_sizes: Sequence[int]
    compressions: Sequence[float]
    shardings: Sequence[str]
    family: str = "configs/demo"
    hosts: int = 2
    rounds: int = 4
    steps: int = 5
    overrides: Sequence[str] = ()


@dataclass(frozen=True)
class Setup:
    """label, config, overrides: as a plan of launch.runners.measure_steps has them."""

    label: str
    side: Side
    compression: float
    config: str
    overrides: Sequence[str]


@dataclass(frozen=True, eq=False)
class Task:
    """A network at a batch size, to be measured. setups: of all hosts; alone: of one process with the threads of all.

    rounds, steps: of each setup, in each round.
    """

    link: Link
    hosts: int
    threads: int
    global_batch_size: int
    setups: Sequence[Setup]
    alone: Sequence[Setup]
    rounds: int
    steps: int

    @property
    def label(self) -> str:
        return f"{self.link.label}, batch size {self.global_batch_size:,}"

    @property
    def file_name(self) -> str:
        where = f"{self.link.rate_mbit:g}mbit_{self.link.delay_us:g}us" if self.link.is_emulated else "loopback"
        return f"{where}_batch{self.global_batch_size}.json"

    @property
    def weight(self) -> float:
        """About the time that it takes, in that of a cell over a fast network."""
        return 1 + (self.global_batch_size / self.link.rate_mbit / 40 if self.link.rate_mbit else 0)

    def plan(self, setups: Sequence[Setup]) -> dict[str, Any]:
        """For launch.runners.measure_steps."""
        listed = [{"label": s.label, "config": s.config, "overrides": list(s.overrides)} for s in setups]
        few = max(2, self.steps // 2)
        return {"rounds": self.rounds, "steps": self.steps, "warm_up": few, "profile_steps": few, "setups": listed}

    @cached_property
    def fingerprint(self) -> str:
        """Of all settings that what is measured depends on. Raises ConfigError for a mistake in a config."""
        setups = [*self.alone, *self.setups]
        configs = [dump_config(load_config(s.config, s.overrides, CHOICES), CHOICES) for s in setups]
        parts = [self.link.rate_mbit, self.link.delay_us, self.hosts, self.threads, self.plan(setups), configs]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def build_tasks(sweep: Sweep) -> list[Task]:
    """The cells of a sweep, loopback first. Raises ConfigError."""
    threads = load_config(f"{sweep.family}/robe.toml", sweep.overrides, CHOICES).parallelism.threads_per_rank
    tasks = []
    for link in (LOOPBACK, *sweep.links):
        for batch_size in sweep.batch_sizes:
            setups, alone = _networked_setups(sweep, batch_size), _single_setups(sweep, batch_size, threads)
            task = Task(link, sweep.hosts, threads, batch_size, setups, alone, sweep.rounds, sweep.steps)
            _ = task.fingerprint  # reads the configs: a mistake in one is found before anything runs
            tasks.append(task)
    return tasks


def _shared_overrides(sweep: Sweep, batch_size: int, ranks: int) -> tuple[str, ...]:
    return (
        *sweep.overrides,
        "run.device=cpu",
        f"training.global_batch_size={batch_size}",
        f"evaluation.global_batch_size={batch_size}",
        f"parallelism.world_size={ranks}",
    )


def _networked_setups(sweep: Sweep, batch_size: int) -> list[Setup]:
    shared = _shared_overrides(sweep, batch_size, sweep.hosts)
    config = f"{sweep.family}/sharded.toml"
    setups = [
        Setup(name.replace("_", "-"), "sharded", 1.0, config, (*shared, f"parallelism.sharding={name}"))
        for name in sweep.shardings
    ]
    return setups + _robe_setups(sweep, "data_parallel", f"{sweep.family}/robe.toml", shared)


def _single_setups(sweep: Sweep, batch_size: int, threads: int) -> list[Setup]:
    shared = _shared_overrides(sweep, batch_size, 1)
    shared = (*shared, f"parallelism.threads_per_rank={sweep.hosts * threads}")
    return _robe_setups(sweep, "single", f"{sweep.family}/robe_single.toml", shared)


def _robe_setups(sweep: Sweep, side: Side, config: str, shared: tuple[str, ...]) -> list[Setup]:
    return [
        Setup(
            f"ROBE {compression:g}×, {ROBE_SIDES[side].removeprefix('in ')}",
            side,
            compression,
            config,
            (*shared, f"embedding.compression={compression:g}"),
        )
        for compression in sweep.compressions
    ]


def read_cell(task: Task, directory: Path) -> dict[str, Any] | None:
    """The cell as it was measured with the same settings; None where it was not."""
    try:
        cell = json.loads((directory / task.file_name).read_text())
    except (OSError, ValueError):
        return None
    is_same = cell.get("version") == VERSION and cell.get("fingerprint") == task.fingerprint
    return cell if is_same else None


def write_cell(task: Task, cell: dict[str, Any], directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / task.file_name, json.dumps(cell, indent=2))


def measure_cell(task: Task) -> dict[str, Any]:
    """One process first, right before what it is compared with; then the network, and the steps over it.

    "cells" are those of crossover.json: one without a network, beside which it was measured, and one with it. Raises
    RankFailed, or RuntimeError where the network cannot be made.
    """
    started = time.perf_counter()
    alone = _measure_setups(task, task.alone, local_network(1), task.hosts * task.threads)
    with _build_network(task.link, task.hosts) as network:
        described = describe_network(network)
        begun, before = time.perf_counter(), network.read_counts() if network.is_emulated else None
        together = _measure_setups(task, task.setups, network, task.threads)
        if before:
            after, seconds = network.read_counts(), time.perf_counter() - begun
            described["dropped_packets"] = after.dropped - before.dropped
            described["relay_cores"] = (after.cpu_s - before.cpu_s) / seconds
    beside = {"rate_mbit": task.link.rate_mbit, "delay_us": task.link.delay_us}
    return {
        "version": VERSION,
        "fingerprint": task.fingerprint,
        "seconds": round(time.perf_counter() - started, 1),
        "cells": [{"network": None, "beside": beside, **alone}, {"network": described, **together}],
    }


def _measure_setups(task: Task, setups: Sequence[Setup], network: Network, threads: int) -> dict[str, Any]:
    plan = task.plan(setups)
    with tempfile.TemporaryDirectory() as directory:
        asked, output = Path(directory, "plan.json"), Path(directory, "output.json")
        asked.write_text(json.dumps(plan))
        environment = {"OMP_NUM_THREADS": str(threads)}
        run_ranks(network, [*ENTRY, str(asked), str(output)], timeout_s=_TIMEOUT_S, env=environment)
        measured = json.loads(output.read_text())
    sides = [{"side": setup.side, "asked_compression": setup.compression} for setup in setups]
    return {
        "global_batch_size": task.global_batch_size,
        "rounds": task.rounds,
        "steps": task.steps,
        "environment": measured["environment"],
        "setups": [found | side for found, side in zip(measured["setups"], sides, strict=True)],
    }


def _build_network(link: Link, hosts: int) -> contextlib.AbstractContextManager[Network]:
    if link.rate_mbit is None or link.delay_us is None:
        return contextlib.nullcontext(local_network(hosts))
    return emulated_network(hosts, rate_mbit=link.rate_mbit, delay_us=link.delay_us)


def describe_network(network: Network) -> dict[str, Any]:
    """As asked for and as measured now; what its relay counts is not in it yet."""
    speed = network.measure()
    return {
        "emulated": network.is_emulated,
        "hosts": len(network.hosts),
        "rate_mbit": network.rate_mbit,
        "delay_us": network.delay_us,
        "measured_rate_mbit": speed.rate_mbit,
        "measured_round_trip_us": speed.round_trip_us,
        "is_as_asked": network.is_as_asked(speed),
        "dropped_packets": 0,
        "relay_cores": 0.0,
    }
