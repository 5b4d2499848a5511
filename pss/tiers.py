"""The shared array divided between frequent and rare ids: tiers that share apart, and private rows that do not share.

`tiers = [[c_1, s_1], [c_2, s_2], ...]`, counts falling: ids seen in training fewer than c_1 times (and at least c_2)
share the part s_1 of M among themselves, those seen fewer than c_2 times the part s_2, and so on; the others, and row 0
of every table, which stands for what is missing or was never seen, have the rest of M:

    M = [ frequent | tier 1 | tier 2 | ... ],     location in the part of the id's tier

so that the many rare ids disturb only each other. Private rows: the K ids seen most often, of all tables together, have
rows of their own in front of all that:

    M = [ rows of the K most frequent | frequent | tier 1 | tier 2 | ... ]

Measured before they were built (MovieLens, d = 16, Z = 8, 100×; validation AUC, mean over 3 or 4 hash seeds, whose
standard deviations were .0004 to .0040):

    one part .7500;  [[20, .01]] .7569, [[20, .02]] .7589, [[20, .05]] .7555, [[50, .01]] .7555
    null results: three parts ([[100, .35], [20, .05]] .7586); private rows (a quarter of M .7455, half .7445, a quarter
    with a tail of 5 % .7552); a part of M for each table (by √rows .7461, by entropy .7454); sum of two lookups .7480

Not in the papers. Where an id belongs must be known at lookup. Datasets number the ids of a table by falling frequency,
so it takes one number per table and tier, its first row, and for private rows two: 8 bytes each, counted as stored.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from torchrec.modules.embedding_configs import EmbeddingBagConfig


class PrivateRows(NamedTuple):
    """Rows [1, bounds[t]) of table t are private, row r at starts[t] + r · embedding_dim; empty if there are none."""

    bounds: list[int]
    starts: list[int]
    size: int  # elements of all private rows


class Tiers(NamedTuple):
    """Parts of M and where they begin in each table. Without tiers there is one part, all of M, and no bound."""

    starts: list[int]  # first element of each part
    sizes: list[int]  # elements of each part
    bounds: list[list[int]]  # [tier from 1 on][table]: the tier's first row


NO_PRIVATE_ROWS = PrivateRows([], [], 0)


def check_tiers(tiers: Sequence[Sequence[float]]) -> None:
    """Raise ValueError for anything but pairs of falling counts ≥ 1 and shares in (0, 1) that leave something."""
    for tier in tiers:
        if len(tier) != 2 or tier[0] < 1 or int(tier[0]) != tier[0] or not 0 < tier[1] < 1:
            raise ValueError(f"tiers: {list(tier)} is no [count, share] of a count of at least 1 and a share in (0, 1)")
    counts, shares = [tier[0] for tier in tiers], [tier[1] for tier in tiers]
    if any(after >= before for before, after in pairwise(counts)):
        raise ValueError(f"tiers: counts must fall, not {counts}")
    if sum(shares) >= 1:
        raise ValueError(f"tiers: shares {shares} leave nothing of the array to the frequent ids")


def check_counts(tables: Sequence[EmbeddingBagConfig], id_counts: Sequence[np.ndarray] | None) -> Sequence[np.ndarray]:
    """Return counts (num_embeddings,) of every table. Raises ValueError where they are missing or rise after row 1."""
    if id_counts is None:
        raise ValueError("id_counts: tiers and private rows need to know how often ids occur in training")
    for table, counts in zip(tables, id_counts, strict=True):
        if len(counts) != table.num_embeddings:
            raise ValueError(f"id_counts of table {table.name!r}: {len(counts)} for {table.num_embeddings} rows")
        if (np.diff(counts[1:]) > 0).any():
            raise ValueError(
                f"id_counts of table {table.name!r} rise: tiers and private rows need ids that are numbered by falling "
                "frequency (data.criteo.ids = 'dictionary')"
            )
    return id_counts


def solve_tiers(
    tiers: Sequence[Sequence[float]], id_counts: Sequence[np.ndarray], start: int, memory_size: int, smallest: int
) -> Tiers:
    """Divide into parts the elements from `start` on of an array of memory_size, none below `smallest` elements.

    id_counts: see `check_counts`. Raises ValueError for impossible tiers and for an array too small to divide.
    """
    check_tiers(tiers)
    rest = [max(smallest, round(share * (memory_size - start))) for _, share in tiers]
    sizes = [memory_size - start - sum(rest), *rest]
    if sizes[0] < smallest:
        raise ValueError(
            f"tiers: {memory_size - start} elements are too few for {len(sizes)} parts of {smallest} or more"
        )
    starts = [start + sum(sizes[:tier]) for tier in range(len(sizes))]
    bounds = [[1 + int(np.count_nonzero(counts[1:] >= least)) for counts in id_counts] for least, _ in tiers]
    return Tiers(starts, sizes, bounds)


def solve_private_rows(
    tables: Sequence[EmbeddingBagConfig], id_counts: Sequence[np.ndarray], elements: int
) -> PrivateRows:
    """Choose as many rows as `elements` hold, those of the largest counts over all tables; ids never seen have none.

    Of equal counts the first tables' and lower rows come first. Rows of different lengths are taken in order of their
    counts until one does not fit. id_counts: see `check_counts`.
    """
    table_of = np.repeat(np.arange(len(tables)), [table.num_embeddings - 1 for table in tables])
    counts = np.concatenate([counts[1:] for counts in id_counts])
    order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    dims = np.array([table.embedding_dim for table in tables])
    fitting = int(np.count_nonzero(np.cumsum(dims[table_of[order]]) <= elements))
    rows = np.bincount(table_of[order[:fitting]], minlength=len(tables))
    firsts = np.concatenate([[0], np.cumsum(rows * dims)])
    return PrivateRows((1 + rows).tolist(), (firsts[:-1] - dims).tolist(), int(firsts[-1]))
