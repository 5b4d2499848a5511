"""Is `recsys.profile.timing` right? Experiments whose outcome is known beforehand, each some steps on the ranks of a
job.

Every function that takes a bench is collective. A `Proof` sets a measured figure beside the one it has to be.
"""

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchrec.datasets.utils import Batch

from recsys.bench.step_bench import Bench
from recsys.profile.window import profile_steps
from recsys.runs.phases import GRADIENT_ALL_REDUCE
from recsys.runs.ranks import Ranks, gather
from recsys.runs.window_timing import WindowTiming
from recsys.train.parallelism import unwrapped

SIZES_PER_PAIR = 3
"""8-byte numbers that TorchRec's input distribution sends from each rank to each before the ids."""


@dataclass(frozen=True)
class Proof:
    """Hold a measured figure against the one known. tolerance: what they may differ by, in the unit."""

    claim: str
    expected: float
    measured: float
    unit: str
    tolerance: float

    @property
    def holds(self) -> bool:
        """Return whether the figures differ by no more than the tolerance."""
        return abs(self.measured - self.expected) <= self.tolerance


def prove_sums(label: str, window: WindowTiming) -> list[Proof]:
    """Prove (a): the parts of a step sum to the step as the wall clock has it, and so do its phases.

    The parts are computing, exposed communication and other, taken from the trace.
    """
    proofs = []
    for rank, timing in enumerate(window.ranks):
        assert timing.wall_ms is not None
        parts = timing.compute_ms + timing.exposed_comm_ms + timing.other_ms
        phases = sum(phase.ms for phase in timing.phases.values())
        for what, total_ms in (("parts", parts), ("phases", phases)):
            claim = f"(a) {label}, rank {rank}: {what} sum to the step on the wall"
            proofs.append(Proof(claim, timing.wall_ms, total_ms, "ms", 0.01 * timing.wall_ms))
    return proofs


def prove_blocked(label: str, window: WindowTiming) -> list[Proof]:
    """Prove (b): exposed communication is time in which the step's thread did not run, by the system's account.

    For steps that mostly communicate. Where something competes for the cores, a thread that computes does not run
    either.
    """
    return [
        Proof(
            f"(b) {label}, rank {rank}: exposed communication is step − the thread's CPU time",
            timing.blocked_ms,
            timing.exposed_comm_ms,
            "ms",
            0.1 * timing.blocked_ms,
        )
        for rank, timing in enumerate(window.ranks)
        if timing.blocked_ms is not None
    ]


def prove_sleep(label: str, bench: Bench, sleep_ms: float, steps: int, module: str = "over_arch") -> list[Proof]:
    """Prove (c): where rank 1 sleeps in the forward pass, rank 0 waits that long and nothing else changes.

    Rank 1 sleeps after `module`, which counts as "other" there. Figures are differences of windows with and without the
    sleep, interleaved.
    """
    ranks, windows = bench.ranks, dict[bool, list[WindowTiming]]({False: [], True: []})
    where = next(m for name, m in unwrapped(bench.assembly.model).named_modules() if name.endswith(module))
    for asleep in (False, True) * 3:
        sleep_s = 1e-3 * sleep_ms if asleep and ranks.rank == 1 else 0.0
        handle = where.register_forward_hook(lambda *_, s=sleep_s: time.sleep(s))
        windows[asleep].append(bench.profile(steps))
        handle.remove()

    def change(rank: int, field: str) -> float:
        with_sleep, without = (
            median(getattr(w.ranks[rank], field) for w in windows[asleep]) for asleep in (True, False)
        )
        return with_sleep - without

    expected = {(0, "wait_ms"): sleep_ms, (0, "exposed_wait_ms"): sleep_ms, (1, "other_ms"): sleep_ms}
    fields = ("wait_ms", "exposed_wait_ms", "other_ms", "compute_ms")
    changes = {(rank, field): change(rank, field) for rank in (0, 1) for field in fields}
    changes |= {(rank, "transfer_ms"): change(rank, "comm_ms") - changes[rank, "wait_ms"] for rank in (0, 1)}
    return [
        Proof(
            f"(c) {label}, rank 1 sleeps {sleep_ms:g} ms: {field.removesuffix('_ms')} of rank {rank} grows by",
            expected.get((rank, field), 0.0),
            grown,
            "ms",
            0.1 * sleep_ms,
        )
        for (rank, field), grown in changes.items()
    ]


def prove_bytes(label: str, bench: Bench, window: WindowTiming) -> list[Proof]:
    """Prove (d): the bytes of collectives, summed over ranks, are those of the closed form.

    All-reduce: the gradients, replicated embeddings' among them. All-to-all of tables sharded table-wise: ids and
    lengths of 8 bytes, B·F each, and their sizes; pooled embeddings, B·F·D·4, forward and backward.
    """
    config, world_size, facts = bench.config, bench.ranks.world_size, bench.assembly.facts
    exchanged = {kind: bytes_ * world_size for kind, bytes_ in window.collective("bytes").items()}
    replicated = facts.placement == "replicate"
    gradients = 4 * world_size * (facts.parameters.dense + (facts.parameters.embedding if replicated else 0))
    proofs = [Proof(f"(d) {label}: bytes all-reduced", gradients, exchanged.get("all_reduce", 0.0), "B", 0)]
    if not replicated:
        bags = config.training.global_batch_size * bench.num_features
        expected = 2 * 8 * bags + 2 * 4 * bags * config.model.embedding_dim + 8 * SIZES_PER_PAIR * world_size**2
        proofs.append(Proof(f"(d) {label}: bytes all to all", expected, exchanged.get("all_to_all", 0.0), "B", 0))
    return proofs


