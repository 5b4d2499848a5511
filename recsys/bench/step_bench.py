"""Times of training or inference steps of several arms, on the ranks of one job, without training them to any end.

All arms are alive at once and interleaved, a few steps each, in an order that changes every round: a machine that
drifts drifts for all. Every arm takes the same rows. A profiled window of each comes last.
"""

import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torchrec.datasets.utils import Batch

from configs.schema import RunConfig
from recsys.data.dataset import Dataset
from recsys.data.registry import build_dataset
from recsys.models.registry import MODELS
from recsys.profile.window import profile_steps
from recsys.runs.ranks import Ranks
from recsys.runs.window_timing import WindowTiming
from recsys.train.assemble import Assembly, TrainStep, assemble, build_batches
from recsys.train.clocks import StepTimer

Mode = Literal["train", "inference"]
_BATCHES = 8
"""Different batches one after another, built beforehand: what is timed excludes loading."""


@dataclass(frozen=True)
class StepMeasurement:
    """Hold the steps of one arm.

    step_ms: (rounds × steps,) float64 of rank 0. window: where its time goes; None where nothing was profiled.
    """

    config: RunConfig
    assembly: Assembly
    num_tables: int
    step_ms: np.ndarray
    window: WindowTiming | None

    def summary(self) -> dict[str, Any]:
        """Return the measurement as JSON holds it.

        Parts are means over ranks, of the profiled window: computing + exposed + other = its step.
        """
        quartiles = np.percentile(self.step_ms, [25, 50, 75])
        config, facts = self.config, self.assembly.facts
        return {
            "method": config.embedding.method,
            "placement": facts.placement,
            "sharding": facts.sharding,
            "world_size": facts.world_size,
            "threads_per_rank": facts.threads_per_rank,
            "compression": facts.compression.actual,
            "embedding_parameters": facts.parameters.embedding,
            "dense_parameters": facts.parameters.dense,
            "bytes_per_rank": facts.bytes_per_rank.model_dump(),
            "global_batch_size": config.training.global_batch_size,
            "embedding_dim": config.model.embedding_dim,
            "num_tables": self.num_tables,
            "step_ms": {**dict(zip(("p25", "median", "p75"), quartiles.tolist(), strict=True)), "n": len(self.step_ms)},
            **(_parts(self.window) if self.window else {}),
        }


def _parts(window: WindowTiming) -> dict[str, Any]:
    names = ("compute", "exposed_comm", "exposed_wait", "overlap", "other", "comm", "wait")
    return {
        "profiled_step_ms": window.mean("step_ms"),
        "parts": {f"{name}_ms": window.mean(f"{name}_ms") for name in names},
        "phases_ms": window.phases(),
        "bytes_per_step": window.collective("bytes"),
        "collectives_per_step": window.collective("count"),
        "transfer_ms": window.collective("transfer_ms"),
    }


def measure_steps(
    configs: Sequence[RunConfig],
    ranks: Ranks,
    *,
    mode: Mode = "train",
    rounds: int,
    steps: int,
    warm_up: int,
    profile_steps: int,
    progress: Callable[[str], None] = lambda _: None,
) -> list[StepMeasurement]:
    """Measure `steps` steps of every arm in each of `rounds` rounds, after `warm_up` of each. Collective.

    profile_steps: recorded for each arm at the end, none for 0. progress: called with a word on what comes next.
    """
    benches = _build(configs, ranks, mode, progress)
    for bench in benches:
        bench.run(warm_up)
    step_ms: list[list[np.ndarray]] = [[] for _ in benches]
    for number in range(rounds):
        progress(f"round {number + 1} of {rounds}")
        # Seeded by the round: every rank has to draw the same order, or their collectives would not match.
        shuffled = np.random.default_rng(number).permutation(len(benches))
        for index in shuffled:
            dist.barrier()
            step_ms[index].append(benches[index].run(steps))
    progress("profile")
    windows = [bench.profile(profile_steps) if profile_steps else None for bench in benches]
    return [
        StepMeasurement(bench.config, bench.assembly, bench.num_features, np.concatenate(times), window)
        for bench, times, window in zip(benches, step_ms, windows, strict=True)
    ]


class Bench:
    """Hold one arm, ready to take steps."""

    def __init__(self, config: RunConfig, dataset: Dataset, ranks: Ranks, mode: Mode) -> None:
        self.config, self.ranks, self.mode = config, ranks, mode
        self.assembly = assemble(config, dataset, ranks)
        self.batches = _cycle_of_batches(config, dataset, ranks)
        model, optimizer = self.assembly.model, self.assembly.optimizer
        self.train_step = TrainStep(model, optimizer, 1_000_000, seed=config.run.seed, ranks=ranks)
        self.num_features = len(dataset.feature_names)
        self.num_steps = 0
        self.assembly.model.train(mode == "train")

    def run(self, steps: int) -> np.ndarray:
        """Take some steps, and return the milliseconds of each, (steps,) float64."""
        timer = StepTimer(self.ranks.device)
        for batch in itertools.islice(self.batches, steps):
            timer.start()
            self.step(batch)
            timer.stop()
        return timer.take()

    def step(self, batch: Batch) -> object:
        """Take one step on a batch, of training or of inference as the mode says."""
        self.num_steps += 1
        if self.mode == "train":
            return self.train_step(batch, self.num_steps)
        with torch.no_grad():  # FBGEMM has no kernels for inference mode
            return torch.sigmoid(self.assembly.model(batch.dense_features, batch.sparse_features))

    def profile(self, steps: int, step: Callable[[Batch], object] | None = None) -> WindowTiming:
        """Profile some steps, and return where their time goes. step: taken in place of `self.step`."""
        with tempfile.TemporaryDirectory() as directory:
            return profile_steps(
                self.assembly.model, MODELS[self.config.model.architecture].PHASES, self.ranks,
                load=lambda: next(self.batches), train=step or self.step, num_steps=steps,
                trace=Path(directory) / "trace.json",
            )  # fmt: skip


def _build(configs: Sequence[RunConfig], ranks: Ranks, mode: Mode, progress: Callable[[str], None]) -> list[Bench]:
    datasets: list[tuple[Any, Dataset]] = []
    benches = []
    for config in configs:
        dataset = next((loaded for section, loaded in datasets if section == config.data), None)
        if dataset is None:
            progress("data")
            dataset = build_dataset(config.data)
            datasets.append((config.data, dataset))
        progress(f"building {config.run.name}")
        benches.append(Bench(config, dataset, ranks, mode))
    return benches


def _cycle_of_batches(config: RunConfig, dataset: Dataset, ranks: Ranks) -> Iterator[Batch]:
    batches = build_batches(config, dataset, ranks)
    return itertools.cycle(list(itertools.islice(batches.from_step(0), min(_BATCHES, batches.steps_per_epoch))))
