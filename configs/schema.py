"""What a run is, as data: one frozen section per concern, put together in `RunConfig`.

A section checks its own values; `configs.load` turns what pydantic finds into errors that name file, key and value.
Methods, models and datasets bring `Options` of their own: any pydantic model that refuses unknown keys, kept in the
file of what it belongs to and validated by the loader through the registries it is handed. This package knows none of
them by name, and they need nothing of it.

Departure from plain dataclasses: pydantic checks types without conversions and lists the allowed values for us.
"""

from typing import Literal, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, model_validator

OptimizerName = Literal["sgd", "adagrad"]
DenseOptimizerName = Literal["sgd", "adagrad", "adam"]
Sharding = Literal[
    "planner", "table_wise", "row_wise", "column_wise", "table_row_wise", "table_column_wise", "data_parallel"
]


class Section(BaseModel):
    """A section of a config: frozen; unknown keys and silent conversions are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


@runtime_checkable
class ChecksWorldSize(Protocol):
    """Options that do not go with every number of ranks; `load_config` asks them before anything is built."""

    def check_world_size(self, world_size: int) -> None:
        """Raise ValueError where these options do not go with that many ranks."""
        ...


class RunSection(Section):
    """Which run this is, and where it leaves what it makes."""

    name: str = Field(default="", pattern=r"^[\w.\-]*$")
    """Name of the run and of its directory; empty = the name of the config file. A base file does not hand it on."""
    dir: str = "runs"
    """Directory that holds the run directories."""
    seed: int = Field(default=0, ge=0)
    """Seeds dense weights, embeddings, hash functions and the order of the rows."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto = CUDA when a device is present."""
    overwrite: bool = False
    """Replace a finished run of the same name."""


class DataSection(Section):
    """The rows, and in which order they are trained on."""

    dataset: str
    """Where the rows come from; its own keys are in [data.<dataset>]."""
    cache_dir: str = ".cache"
    """Directory of the columnar caches."""
    shuffle_window_rows: int = Field(default=4_194_304, ge=0)
    """Training rows are permuted within windows of this many rows, the windows among themselves; 0 = file order."""
    options: SerializeAsAny[BaseModel] = Section()


class ModelSection(Section):
    """The layers around the embeddings."""

    architecture: str
    """The model around the embeddings; its own keys are in [model.<architecture>]."""
    embedding_dim: int = Field(ge=1)
    """Dimension of every embedding, D in the papers' tables."""
    options: SerializeAsAny[BaseModel] = Section()


class EmbeddingSection(Section):
    """How the embeddings are stored: what a comparison varies."""

    method: str
    """How embeddings are stored; its own keys are in [embedding.<method>]."""
    compression: float = Field(default=1.0, ge=1.0)
    """Parameters of the full tables / parameters stored."""
    init_scale: float = Field(default=0.01, gt=0.0)
    """Embedding parameters start uniform in ± init_scale: small starts are best for full tables and ROBE alike."""
    whole_tables_below: int = Field(default=0, ge=0)
    """Tables of fewer rows than this are stored whole, whatever the method; their parameters count."""
    fit_to: str = ""
    """Run directory of a trained run with full tables that kept its best evaluation (checkpoint.keep_best): start from
    its layers, and from the compressed tables that fit its tables best, instead of at random."""
    options: SerializeAsAny[BaseModel] = Section()


class ParallelismSection(Section):
    """Over how many processes the run is divided, and how."""

    world_size: int = Field(default=1, ge=1)
    """Ranks of the job; the global batch is divided among them."""
    threads_per_rank: int = Field(default=1, ge=1)
    """CPU threads of one rank: keep world_size x threads_per_rank equal in a comparison."""
    sharding: Sharding = "planner"
    """Sharding of the tables of a method that is placed by sharding; ignored by replicated methods."""
    timeout_s: int = Field(default=300, ge=1)
    """A collective that takes longer ends the job."""