def prove_ddp(label: str, bench: Bench, steps: int) -> list[Proof]:
    """Prove (e): the gradients' all-reduce takes as long as by DDP's own clock.

    DDP measures from the start of its first all-reduce to the end of the last.
    """
    model = bench.assembly.model
    assert isinstance(model, DistributedDataParallel)
    model._set_ddp_runtime_logging_sample_rate(1)
    theirs: list[float] = []

    def step(batch: Batch) -> None:
        bench.step(batch)
        theirs.append(1e-6 * model._get_ddp_logging_data()["backward_comm_time"])  # type: ignore[operator]

    window = bench.profile(steps, step)
    own = window.ranks[bench.ranks.rank].phases[GRADIENT_ALL_REDUCE].ms
    pairs = gather((sum(theirs[1:]) / (len(theirs) - 1), own), bench.ranks)
    return [
        Proof(
            f"(e) {label}, rank {rank}: the gradients' all-reduce by DDP's own clock",
            ddp,
            ours,
            "ms",
            max(0.1 * ddp, 0.5),
        )
        for rank, (ddp, ours) in enumerate(pairs)
    ]


def prove_ablation(label: str, bench: Bench, steps: int) -> list[Proof]:
    """Prove (c): the same local work without the all-reduce is shorter by what was exposed.

    Steps with and without it are interleaved, and not profiled.
    """
    model = bench.assembly.model
    assert isinstance(model, DistributedDataParallel)
    reduced, local = [], []
    for _ in range(steps):
        dist.barrier()
        reduced.extend(bench.run(1))
        dist.barrier()
        with model.no_sync():
            local.extend(bench.run(1))
    saved, window = median(reduced) - median(local), bench.profile(steps)
    pairs = gather((saved, window.ranks[bench.ranks.rank].exposed_comm_ms), bench.ranks)
    return [
        Proof(
            f"(c) {label}, rank {rank}: exposed is what a step without all-reduce saves",
            less,
            exposed,
            "ms",
            0.1 * less,
        )
        for rank, (less, exposed) in enumerate(pairs)
    ]


def prove_overhead(label: str, bench: Bench, steps: int) -> list[Proof]:
    """Prove (g): steps between windows cost what steps of a run without windows do.

    Steps before a window and after it, interleaved. Medians of rank 0.
    """
    before, after = [], []
    for _ in range(8):
        dist.barrier()
        before.extend(bench.run(2 * steps))
        bench.profile(1)
        dist.barrier()
        after.extend(bench.run(2 * steps))
        bench.run(2)  # neither follows a window more closely than the other
    ratio = gather(median(after) / median(before), bench.ranks)[0]
    return [Proof(f"(g) {label}: a step between windows, over one without any", 1.0, ratio, "×", 0.02)]


def measure_transfer(num_bytes: int, ranks: Ranks, steps: int) -> float:
    """Measure the exposed communication in ms on rank 1 of a step in which rank 0 sends it bytes. Collective.

    The all-to-all begins on both ranks at once. It sends one way only: with both ways full, TCP does not keep to the
    network's rate. The median of five windows.
    """
    sent = [0, num_bytes // 4] if ranks.rank == 0 else [0, 0]
    received = [num_bytes // 4, 0] if ranks.rank == 1 else [0, 0]
    values, place = torch.zeros(sum(sent), device=ranks.device), torch.empty(sum(received), device=ranks.device)

    def load() -> None:
        dist.barrier()

    def train(_: None) -> None:
        values.add_(1.0)
        dist.all_to_all_single(place, values, received, sent)

    with tempfile.TemporaryDirectory() as directory:
        trace = Path(directory) / "trace.json"
        windows = [
            profile_steps(nn.Module(), {}, ranks, load=load, train=train, num_steps=steps, trace=trace)
            for _ in range(5)
        ]
    return median(window.ranks[1].exposed_comm_ms for window in windows)


def prove_rate(exposed_ms: Mapping[int, float], rate_mbit: float) -> Proof:
    """Prove (c): more bytes take longer by what they take at the rate of the network.

    exposed_ms: by bytes sent.
    """
    small, large = min(exposed_ms), max(exposed_ms)
    expected = 8e-3 * (large - small) / rate_mbit
    claim = f"(c) {large / 1e6:g} MB instead of {small / 1e6:g} sent at {rate_mbit:g} Mbit/s: more exposed"
    return Proof(claim, expected, exposed_ms[large] - exposed_ms[small], "ms", 0.1 * expected)


def prove_delay(exposed_ms: Mapping[float, float], num_bytes: int, trips: int) -> Proof:
    """Prove (c): a longer one-way delay adds to a transfer what gloo's trips take longer.

    exposed_ms: by one-way delay in µs. trips: how many gloo needs to receive, whatever one takes.
    """
    short, long = min(exposed_ms), max(exposed_ms)
    expected = 1e-3 * trips * (long - short)
    claim = f"(c) {num_bytes:,} B sent, {trips} trips of {long:g} µs instead of {short:g}: more exposed"
    return Proof(claim, expected, exposed_ms[long] - exposed_ms[short], "ms", 0.1 * expected)
