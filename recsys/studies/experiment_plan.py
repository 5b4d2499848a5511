"""Which runs an experiment is made of, and whether this machine can hold them: known before anything is trained."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from configs.load import ConfigError, flatten, load_config, resolved
from configs.schema import RunConfig
from recsys.data.dataset import Dataset, count_ids
from recsys.data.registry import build_dataset, find_dataset
from recsys.embedding.embedding_size import count_parameters
from recsys.embedding.embeddings import METHODS, build_embedding, build_tables
from recsys.models.registry import MODELS
from recsys.runs.ranks import choose_device
from recsys.studies.experiment import Experiment, Method, Source, as_overrides
from recsys.train.registry import CHOICES

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PROCESS_BYTES = 800 * 2**20
"""Of a process with PyTorch, TorchRec and a small model, as measured."""
_STATES = {"sgd": 0, "adagrad": 1}


@dataclass(frozen=True)
class Group:
    """Runs alike in all but learning rate and seed. overrides: of all of them, over `config`.

    parameters: of the embeddings as they will be built; needs_bytes: of one run in memory; problem: why it cannot be
    run, None where it can. seconds: estimate for one run, None where the experiment knows no figure.
    """

    setting: str
    architecture: str
    method: str
    compression: float
    config: str
    overrides: tuple[str, ...]
    parameters: int | None = None
    needs_bytes: int | None = None
    seconds: float | None = None
    problem: str | None = None

    @property
    def setup(self) -> tuple[str, str, float]:
        """What the time of a step depends on."""
        return self.architecture, self.method, self.compression

    @property
    def held_bytes(self) -> int:
        """Of one run, but for its processes."""
        return 0 if self.needs_bytes is None else self.needs_bytes - PROCESS_BYTES * self.load().parallelism.world_size

    @property
    def name(self) -> str:
        parts = [self.setting, self.architecture, self.method, f"{self.compression:g}x".replace("+", "")]
        return "_".join(part for part in parts if part)

    def load(self, more: Sequence[str] = ()) -> RunConfig:
        return load_config(self.config, [*self.overrides, *more], CHOICES)


def find_source(experiment: Experiment, data: str | None) -> tuple[str, Source, list[str]]:
    """Return the experiment's source whose dataset's files `data` names, and the overrides that name them.

    data: None = generated rows. Raises ConfigError.
    """
    name, found = ("generated", []) if data is None else find_dataset(data)
    if name not in experiment.data:
        known = ", ".join(experiment.data)
        raise ConfigError(f"--data {data}: these are {name} rows; the experiment is defined for: {known}")
    return name, experiment.data[name], found


def plan_groups(experiment: Experiment, source: Source, overrides: Sequence[str], scale: float) -> list[Group]:
    """Every combination of setting, model, method and compression, the baseline of each setting and model first.

    Raises ConfigError for a mistake in a key or value, and for a scale where nothing can be scaled.
    """
    if not 0 < scale < math.inf:
        raise ConfigError(f"--scale {scale:g}: must be above 0")
    if scale != 1 and not source.scaled:
        raise ConfigError(f"--scale {scale:g}: these rows come from files and cannot be scaled")
    config = str(CONFIGS / source.config)

    def plan(setting: str, architecture: str, method: Method, compression: float) -> Group:
        settings = {**source.overrides, **source.settings[setting], **method.overrides}
        laid = [*as_overrides(settings), f"model.architecture={architecture}", f"embedding.compression={compression!r}"]
        laid += _scale_keys(config, laid, source.scaled, scale)
        return Group(setting, architecture, method.name, compression, config, (*laid, *overrides))

    groups = [
        plan(setting, architecture, method, compression)
        for setting in source.settings
        for architecture in experiment.architectures
        for method in experiment.methods
        for compression in method.compressions
    ]
    return [replace(group, seconds=_estimate_seconds(group, source)) for group in groups]


def _scale_keys(config: str, overrides: list[str], scaled: Mapping[str, float], scale: float) -> list[str]:
    if scale == 1:
        return []
    values = flatten(resolved(load_config(config, overrides, CHOICES), CHOICES))
    found = []
    for key, most in scaled.items():
        value = min(scale * values[key], most or math.inf)
        found.append(f"{key}={max(1, round(value)) if isinstance(values[key], int) else value}")
    return found


def _estimate_seconds(group: Group, source: Source) -> float | None:
    config, per_row = group.load(), source.microseconds_per_row.get(group.architecture)
    rows = getattr(config.data.options, "train_rows", None)
    if per_row is None or rows is None:
        return None
    held_out = sum(getattr(config.data.options, f"{split}_rows", 0) for split in ("validation", "test"))
    evaluations = config.training.epochs / config.evaluation.every_epochs
    cores = config.parallelism.world_size * config.parallelism.threads_per_rank
    return 1e-6 * per_row * (rows * config.training.epochs + 0.4 * held_out * evaluations) / cores


def check_source(groups: Sequence[Group]) -> dict[str, Dataset]:
    """Return the rows of each setting. Raises ValueError where `Dataset.check` does, and what building them raises."""
    datasets = {}
    for group in groups:
        if group.setting not in datasets:
            dataset = datasets[group.setting] = build_dataset(group.load().data)
            try:
                dataset.check()
            except ValueError as error:
                raise ValueError(f"setting {group.setting!r}: {error}") from None
    return datasets


def check_target(target: float | None, datasets: Mapping[str, Dataset]) -> dict[str, float]:
    """Setting -> best possible test AUC, where it is known. Raises ConfigError for a target above it."""
    best = {setting: found.auc for setting, data in datasets.items() if (found := data.best_possible()) is not None}
    for setting, auc in best.items():
        if target is not None and target > auc:
            where = f" of setting {setting!r}" if setting else ""
            raise ConfigError(f"--target {target:g}: the best possible AUC on the test rows{where} is {auc:.6f}")
    return best


def size_groups(groups: Sequence[Group], datasets: Mapping[str, Dataset], memory: int | None) -> list[Group]:
    """The groups with what they hold, and with their problem where a method refuses or memory (bytes) is exceeded;
    None: of a cluster, not known."""
    counts = {setting: cache(lambda data=data: count_ids(data)) for setting, data in datasets.items()}
    return [_size(group, datasets[group.setting], counts[group.setting], memory) for group in groups]


def _size(group: Group, dataset: Dataset, id_counts: Callable[[], Any], memory: int | None) -> Group:
    config = group.load()
    first_order = MODELS[group.architecture].FIRST_ORDER
    tables = build_tables(
        dataset.feature_names, dataset.num_embeddings, config.model.embedding_dim, first_order=first_order
    )
    try:
        module = build_embedding(
            config.embedding,
            tables,
            seed=0,
            device=torch.device("meta"),
            id_counts=lambda: id_counts() * (1 + first_order),
        )
    except ValueError as refused:
        return replace(group, problem=str(refused))
    parameters = count_parameters(module)
    fused = METHODS[config.embedding.method].placement == "shard"
    copies = 1 + _STATES[config.optimizer.embedding] + (not fused)  # replicated: a dense gradient
    ranks = config.parallelism.world_size
    needs = PROCESS_BYTES * ranks + 4 * parameters * copies * (1 if fused else ranks)
    found = replace(group, parameters=parameters, needs_bytes=needs)
    if memory is None or needs <= memory:
        return found
    problem = (
        f"needs {needs:,} bytes of memory, {memory:,} are available: {parameters:,} embedding parameters × 4 bytes"
    )
    each = "" if fused or ranks == 1 else f" × {ranks} ranks"
    return replace(found, problem=f"{problem} × {copies} (themselves, optimizer state, gradient){each}")


def available_bytes(device: str = "auto") -> int:
    """Of memory for new processes: of the machine, or of the GPU where runs are made on it."""
    if choose_device(device).type == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
