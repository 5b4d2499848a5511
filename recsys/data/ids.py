"""How raw values become ids of an embedding table: by a dictionary of the training rows, or modulo its size.

Ids belong to the data: every embedding method is given the same ones.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

OUT_OF_VOCABULARY = 0


class Encoder(Protocol):
    """A map from the values of one feature to ids in [0, num_embeddings)."""

    @property
    def num_embeddings(self) -> int: ...

    def encode(self, values: pa.Array) -> np.ndarray:
        """Return the ids (n,) int32 of (n,) uint32 values, null where the cell is blank."""
        ...


@dataclass(frozen=True)
class Modulo:
    """Numbers values by id = value mod num_embeddings; a blank cell is id 0."""

    num_embeddings: int

    def encode(self, values: pa.Array) -> np.ndarray:
        return (values.fill_null(0).to_numpy() % np.uint32(self.num_embeddings)).astype(np.int32)


@dataclass(frozen=True)
class Dictionary:
    """Numbers values by id = 1 + place in `kept` (distinct, null for the blank); everything else is id 0."""

    kept: pa.Array

    @property
    def num_embeddings(self) -> int:
        return 1 + len(self.kept)

    def encode(self, values: pa.Array) -> np.ndarray:
        places = pc.call_function("index_in", [values], pc.SetLookupOptions(self.kept))
        return places.fill_null(OUT_OF_VOCABULARY - 1).to_numpy() + np.int32(1)


def build_dictionary(values: pa.ChunkedArray, min_count: int, max_num_embeddings: int | None) -> Dictionary:
    """Return the dictionary of the values (integers, null where blank) seen at least `min_count` times.

    The most frequent come first. A blank is a value like any other. Equally frequent ones stand in ascending order, the
    blank before them all. The least frequent are dropped where the table, id 0 included, would exceed
    `max_num_embeddings`.
    """
    distinct, counts = values.value_counts().flatten()
    counts = counts.to_numpy()
    ascending = distinct.cast(pa.int64()).fill_null(-1).to_numpy()
    order = np.lexsort((ascending, -counts))
    num_kept = int(np.count_nonzero(counts >= min_count))
    if max_num_embeddings is not None:
        num_kept = min(num_kept, max_num_embeddings - 1)
    return Dictionary(distinct.take(pa.array(order[:num_kept])))
