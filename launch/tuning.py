"""How the embeddings' learning rate is chosen, the same for all methods: by log loss on the selecting rows, from one
grid and one step beyond it where the best lies at its end."""

from collections.abc import Sequence

from launch.sweep import Outcome
from recsys.method_rows import Trial

RATE = "optimizer.embedding_learning_rate"


def read_trial(rate: float, outcome: Outcome) -> Trial:
    if outcome.error:
        return Trial(rate, None, outcome.seconds or 0.0, outcome.error)
    summary = outcome.run_dir.read_summary()
    log_loss = summary["best"][f"{summary['selected_on']}_log_loss"]
    return Trial(rate, log_loss, summary["train_time_s"] + summary["evaluation_time_s"])


def choose_rate(trials: Sequence[Trial]) -> float | None:
    """The learning rate of the lowest log loss; None where every trial failed."""
    found = [(trial.log_loss, trial.learning_rate) for trial in trials if trial.log_loss is not None]
    return min(found)[1] if found else None


def find_next_rate(trials: Sequence[Trial]) -> float | None:
    """One step of the grid beyond its end, where the best rate lies there; below it where every trial failed."""
    rates, best = sorted(trial.learning_rate for trial in trials), choose_rate(trials)
    if len(rates) < 2 or best not in (None, rates[0], rates[-1]):
        return None
    end, inner = (rates[-1], rates[-2]) if best == rates[-1] else (rates[0], rates[1])
    return float(f"{end * end / inner:.1g}")
