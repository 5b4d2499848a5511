"""A crossover.json as launch.netlab writes it, its steps made from known constants."""

from recsys.cost.measured_steps import count_bytes

NETWORKS = [None, (None, None), (10_000, 50), (1000, 50), (1000, 1000), (100, 1000)]
BATCHES = (512, 2048, 8192)
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


def made_setup(kind: str, compression: float, batch: int, network) -> dict:
    is_sharded = kind in ("table_wise", "row_wise")
    setup = {
        "label": f"{kind} {compression:g}",
        "placement": "shard" if is_sharded else "replicate",
        "sharding": kind if is_sharded else None,
        "world_size": 1 if kind == "single" else 2,
        "num_tables": 26,
        "embedding_dim": 16,
        "embedding_parameters": int(54e6 / compression),
        "dense_parameters": 27_601,
        "global_batch_size": batch,
        "collectives_per_step": COLLECTIVES[kind],
    }
    setup["bytes_per_step"] = {name: 1.00001 * size for name, size in count_bytes(setup).items()}
    rows = batch / setup["world_size"] / 1000
    ms = FIXED[kind] + COMPUTING[kind] * rows + (0 if is_sharded else ARRAY * setup["embedding_parameters"] / 1e6)
    if network is not None:
        rate, delay_us = network if network[0] else (LOOPBACK_MBIT, LOOPBACK_US / 2)
        # of two ranks half of an all-to-all's bytes cross, all of an all-reduce's, and of an all-gather what was put in
        crosses = {"all_to_all": 0.5, "all_reduce": 1.0, "all_gather": 1.0}
        wire = sum(size * crosses[name] for name, size in count_bytes(setup).items())
        messages = sum(MESSAGES[name] * count for name, count in COLLECTIVES[kind].items())
        ms += TRIPS * messages * delay_us / 1000 + WIRE * wire / (rate * 1e6 / 8) * 1e3
    setup["step_ms"] = {"median": ms, "p25": 0.95 * ms, "p75": 1.05 * ms, "n": 20}
    return setup


def made_document() -> dict:
    cells = []
    for network in NETWORKS:
        kinds = [("single", c) for c in (100, 1000, 10_000)]
        described = None
        if network is not None:
            kinds = [("table_wise", 1), ("row_wise", 1), *(("data_parallel", c) for c in (100, 1000, 10_000))]
            rate, delay_us = network
            described = {
                "emulated": rate is not None,
                "rate_mbit": rate,
                "delay_us": delay_us,
                "measured_rate_mbit": 0.97 * rate if rate else LOOPBACK_MBIT,
                "measured_round_trip_us": 2 * delay_us if delay_us is not None else LOOPBACK_US,
            }
        cells += [
            {"network": described, "setups": [made_setup(kind, c, batch, network) for kind, c in kinds]}
            for batch in BATCHES
        ]
    return {"version": 1, "cells": cells}
