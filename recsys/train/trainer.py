"""The loop: train, evaluate, stop, record, checkpoint. It alone sees the whole config.

A step is forward, backward and update; its time excludes loading, evaluation, checkpoints and recording. Training time
is the wall clock from the first step on with evaluation and checkpoints taken out. Every decision to stop is taken on
values that all ranks share, so ranks always leave the loop together.
"""

import math
import resource
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from pydantic import BaseModel
from torch import nn
from torchrec.datasets.utils import Batch
from torchrec.optim.keyed import CombinedOptimizer

from configs.schema import RunConfig
from recsys.data.dataset import Dataset
from recsys.models.registry import MODELS
from recsys.profile.profile_window import Windows, profile_steps
from recsys.runs.metrics import (
    DATA_MS,
    PEAK_GIB,
    QUALITY,
    SAMPLES_PER_S,
    STEP_MS,
    STEP_P95_MS,
    TRAIN_LOG_LOSS,
    quality_name,
)
from recsys.runs.ranks import Ranks, gather, on_first_rank
from recsys.runs.summary import RunFacts, RunSummary, Status, Target
from recsys.runs.window_timing import WindowTiming
from recsys.train.assemble import TrainStep, build_batches
from recsys.train.checkpoint import Checkpoints
from recsys.train.clocks import StepTimer, StepTimes, Stopwatch
from recsys.train.evaluation import evaluate
from recsys.train.recorder import Recorder


class Progress(BaseModel):
    """What the trainer must know to go on: kept in checkpoints, the same on every rank."""

    step: int = 0
    train_time_s: float = 0.0
    evaluation_time_s: float = 0.0
    evaluations: list[dict[str, int | float]] = []
    profiles: list[WindowTiming] = []


