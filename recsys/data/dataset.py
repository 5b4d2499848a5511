"""What a dataset is: rows of three splits, read at random, and what is known of them.

A dataset is a class in a file of its own and a line in `recsys.data.registry`. It brings its `Options`, says which
features its rows have, and reads them; what every dataset does alike is done here, once.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from pydantic import BaseModel

READ_ROWS = 16384
"""Rows that are read at once: enough to hide numpy's cost per call, few enough to stay in cache."""

LONG_COUNT_ROWS = 10_000_000
"""From this many rows on, counting ids takes long enough to say so."""


@dataclass(frozen=True)
class Rows:
    """n rows of a dataset, with one id per feature."""

    dense: np.ndarray
    """(n, D) float32, already transformed."""
    ids: np.ndarray
    """(n, F) int64, each in [0, num_embeddings of its table)."""
    labels: np.ndarray
    """(n,) float32, 0 or 1."""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: slice) -> "Rows":
        return Rows(self.dense[rows], self.ids[rows], self.labels[rows])


@dataclass(frozen=True)
class BestPossible:
    """What the true probabilities themselves score on a split, expected over its labels: no model does better."""

    auc: float
    log_loss: float
    base_rate: float


class Dataset(ABC):
    """Random access to the rows of the splits "train", "validation" (may be empty) and "test"."""

    Options: ClassVar[type[BaseModel]]
    """Its keys in [data.<dataset>]."""
    files: ClassVar[str] = ""
    """What `from_path` recognises, in words."""

    dense_names: tuple[str, ...]
    feature_names: tuple[str, ...]
    num_embeddings: tuple[int, ...]
    """Rows of each feature's table: every id is below it."""
    splits: Mapping[str, int]
    """Rows of each split."""

    @classmethod
    @abstractmethod
    def build(cls, options: Any, cache_dir: Path) -> Self:
        """Return the dataset of these options; what it keeps on disk lies in `cache_dir`.

        Raises ValueError or FileNotFoundError, naming file and place, where the rows cannot be had.
        """

    @classmethod
    def from_path(cls, path: Path) -> Mapping[str, str] | None:
        """Return the options that name the files at an existing path, or None where they are not of this dataset."""
        del path
        return None

    @abstractmethod
    def fingerprint(self) -> str:
        """Return what changes whenever any row, id or split does: a checkpoint goes on with the same rows only."""

    @abstractmethod
    def read_split(self, split: str, indices: np.ndarray) -> Rows:
        """Return the rows of a split that exists at (n,) int64 indices that it has, in the order asked for."""

    def best_possible(self) -> BestPossible | None:
        """Return what the true probabilities score on the test split, or None where nobody knows them."""
        return None

    def num_rows(self, split: str) -> int:
        """Return the number of rows of a split. Raises ValueError for one that does not exist."""
        if split not in self.splits:
            raise ValueError(f"split {split!r} is none of {', '.join(self.splits)}")
        return self.splits[split]

    def check_indices(self, split: str, indices: np.ndarray) -> None:
        """Raise IndexError where the split does not have one of the (n,) indices."""
        num_rows = self.num_rows(split)
        if indices.size and (indices.min() < 0 or indices.max() >= num_rows):
            raise IndexError(f"rows {indices.min()} to {indices.max()} of {split!r}, which has {num_rows}")

    def read(self, split: str, indices: np.ndarray) -> Rows:
        """Return the rows of the split at (n,) int64 indices, in the order asked for.

        Raises IndexError for an index that the split does not have, and ValueError for an id outside its table, naming
        row, feature and id: a hash would take it silently, and a sharded table for row 0.
        """
        self.check_indices(split, indices)
        rows = self.read_split(split, indices)
        if len(rows):
            largest = rows.ids.view(np.uint64).max(axis=0)  # a negative id is a large one
            for feature in np.flatnonzero(largest >= np.array(self.num_embeddings, dtype=np.uint64)):
                ids, size = rows.ids[:, feature], self.num_embeddings[feature]
                row = int(np.flatnonzero((ids < 0) | (ids >= size))[0])
                raise ValueError(
                    f"row {indices[row]} of the {split} rows: id {ids[row]} of feature "
                    f"{self.feature_names[feature]!r} is not in [0, {size}), the rows of its table"
                )
        return rows

    def check(self, target_auc: float | None = None) -> None:
        """Raise ValueError for what would only show after training.

        That is a held-out split whose rows all have one label, and a target that no model can reach.
        """
        for split in ("validation", "test"):
            num_rows = self.num_rows(split)
            if num_rows and not self._has_both_labels(split, num_rows):
                raise ValueError(f"all {num_rows:,} {split} rows have the same label: AUC needs both")
        best = self.best_possible() if target_auc is not None else None
        if target_auc is not None and best is not None and target_auc > best.auc:
            raise ValueError(
                f"training.target_auc = {target_auc}: the best possible test AUC of these rows is {best.auc:.4f}, by "
                "the probabilities that generated them"
            )

    def _has_both_labels(self, split: str, num_rows: int) -> bool:
        seen: set[float] = set()
        start, size = 0, 1024  # as a rule the first rows already have both
        while start < num_rows and len(seen) < 2:
            rows = self.read(split, np.arange(start, min(num_rows, start + size)))
            seen.update(np.unique(rows.labels).tolist())
            start, size = start + size, min(8 * size, 1 << 20)
        return len(seen) == 2


def count_ids(dataset: Dataset) -> tuple[np.ndarray, ...]:
    """Return how often each id occurs in the training split: for every table (num_embeddings,) int64.

    Reads the split once, on every rank that asks: all of them get the same counts without talking to each other.
    """
    counts = tuple(np.zeros(rows, np.int64) for rows in dataset.num_embeddings)
    num_rows = dataset.num_rows("train")
    if num_rows >= LONG_COUNT_ROWS:
        print(f"counting the ids of {num_rows:,} training rows", flush=True)
    for start in range(0, num_rows, READ_ROWS):
        rows = dataset.read("train", np.arange(start, min(start + READ_ROWS, num_rows), dtype=np.int64))
        for table, ids in zip(counts, rows.ids.T, strict=True):
            np.add.at(table, ids, 1)
    return counts


def check_fractions(validation_fraction: float, test_fraction: float) -> None:
    """Raise ValueError where the two held-out parts leave no rows to train on."""
    if test_fraction + validation_fraction >= 1:
        raise ValueError(
            f"test_fraction = {test_fraction} and validation_fraction = {validation_fraction} leave no rows to train on"
        )
