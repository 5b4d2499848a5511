"""Sizes and places of what clustered compositional embeddings (`pss.methods.cce`) store, solved from a budget."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig

POINTER_DTYPES = {1 << 8: torch.uint8, 1 << 16: torch.int16, 1 << 31: torch.int32}
"""By the most clusters that they can tell apart; an int16 is read as unsigned."""
_COUNTER_BYTES = 8  # of clusterings, where there is something to cluster


class TablePlace(NamedTuple):
    """Where a table is. In memory from `start`: its codebooks, chunks · rows rows of d / chunks elements, then its
    helper tables likewise. In the pointers from `pointer_start`: chunks of them for every id. A table that is whole is
    a codebook with a row for every id, without helper tables and pointers."""

    start: int
    chunks: int
    rows: int
    is_whole: bool
    pointer_start: int


@dataclass(frozen=True)
class CceLayout:
    """memory_size: elements of all tables; pointers: of all tables."""

    chunks: int
    clusters: int
    helper_rows: int
    places: list[TablePlace]
    memory_size: int
    pointers: int

    @property
    def pointer_dtype(self) -> torch.dtype:
        return next(dtype for most, dtype in POINTER_DTYPES.items() if self.clusters <= most)

    @property
    def pointer_bytes(self) -> int:
        return self.pointers * self.pointer_dtype.itemsize

    @property
    def stored_bytes(self) -> int:
        return 4 * self.memory_size + self.pointer_bytes + (_COUNTER_BYTES if self.pointers else 0)


def lay_out(tables: Sequence[EmbeddingBagConfig], chunks: int, clusters: int, helper_rows: int) -> CceLayout:
    """Every table in the form that takes less: whole, or with `clusters` and `helper_rows` rows."""
    places, memory_size, pointers = [], 0, 0
    pointer_bytes = CceLayout(chunks, clusters, helper_rows, [], 0, 0).pointer_dtype.itemsize
    for table in tables:
        dim, ids = table.embedding_dim, table.num_embeddings
        own_chunks = max(c for c in range(1, min(chunks, dim) + 1) if dim % c == 0)
        is_whole = 4 * dim * ids <= 4 * dim * (clusters + helper_rows) + pointer_bytes * own_chunks * ids
        places.append(TablePlace(memory_size, own_chunks, ids if is_whole else clusters, is_whole, pointers))
        memory_size += dim * (ids if is_whole else clusters + helper_rows)
        pointers += 0 if is_whole else own_chunks * ids
    return CceLayout(chunks, clusters, helper_rows, places, memory_size, pointers)


def solve_layout(tables: Sequence[EmbeddingBagConfig], chunks: int | None, budget_bytes: int) -> CceLayout:
    """The layout that `pss.methods.cce` describes; where none fits, the least there is: 2 clusters and 2 helper rows.

    chunks: asked, at least 1; None = the most of 4 to 1 whose pointers take at most half of the budget, or 1.
    """
    asked = [(chunks, budget_bytes)] if chunks else [*((c, budget_bytes // 2) for c in (4, 3, 2, 1)), (1, budget_bytes)]
    most = max([2, *(table.num_embeddings for table in tables)])
    for count, most_pointer_bytes in asked:
        low = 2
        widths = []
        for high in POINTER_DTYPES:
            if low <= most:
                widths.append((low, min(high, most)))
            low = high + 1
        for low, high in reversed(widths):  # the widest pointers first
            clusters = _most(low, high, lambda k, c=count: lay_out(tables, c, k, k).stored_bytes <= budget_bytes)
            if clusters is None or lay_out(tables, count, clusters, clusters).pointer_bytes > most_pointer_bytes:
                continue
            rows = _most(
                clusters, most, lambda h, c=count, k=clusters: lay_out(tables, c, k, h).stored_bytes <= budget_bytes
            )
            assert rows is not None
            return lay_out(tables, count, clusters, rows)
    return lay_out(tables, chunks or 1, 2, 2)


def _most(low: int, high: int, fits: Callable[[int], bool]) -> int | None:
    """The greatest number in [low, high] that fits, if any; what fits is fitted by all smaller ones."""
    if not fits(low):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
