"""From a dataset to the batches of one rank: which rows, in which order, for which step.

Training step s of any layout uses the same global batch: positions [s·B, (s+1)·B) of the shuffled epoch, of which rank
r of R takes the r-th contiguous share of B/R rows. So runs at different world sizes see identical global batches, and
the data position of a checkpoint is just the step. Evaluation reads a split in file order, each row once.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torchrec.datasets.utils import Batch

from configs.schema import DataSection, Section
from recsys.data import criteo, movielens, synthetic
from recsys.data.batch import Rows, build_batch

READ_ROWS = 16384
"""Rows a rank reads at once: large enough to hide numpy's cost per call, small enough to stay in cache."""

LONG_COUNT_ROWS = 10_000_000
"""From this many rows on, counting ids takes long enough to say so."""


class Dataset(Protocol):
    """Random access to the rows of three splits: "train", "validation" (may be empty) and "test"."""

    @property
    def dense_names(self) -> tuple[str, ...]: ...

    @property
    def feature_names(self) -> tuple[str, ...]: ...

    @property
    def num_embeddings(self) -> tuple[int, ...]:
        """Rows of each feature's table: every id is below it."""
        ...

    def num_rows(self, split: str) -> int: ...

    def read(self, split: str, indices: np.ndarray) -> Rows:
        """Rows of the split at (n,) int64 indices, in the order asked for."""
        ...

    def best_possible(self) -> Any:
        """auc, log_loss and base_rate of the true probabilities on the test split, or None where unknown."""
        ...

    def fingerprint(self) -> str:
        """Changes whenever any row, id or split does."""
        ...


class DatasetKind(Protocol):
    """A module that offers a dataset."""

    @property
    def Options(self) -> type[Section]: ...

    def build(self, options: Any, cache_dir: Path) -> Dataset: ...


DATASETS: dict[str, DatasetKind] = {"criteo": criteo, "movielens": movielens, "synthetic": synthetic}


def build_dataset(section: DataSection) -> Dataset:
    return DATASETS[section.dataset].build(section.options, Path(section.cache_dir))


def read_rows(dataset: Dataset, split: str, indices: np.ndarray) -> Rows:
    """Rows of the split at (n,) indices. Raises ValueError for an id outside its table, naming row, feature and id: a
    hash would take it silently, and a sharded table for row 0."""
    rows = dataset.read(split, indices)
    if len(rows):
        largest = rows.ids.view(np.uint64).max(axis=0)  # a negative id is a large one
        for feature in np.flatnonzero(largest >= np.array(dataset.num_embeddings, dtype=np.uint64)):
            ids, size = rows.ids[:, feature], dataset.num_embeddings[feature]
            row = int(np.flatnonzero((ids < 0) | (ids >= size))[0])
            raise ValueError(
                f"row {indices[row]} of the {split} rows: id {ids[row]} of feature {dataset.feature_names[feature]!r} "
                f"is not in [0, {size}), the rows of its table"
            )
    return rows


def count_ids(dataset: Dataset) -> tuple[np.ndarray, ...]:
    """How often each id occurs in the training split: for every table (num_embeddings,) int64.

    Reads the split once, on every rank that asks: all of them get the same counts without talking to each other.
    """
    counts = tuple(np.zeros(rows, np.int64) for rows in dataset.num_embeddings)
    num_rows = dataset.num_rows("train")
    if num_rows >= LONG_COUNT_ROWS:
        print(f"counting the ids of {num_rows:,} training rows", flush=True)
    for start in range(0, num_rows, READ_ROWS):
        rows = read_rows(dataset, "train", np.arange(start, min(start + READ_ROWS, num_rows), dtype=np.int64))
        for table, ids in zip(counts, rows.ids.T, strict=True):
            np.add.at(table, ids, 1)
    return counts


