"""Which runs a study is made of, and whether this machine can hold them: known before anything is trained."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollectionInterface
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from configs.load import ConfigError, flatten, load_config, resolved
from configs.schema import RunConfig
from pss.method import CompressionRefused
from recsys.data.dataset import Dataset, count_ids
from recsys.data.registry import build_dataset, find_dataset
from recsys.embedding.registry import METHODS, build_embedding
from recsys.embedding.sizes import count_parameters
from recsys.runs.ranks import choose_device
from recsys.studies.spec import Method, Source, Study, as_overrides
from recsys.train.assemble import plan_tables
from recsys.train.registry import CHOICES

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PROCESS_BYTES = 800 * 2**20
"""Of a process with PyTorch, TorchRec and a small model, as measured."""
_STATES = {"sgd": 0, "adagrad": 1}
_STD_ROWS = 4096


@dataclass(frozen=True)
class PlannedArm:
    """Describe runs alike in all but learning rate and seed. overrides: of all of them, over `config`.

    parameters: of the embeddings as they will be built; needs_bytes: of one run in memory; problem: why it cannot be
    run, None where it can. limit: the highest compression that the method reaches on these tables, where the target is
    higher. initial_std: of the tables it starts with, over that of full tables. seconds: estimate for one run, None
    where the study knows no figure.
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
    limit: float | None = None
    initial_std: float | None = None

    @property
    def key(self) -> tuple[str, str, float]:
        """Return what the time of a step depends on."""
        return self.architecture, self.method, self.compression

    @property
    def held_bytes(self) -> int:
        """Return the memory of one run, without that of its processes."""
        return 0 if self.needs_bytes is None else self.needs_bytes - PROCESS_BYTES * self.load().parallelism.world_size

    @property
    def name(self) -> str:
        """Return the name of the arm, with which those of its runs begin."""
        parts = [self.setting, self.architecture, self.method, f"{self.compression:g}x".replace("+", "")]
        return "_".join(part for part in parts if part)

    @property
    def is_refused(self) -> bool:
        """Return whether the method does not reach the compression."""
        return self.limit is not None and self.compression > self.limit

    @property
    def is_able(self) -> bool:
        """Return whether it can be run."""
        return self.problem is None and not self.is_refused

    def load(self) -> RunConfig:
        """Return the config of its runs. Raises ConfigError for a mistake in it."""
        return load_config(self.config, self.overrides, CHOICES)


def find_source(study: Study, data: str | None) -> tuple[str, Source, list[str]]:
    """Return the source of the study that the files at `data` belong to, and the overrides that name them.

    data: None = the study's first source. Raises ConfigError.
    """
    if data is None:
        name = next(iter(study.data))
        return name, study.data[name], []
    dataset, overrides = find_dataset(data)
    if dataset not in study.data:
        known = ", ".join(study.data)
        raise ConfigError(f"--data {data}: these are {dataset} rows; the study is defined for: {known}")
    return dataset, study.data[dataset], overrides


def plan_arms(study: Study, source: Source, overrides: Sequence[str], scale: float = 1.0) -> list[PlannedArm]:
    """Return every combination of setting, model, method and compression, the baseline of each setting and model first.

    Raises ConfigError for a mistake in a key or value, and for a scale where nothing can be scaled.
    """
    if not 0 < scale < math.inf:
        raise ConfigError(f"--scale {scale:g}: must be above 0")
    if scale != 1 and not source.scaled:
        raise ConfigError(f"--scale {scale:g}: these rows come from files and cannot be scaled")
    config = str(CONFIGS / source.config)

    def plan(setting: str, architecture: str, method: Method, compression: float) -> PlannedArm:
        """Return the arm of one combination."""
        settings = {**source.overrides, **source.settings[setting], **method.overrides}
        laid = [*as_overrides(settings), f"model.architecture={architecture}", f"embedding.compression={compression!r}"]
        laid += _scale_keys(config, laid, source.scaled, scale)
        return PlannedArm(setting, architecture, method.name, compression, config, (*laid, *overrides))

    arms = [
        plan(setting, architecture, method, compression)
        for setting in source.settings
        for architecture in study.architectures
        for method in study.methods
        for compression in method.compressions
    ]
    return [replace(arm, seconds=_estimate_seconds(arm, source)) for arm in arms]


def _scale_keys(config: str, overrides: list[str], scaled: Mapping[str, float], scale: float) -> list[str]:
    """Return the overrides that multiply the study's scaled keys, each up to its most."""
    if scale == 1:
        return []
    values = flatten(resolved(load_config(config, overrides, CHOICES), CHOICES))
    changed = []
    for key, most in scaled.items():
        value = min(scale * values[key], most or math.inf)
        changed.append(f"{key}={max(1, round(value)) if isinstance(values[key], int) else value}")
    return changed


def _estimate_seconds(arm: PlannedArm, source: Source) -> float | None:
    """Return about the seconds of one run, None where the study knows no figure for the model."""
    config, per_row = arm.load(), source.microseconds_per_row.get(arm.architecture)
    rows = getattr(config.data.options, "train_rows", None)
    if per_row is None or rows is None:
        return None
    held_out = sum(getattr(config.data.options, f"{split}_rows", 0) for split in ("validation", "test"))
    evaluations = config.training.epochs / config.evaluation.every_epochs
    # A row costs 0.4 of its training where it is evaluated: forward alone.
    cores = config.parallelism.world_size * config.parallelism.threads_per_rank
    return 1e-6 * per_row * (rows * config.training.epochs + 0.4 * held_out * evaluations) / cores


