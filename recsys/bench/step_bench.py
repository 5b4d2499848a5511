"""Times of training or inference steps of several setups, on the ranks of one job, without training them to any end.

All setups are alive at once and take turns, a few steps each, in an order that changes every round: a machine that
drifts drifts for all. Every setup takes the same rows. A profiled window of each comes last.
"""

import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

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

T = TypeVar("T")
Mode = Literal["train", "inference"]
_BATCHES = 8
"""Different batches in turn, made beforehand: what is timed excludes loading."""


@dataclass(frozen=True)
class StepMeasurement:
    """Of one setup. step_ms: (rounds × steps,) of rank 0. window: where its time goes; None where not asked for."""

    config: RunConfig
    assembly: Assembly
    num_tables: int
    step_ms: np.ndarray
    window: WindowTiming | None

    def summary(self) -> dict[str, Any]:
        """For JSON. Parts are means over ranks, of the profiled window: computing + exposed + other = its step."""
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
    """Collective. `steps` steps of every setup in each of `rounds` rounds, after warm_up of each."""
    benches = _build(configs, ranks, mode, progress)
    for bench in benches:
        bench.run(warm_up)
    found: list[list[np.ndarray]] = [[] for _ in benches]
    for turn in range(rounds):
        progress(f"round {turn + 1} of {rounds}")
        shuffled = np.random.default_rng(turn).permutation(len(benches))
        for index in shuffled:
            dist.barrier()
            found[index].append(benches[index].run(steps))
    progress("profile")
    windows = [bench.profile(profile_steps) if profile_steps else None for bench in benches]
    return [
        StepMeasurement(bench.config, bench.assembly, bench.num_features, np.concatenate(times), window)
        for bench, times, window in zip(benches, found, windows, strict=True)
    ]


class Bench:
    """One setup, ready to make steps."""

    def __init__(self, config: RunConfig, dataset: Dataset, ranks: Ranks, mode: Mode) -> None:
        self.config, self.ranks, self.mode = config, ranks, mode
        self.assembly = assemble(config, dataset, ranks)
        self.batches = _cycle_of_batches(config, dataset, ranks)
        model, optimizer = self.assembly.model, self.assembly.optimizer
        self.train_step = TrainStep(model, optimizer, 1_000_000, seed=config.run.seed, ranks=ranks)
        self.num_features = len(dataset.feature_names)
        self.made = 0
        self.assembly.model.train(mode == "train")

    def run(self, steps: int) -> np.ndarray:
        """ms of each of the steps."""
        timer = StepTimer(self.ranks.device)
        for batch in itertools.islice(self.batches, steps):
            timer.start()
            self.step(batch)
            timer.stop()
        return timer.take()

    def step(self, batch: Batch) -> object:
        self.made += 1
        if self.mode == "train":
            return self.train_step(batch, self.made)
        with torch.no_grad():  # FBGEMM has no kernels for inference mode
            return torch.sigmoid(self.assembly.model(batch.dense_features, batch.sparse_features))

    def profile(self, steps: int, step: Callable[[Batch], object] | None = None) -> WindowTiming:
        """step: in place of `self.step`."""
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
        dataset = next((found for section, found in datasets if section == config.data), None)
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
