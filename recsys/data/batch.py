"""Rows as arrays, and the batch a model eats.

`Rows` is what every dataset yields (plain numpy, one id per feature); `build_batch` makes of it TorchRec's own
`Batch`, whose `KeyedJaggedTensor` holds one bag of one id per row and feature.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor


@dataclass(frozen=True)
class Rows:
    """n rows of a dataset.

    dense: (n, D) float32, already transformed. ids: (n, F) int64, each in [0, num_embeddings of its table).
    labels: (n,) float32, 0 or 1.
    """

    dense: np.ndarray
    ids: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: slice) -> "Rows":
        return Rows(self.dense[rows], self.ids[rows], self.labels[rows])


def build_batch(rows: Rows, feature_names: Sequence[str], device: torch.device) -> Batch:
    """Rows of n samples -> Batch: dense (n, D) float32, a KJT of F features with n bags of one id, labels (n,)."""
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
