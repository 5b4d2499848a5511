"""The trials of a sweep over networks: which arms each holds, how one is measured, and what is kept of it."""

import contextlib
import hashlib
import itertools
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
from recsys.runs.run_directory import write_atomically
from recsys.train.registry import CHOICES

ENTRY = (sys.executable, "-m", "launch.runners.measure_steps")
VERSION = 1
LOOPBACK = Link(rate_mbit=None, delay_us=None)
_TIMEOUT_S = 1800


@dataclass(frozen=True)
class Sweep:
    """Say which networks, batch sizes and arms are measured.

    family: directory of sharded.toml, robe.toml and robe_single.toml; links: loopback aside, which is always measured;
    overrides: section.key=value, of all arms.
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
class Arm:
    """Describe one side at one compression. label, config, overrides: as in a plan of launch.runners.measure_steps."""

    label: str
    side: Side
    compression: float
    config: str
    overrides: Sequence[str]


@dataclass(frozen=True, eq=False)
class Trial:
    """Describe a network at a batch size, to be measured. arms: of all hosts; alone: of one process, all threads.

    rounds, steps: of each arm, in each round.
    """

    link: Link
    hosts: int
    threads: int
    global_batch_size: int
    arms: Sequence[Arm]
    alone: Sequence[Arm]
    rounds: int
    steps: int

    @property
    def label(self) -> str:
        """Return network and batch size in words."""
        return f"{self.link.label}, batch size {self.global_batch_size:,}"

    @property
    def file_name(self) -> str:
        """Return where the trial is kept."""
        where = f"{self.link.rate_mbit:g}mbit_{self.link.delay_us:g}us" if self.link.is_emulated else "loopback"
        return f"{where}_batch{self.global_batch_size}.json"

    @property
    def weight(self) -> float:
        """Return about the time that it takes, in that of a trial over a fast network."""
        return 1 + (self.global_batch_size / self.link.rate_mbit / 40 if self.link.rate_mbit else 0)

    def plan(self, arms: Sequence[Arm]) -> dict[str, Any]:
        """Return the plan for launch.runners.measure_steps."""
        listed = [{"label": a.label, "config": a.config, "overrides": list(a.overrides)} for a in arms]
        few = max(2, self.steps // 2)
        return {"rounds": self.rounds, "steps": self.steps, "warm_up": few, "profile_steps": few, "setups": listed}

    @cached_property
    def fingerprint(self) -> str:
        """Return a hash of all settings that the steps depend on. Raises ConfigError for a mistake in a config."""
        arms = [*self.alone, *self.arms]
        configs = [dump_config(load_config(a.config, a.overrides, CHOICES), CHOICES) for a in arms]
        parts = [self.link.rate_mbit, self.link.delay_us, self.hosts, self.threads, self.plan(arms), configs]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def build_trials(sweep: Sweep) -> list[Trial]:
    """Return the trials of a sweep, loopback first. Raises ConfigError."""
    threads = load_config(f"{sweep.family}/robe.toml", sweep.overrides, CHOICES).parallelism.threads_per_rank
    trials = []
    for link, batch_size in itertools.product((LOOPBACK, *sweep.links), sweep.batch_sizes):
        arms, alone = _networked_arms(sweep, batch_size), _single_arms(sweep, batch_size, threads)
        trial = Trial(link, sweep.hosts, threads, batch_size, arms, alone, sweep.rounds, sweep.steps)
        _ = trial.fingerprint  # reads the configs: a mistake in one is reported before anything runs
        trials.append(trial)
    return trials


def _shared_overrides(sweep: Sweep, batch_size: int, ranks: int) -> tuple[str, ...]:
    return (
        *sweep.overrides,
        "run.device=cpu",
        f"training.global_batch_size={batch_size}",
        f"evaluation.global_batch_size={batch_size}",
        f"parallelism.world_size={ranks}",
    )


def _networked_arms(sweep: Sweep, batch_size: int) -> list[Arm]:
    shared = _shared_overrides(sweep, batch_size, sweep.hosts)
    config = f"{sweep.family}/sharded.toml"
    arms = [
        Arm(name.replace("_", "-"), "sharded", 1.0, config, (*shared, f"parallelism.sharding={name}"))
        for name in sweep.shardings
    ]
    return arms + _robe_arms(sweep, "data_parallel", f"{sweep.family}/robe.toml", shared)


def _single_arms(sweep: Sweep, batch_size: int, threads: int) -> list[Arm]:
    shared = _shared_overrides(sweep, batch_size, 1)
    shared = (*shared, f"parallelism.threads_per_rank={sweep.hosts * threads}")
    return _robe_arms(sweep, "single", f"{sweep.family}/robe_single.toml", shared)


def _robe_arms(sweep: Sweep, side: Side, config: str, shared: tuple[str, ...]) -> list[Arm]:
    return [
        Arm(
            f"ROBE {compression:g}×, {ROBE_SIDES[side].removeprefix('in ')}",
            side,
            compression,
            config,
            (*shared, f"embedding.compression={compression:g}"),
        )
        for compression in sweep.compressions
    ]


def load_trial(trial: Trial, directory: Path) -> dict[str, Any] | None:
    """Return the trial as it was measured with the same settings, None where it was not."""
    try:
        measured = json.loads((directory / trial.file_name).read_text())
    except (OSError, ValueError):
        return None
    is_same = measured.get("version") == VERSION and measured.get("fingerprint") == trial.fingerprint
    return measured if is_same else None


def save_trial(trial: Trial, measured: dict[str, Any], directory: Path) -> None:
    """Keep a measured trial."""
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / trial.file_name, json.dumps(measured, indent=2))


def measure_trial(trial: Trial) -> dict[str, Any]:
    """Measure one process, right before what it is compared with; then the network, and the steps over it.

    "cells" are those of crossover.json: one without a network, beside which it was measured, and one with it. Raises
    RankFailed, or RuntimeError where the network cannot be started.
    """
    started = time.perf_counter()
    alone = _measure_arms(trial, trial.alone, local_network(1), trial.hosts * trial.threads)
    with _build_network(trial.link, trial.hosts) as network:
        described = describe_network(network)
        started_steps, before = time.perf_counter(), network.read_counts() if network.is_emulated else None
        together = _measure_arms(trial, trial.arms, network, trial.threads)
        if before:
            after, seconds = network.read_counts(), time.perf_counter() - started_steps
            described["dropped_packets"] = after.dropped - before.dropped
            described["relay_cores"] = (after.cpu_s - before.cpu_s) / seconds
    beside = {"rate_mbit": trial.link.rate_mbit, "delay_us": trial.link.delay_us}
    return {
        "version": VERSION,
        "fingerprint": trial.fingerprint,
        "seconds": round(time.perf_counter() - started, 1),
        "cells": [{"network": None, "beside": beside, **alone}, {"network": described, **together}],
    }


def _measure_arms(trial: Trial, arms: Sequence[Arm], network: Network, threads: int) -> dict[str, Any]:
    plan = trial.plan(arms)
    with tempfile.TemporaryDirectory() as directory:
        plan_file, output = Path(directory, "plan.json"), Path(directory, "output.json")
        plan_file.write_text(json.dumps(plan))
        environment = {"OMP_NUM_THREADS": str(threads)}
        run_ranks(network, [*ENTRY, str(plan_file), str(output)], timeout_s=_TIMEOUT_S, env=environment)
        measured = json.loads(output.read_text())
    sides = [{"side": arm.side, "asked_compression": arm.compression} for arm in arms]
    return {
        "global_batch_size": trial.global_batch_size,
        "rounds": trial.rounds,
        "steps": trial.steps,
        "environment": measured["environment"],
        "setups": [steps | side for steps, side in zip(measured["setups"], sides, strict=True)],
    }


def _build_network(link: Link, hosts: int) -> contextlib.AbstractContextManager[Network]:
    if link.rate_mbit is None or link.delay_us is None:
        return contextlib.nullcontext(local_network(hosts))
    return emulated_network(hosts, rate_mbit=link.rate_mbit, delay_us=link.delay_us)


def describe_network(network: Network) -> dict[str, Any]:
    """Return the network as requested and as measured now; what its relay counts is not in it yet."""
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
