"""Starting a compressed model from a trained one: its layers copied, its full tables fitted by the compressed ones.

The source is the run directory of a finished run with full tables, sharded or not, that kept its best evaluation
(`checkpoint.keep_best`). How the tables are fitted is the method's: see `pss.collection.EmbeddingHooks.fit`.
"""

import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from configs.load import flatten
from recsys.embedding.hooks import hooks_of
from recsys.train.checkpoint import BEST

SHARED = ("data", "model")
"""Sections in which the trained run and this one must agree."""


def start_from_trained(
    source: Path,
    sections: dict[str, Any],
    model: nn.Module,
    embedding: nn.Module,
    tables: Sequence[EmbeddingBagConfig],
    id_counts: Callable[[], Sequence[np.ndarray]],
) -> float:
    """Copies the layers of the trained run into `model` and fits its tables by `embedding`, a part of it.

    sections: this run's resolved config. Returns the relative error of the fitted tables, √(Σ w·(E − fit)² / Σ w·E²),
    w the weights of the rows where there are any.
    Raises ValueError where there is no such checkpoint, where the runs differ in data or model, and for a method that
    cannot be fitted.
    """
    checkpoint = source / "checkpoints" / BEST
    if not checkpoint.is_dir():
        raise ValueError(
            f"embedding.fit_to = {str(source)!r}: there is no {checkpoint}; train with checkpoint.keep_best=true"
        )
    _check_same(source, sections)
    prefix = next(name for name, module in model.named_modules() if module is embedding)
    state = model.state_dict()
    layers = {name: value for name, value in state.items() if not name.startswith(f"{prefix}.")}
    names = [f"{prefix}.embedding_bags.{table.name}.weight" for table in tables]
    stored = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    try:
        sizes = [cast(TensorStorageMetadata, stored[f"model.{name}"]).size for name in names]
        full = [torch.empty(size) for size in sizes]
        load({"model": layers | dict(zip(names, full, strict=True))}, checkpoint_id=checkpoint)
    except (KeyError, CheckpointException) as error:  # the latter is no subclass of Exception
        raise ValueError(f"embedding.fit_to = {str(source)!r}: {checkpoint} holds no full tables: {error}") from error
    model.load_state_dict(layers, strict=False)
    # Sharded tables of one column are stored wider (baselines.sharded): the first columns are what is looked up.
    columns = [values[:, : table.embedding_dim] for values, table in zip(full, tables, strict=True)]
    try:
        return hooks_of(embedding).fit(columns, id_counts)
    except ValueError as error:
        raise ValueError(f"embedding.fit_to: {error}") from error


def _check_same(source: Path, sections: dict[str, Any]) -> None:
    trained = tomllib.loads((source / "config.toml").read_text())
    for section in SHARED:
        theirs, ours = flatten(trained[section]), flatten(sections[section])
        for key in sorted(theirs.keys() | ours.keys()):
            if key != "cache_dir" and theirs.get(key) != ours.get(key):
                raise ValueError(
                    f"embedding.fit_to = {str(source)!r} was trained with {section}.{key} = {theirs.get(key)!r}, "
                    f"this run has {ours.get(key)!r}"
                )
