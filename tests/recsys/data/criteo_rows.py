"""Criteo-like text made at random, and what should become of it, worked out in plain Python."""

import gzip
import lzma
import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa

from recsys.data.criteo_tsv import CARDINALITIES, DENSE_NAMES, FEATURE_NAMES

CACHE_ARRAYS = ("labels.npy", "dense.npy", "ids.npy")


def draw_row(rng: random.Random) -> str:
    """One line without its newline: blanks, negative integers, 4 (C1) to 79 (C26) distinct values a category."""
    integers = ["" if rng.random() < 0.2 else str(rng.choice([0, 1, -2, rng.randrange(100_000)])) for _ in DENSE_NAMES]
    categories = [
        "" if rng.random() < 0.1 else f"{rng.randrange(4 + 3 * f) * 2654435761 % 2**32:08x}"
        for f in range(len(FEATURE_NAMES))
    ]
    return "\t".join([str(rng.randrange(2)), *integers, *categories])


def draw_rows(n: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [draw_row(rng) for _ in range(n)]


def replace_cell(row: str, column: int, cell: str) -> str:
    cells = row.split("\t")
    return "\t".join([*cells[:column], cell, *cells[column + 1 :]])


def write_text(path: Path, text: str) -> Path:
    """`text` as is, or compressed as the suffix says."""
    data = text.encode()
    match path.suffix:
        case ".gz":
            data = gzip.compress(data)
        case ".xz":
            data = lzma.compress(data)
        case ".zst":
            sink = pa.BufferOutputStream()
            with pa.CompressedOutputStream(sink, "zstd") as stream:
                stream.write(data)
            data = sink.getvalue().to_pybytes()
    path.write_bytes(data)
    return path


def write_rows(path: Path, rows: list[str]) -> Path:
    return write_text(path, "".join(f"{row}\n" for row in rows))


def expect_dense(rows: list[str]) -> np.ndarray:
    """(n, 13) float64."""
    return np.array([[math.log(1 + max(int(cell or 0), 0)) for cell in row.split("\t")[1:14]] for row in rows])


def expect_labels(rows: list[str]) -> np.ndarray:
    return np.array([int(row[0]) for row in rows])


def expect_dictionary(
    rows: list[str], num_train: int, min_count: int, cap: int | None
) -> tuple[np.ndarray, tuple[int, ...]]:
    """ids (n, 26) and the tables' sizes: frequent first, ties by value with the blank first, 0 for the rest."""
    columns, sizes = [], []
    for f in range(len(FEATURE_NAMES)):
        cells = [row.split("\t")[14 + f] for row in rows]
        values = [int(cell, 16) if cell else -1 for cell in cells]
        counts = Counter(values[:num_train])
        kept = sorted((v for v in counts if counts[v] >= min_count), key=lambda v: (-counts[v], v))
        kept = kept[: None if cap is None else cap - 1]
        columns.append([kept.index(v) + 1 if v in kept else 0 for v in values])
        sizes.append(len(kept) + 1)
    return np.array(columns).T, tuple(sizes)


def expect_modulo(rows: list[str], cardinalities: str, cap: int | None) -> tuple[np.ndarray, tuple[int, ...]]:
    sizes = tuple(min(size, cap or size) for size in CARDINALITIES[cardinalities])
    ids = [
        [int(cell or "0", 16) % size for cell, size in zip(row.split("\t")[14:], sizes, strict=True)] for row in rows
    ]
    return np.array(ids), sizes
