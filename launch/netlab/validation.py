"""Proofs that communication and computing are measured rightly, on ranks of this machine and over emulated networks."""

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from configs.load import load_config
from configs.schema import RunConfig
from launch.netlab.emulated_network import Network, describe_obstacle, emulated_network, local_network
from launch.netlab.network_ranks import run_ranks
from recsys.bench.step_bench import Bench
from recsys.bench.timing_proofs import (
    Proof,
    measure_transfer,
    prove_ablation,
    prove_blocked,
    prove_bytes,
    prove_ddp,
    prove_delay,
    prove_overhead,
    prove_rate,
    prove_sleep,
    prove_sums,
)
from recsys.data.registry import build_dataset
from recsys.runs.ranks import Ranks, choose_device, process_group
from recsys.runs.run_directory import write_atomically
from recsys.train.heap import keep_freed_memory
from recsys.train.registry import CHOICES

RATE_MBIT, DELAYS_US = 1000.0, (1000.0, 6000.0)
SLOW_MBIT, SLOW_DELAY_US = 100.0, 500.0
"""A network on which a step of ROBE mostly communicates."""
SMALL, MEDIUM, LARGE = 64, 4_000_000, 16_000_000
"""Bytes sent: all delay, and two that differ by what the rate makes of them."""
TRIPS = 2
"""Over the network: gloo's receiver says it is ready, then data comes."""
_ROOT = Path(__file__).resolve().parents[2]
_TIMEOUT_S = 300
_OVERRIDES = ("data.synthetic.train_rows=20000", "data.synthetic.scale=0.02", "parallelism.timeout_s=120")


def prove(steps: int) -> list[Proof]:
    """Return every proof that this machine can make. Raises RankFailed."""
    say = Console(stderr=True).print
    say("two ranks on this machine")
    proofs = _proofs(_run("machine", local_network(2), steps))
    if obstacle := describe_obstacle():
        say(f"left out: {obstacle}")
        return proofs
    transfers = {}
    for delay_us in DELAYS_US:
        say(f"two ranks over an emulated network, {RATE_MBIT:g} Mbit/s and {delay_us:g} µs")
        with emulated_network(2, rate_mbit=RATE_MBIT, delay_us=delay_us) as network:
            transfers[delay_us] = {int(n): ms for n, ms in _run("transfer", network, steps).items()}
    at_rate = transfers[min(DELAYS_US)]  # beyond, TCP's window is the limit for a while
    proofs.append(prove_rate({n: at_rate[n] for n in (MEDIUM, LARGE)}, RATE_MBIT))
    proofs.append(prove_delay({delay: found[SMALL] for delay, found in transfers.items()}, SMALL, TRIPS))
    say(f"two ranks over an emulated network, {SLOW_MBIT:g} Mbit/s and {SLOW_DELAY_US:g} µs")
    with emulated_network(2, rate_mbit=SLOW_MBIT, delay_us=SLOW_DELAY_US) as network:
        return proofs + _proofs(_run("slow", network, steps))


def _run(scenario: str, network: Network, steps: int) -> Any:
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "found.json"
        command = [sys.executable, "-m", "launch.netlab.validation", scenario, str(steps), str(output)]
        path = os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])
        run_ranks(network, command, timeout_s=_TIMEOUT_S, env={"PYTHONPATH": path})
        return json.loads(output.read_text())


def _proofs(found: Any) -> list[Proof]:
    return [Proof(**proof) for proof in found]


def run_rank(scenario: str, steps: int, output: Path) -> None:
    """Run one rank of a scenario; the first writes what was found. Started by `prove`, in a process for each rank."""
    sharded = _load("demo/sharded", "parallelism.sharding=table_wise")
    device = choose_device("cpu")
    keep_freed_memory()
    with process_group(sharded.parallelism, device) as ranks:
        found = SCENARIOS[scenario](ranks, steps)
        if ranks.is_first:
            write_atomically(output, json.dumps(found))


def _load(name: str, *overrides: str) -> RunConfig:
    path = str(_ROOT / "configs" / f"{name}.toml")
    return load_config(path, [*_OVERRIDES, "training.global_batch_size=2048", *overrides], CHOICES)


def _prove_on_machine(ranks: Ranks, steps: int) -> list[dict[str, Any]]:
    proofs = []
    for label, config in (
        ("sharded", _load("demo/sharded", "parallelism.sharding=table_wise")),
        ("ROBE", _load("demo/robe")),
    ):
        bench = Bench(config, build_dataset(config.data), ranks, "train")
        bench.run(5)
        window = bench.profile(steps)
        proofs += prove_sums(label, window) + prove_bytes(label, bench, window)
        proofs += prove_sleep(label, bench, sleep_ms=100.0, steps=steps)
        proofs += prove_overhead(label, bench, steps)
        if label == "ROBE":
            proofs += prove_ddp(label, bench, steps)
    return [asdict(proof) for proof in proofs]


def _prove_on_slow_network(ranks: Ranks, steps: int) -> list[dict[str, Any]]:
    config = _load("demo/robe", "embedding.compression=10")
    bench = Bench(config, build_dataset(config.data), ranks, "train")
    bench.run(5)
    label = f"ROBE at {SLOW_MBIT:g} Mbit/s"
    proofs = prove_blocked(label, bench.profile(steps)) + prove_ablation(label, bench, steps)
    return [asdict(proof) for proof in proofs]


def _transfer(ranks: Ranks, steps: int) -> dict[int, float]:
    return {num_bytes: measure_transfer(num_bytes, ranks, steps) for num_bytes in (SMALL, MEDIUM, LARGE)}


SCENARIOS = {"machine": _prove_on_machine, "slow": _prove_on_slow_network, "transfer": _transfer}


def print_proofs(proofs: Sequence[Proof]) -> None:
    """Print the proofs as a table, and how many hold."""
    table = Table(box=None, header_style="bold")
    table.add_column("claim", overflow="fold")
    for name in ("expected", "measured", "may differ by", ""):
        table.add_column(name, justify="right")
    for proof in proofs:
        figures = (proof.expected, proof.measured, proof.tolerance)
        shown = [f"{f:,.0f} {proof.unit}" if proof.unit == "B" else f"{f:,.2f} {proof.unit}" for f in figures]
        table.add_row(proof.claim, *shown, "holds" if proof.holds else "[bold red]does not hold[/]")
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(table)
    held = sum(proof.holds for proof in proofs)
    console.print(f"{held} of {len(proofs)} hold")


if __name__ == "__main__":
    run_rank(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
