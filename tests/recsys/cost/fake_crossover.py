"""A crossover.json as launch.netlab writes it, its steps made from known constants."""

from typing import Any

from recsys.cost.crossover import Arm
from recsys.cost.fit import count_bytes

NETWORKS = [(None, None), (10_000, 50), (1000, 50), (1000, 1000), (100, 1000)]
BATCHES = (512, 2048, 8192)
COMPRESSIONS = (100, 1000, 10_000)
FIXED = {"table_wise": 4.0, "row_wise": 6.0, "data_parallel": 3.0, "single": 1.0}
COMPUTING = {"table_wise": 11.0, "row_wise": 13.0, "data_parallel": 9.0, "single": 10.0}
ARRAY, TRIPS, WIRE = 2.5, 3.0, 1.2
COLLECTIVES = {
    "table_wise": {"all_to_all": 5, "all_reduce": 1},
    "row_wise": {"all_to_all": 3, "all_reduce": 2, "all_gather": 1},
    "data_parallel": {"all_reduce": 2},
    "single": {},
}
MESSAGES = {"all_to_all": 1, "all_reduce": 2, "all_gather": 1}  # of two ranks
LOOPBACK_MBIT, LOOPBACK_US = 20_000, 20


def make_arm(kind: str, compression: float, batch: int, rate_mbit: float, delay_us: float) -> dict[str, Any]:
    is_sharded = kind in ("table_wise", "row_wise")
    arm = {
        "label": f"{kind} {compression:g}",
        "side": "sharded" if is_sharded else kind,
        "asked_compression": compression,
        "placement": "shard" if is_sharded else "replicate",
        "sharding": kind if is_sharded else None,
        "world_size": 1 if kind == "single" else 2,
        "num_tables": 26,
        "embedding_dim": 16,
        "embedding_parameters": int(54e6 / compression),
        "dense_parameters": 27_601,
        "global_batch_size": batch,
        "collectives_per_step": dict(COLLECTIVES[kind]),
        "step_ms": {"median": 1.0, "p25": 1.0, "p75": 1.0, "n": 20},
    }
    stated = count_bytes(Arm(**arm))
    arm["bytes_per_step"] = {name: 1.00001 * size for name, size in stated.items()}
    rows = batch / arm["world_size"] / 1000
    ms = FIXED[kind] + COMPUTING[kind] * rows + (0 if is_sharded else ARRAY * arm["embedding_parameters"] / 1e6)
    # Of two ranks half of an all-to-all's bytes cross, all of an all-reduce's, and of an all-gather what was put in.
    crosses = {"all_to_all": 0.5, "all_reduce": 1.0, "all_gather": 1.0}
    wire = sum(size * crosses[name] for name, size in stated.items())
    messages = sum(MESSAGES[name] * count for name, count in COLLECTIVES[kind].items())
    ms += TRIPS * messages * delay_us / 1000 + WIRE * wire / (rate_mbit * 1e6 / 8) * 1e3
    arm["step_ms"] = {"median": ms, "p25": 0.95 * ms, "p75": 1.05 * ms, "n": 20}
    return arm


def make_document() -> dict[str, Any]:
    """The steps of one process are the first three trials, beside loopback."""
    beside = {"rate_mbit": None, "delay_us": None}
    trials: list[dict[str, Any]] = [
        {"network": None, "beside": beside, "global_batch_size": batch,
         "setups": [make_arm("single", c, batch, LOOPBACK_MBIT, 0) for c in COMPRESSIONS]}
        for batch in BATCHES
    ]  # fmt: skip
    for asked in NETWORKS:
        rate, delay_us = asked if asked[0] else (LOOPBACK_MBIT, LOOPBACK_US / 2)
        network = {
            "emulated": asked[0] is not None,
            "rate_mbit": asked[0],
            "delay_us": asked[1],
            "measured_rate_mbit": 0.97 * rate if asked[0] else rate,
            "measured_round_trip_us": 2 * delay_us,
            "is_as_asked": True,
            "dropped_packets": 0,
            "relay_cores": 0.25,
        }
        kinds = [("table_wise", 1), ("row_wise", 1), *(("data_parallel", c) for c in COMPRESSIONS)]
        trials += [
            {"network": network, "global_batch_size": batch,
             "setups": [make_arm(kind, c, batch, rate, delay_us) for kind, c in kinds]}
            for batch in BATCHES
        ]  # fmt: skip
    environment = {"world_size": 2, "cpu": "Some <CPU>", "cpu_cores": 2, "commit": "0123456789ab"}
    environment |= {"uncommitted_changes": False, "started": "2026-01-02T03"}
    return {"version": 1, "status": "finished", "environment": environment, "cells": trials}
