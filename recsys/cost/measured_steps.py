"""Measured steps as the cost model sees them: read from the crossover.json of launch.netlab, with bytes by
formula.

A network's speed is one number each for rate and delay, whatever its single cells found.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs.load import ConfigError
from recsys.cost.collective_cost import Link, all_gather_s, all_reduce_s, all_to_all_s, reduce_scatter_s

_FLOAT, _ID = 4, 8
_FORMULAS: dict[str, Callable[[float, int, Link], float]] = {
    "all_to_all": all_to_all_s,
    "reduce_scatter": reduce_scatter_s,
    "all_gather": lambda own, ranks, link: all_gather_s(ranks * own, ranks, link),  # counted is what a rank puts in
    "all_reduce": all_reduce_s,
}
_A_MESSAGE, _A_BYTE = Link(1.0, 0.0), Link(0.0, 1.0)
"""Links over which a collective takes as long as it has messages, or bytes to send."""


@dataclass(frozen=True)
class MeasuredStep:
    """One setup over one network at one batch size. network "": one process. spread: of the quartiles over the median.

    rate: bytes a ms; delay_ms: one way; messages, wire_bytes: of one rank in sequence, across the network.
    counted_bytes: by the profile, of all collectives, None without one; stated_bytes: by formula.
    """

    kind: str
    label: str
    network: str
    is_emulated: bool
    global_batch_size: int
    ranks: int
    array_parameters: float
    rate: float
    delay_ms: float
    messages: float
    wire_bytes: float
    stated_bytes: float
    counted_bytes: float | None
    step_ms: float
    spread: float

    @property
    def local_batch_size(self) -> float:
        return self.global_batch_size / self.ranks

    @property
    def origin(self) -> str:
        return "emulated" if self.is_emulated else "measured"

    @property
    def where(self) -> str:
        return self.network or "one process"


def read_steps(path: Path) -> list[MeasuredStep]:
    """The setups of a crossover.json of launch.netlab.command. Raises ConfigError naming file and key."""
    try:
        document = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from None
    cells = document.get("cells") if isinstance(document, dict) else None
    if not isinstance(cells, list):
        raise ConfigError(f"{path}: has no list 'cells': give the crossover.json that launch.netlab writes")
    try:
        for cell in cells:
            for setup in cell["setups"]:
                if setup["step_ms"]["median"] <= 0:
                    raise ConfigError(f"{path}: {setup['label']}: a step of {setup['step_ms']['median']:g} ms")
        speeds = _speeds(cells)
        return [_read_step(cell, setup, speeds) for cell in cells for setup in cell["setups"]]
    except KeyError as error:
        raise ConfigError(f"{path}: a cell has no {error.args[0]!r}") from None


def _name_network(network: Mapping[str, Any] | None) -> str:
    if network is None:
        return ""
    if not network["emulated"]:
        return "loopback"
    return f"{network['rate_mbit']:g} Mbit/s, {network['delay_us']:g} µs"


def _speeds(cells: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Network -> (bytes a ms, one-way ms). The rate is the one asked for where that was found within a quarter, else
    the median of what its cells found: a measurement lasts a moment, and something may disturb it."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for cell in cells:
        if cell["network"] is not None:
            found.setdefault(_name_network(cell["network"]), []).append(cell["network"])
    speeds = {}
    for name, networks in found.items():
        rate = float(np.median([network["measured_rate_mbit"] for network in networks]))
        asked = networks[0]["rate_mbit"] if networks[0]["emulated"] else None
        if asked is not None and abs(rate / asked - 1) < 0.25:
            rate = asked
        round_trip_us = float(np.median([network["measured_round_trip_us"] for network in networks]))
        speeds[name] = 1e3 / 8 * rate, round_trip_us / 2e3
    return speeds


def _read_step(
    cell: Mapping[str, Any], setup: Mapping[str, Any], speeds: Mapping[str, tuple[float, float]]
) -> MeasuredStep:
    name, time = _name_network(cell["network"]), setup["step_ms"]
    rate, delay_ms = speeds.get(name, (np.inf, 0.0))
    ranks, counts = setup["world_size"], setup.get("collectives_per_step", {})
    stated = count_bytes(setup)
    is_robe = setup["placement"] == "replicate"
    if unknown := counts.keys() - _FORMULAS.keys():
        raise KeyError(f"known collective, only {sorted(unknown)}")
    return MeasuredStep(
        kind=setup["sharding"] or ("data_parallel" if ranks > 1 else "single"),
        label=setup["label"],
        network=name,
        is_emulated=bool(cell["network"] and cell["network"]["emulated"]),
        global_batch_size=setup["global_batch_size"],
        ranks=ranks,
        array_parameters=setup["embedding_parameters"] if is_robe else 0.0,
        rate=rate,
        delay_ms=delay_ms,
        messages=sum(count * _FORMULAS[kind](0, ranks, _A_MESSAGE) for kind, count in counts.items()),
        wire_bytes=sum(_FORMULAS[kind](size, ranks, _A_BYTE) for kind, size in stated.items()),
        stated_bytes=sum(stated.values()),
        counted_bytes=sum(setup["bytes_per_step"].values()) if "bytes_per_step" in setup else None,
        step_ms=time["median"],
        spread=(time["p75"] - time["p25"]) / time["median"],
    )


def count_bytes(setup: Mapping[str, Any]) -> dict[str, float]:
    """What one rank puts into the collectives of a step, by formula: those of `recsys.cost.cost_model`, as gloo has
    them.

    Lengths are sent as int64, to every rank where rows are over all; gloo's reduce-scatter is an all-reduce.
    """
    p = setup["world_size"]
    if p == 1:
        return {}
    layers = _FLOAT * setup["dense_parameters"]
    if setup["placement"] == "replicate":
        return {"all_reduce": layers + _FLOAT * setup["embedding_parameters"]}
    batch, features = setup["global_batch_size"], setup["num_tables"]
    bags = batch / p * features
    pooled = _FLOAT * batch * features * setup["embedding_dim"]
    if setup["sharding"] == "row_wise":
        return {
            "all_to_all": bags * (_ID + _ID * p),
            "all_reduce": pooled + layers,
            "all_gather": pooled / p,
        }
    return {"all_to_all": bags * 2 * _ID + 2 * pooled / p, "all_reduce": layers}


def worst_byte_error(steps: Sequence[MeasuredStep]) -> float | None:
    """The largest relative difference between bytes by formula and as counted; None where none were counted."""
    errors = [abs(s.stated_bytes / s.counted_bytes - 1) for s in steps if s.counted_bytes]
    return max(errors, default=None)
