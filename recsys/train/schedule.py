"""When a run evaluates, records, profiles, saves and stops: read from the config once, asked after every step.

Every answer follows from values that all ranks share, so ranks always leave the loop together. Time alone is rank 0's,
and is asked for where ranks communicate anyway.
"""

import math
from collections.abc import Sequence

from configs.schema import EvaluationSection, RunConfig, TrainingSection
from recsys.profile.window import ProfilerSchedule

Evaluations = Sequence[dict[str, int | float]]
"""What was measured at each evaluation so far, by position and `<split>_<metric>`."""


class Schedule:
    """Which steps, counted from 1, are followed by what."""

    def __init__(self, config: RunConfig, steps_per_epoch: int) -> None:
        self.total_steps = max(1, math.floor(config.training.epochs * steps_per_epoch + 1e-9))
        if config.training.max_steps is not None:
            self.total_steps = min(self.total_steps, config.training.max_steps)
        self._log_interval = config.logging.every_steps
        self._save_interval = config.checkpoint.every_steps
        self._evaluation_interval = max(1.0, config.evaluation.every_epochs * steps_per_epoch)
        # A profiled window must not be cut by any of these.
        intervals = (self._evaluation_interval, self._save_interval, self.total_steps)
        self._windows = ProfilerSchedule(config.profile, [steps for steps in intervals if steps])

    def logs(self, step: int) -> bool:
        """Return whether loss and speed are recorded after the step."""
        return step % self._log_interval == 0

    def evaluates(self, step: int) -> bool:
        """Return whether the step ends a fraction of an epoch, which need not be a whole number of steps."""
        return step % self._evaluation_interval < 1 or step == self.total_steps

    def saves(self, step: int) -> bool:
        """Return whether a checkpoint is written after the step."""
        return self._save_interval > 0 and step % self._save_interval == 0

    def profiles(self, step: int, windows: int) -> bool:
        """Return whether a profiled window begins after the step. windows: how many there were."""
        return self._windows.is_due(step, windows)

    def describe_obstacle(self) -> str | None:
        """Return why a run that is to make profiled windows makes none."""
        return self._windows.describe_obstacle()


class StopRules:
    """Which evaluation is the best, where the target was reached, and when that ends training.

    split: whose rows decide: the validation split, or the test split where a dataset has no validation rows.
    """

    def __init__(self, training: TrainingSection, evaluation: EvaluationSection, total_steps: int, split: str) -> None:
        self.training, self.patience, self.total_steps, self.split = training, evaluation.patience, total_steps, split

    def best(self, evaluations: Evaluations) -> dict[str, int | float] | None:
        """Return the evaluation of the lowest log loss; the first of equals."""
        return min(evaluations, key=lambda e: e[f"{self.split}_log_loss"], default=None)

    def target_reached(self, evaluations: Evaluations) -> dict[str, int | float] | None:
        """Return the first evaluation that reached the target AUC; None where none did, or there is no target."""
        target = self.training.target_auc
        if target is None:
            return None
        return next((e for e in evaluations if e[f"{self.split}_auc"] >= target), None)

    def reason_to_stop(self, step: int, evaluations: Evaluations, *, is_evaluated: bool) -> str | None:
        """Return why training ends after the step; None = it goes on. is_evaluated: the last evaluation is of it."""
        if step >= self.total_steps:
            return "max_steps" if step == self.training.max_steps else "epochs"
        if not is_evaluated:
            return None
        if self.training.stop_at_target and self.target_reached(evaluations) is not None:
            return "target_auc"
        best = self.best(evaluations)
        if self.patience and best is not None and len(evaluations) - 1 - evaluations.index(best) >= self.patience:
            return "patience"
        return None
