"""Tables E (n, d) to sketch: drawn, or read from a file or a run's checkpoint."""

import pickle
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

_WEIGHT = re.compile(r"(?:^|\.)embedding_bags\.([^.]+)\.weight$")
_OPTIMIZER = "optimizer."  # its state is named after the weights


def random_table(num_embeddings: int, dim: int, seed: int) -> np.ndarray:
    """Return (n, d) float32, N(0, 1): all rows of nearly the same norm, all singular values of nearly the same size."""
    return np.random.default_rng(seed).standard_normal((num_embeddings, dim), dtype=np.float32)


def power_law_table(num_embeddings: int, dim: int, exponent: float, seed: int) -> np.ndarray:
    """Return (n, d) float32: row i = 1, 2, … in a random direction with norm i^-exponent."""
    table = random_table(num_embeddings, dim, seed)
    norms = np.arange(1, num_embeddings + 1, dtype=np.float64) ** -exponent
    return (table / np.linalg.norm(table, axis=1, keepdims=True) * norms[:, None]).astype(np.float32)


def load_table(source: str) -> np.ndarray:
    """Return the table at `source`, (n, d) float32, finite and not all zeros.

    source: a .npy file; a .pt file with a tensor, or with a dictionary of them; or a checkpoint directory
    (torch.distributed.checkpoint, a run's checkpoints/step_<n>). "<path>:<table>" chooses among several.
    Raises ValueError naming the source for what cannot be read, and listing the tables where one must be chosen.
    """
    path, _, name = (source, "", "") if Path(source).exists() else source.rpartition(":")
    if not Path(path or source).exists():
        raise ValueError(f"{path or source} does not exist")
    try:
        table = _read(Path(path), name)
    except (ValueError, OSError, EOFError, RuntimeError, pickle.UnpicklingError, CheckpointException) as error:
        raise ValueError(f"{source} cannot be read: {str(error).splitlines()[0]}") from error
    if table.ndim != 2 or 0 in table.shape:
        raise ValueError(f"{source} is no table (rows, dim) but of shape {tuple(table.shape)}")
    table = table.astype(np.float32)
    if not np.isfinite(table).all():
        raise ValueError(f"{source} holds numbers that are not finite")
    if not table.any():
        raise ValueError(f"{source} holds nothing but zeros")
    return table


def _read(path: Path, name: str) -> np.ndarray:
    if path.is_dir():
        return _read_checkpoint(path, name)
    if path.suffix == ".npy":
        return np.load(path, allow_pickle=False)
    if path.suffix != ".pt":
        raise ValueError("it is none of .npy, .pt and a checkpoint directory")
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(loaded, Tensor):
        return loaded.float().numpy()
    tensors = {key: value for key, value in loaded.items() if isinstance(value, Tensor)}
    return tensors[_choose(path, name, {key: key for key in tensors})].float().numpy()


def _read_checkpoint(path: Path, name: str) -> np.ndarray:
    if not (path / ".metadata").is_file():
        raise ValueError("it is no checkpoint: a run's are in checkpoints/step_<n>")
    stored = FileSystemReader(path).read_metadata().state_dict_metadata
    keys = {
        match[1]: key for key in stored if (match := _WEIGHT.search(key)) and not key.startswith(_OPTIMIZER)
    }  # fmt: skip
    key = _choose(path, name, keys)
    description = stored[key]
    assert isinstance(description, TensorStorageMetadata)
    tensor = torch.empty(description.size, dtype=description.properties.dtype)
    load({key: tensor}, checkpoint_id=path, no_dist=True)
    return tensor.float().numpy()


def _choose(path: Path, name: str, keys: dict[str, str]) -> str:
    """Return the key of the table that is meant: the named one, or the only one."""
    if not keys:
        raise ValueError("it holds no full table")
    if name not in keys and (name or len(keys) > 1):
        shown = ", ".join(list(keys)[:30]) + (", …" if len(keys) > 30 else "")
        raise ValueError(f"choose one of its tables, as in {path}:{next(iter(keys))}, out of {shown}")
    return keys[name] if name else next(iter(keys.values()))