def open_datasets(arms: Sequence[PlannedArm]) -> dict[str, Dataset]:
    """Return the rows of each setting.

    Raises ValueError where `Dataset.check` does, and what building the rows raises.
    """
    datasets = {}
    for arm in arms:
        if arm.setting not in datasets:
            dataset = datasets[arm.setting] = build_dataset(arm.load().data)
            try:
                dataset.check()
            except ValueError as error:
                raise ValueError(f"setting {arm.setting!r}: {error}") from None
    return datasets


def check_target(target: float | None, datasets: Mapping[str, Dataset]) -> dict[str, float]:
    """Return the best possible test AUC of every setting where it is known.

    Raises ConfigError for a target above it.
    """
    best = {setting: found.auc for setting, data in datasets.items() if (found := data.best_possible()) is not None}
    for setting, auc in best.items():
        if target is not None and target > auc:
            where = f" of setting {setting!r}" if setting else ""
            raise ConfigError(f"--target {target:g}: the best possible AUC on the test rows{where} is {auc:.6f}")
    return best


def size_arms(
    study: Study, arms: Sequence[PlannedArm], datasets: Mapping[str, Dataset], memory: int | None
) -> list[PlannedArm]:
    """Return the arms with what they hold, and with the problem of those that cannot be run.

    arms: those of one method stand together, by rising compression. memory: bytes available to one run, None where it
    is not known, as of a cluster.
    """
    counts = {setting: cache(lambda data=data: count_ids(data)) for setting, data in datasets.items()}

    def size(arm: PlannedArm) -> PlannedArm:
        """Return the arm with what it holds."""
        return _size(arm, datasets[arm.setting], counts[arm.setting], memory, with_std=study.layout == "grid")

    sized = [size(arm) for arm in arms]
    if study.unreachable == "problem":
        return [replace(arm, limit=None) for arm in sized]
    # That a compression is beyond reach is a figure of the method here, not a problem.
    sized = [replace(arm, problem=None) if arm.is_refused else arm for arm in sized]
    lowest = {(arm.setting, arm.architecture, arm.method): place for place, arm in reversed(list(enumerate(sized)))}
    for place in lowest.values():
        if (arm := sized[place]).is_refused:
            highest = size(_at_compression(arm, arm.limit or 1.0))
            sized[place] = replace(highest, limit=highest.limit or highest.compression)
    return sized


def _at_compression(arm: PlannedArm, compression: float) -> PlannedArm:
    overrides = (*arm.overrides, f"embedding.compression={compression!r}")
    return replace(arm, compression=compression, overrides=overrides, limit=None)


def _size(
    arm: PlannedArm, dataset: Dataset, counts: Callable[[], tuple[np.ndarray, ...]], memory: int | None, with_std: bool
) -> PlannedArm:
    config = arm.load()
    tables, _ = plan_tables(config, dataset)
    device = torch.device("cpu" if with_std else "meta")  # initial values are needed, or shapes alone

    def id_counts() -> tuple[np.ndarray, ...]:
        """Return how often each id occurs, by table."""
        return counts() * (len(tables) // len(dataset.feature_names))  # first-order tables have the same ids

    try:
        module = build_embedding(config.embedding, tables, seed=0, device=device, id_counts=id_counts)
    except CompressionRefused as refused:
        return replace(arm, problem=str(refused), limit=refused.nearest)
    except ValueError as refused:
        return replace(arm, problem=str(refused))
    if with_std:
        std = measure_initial_std(module, tables) / (config.embedding.init_scale / math.sqrt(3))
        arm = replace(arm, initial_std=std)
    parameters = count_parameters(module)
    is_sharded = METHODS[config.embedding.method].placement == "shard"
    copies = 1 + _STATES[config.optimizer.embedding] + (not is_sharded)  # replicated: a dense gradient
    ranks = config.parallelism.world_size
    needs = PROCESS_BYTES * ranks + 4 * parameters * copies * (1 if is_sharded else ranks)
    arm = replace(arm, parameters=parameters, needs_bytes=needs)
    if memory is None or needs <= memory:
        return arm
    each = "" if is_sharded or ranks == 1 else f" × {ranks} ranks"
    problem = (
        f"needs {needs:,} bytes of memory, {memory:,} are available: {parameters:,} embedding parameters × 4 bytes"
        f" × {copies} (themselves, optimizer state, gradient){each}"
    )
    return replace(arm, problem=problem)


def measure_initial_std(module: EmbeddingBagCollectionInterface, tables: Sequence[EmbeddingBagConfig]) -> float:
    """Return the standard deviation of all elements of random rows, as many of each table."""
    generator = torch.Generator().manual_seed(0)
    features = [(name, table.num_embeddings) for table in tables for name in table.feature_names]
    ids = [torch.randint(rows, (_STD_ROWS,), generator=generator) for _, rows in features]
    lengths = torch.ones(len(features) * _STD_ROWS, dtype=torch.int64)
    with torch.no_grad():
        bags = module(KeyedJaggedTensor([name for name, _ in features], torch.cat(ids), lengths=lengths))
    return float(bags.values().double().std())


def available_bytes(device: str = "auto") -> int:
    """Return the memory for new processes: of the machine, or of the GPU where runs are made on it."""
    if choose_device(device).type == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def describe_options(arms: Sequence[PlannedArm]) -> dict[str, str]:
    """Return the [embedding] keys of every method as text, without the compression."""
    sections: dict[str, dict[str, Any]] = {}
    for arm in arms:
        if arm.method not in sections:
            embedding = resolved(arm.load(), CHOICES)["embedding"]
            sections[arm.method] = flatten({key: value for key, value in embedding.items() if key != "compression"})
    return {name: ", ".join(f"{key} = {value}" for key, value in keys.items()) for name, keys in sections.items()}