class OptimizerSection(Section):
    """How embeddings and layers are updated."""

    dense: DenseOptimizerName = "sgd"
    """Optimizer of the layers outside the embeddings."""
    dense_learning_rate: float = Field(gt=0.0)
    """Of the layers."""
    embedding: OptimizerName = "sgd"
    """Optimizer of the embedding parameters: element-wise on both sides (FBGEMM: EXACT_SGD, EXACT_ADAGRAD)."""
    embedding_learning_rate: float = Field(gt=0.0)
    """Of the embeddings."""
    adagrad_eps: float = Field(default=1e-8, gt=0.0)
    """Added to the root of Adagrad's accumulator, dense and embedding alike; the accumulators start at zero."""


class TrainingSection(Section):
    """How long the run trains, and what ends it."""

    global_batch_size: int = Field(ge=1)
    """Rows per step over all ranks."""
    epochs: float = Field(default=1.0, gt=0.0)
    """Passes over the training rows, fractions allowed."""
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after this many steps."""
    time_budget_s: float | None = Field(default=None, gt=0.0)
    """Stop when training alone (without evaluation and checkpoints) has taken this long."""
    target_auc: float | None = Field(default=None, gt=0.5, lt=1.0)
    """Time to this AUC is reported."""
    stop_at_target: bool = False
    """Stop at the first evaluation that reaches target_auc."""

    @model_validator(mode="after")
    def _target_is_given(self) -> "TrainingSection":
        if self.stop_at_target and self.target_auc is None:
            raise ValueError("stop_at_target needs target_auc")
        return self


class EvaluationSection(Section):
    """When the held-out rows are scored."""

    every_epochs: float = Field(default=1.0, gt=0.0)
    """Evaluate each time this fraction of the training rows has been seen, and at the end."""
    global_batch_size: int = Field(default=16384, ge=1)
    """Rows per evaluation step over all ranks."""
    at_start: bool = False
    """Evaluate before the first step too."""
    patience: int = Field(default=0, ge=0)
    """Stop after this many evaluations without a better log loss on the validation rows; 0 = never."""


class CheckpointSection(Section):
    """What of the run is kept, and whether it continues from there."""

    every_steps: int = Field(default=0, ge=0)
    """Steps between checkpoints; 0 = none during training."""
    at_end: bool = False
    """Write a checkpoint when training ends."""
    keep_best: bool = False
    """Keep a checkpoint of the best evaluation so far, as checkpoints/best."""
    keep_scores: bool = True
    """Keep the scores of the test rows at the best evaluation, 5 bytes a row: for paired differences of AUC."""
    keep_last: int = Field(default=2, ge=1)
    """Checkpoints that are kept, the newest."""
    resume: Literal["never", "auto"] = "auto"
    """auto = continue from the newest checkpoint of the run directory where there is one, never = start anew."""


class LoggingSection(Section):
    """What is written down while the run trains."""

    every_steps: int = Field(default=50, ge=1)
    """Steps between two records of loss and speed."""
    tensorboard: bool = True
    """Write scalars for TensorBoard beside the records."""


class ProfileSection(Section):
    """When steps are profiled."""

    every_steps: int = Field(default=0, ge=0)
    """Steps from one profiled window to the next: computing, communication and waiting by phase; 0 = none."""
    steps: int = Field(default=10, ge=1)
    """Steps of a window. They train as all steps do; times and throughput are taken from the others. A window lies
    between evaluations and checkpoints; where none is that far from the next, there is none, and the run says so."""


class RunConfig(Section):
    """Everything that a run depends on."""

    run: RunSection = RunSection()
    data: DataSection
    model: ModelSection
    embedding: EmbeddingSection
    parallelism: ParallelismSection = ParallelismSection()
    optimizer: OptimizerSection
    training: TrainingSection
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    logging: LoggingSection = LoggingSection()
    profile: ProfileSection = ProfileSection()

    @model_validator(mode="after")
    def _batches_divide(self) -> "RunConfig":
        ranks = self.parallelism.world_size
        for section in ("training", "evaluation"):
            rows = getattr(self, section).global_batch_size
            if rows % ranks:
                raise ValueError(
                    f"{section}.global_batch_size = {rows} is not a multiple of parallelism.world_size = {ranks}: "
                    "every rank takes an equal share"
                )
        return self
