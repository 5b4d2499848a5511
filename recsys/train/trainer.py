"""The loop: train, evaluate, stop, record, checkpoint. It alone sees the whole config.

A step is forward, backward and update; its time excludes loading, evaluation, checkpoints and recording. Training time
is the wall clock from the first step on with evaluation and checkpoints taken out. Every decision to stop is taken on
values that all ranks share, so ranks always leave the loop together.
"""

import resource
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from pydantic import BaseModel
from torchrec.datasets.utils import Batch

from configs.schema import RunConfig
from recsys.data.dataset import Dataset
from recsys.models.registry import MODELS
from recsys.profile.window import profile_steps
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
from recsys.runs.summary import RunSummary, Status, Target
from recsys.runs.window_timing import WindowTiming
from recsys.train.assemble import Assembly, TrainStep, build_batches
from recsys.train.checkpoint import Checkpoints
from recsys.train.clocks import StepTimer, StepTimes, Stopwatch
from recsys.train.evaluation import evaluate
from recsys.train.recorder import Recorder
from recsys.train.schedule import Schedule, StopRules


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
        assembly: Assembly,
        checkpoints: Checkpoints,
        recorder: Recorder,
        ranks: Ranks,
    ) -> None:
        self.config, self.dataset, self.ranks = config, dataset, ranks
        self.model, self.optimizer, self.facts = assembly
        self.checkpoints, self.recorder = checkpoints, recorder
        self.batches = build_batches(config, dataset, ranks)
        self.schedule = Schedule(config, self.batches.steps_per_epoch)
        if ranks.is_first and (obstacle := self.schedule.describe_obstacle()):
            print(f"no profiled windows: {obstacle}", flush=True)
        self.splits = [s for s in ("validation", "test") if dataset.num_rows(s)]
        total_steps = self.schedule.total_steps
        self.rules = StopRules(config.training, config.evaluation, total_steps, self.splits[0])
        self.train_step = TrainStep(self.model, self.optimizer, total_steps, seed=config.run.seed, ranks=ranks)
        self.progress = Progress()
        self.peak_gib: list[float] = []
        self.step_timer, self.data_timer = StepTimer(ranks.device), StepTimer(ranks.device)
        self.step_times, self.data_times = StepTimes(), StepTimes()
        self.watch = Stopwatch(ranks.device)

    def run(self) -> str:
        """Train until a rule ends it, and return which; the summary says so whatever happens."""
        self._resume()
        try:
            reason = self._train()
        except BaseException:
            self.recorder.write_summary_if_running(self.summary("running", None))
            raise
        summary = self.summary("finished", reason)
        self.recorder.write_summary(summary)
        self.recorder.write_hparams(summary, self.config.optimizer)
        return reason

    def _train(self) -> str:
        if self.config.evaluation.at_start and not self.progress.evaluations:
            self._evaluate()
        reason = self._reason_to_stop(is_evaluated=True)
        batches = self.batches.from_step(self.progress.step)
        losses: list[torch.Tensor] = []  # since they were last recorded, on the device: reading one would wait for it
        self.watch.start()
        while reason is None:
            if self.schedule.profiles(self.progress.step, len(self.progress.profiles)):
                losses += self._profile(batches)
            else:
                losses.append(self._timed_step(batches))
            step = self.progress.step
            self.recorder.advance(step)
            logs, evaluates = self.schedule.logs(step), self.schedule.evaluates(step)
            if logs:
                self._record_training(losses)
                losses = []
            if evaluates:
                if losses:
                    self._average(losses)  # raises, naming the step, before scores that are not finite do
                self._evaluate()
            reason = self._reason_to_stop(is_evaluated=evaluates, check_time=logs or evaluates)
            if self.schedule.saves(step) or (reason and self.config.checkpoint.at_end):
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
        self.recorder.start(self.schedule.total_steps, self.progress.step)

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
            is_best = self.rules.best(self.progress.evaluations) is self.progress.evaluations[-1]
            if is_best and scores and self.config.checkpoint.keep_scores:
                self.recorder.run_dir.write_scores(*scores)
        if is_best and self.config.checkpoint.keep_best:
            self._save(is_best=True)

    def _reason_to_stop(self, *, is_evaluated: bool, check_time: bool = False) -> str | None:
        reason = self.rules.reason_to_stop(self.progress.step, self.progress.evaluations, is_evaluated=is_evaluated)
        budget = self.config.training.time_budget_s
        if reason is None and check_time and budget is not None:
            # Rank 0's clock is everyone's; ranks that went by their own would not stop at one step.
            reason = "time_budget" if on_first_rank(lambda: self.watch.read_s() >= budget) else None
        return reason

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
            selected_on=self.rules.split,
            best=self.rules.best(evaluations),
            last=evaluations[-1] if evaluations else None,
            target=self._target(),
        )

    def _target(self) -> Target | None:
        auc = self.config.training.target_auc
        if auc is None:
            return None
        split, reached = self.rules.split, self.rules.target_reached(self.progress.evaluations) or {}
        position = {"time_s": reached.get("time_s"), "samples": reached.get("samples"), "epochs": reached.get("epoch")}
        return Target.model_validate({"auc": auc, "split": split, **position})


def peak_gib(device: torch.device) -> float:
    """Return the largest memory so far of this process in GiB: resident on CPU, allocated on the device on CUDA."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
