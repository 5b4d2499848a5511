"""Where the figures of a run go while it runs: metrics.jsonl, TensorBoard, and a progress bar on a terminal.

Only rank 0 records; the others hold a recorder that does nothing, so the trainer has no branch on rank.
"""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.tensorboard.summary import hparams
from torch.utils.tensorboard.writer import SummaryWriter

from recsys.run_dir import RunDir


class Recorder:
    def __init__(self, run_dir: RunDir, *, enabled: bool, tensorboard: bool) -> None:
        self.run_dir = run_dir
        self.enabled = enabled
        self._tensorboard = enabled and tensorboard
        self._writer: SummaryWriter | None = None
        self._progress: Progress | None = None

    def start(self, total_steps: int, step: int) -> None:
        """Drops what an earlier attempt recorded after `step`."""
        if self.enabled:
            self.run_dir.keep_records_until(step)
        if self._tensorboard:
            self._writer = SummaryWriter(str(self.run_dir.path), purge_step=step + 1)
        console = Console(stderr=True)
        if self.enabled and console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=console,
            )
            self._task = self._progress.add_task(self.run_dir.name, total=total_steps, completed=step, note="")
            self._progress.start()

    def advance(self, step: int) -> None:
        if self._progress:
            self._progress.update(self._task, completed=step)

    def record(self, position: Mapping[str, float], metrics: Mapping[str, float]) -> None:
        """position: step, samples, epoch and time_s. metrics: values by the names of `recsys.metrics`."""
        if not self.enabled:
            return
        self.run_dir.append_record({**position, **metrics})
        if self._writer:
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, int(position["step"]))
        if self._progress:
            shown = {name.partition("/")[2]: value for name, value in metrics.items()}
            noted = [name for name in ("train_log_loss", "validation_auc", "test_auc") if name in shown]
            note = " ".join(f"{name} {shown[name]:.4f}" for name in noted)
            self._progress.update(self._task, note=note)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        if self.enabled:
            self.run_dir.write_summary(summary)

    def keep_summary(self, summary: Mapping[str, Any]) -> None:
        """Writes how far a run came that is about to end, unless another rank has already said why it ends."""
        if self.enabled and self.run_dir.read_summary()["status"] == "running":
            self.run_dir.write_summary(summary)

    def write_hparams(self, parameters: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """The run's row of TensorBoard's HPARAMS page. parameters: numbers, strings or booleans by dotted key."""
        if self._writer:
            for summary in hparams(dict(parameters), dict(metrics)):
                assert self._writer.file_writer is not None
                self._writer.file_writer.add_summary(summary)
            for name, value in metrics.items():
                self._writer.add_scalar(name, value)

    def close(self) -> None:
        if self._progress:
            self._progress.stop()
        if self._writer:
            self._writer.close()
