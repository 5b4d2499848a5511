"""Generated rows as a file in Criteo's raw format.

One row a line, tab separated: label, 13 integers, 26 categories of 8 hex digits, blanks for what is missing. The hex
number of an id is a bijection of 32 bits, another one for each feature and seed, so a file carries the same partition
of rows into ids as the arrays do, but neither the ids' order nor their count.
"""

import lzma
import os
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
from pyarrow import csv

from recsys.data import exact
from recsys.data.criteo_schema import DENSE_NAMES, FEATURE_NAMES
from recsys.data.synthetic_columns import MISSING_ID, MISSING_INTEGER

CODECS = {".gz": "gzip", ".zst": "zstd"}
SCHEMA = pa.schema(
    [("label", pa.int8())]
    + [(name, pa.int64()) for name in DENSE_NAMES]
    + [(name, pa.string()) for name in FEATURE_NAMES]
)
_HEX = np.array([f"{i:04x}" for i in range(2**16)], "S4").view(np.uint32)


def write(path: Path, blocks: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]], seed: int) -> None:
    """blocks: integers (13, n), ids (26, n), labels (n,). Compressed by suffix: .gz, .zst or .xz.

    The file appears under its name only once it is whole. Memory is that of one block.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    options = csv.WriteOptions(include_header=False, delimiter="\t", quoting_style="none")
    keys = exact.random_keys(seed, "hex", len(FEATURE_NAMES))
    try:
        with (
            closing(_open(unfinished, path.suffix)) as sink,
            csv.CSVWriter(sink, SCHEMA, write_options=options) as writer,
        ):
            for integers, ids, labels in blocks:
                writer.write_batch(_record_batch(integers, ids, labels, keys))
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def category_codes(ids: np.ndarray, key: int) -> np.ndarray:
    """ids (n,) -> (n,) uint32, a bijection: each step of it can be undone."""
    x = ids.astype(np.uint32) ^ np.uint32(key & 0xFFFFFFFF)
    x *= np.uint32(0x9E3779B1)
    x ^= x >> np.uint32(15)
    x *= np.uint32(0x85EBCA6B)
    x ^= x >> np.uint32(13)
    return x


def _open(path: Path, suffix: str) -> IO[bytes] | pa.NativeFile:
    if suffix == ".xz":
        return lzma.open(path, "wb", preset=1)
    return pa.output_stream(str(path), compression=CODECS.get(suffix))


def _record_batch(integers: np.ndarray, ids: np.ndarray, labels: np.ndarray, keys: np.ndarray) -> pa.RecordBatch:
    n = len(labels)
    offsets = pa.py_buffer(np.arange(0, 8 * n + 1, 8, dtype=np.int32))
    columns = [pa.array(labels.astype(np.int8))]
    columns += [pa.array(x, mask=x == MISSING_INTEGER) for x in integers]
    for feature, key in zip(ids, keys.tolist(), strict=True):
        codes = category_codes(feature, key)
        digits = np.stack([_HEX[codes >> np.uint32(16)], _HEX[codes & np.uint32(0xFFFF)]], axis=1)
        present = pa.py_buffer(np.packbits(feature != MISSING_ID, bitorder="little"))
        columns.append(pa.StringArray.from_buffers(n, offsets, pa.py_buffer(digits), present))
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)
