"""A queue of trials, some at a time, and what is shown meanwhile.

On a terminal: a bar of all with the time left, and one of each trial that runs, fed from its run directory. Elsewhere:
a line for each end.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from configs.schema import RunConfig
from launch.runners.trial import End, run_dir_of
from recsys.report.numbers import format_seconds
from recsys.runs.run_directory import RunDir

_READ_EVERY_S = 1.0


def run_queue(
    configs: Sequence[RunConfig],
    jobs: int,
    title: str,
    start: Callable[[int], None],
    poll: Callable[[], Mapping[int, End]],
) -> list[End]:
    """Run every config, `jobs` at a time, and return how each ended, in order.

    start(index) begins one. poll() waits a moment and returns those that have ended since, by index.
    """
    waiting, ended = deque(range(len(configs))), dict[int, End]()
    with TrialDisplay(title, len(configs), jobs) as display:
        while len(ended) < len(configs):
            while waiting and len(configs) - len(waiting) - len(ended) < jobs:
                index = waiting.popleft()
                display.start(configs[index])
                start(index)
            for index, end in poll().items():
                ended[index] = end
                display.finish(configs[index], end)
            display.update(len(waiting))
    return [ended[index] for index in range(len(configs))]


class TrialDisplay:
    """Show the progress of trials on stderr: bars on a terminal, else a line for each end."""

    def __init__(self, title: str, total: int, jobs: int) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.total, self.jobs = total, jobs
        self.seconds: list[float] = []
        self.started: dict[str, float] = {}
        self.running: dict[str, tuple[TaskID, RunConfig]] = {}
        self._read_at = 0.0
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.bar = self.progress.add_task(escape(title), total=total, note="")

    def __enter__(self) -> "TrialDisplay":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        for task, _config in self.running.values():
            self.progress.remove_task(task)
        self.progress.stop()

    def start(self, config: RunConfig) -> None:
        """Show a trial that begins."""
        name = config.run.name
        self.started[name] = time.time()
        self.running[name] = self.progress.add_task(f"  {escape(name)}", total=None, note="starting"), config

    def finish(self, config: RunConfig, end: End) -> None:
        """Take a trial off the display and print its end where that is news."""
        name = config.run.name
        del self.started[name]
        self.progress.remove_task(self.running.pop(name)[0])
        self.seconds.append(end.seconds)
        if end.failure or not self.console.is_terminal:
            figures = [format_seconds(end.seconds), _describe(_read_newest(run_dir_of(config)))]
            text = f"failed: {end.failure}" if end.failure else ", ".join(filter(None, figures))
            self.console.print(f"{len(self.seconds)}/{self.total} {name}: {text}", markup=False, soft_wrap=True)

    def update(self, waiting: int) -> None:
        """Refresh the bars; `waiting` trials have not begun. To be called again and again."""
        note = f"{len(self.seconds)} of {self.total}"
        now = time.time()
        if self.seconds:
            mean = fmean(self.seconds)
            begun = sum(max(0.0, mean - (now - started)) for started in self.started.values())
            note += f", about {format_seconds((waiting * mean + begun) / self.jobs)} left"
        self.progress.update(self.bar, completed=len(self.seconds), note=note)
        if not self.progress.disable and now - self._read_at > _READ_EVERY_S:
            self._read_at = now
            self._read_runs()

    def _read_runs(self) -> None:
        for name, (task, config) in self.running.items():
            run_dir = run_dir_of(config)
            path = run_dir.path / "metrics.jsonl"
            # An older file is that of an earlier attempt.
            if path.exists() and path.stat().st_mtime >= self.started[name] and (newest := _read_newest(run_dir)):
                epochs = config.training.epochs
                done = min(newest["epoch"], epochs)
                self.progress.update(task, total=epochs, completed=done, note=escape(_describe(newest)))


def _read_newest(run_dir: RunDir) -> dict[str, float]:
    """Return the newest value of every metric that a run has recorded."""
    newest: dict[str, float] = {}
    for record in run_dir.records():
        newest |= record
    return newest


def _describe(newest: Mapping[str, float]) -> str:
    """Return a run's newest figures in a few words."""
    parts = [f"{newest['step']:,} steps"] if newest else []
    if "time/step_ms" in newest:
        parts.append(f"{newest['time/step_ms']:.1f} ms a step")
    if "quality/test_auc" in newest:
        parts.append(f"test AUC {newest['quality/test_auc']:.4f}")
    return ", ".join(parts)
