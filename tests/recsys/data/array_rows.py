"""A dataset of given arrays."""

from pathlib import Path

import numpy as np

from recsys.data.dataset import BestPossible, Dataset, Rows


def make_rows(labels, ids=None, dense=None) -> Rows:
    """labels (n,), ids (n, F), dense (n, D) -> rows; by default one feature whose id is 0, one number that is 0."""
    labels = np.asarray(labels, np.float32)
    ids = np.zeros((len(labels), 1), np.int64) if ids is None else np.asarray(ids, np.int64)
    dense = np.zeros((len(labels), 1), np.float32) if dense is None else np.asarray(dense, np.float32)
    return Rows(dense, ids, labels)


class ArrayRows(Dataset):
    """The rows of each split as given, none where not given; features are called a, b, c, ..."""

    def __init__(
        self,
        *,
        train: Rows | None = None,
        validation: Rows | None = None,
        test: Rows | None = None,
        num_embeddings: tuple[int, ...] = (10**6,),
        best: BestPossible | None = None,
    ) -> None:
        some = next(rows for rows in (train, validation, test) if rows is not None)
        given = {"train": train, "validation": validation, "test": test}
        self.rows = {split: some[:0] if rows is None else rows for split, rows in given.items()}
        self.splits = {split: len(rows) for split, rows in self.rows.items()}
        self.num_embeddings, self.best = num_embeddings, best
        self.feature_names = tuple("abcdefgh"[: len(num_embeddings)])
        self.dense_names = tuple(f"I{i + 1}" for i in range(some.dense.shape[1]))

    @classmethod
    def build(cls, options: object, cache_dir: Path) -> "ArrayRows":
        raise NotImplementedError

    def fingerprint(self) -> str:
        return "arrays"

    def best_possible(self) -> BestPossible | None:
        return self.best

    def read_split(self, split: str, indices: np.ndarray) -> Rows:
        rows = self.rows[split]
        return Rows(rows.dense[indices], rows.ids[indices], rows.labels[indices])
