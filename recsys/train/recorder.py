"""Where the figures of a run go while it runs: metrics.jsonl, TensorBoard, and a progress bar on a terminal.

TensorBoard's page of custom scalars shows "communication against computing", the parts of a step as profiled windows
give them, for all chosen runs in the same charts.

Only rank 0 records; the others hold a recorder that does nothing, so the trainer has no branch on rank.
"""

from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.tensorboard.summary import hparams
from torch.utils.tensorboard.writer import SummaryWriter

from configs.schema import OptimizerSection
from recsys.runs.metrics import (
    COMPUTE_MS,
    EXPOSED_COMM_MS,
    OTHER_MS,
    OVERLAP_MS,
    QUALITY,
    WAIT_MS,
    bytes_name,
    phase_name,
    quality_name,
)
from recsys.runs.run_directory import RunDir
from recsys.runs.summary import RunSummary
from recsys.runs.window_timing import WindowTiming
from recsys.train.time_figure import draw_window

_SCALARS = {
    "communication against computing": {
        "computing, ms a step": ["Multiline", [COMPUTE_MS]],
        "exposed communication, ms a step": ["Multiline", [EXPOSED_COMM_MS]],
        "overlap, ms a step": ["Multiline", [OVERLAP_MS]],
        "waiting for a slower rank, ms a step": ["Multiline", [WAIT_MS]],
        "other, ms a step": ["Multiline", [OTHER_MS]],
        "parts of the step, ms": ["Multiline", [COMPUTE_MS, EXPOSED_COMM_MS, OTHER_MS]],
        "bytes a step": ["Multiline", [bytes_name(".*")]],
        "phases, ms a step": ["Multiline", [phase_name(".*")]],
    },
    "quality against time": {
        f"{split} {metric.title}": ["Multiline", [quality_name(split, name)]]
        for name, metric in QUALITY.items()
        for split in ("test", "validation")
    },
}
"""Category -> chart -> the tags in it, as regular expressions."""


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
            self._writer.add_custom_scalars(_SCALARS)
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
        """position: step, samples, epoch and time_s. metrics: values by the names of `recsys.runs.metrics`."""
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

    def record_window(self, position: Mapping[str, float], window: WindowTiming) -> None:
        """A profiled window: its figures, their picture, and where its traces lie."""
        self.record(position, window.metrics())
        if self._writer:
            step = int(position["step"])
            self._writer.add_figure("where the time goes", draw_window(window), step)
            traces = [self.run_dir.trace(window.step, rank).name for rank in range(len(window.ranks))]
            listed = "\n".join(f"- `{self.run_dir.path}/profile/{name}`" for name in traces)
            self._writer.add_text("traces", f"For Perfetto or another viewer of traces:\n\n{listed}", step)

    def write_summary(self, summary: RunSummary) -> None:
        if self.enabled:
            self.run_dir.write_summary(summary)

    def write_summary_if_running(self, summary: RunSummary) -> None:
        """Write how far a run came that is about to end, unless another rank has already said why it ends."""
        if self.enabled and self.run_dir.read_summary().status == "running":
            self.run_dir.write_summary(summary)

    def write_hparams(self, summary: RunSummary, optimizer: OptimizerSection) -> None:
        """Write the run's row of TensorBoard's HPARAMS page: what sets it apart, and its best figures."""
        if self._writer is None:
            return
        assert summary.best is not None, "a finished run has evaluations"
        facts = ("method", "placement", "world_size", "global_batch_size", "seed")
        parameters = {
            "compression": summary.compression.target,
            "embedding_learning_rate": optimizer.embedding_learning_rate,
            "dense_learning_rate": optimizer.dense_learning_rate,
            **{name: getattr(summary, name) for name in facts},
        }
        metrics: dict[str, float] = {f"best/test_{name}": summary.best[f"test_{name}"] for name in QUALITY}
        if summary.step_ms:
            metrics["best/step_p50_ms"] = summary.step_ms.p50
        for event in hparams(parameters, metrics):
            assert self._writer.file_writer is not None
            self._writer.file_writer.add_summary(event)
        for name, value in metrics.items():
            self._writer.add_scalar(name, value)

    def close(self) -> None:
        if self._progress:
            self._progress.stop()
        if self._writer:
            self._writer.close()
