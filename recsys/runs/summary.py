"""What is known of a run: one model, written by training as summary.json and read by everything else.

Training fills it in one place each: what was chosen and built (`RunFacts`) once the model stands, what was measured
(`RunSummary`) whenever the summary is written. A reader takes what it needs by name; nobody edits the JSON.

Summaries of earlier versions stay readable: keys that are no more are ignored, what they lack has a default, and a
renamed field also takes its former name.
"""

from typing import Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, field_validator

from recsys.runs.window_timing import WindowTiming

Status = Literal["running", "finished", "failed", "interrupted"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False, use_attribute_docstrings=True)


class Parameters(_Part):
    """Numbers of parameters; embedding_full: of the uncompressed tables."""

    dense: int
    embedding: int
    embedding_full: int


class Compression(_Part):
    """Parameters of the full tables over those stored: as the config asks, and as built."""

    target: float = Field(validation_alias=AliasChoices("target", "asked"))
    actual: float = Field(validation_alias=AliasChoices("actual", "obtained"))


class BytesPerRank(_Part):
    """What each rank really holds; dense is the same on all of them."""

    embedding: list[int] = Field(min_length=1)
    embedding_optimizer: list[int] = Field(min_length=1)
    dense: int | None = None


class Times(_Part):
    """Percentiles and mean over the steps of a run in ms, without the first ones (`recsys.train.clocks`)."""

    p50: float
    p95: float
    mean: float | None = None


class BestPossible(_Part):
    """Quality that no model can exceed on the test rows; known of generated data alone."""

    auc: float
    log_loss: float
    base_rate: float


class Target(_Part):
    """The AUC to reach, on which split, and where in training it was reached first; None = never."""

    auc: float
    split: str
    time_s: float | None
    samples: int | None
    epochs: float | None


class Failure(_Part):
    """The rank where a run first went wrong, and what it said."""

    rank: int
    message: str


class RunFacts(_Part):
    """What was chosen and built: known before the first step, and constant from then on."""

    name: str
    architecture: str
    method: str
    placement: str
    sharding: str | None
    """How TorchRec divided the tables; None for a replicated method."""
    dataset: str
    data_fingerprint: str
    seed: int
    device: str
    world_size: int
    threads_per_rank: int
    global_batch_size: int
    train_rows: int
    test_rows: int
    best_possible: BestPossible | None = None
    parameters: Parameters
    compression: Compression
    embedding_stored_bytes: int | None = None
    """Of all that must be kept to look up; the actual compression is over it."""
    bytes_per_rank: BytesPerRank


class RunSummary(RunFacts):
    """summary.json: the facts, and what was measured so far; it may be missing from a run that has not come so far.

    An evaluation, `best` or `last`, is its position (step, samples, epoch, time_s) and `<split>_<metric>` for every
    metric of `recsys.runs.metrics`.
    """

    status: Status
    stop_reason: str | None = None
    steps: int = 0
    samples: int = 0
    epochs: float = 0.0
    train_time_s: float | None = None
    """Wall clock of training alone: evaluation and checkpoints are taken out."""
    evaluation_time_s: float | None = None
    step_ms: Times | None = None
    data_ms: Times | None = None
    samples_per_s: float | None = None
    profiles: list[WindowTiming] = []
    peak_memory_gib: list[float] | None = None
    """By rank; empty before the first evaluation."""
    test_positives: int | None = None
    selected_on: str
    """The split that decides about the best evaluation, patience and target: validation where it has rows."""
    best: dict[str, int | float] | None = None
    last: dict[str, int | float] | None = None
    target: Target | None = None
    error: Failure | None = None

    @field_validator("profiles")
    @classmethod
    def _steps_take_time(cls, windows: list[WindowTiming]) -> list[WindowTiming]:
        if not all(window.ranks and all(rank.step_ms > 0 for rank in window.ranks) for window in windows):
            raise ValueError("a profiled window has no ranks, or steps that took no time")
        return windows

    def ended(self, status: Status, failure: Failure) -> "RunSummary":
        """Return the summary of this run once it has ended before its time: status is failed or interrupted."""
        return self.model_copy(update={"status": status, "stop_reason": status, "error": failure})