class RowOrder:
    """A permutation of `num_rows` rows for every epoch, with memory of one window.

    Rows are permuted within windows of `window_rows` consecutive rows, and the windows among themselves, so a file
    far larger than memory is read nearly in sequence; a window of at least num_rows rows is a full permutation.
    """

    def __init__(self, num_rows: int, window_rows: int, seed: int) -> None:
        self.num_rows = num_rows
        self.window_rows = min(window_rows, num_rows)
        self.seed = seed
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None
        self._window: tuple[tuple[int, int], np.ndarray] | None = None

    def rows(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Row indices (stop − start,) int64 at positions [start, stop) of the epoch's order."""
        if self.window_rows == 0:
            return np.arange(start, stop, dtype=np.int64)
        _, starts = self._windows(epoch)
        parts, position = [], start
        while position < stop:
            place = int(np.searchsorted(starts, position, side="right")) - 1
            end = min(stop, int(starts[place + 1]))
            parts.append(self._permuted(epoch, place)[position - starts[place] : end - starts[place]])
            position = end
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def _windows(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The windows in the epoch's order, and the first position of each (one more at the end)."""
        if self._epoch is None or self._epoch[0] != epoch:
            count = -(-self.num_rows // self.window_rows)
            order = np.random.default_rng((self.seed, epoch)).permutation(count)
            sizes = np.full(count, self.window_rows)
            sizes[-1] = self.num_rows - (count - 1) * self.window_rows
            self._epoch = (epoch, order, np.concatenate([[0], np.cumsum(sizes[order])]))
        return self._epoch[1], self._epoch[2]

    def _permuted(self, epoch: int, place: int) -> np.ndarray:
        if self._window is None or self._window[0] != (epoch, place):
            window = int(self._windows(epoch)[0][place])
            first = window * self.window_rows
            size = min(self.window_rows, self.num_rows - first)
            shuffled = np.random.default_rng((self.seed, epoch, window)).permutation(size)
            self._window = ((epoch, place), shuffled + first)
        return self._window[1]


class TrainingBatches:
    """The batches of one rank, from any step on.

    Every rank's share is equal; the rows left over at the end of an epoch (fewer than a global batch) wait for the
    next epoch's order.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        global_batch_size: int,
        rank: int,
        world_size: int,
        shuffle_window_rows: int,
        seed: int,
        device: torch.device,
    ) -> None:
        num_rows = dataset.num_rows("train")
        self.steps_per_epoch = num_rows // global_batch_size
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"training.global_batch_size = {global_batch_size} exceeds the {num_rows} rows of the training split"
            )
        self.dataset, self.device = dataset, device
        self.global_batch_size = global_batch_size
        self.local_batch_size = global_batch_size // world_size
        self.offset = rank * self.local_batch_size
        self.order = RowOrder(num_rows, shuffle_window_rows, seed)

    def from_step(self, step: int) -> Iterator[Batch]:
        """Batches of local_batch_size rows for steps `step`, `step` + 1, ... without end."""
        while True:
            epoch, first = divmod(step, self.steps_per_epoch)
            count = min(max(1, READ_ROWS // self.local_batch_size), self.steps_per_epoch - first)
            rows = read_rows(self.dataset, "train", self._indices(epoch, first, count))
            for i in range(count):
                share = slice(i * self.local_batch_size, (i + 1) * self.local_batch_size)
                yield build_batch(rows[share], self.dataset.feature_names, self.device)
            step += count

    def _indices(self, epoch: int, first: int, count: int) -> np.ndarray:
        starts = (np.arange(first, first + count) * self.global_batch_size) + self.offset
        return np.concatenate([self.order.rows(epoch, s, s + self.local_batch_size) for s in starts.tolist()])


def evaluation_batches(
    dataset: Dataset, split: str, *, global_batch_size: int, rank: int, world_size: int, device: torch.device
) -> Iterator[tuple[Batch, int]]:
    """Batches of this rank and how many of each one's rows count.

    Every rank gets the same number of equally large batches, since sharded tables need all ranks in every step: the
    last ones are filled up with the split's last row, which does not count again.
    """
    num_rows, local = dataset.num_rows(split), global_batch_size // world_size
    for start in range(rank * local, -(-num_rows // global_batch_size) * global_batch_size, global_batch_size):
        indices = np.arange(start, start + local, dtype=np.int64)
        rows = read_rows(dataset, split, np.minimum(indices, num_rows - 1))
        yield build_batch(rows, dataset.feature_names, device), int(np.clip(num_rows - start, 0, local))


def check_data(dataset: Dataset, target_auc: float | None) -> None:
    """Raises ValueError for what would only show after training: a held-out split whose rows all have one label, and a
    target that no model can reach."""
    for split in ("validation", "test"):
        num_rows = dataset.num_rows(split)
        if num_rows and not _has_both_labels(dataset, split, num_rows):
            raise ValueError(f"all {num_rows:,} {split} rows have the same label: AUC needs both")
    best = dataset.best_possible() if target_auc is not None else None
    if target_auc is not None and best is not None and target_auc > best.auc:
        raise ValueError(
            f"training.target_auc = {target_auc}: the best possible test AUC of these rows is {best.auc:.4f}, by the "
            "probabilities that generated them"
        )


def _has_both_labels(dataset: Dataset, split: str, num_rows: int) -> bool:
    """As a rule the first rows already do."""
    seen: set[float] = set()
    start, size = 0, 1024
    while start < num_rows and len(seen) < 2:
        rows = read_rows(dataset, split, np.arange(start, min(num_rows, start + size)))
        seen.update(np.unique(rows.labels).tolist())
        start, size = start + size, min(8 * size, 1 << 20)
    return len(seen) == 2
