"""How the embeddings' learning rate is chosen, the same for all methods: by log loss on the selecting rows, from one
grid and one step beyond it where the best lies at its end."""

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

from launch.runners.trial import Outcome
from recsys.studies.method_rows import RateTrial

RATE = "optimizer.embedding_learning_rate"


Setup = TypeVar("Setup", bound=Hashable)


def tune(
    setups: Sequence[Setup], rates: Sequence[float], make: Callable[[str, list[tuple[Setup, float]]], Sequence[Outcome]]
) -> dict[Setup, list[RateTrial]]:
    """The trials of every setup, by rising rate. make: a title, setups with rates -> the outcomes of their runs."""
    found: dict[Setup, list[RateTrial]] = {setup: [] for setup in setups}

    def run(title: str, keys: list[tuple[Setup, float]]) -> None:
        for (setup, rate), outcome in zip(keys, make(title, keys), strict=True):
            found[setup].append(_read_trial(rate, outcome))

    run("learning rates", [(setup, rate) for setup in setups for rate in rates])
    beyond = [(setup, rate) for setup in setups if (rate := find_next_rate(found[setup])) is not None]
    run("beyond the grid", beyond)
    return {setup: sorted(trials, key=lambda trial: trial.learning_rate) for setup, trials in found.items()}


def _read_trial(rate: float, outcome: Outcome) -> RateTrial:
    if outcome.failure:
        return RateTrial(rate, None, outcome.seconds or 0.0, outcome.failure)
    summary = outcome.run_dir.read_summary()
    assert summary.best is not None, "a finished run has evaluations"
    seconds = (summary.train_time_s or 0.0) + (summary.evaluation_time_s or 0.0)
    return RateTrial(rate, summary.best[f"{summary.selected_on}_log_loss"], seconds)


def choose_rate(trials: Sequence[RateTrial]) -> float | None:
    """The learning rate of the lowest log loss; None where every trial failed."""
    found = [(trial.log_loss, trial.learning_rate) for trial in trials if trial.log_loss is not None]
    return min(found)[1] if found else None


def find_next_rate(trials: Sequence[RateTrial]) -> float | None:
    """One step of the grid beyond its end, where the best rate lies there; below it where every trial failed."""
    rates, best = sorted(trial.learning_rate for trial in trials), choose_rate(trials)
    if len(rates) < 2 or best not in (None, rates[0], rates[-1]):
        return None
    end, inner = (rates[-1], rates[-2]) if best == rates[-1] else (rates[0], rates[1])
    return float(f"{end * end / inner:.1g}")