class Trainer:
    """Trains a placed model on a dataset as the config says; `run` returns why it stopped."""

    def __init__(
        self,
        config: RunConfig,
        dataset: Dataset,
        model: nn.Module,
        optimizer: CombinedOptimizer,
        checkpoints: Checkpoints,
        recorder: Recorder,
        ranks: Ranks,
        facts: RunFacts,
    ) -> None:
        """facts: what is known of the run before training, the constant part of its summary."""
        self.config, self.dataset, self.model, self.optimizer = config, dataset, model, optimizer
        self.checkpoints, self.recorder, self.ranks, self.facts = checkpoints, recorder, ranks, facts
        self.batches = build_batches(config, dataset, ranks)
        per_epoch = self.batches.steps_per_epoch
        self.total_steps = max(1, math.floor(config.training.epochs * per_epoch + 1e-9))
        if config.training.max_steps is not None:
            self.total_steps = min(self.total_steps, config.training.max_steps)
        self.evaluation_interval = max(1.0, config.evaluation.every_epochs * per_epoch)
        intervals = (self.evaluation_interval, config.checkpoint.every_steps, self.total_steps)
        self.windows = Windows(config.profile, [steps for steps in intervals if steps])
        if ranks.is_first and (obstacle := self.windows.describe_obstacle()):
            print(f"no profiled windows: {obstacle}", flush=True)
        self.splits = [s for s in ("validation", "test") if dataset.num_rows(s)]
        self.progress = Progress()
        self.train_step = TrainStep(model, optimizer, self.total_steps, seed=config.run.seed, ranks=ranks)
        self.peak_gib: list[float] = []
        self.step_timer, self.data_timer = StepTimer(ranks.device), StepTimer(ranks.device)
        self.step_times, self.data_times = StepTimes(), StepTimes()
        self.watch = Stopwatch(ranks.device)

    @property
    def selecting_split(self) -> str:
        """The split that decides about the best evaluation, patience and target: validation where there is one."""
        return self.splits[0]

    def run(self) -> str:
        self._resume()
        try:
            reason = self._train()
        except BaseException:
            self.recorder.keep_summary(self.summary("running", None))
            raise
        self.recorder.write_summary(self.summary("finished", reason))
        self.recorder.write_hparams(*self._hparams())
        return reason

    def _train(self) -> str:
        if self.config.evaluation.at_start and not self.progress.evaluations:
            self._evaluate()
        reason = self._stop_reason(evaluated=True)
        batches = self.batches.from_step(self.progress.step)
        losses: list[torch.Tensor] = []
        self.watch.start()
        while reason is None:
            due = self.windows.is_due(self.progress.step, len(self.progress.profiles))
            losses += self._profile(batches) if due else [self._timed_step(batches)]
            step = self.progress.step
            self.recorder.advance(step)
            logged = step % self.config.logging.every_steps == 0
            if logged:
                self._record_training(losses)
                losses = []
            evaluated = step % self.evaluation_interval < 1 or step == self.total_steps
            if evaluated:
                if losses:
                    self._average(losses)  # raises, naming the step, before scores that are not finite do
                self._evaluate()
            reason = self._stop_reason(evaluated, check_time=logged or evaluated)
            every = self.config.checkpoint.every_steps
            if (every and step % every == 0) or (reason and self.config.checkpoint.at_end):
                self._save()
        self.watch.stop()
        if losses:
            self._record_training(losses)
        if not self.progress.evaluations or self.progress.evaluations[-1]["step"] != self.progress.step:
            self._evaluate()
        return reason

    def _profile(self, batches: Iterator[Batch]) -> list[torch.Tensor]:
        """A window of steps under the profiler; their losses. On the training clock they count as the mean step does
        that was not profiled."""
        losses: list[torch.Tensor] = []
        first = self.progress.step + 1

        def train(batch: Batch) -> None:
            losses.append(self.train_step(batch, self.progress.step + 1))
            self.progress.step += 1

        with self.watch.paused():
            self._take_times()
            trace = self.recorder.run_dir.trace(first, self.ranks.rank)
            window = profile_steps(
                self.model, MODELS[self.config.model.architecture].PHASES, self.ranks, load=lambda: next(batches),
                train=train, num_steps=self.config.profile.steps, trace=trace, step=first,
            )  # fmt: skip
            self.progress.profiles.append(window)
        means = [times.summary() for times in (self.step_times, self.data_times)]
        self.watch.credit(1e-3 * len(losses) * sum(mean.mean for mean in means if mean and mean.mean))
        self.recorder.record_window(self._position(), window)
        return losses

    def _take_times(self) -> tuple[np.ndarray, np.ndarray]:
        """ms of the steps and of loading since last time, which from here on count."""
        steps, data = self.step_timer.take(), self.data_timer.take()
        self.step_times.add(steps)
        self.data_times.add(data)
        return steps, data

    def _timed_step(self, batches: Iterator[Batch]) -> torch.Tensor:
        self.data_timer.start()
        batch = next(batches)
        self.data_timer.stop()
        self.step_timer.start()
        loss = self.train_step(batch, self.progress.step + 1)
        self.step_timer.stop()
        self.progress.step += 1
        return loss

    def _resume(self) -> None:
        newest = self.checkpoints.newest() if self.config.checkpoint.resume == "auto" else None
        if newest is not None:
            self.progress = Progress.model_validate(self.checkpoints.load(newest, self.model, self.optimizer))
        self.watch = Stopwatch(self.ranks.device, self.progress.train_time_s)
        self.recorder.write_summary(self.summary("running", None))  # before any record: a run that is ended has both
        self.recorder.start(self.total_steps, self.progress.step)

    def _save(self, is_best: bool = False) -> None:
        with self.watch.paused():
            self.progress.train_time_s = self.watch.read_s()
            # Rank 0's clock is everyone's: the state is the same whichever rank reads it back.
            state = self.progress.model_dump()
            if is_best:
                self.checkpoints.save_best(self.model, self.optimizer, state)
            else:
                self.checkpoints.save(self.progress.step, self.model, self.optimizer, state)

    def _position(self) -> dict[str, Any]:
        step = self.progress.step
        return {
            "step": step,
            "samples": step * self.config.training.global_batch_size,
            "epoch": step / self.batches.steps_per_epoch,
            "time_s": self.watch.read_s(),
        }

    def _record_training(self, losses: list[torch.Tensor]) -> None:
        value = float(self._average(losses).mean())
        steps, data = self._take_times()
        rows = self.config.training.global_batch_size
        metrics = {TRAIN_LOG_LOSS: value, PEAK_GIB: peak_gib(self.ranks.device)}
        if len(steps):  # else all were profiled
            metrics |= {
                STEP_MS: float(np.median(steps)),
                STEP_P95_MS: float(np.quantile(steps, 0.95)),
                DATA_MS: float(data.mean()),
                SAMPLES_PER_S: rows * len(steps) / (1e-3 * float(steps.sum() + data.sum())),
            }
        self.recorder.record(self._position(), metrics)

    def _average(self, losses: list[torch.Tensor]) -> torch.Tensor:
        """Of the last steps, each over all ranks. Raises FloatingPointError for one that is not finite."""
        loss = torch.stack(losses)
        dist.all_reduce(loss)
        loss /= self.ranks.world_size
        bad = (~torch.isfinite(loss)).nonzero()
        if len(bad):
            step = self.progress.step - len(losses) + 1 + int(bad[0])
            epoch, batch = divmod(step - 1, self.batches.steps_per_epoch)
            raise FloatingPointError(
                f"the training loss is {float(loss[bad[0]])} at step {step}, batch {batch + 1} of epoch {epoch + 1}: "
                "lower optimizer.embedding_learning_rate or optimizer.dense_learning_rate"
            )
        return loss

    def _evaluate(self) -> None:
        """Quality on every held-out split, outside the training clock."""
        with self.watch.paused():
            clock = Stopwatch(self.ranks.device)
            clock.start()
            found: dict[str, int | float] = {}
            rows = self.config.evaluation.global_batch_size
            scores = None
            for split in self.splits:
                quality, scores = evaluate(self.model, self.dataset, split, rows, self.ranks)
                found |= {f"{split}_{name}": value for name, value in quality.items()}
            self.peak_gib = gather(peak_gib(self.ranks.device), self.ranks)
            clock.stop()
            self.progress.evaluation_time_s += clock.read_s()
            position = self._position()
            self.progress.evaluations.append({**position, **found})
            self.recorder.record(
                position,
                {quality_name(split, name): found[f"{split}_{name}"] for split in self.splits for name in QUALITY},
            )
            self.recorder.write_summary(self.summary("running", None))
            is_best = self._best() is self.progress.evaluations[-1]
            if is_best and scores and self.config.checkpoint.keep_scores:
                self.recorder.run_dir.write_scores(*scores)
        if is_best and self.config.checkpoint.keep_best:
            self._save(is_best=True)

    def _stop_reason(self, evaluated: bool, check_time: bool = False) -> str | None:
        training, step = self.config.training, self.progress.step
        if step >= self.total_steps:
            return "max_steps" if step == training.max_steps else "epochs"
        if evaluated and training.stop_at_target and self._target_reached() is not None:
            return "target_auc"
        patience = self.config.evaluation.patience
        if evaluated and patience and self._evaluations_since_best() >= patience:
            return "patience"
        budget = training.time_budget_s
        if check_time and budget is not None and on_first_rank(lambda: self.watch.read_s() >= budget):
            return "time_budget"
        return None

    def _best(self) -> dict[str, int | float] | None:
        return min(self.progress.evaluations, key=lambda e: e[f"{self.selecting_split}_log_loss"], default=None)

    def _evaluations_since_best(self) -> int:
        best = self._best()
        return len(self.progress.evaluations) - 1 - self.progress.evaluations.index(best) if best else 0

    def _target_reached(self) -> dict[str, Any] | None:
        target = self.config.training.target_auc
        if target is None:
            return None
        return next((e for e in self.progress.evaluations if e[f"{self.selecting_split}_auc"] >= target), None)

    def summary(self, status: Status, reason: str | None) -> RunSummary:
        """The run as far as it has come: the facts known beforehand, and what was measured."""
        evaluations = self.progress.evaluations
        position = self._position()
        return RunSummary(
            **dict(self.facts),
            status=status,
            stop_reason=reason,
            steps=position["step"],
            samples=position["samples"],
            epochs=position["epoch"],
            train_time_s=position["time_s"],
            evaluation_time_s=self.progress.evaluation_time_s,
            step_ms=self.step_times.summary(),
            data_ms=self.data_times.summary(),
            samples_per_s=position["samples"] / position["time_s"] if position["time_s"] else None,
            profiles=self.progress.profiles,
            peak_memory_gib=self.peak_gib,
            test_positives=int(evaluations[-1]["test_positives"]) if evaluations else None,
            selected_on=self.selecting_split,
            best=self._best(),
            last=evaluations[-1] if evaluations else None,
            target=self._target(),
        )

    def _target(self) -> Target | None:
        auc = self.config.training.target_auc
        if auc is None:
            return None
        split, reached = self.selecting_split, self._target_reached() or {}
        position = {"time_s": reached.get("time_s"), "samples": reached.get("samples"), "epochs": reached.get("epoch")}
        return Target.model_validate({"auc": auc, "split": split, **position})

    def _hparams(self) -> tuple[dict[str, Any], dict[str, float]]:
        """What sets this run apart, and its best figures, for TensorBoard's table of runs."""
        best, step_ms = self._best(), self.step_times.summary()
        assert best is not None
        optimizer = self.config.optimizer
        facts = ("method", "placement", "world_size", "global_batch_size", "seed")
        parameters = {
            "compression": self.config.embedding.compression,
            "embedding_learning_rate": optimizer.embedding_learning_rate,
            "dense_learning_rate": optimizer.dense_learning_rate,
            **{name: getattr(self.facts, name) for name in facts},
        }
        metrics = {f"best/test_{name}": best[f"test_{name}"] for name in QUALITY}
        return parameters, metrics | ({"best/step_p50_ms": step_ms.p50} if step_ms else {})


def peak_gib(device: torch.device) -> float:
    """Largest memory so far of this process: resident on CPU, allocated on the device on CUDA."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
