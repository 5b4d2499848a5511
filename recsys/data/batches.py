"""From a dataset to the batches of one rank: which rows, in which order, for which step.

Training step s of any layout uses the same global batch: positions [s·B, (s+1)·B) of the shuffled epoch, of which rank
r of R takes the r-th contiguous share of B/R rows. So runs at different world sizes see identical global batches, and
the data position of a checkpoint is just the step. Evaluation reads a split in file order, each row once.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys.data.dataset import READ_ROWS, Dataset, Rows


def build_batch(rows: Rows, feature_names: Sequence[str], device: torch.device) -> Batch:
    """Return n rows as the batch that a model eats.

    dense_features (n, D) float32; sparse_features a KJT of F features with n bags of one id each, int64;
    labels (n,) float32.
    """
    n, num_features = rows.ids.shape
    return Batch(
        dense_features=torch.from_numpy(np.ascontiguousarray(rows.dense)).to(device),
        sparse_features=KeyedJaggedTensor(
            keys=list(feature_names),
            values=torch.from_numpy(np.ascontiguousarray(rows.ids.T).reshape(-1)).to(device),
            lengths=torch.ones(n * num_features, dtype=torch.int64, device=device),
            offsets=torch.arange(n * num_features + 1, dtype=torch.int64, device=device),
            stride=n,
        ),
        labels=torch.from_numpy(np.ascontiguousarray(rows.labels)).to(device),
    )


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
        """Return the row indices (stop − start,) int64 at positions [start, stop) of the epoch's order."""
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
        """Return the windows in the epoch's order, and the first position of each (one more at the end)."""
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
        """Yield batches of local_batch_size rows for steps `step`, `step` + 1, ... without end."""
        while True:
            epoch, first = divmod(step, self.steps_per_epoch)
            count = min(max(1, READ_ROWS // self.local_batch_size), self.steps_per_epoch - first)
            rows = self.dataset.read("train", self._indices(epoch, first, count))
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
    """Yield the batches of this rank, and how many of each one's rows count.

    Every rank gets the same number of equally large batches, since sharded tables need all ranks in every step: the
    last ones are filled up with the split's last row, which does not count again.
    """
    num_rows, local = dataset.num_rows(split), global_batch_size // world_size
    for start in range(rank * local, -(-num_rows // global_batch_size) * global_batch_size, global_batch_size):
        indices = np.arange(start, start + local, dtype=np.int64)
        rows = dataset.read(split, np.minimum(indices, num_rows - 1))
        yield build_batch(rows, dataset.feature_names, device), int(np.clip(num_rows - start, 0, local))
