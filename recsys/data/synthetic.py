"""Generated data in Criteo's format, with a known best possible quality.

Row k is a pure function of (seed, k): any process can read any rows in any order, nothing is stored, and a split has
as many rows as asked for. A 64-bit hash of k gives every column an independent uniform number, the columns turn these
into integers and ids (`synthetic_columns`), and a teacher into the probability of a click (`synthetic_teacher`), of
which the label is a draw. The splits, and the rows that the teacher is calibrated on, lie in disjoint ranges of k, so
changing the length of one split leaves the other rows as they are.

`SyntheticCriteo.write_tsv` writes rows in Criteo's raw format. The hex number of an id there is a bijection of 32 bits,
another one for each feature and seed, so a file carries the same partition of rows into ids as the arrays do, but
neither the ids' order nor their count.

The ids of real data follow no exact law, and their effects none at all: what this data can show is how methods compare
where many rare ids matter a little, against a bound that is known. It cannot show what they reach on Criteo.
"""

import hashlib
import lzma
import os
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import IO, Literal, NamedTuple, Self

import numpy as np
import pyarrow as pa
from pyarrow import csv
from pydantic import Field

from configs.schema import Section
from recsys.data import exact, synthetic_teacher
from recsys.data.criteo_tsv import CARDINALITIES, DENSE_NAMES, FEATURE_NAMES
from recsys.data.dataset import BestPossible, Dataset, Rows
from recsys.data.synthetic_columns import MISSING_ID, MISSING_INTEGER, Columns, id_columns
from recsys.data.synthetic_teacher import Effects, Teacher

GENERATOR_VERSION = 1
"""Goes up with every change that changes any row: fingerprints of old runs must not match new ones."""

BLOCK_ROWS = 4096  # the arrays of a block fit a core's cache
TSV_CHUNK_ROWS = 32768
CALIBRATION_ROWS = 2**17
RANGES = {"train": 0, "validation": 1, "test": 2, "calibration": 3}
RANGE_BITS = 60  # a split's rows are k = (range << 60) + index

_CODECS = {".gz": "gzip", ".zst": "zstd"}
_TSV_SCHEMA = pa.schema(
    [("label", pa.int8())]
    + [(name, pa.int64()) for name in DENSE_NAMES]
    + [(name, pa.string()) for name in FEATURE_NAMES]
)
_HEX = np.array([f"{i:04x}" for i in range(2**16)], "S4").view(np.uint32)


class Options(Section):
    """Which world the rows are generated in, and how many."""

    seed: int = Field(default=3, ge=0)
    """Another seed is another world: other rows, other effects of ids, other importances of columns. From seed to seed
    the best possible AUC varies by a standard deviation of 0.006 (the default's is near the mean), what a linear model
    reaches by 0.016: compare methods on one seed.
    """
    cardinalities: Literal["criteo_kaggle", "criteo_tb"] = "criteo_kaggle"
    """The public data set whose table sizes are copied."""
    scale: float = Field(default=1.0, gt=0, le=1)
    """Factor on the table sizes."""
    minimum_table_size: int = Field(default=100, ge=1)
    """No table is scaled below this; one that is smaller from the start keeps its size."""
    max_num_embeddings: int = Field(default=40_000_000, ge=2)
    """No table has more rows than this, the missing id's included (MLPerf: 40M)."""
    base_rate: float = Field(default=0.25, ge=0.001, le=0.999)
    """Mean probability of a click."""
    train_rows: int = Field(default=1_000_000, ge=1, lt=2**RANGE_BITS)
    """Rows of the training split."""
    validation_rows: int = Field(default=100_000, ge=0, lt=2**RANGE_BITS)
    """Rows of the validation split."""
    test_rows: int = Field(default=100_000, ge=2, lt=2**RANGE_BITS)
    """Rows of the test split."""
    rare_id_rows: float = Field(default=5000 / 3, ge=1, le=1e12)
    """An id seen less than once in this many rows is rare, its effect declines with its rank. Does not follow
    train_rows: a longer training sees more of the same world."""
    main_sd: float = Field(default=0.8, ge=0, le=10)
    """Standard deviation of the logit's part due to single ids."""
    interaction_sd: float = Field(default=1.0, ge=0, le=10)
    """Standard deviation of the logit's part due to pairs of columns."""
    numeric_sd: float = Field(default=0.5, ge=0, le=10)
    """Standard deviation of the logit's part due to single integers."""


class Block(NamedTuple):
    """n generated rows."""

    integers: np.ndarray
    """(13, n) int64."""
    ids: np.ndarray
    """(26, n) int64."""
    probabilities: np.ndarray
    """(n,) float64, of a click."""
    labels: np.ndarray
    """(n,) float32."""


class SyntheticCriteo(Dataset):
    """Rows generated as they are read. Reading changes no state, so threads may share it."""

    Options = Options
    dense_names = DENSE_NAMES
    feature_names = FEATURE_NAMES

    def __init__(self, options: Options) -> None:
        self.options = options
        num_ids = tuple(_table_size(n, options) for n in CARDINALITIES[options.cardinalities])
        self.num_embeddings = tuple(n + 1 for n in num_ids)
        self.splits = {"train": options.train_rows, "validation": options.validation_rows, "test": options.test_rows}
        self._row_key = exact.random_keys(options.seed, "rows", 1)
        self._label_key = exact.random_keys(options.seed, "labels", 1)
        self._columns = Columns(id_columns(options.cardinalities), num_ids, options.seed)
        self._teacher = self._calibrated_teacher()
        self._best_possible: BestPossible | None = None

    @classmethod
    def build(cls, options: Options, cache_dir: Path) -> Self:
        """Return the dataset; it keeps nothing in `cache_dir`."""
        del cache_dir
        return cls(options)

    def read_split(self, split: str, indices: np.ndarray) -> Rows:
        # dense is ln(1 + x), with 0 for a missing x: what Criteo's reader makes of the written file.
        n = len(indices)
        dense = np.empty((n, len(DENSE_NAMES)), np.float32)
        ids = np.empty((len(FEATURE_NAMES), n), np.int64)
        labels = np.empty(n, np.float32)
        for rows, block in self._blocks(split, indices):
            dense[rows] = np.log1p(np.maximum(block.integers, 0).astype(np.float64)).T
            ids[:, rows] = block.ids
            labels[rows] = block.labels
        return Rows(dense, ids.T, labels)

    def probabilities(self, split: str, indices: np.ndarray) -> np.ndarray:
        """Return the true click probabilities (n,) float64 of the split's rows at (n,) int64 indices."""
        out = np.empty(len(indices))
        for rows, block in self._blocks(split, indices):
            out[rows] = block.probabilities
        return out

    def best_possible(self) -> BestPossible:
        """Return what the true probabilities score on the test split, computed on the first call."""
        if self._best_possible is None:
            indices = np.arange(self.num_rows("test"), dtype=np.int64)
            self._best_possible = synthetic_teacher.best_possible(self.probabilities("test", indices))
        return self._best_possible

    def fingerprint(self) -> str:
        """Return 16 hex digits of all options and the generator's version."""
        identity = f"{GENERATOR_VERSION} {self.options.model_dump_json()}"
        return hashlib.sha256(identity.encode()).hexdigest()[:16]

    def write_tsv(self, path: Path, split: str, start: int = 0, stop: int | None = None) -> None:
        """Write rows [start, stop) of the split as a raw Criteo file; stop = None: to its end.

        One row a line, tab separated: label, 13 integers, 26 categories of 8 hex digits, blanks for what is missing.
        Compressed by suffix: .gz, .zst or .xz. The file has its name only once it is whole; memory is that of a block.
        """
        stop = self.num_rows(split) if stop is None else stop
        if not 0 <= start < stop <= self.num_rows(split):
            raise IndexError(f"rows {start} to {stop - 1} of {split!r}, which has {self.num_rows(split)}")
        chunks = (np.arange(i, min(i + TSV_CHUNK_ROWS, stop)) for i in range(start, stop, TSV_CHUNK_ROWS))
        blocks = (block for chunk in chunks for _, block in self._blocks(split, chunk))
        _write_tsv(path, blocks, self.options.seed)

    def _blocks(self, split: str, indices: np.ndarray) -> Iterator[tuple[slice, Block]]:
        """Yield the rows at `indices` in blocks, each with its place among them."""
        self.check_indices(split, indices)
        for start in range(0, len(indices), BLOCK_ROWS):
            rows = slice(start, start + BLOCK_ROWS)
            hashes = self._row_hashes(split, indices[rows])
            integers, ids = self._columns.draw(hashes)
            probabilities = self._teacher.probabilities(integers, ids)
            chance = exact.unit_interval(exact.draw(hashes, self._label_key)[0])
            yield rows, Block(integers, ids, probabilities, (chance < probabilities).astype(np.float32))

    def _row_hashes(self, row_range: str, indices: np.ndarray) -> np.ndarray:
        """Return 64 mixed bits for each row, (n,) uint64, all different."""
        return exact.mix(indices + (RANGES[row_range] << RANGE_BITS), self._row_key)

    def _calibrated_teacher(self) -> Teacher:
        """Return the teacher of these options, calibrated on rows that belong to no split."""
        options = self.options
        effects = Effects(self._columns, options.rare_id_rows, options.seed)
        hashes = self._row_hashes("calibration", np.arange(CALIBRATION_ROWS))
        blocks = [hashes[i : i + BLOCK_ROWS] for i in range(0, CALIBRATION_ROWS, BLOCK_ROWS)]
        return synthetic_teacher.calibrate(
            effects,
            np.concatenate([effects.terms(*self._columns.draw(block)) for block in blocks], axis=1),
            deviations=(options.main_sd, options.interaction_sd, options.numeric_sd),
            base_rate=options.base_rate,
        )


def _table_size(cardinality: int, options: Options) -> int:
    """Return the number of ids of a table, the missing one not counted."""
    scaled = max(options.minimum_table_size, round(cardinality * options.scale))
    return min(cardinality, scaled, options.max_num_embeddings - 1)


def _write_tsv(path: Path, blocks: Iterable[Block], seed: int) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    options = csv.WriteOptions(include_header=False, delimiter="\t", quoting_style="none")
    keys = exact.random_keys(seed, "hex", len(FEATURE_NAMES))
    try:
        with (
            closing(_open_tsv(unfinished, path.suffix)) as sink,
            csv.CSVWriter(sink, _TSV_SCHEMA, write_options=options) as writer,
        ):
            for block in blocks:
                writer.write_batch(_record_batch(block, keys))
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def category_codes(ids: np.ndarray, key: int) -> np.ndarray:
    """Return the hex number of each id, (n,) uint32 of (n,) ids: a bijection, each step of which can be undone."""
    x = ids.astype(np.uint32) ^ np.uint32(key & 0xFFFFFFFF)
    x *= np.uint32(0x9E3779B1)
    x ^= x >> np.uint32(15)
    x *= np.uint32(0x85EBCA6B)
    x ^= x >> np.uint32(13)
    return x


def _open_tsv(path: Path, suffix: str) -> IO[bytes] | pa.NativeFile:
    if suffix == ".xz":
        return lzma.open(path, "wb", preset=1)
    return pa.output_stream(str(path), compression=_CODECS.get(suffix))


def _record_batch(block: Block, keys: np.ndarray) -> pa.RecordBatch:
    """Return a block as the columns of the file. keys: (26,) uint64, of the categories' hex numbers."""
    n = len(block.labels)
    offsets = pa.py_buffer(np.arange(0, 8 * n + 1, 8, dtype=np.int32))
    columns = [pa.array(block.labels.astype(np.int8))]
    columns += [pa.array(x, mask=x == MISSING_INTEGER) for x in block.integers]
    for feature, key in zip(block.ids, keys.tolist(), strict=True):
        codes = category_codes(feature, key)
        digits = np.stack([_HEX[codes >> np.uint32(16)], _HEX[codes & np.uint32(0xFFFF)]], axis=1)
        present = pa.py_buffer(np.packbits(feature != MISSING_ID, bitorder="little"))
        columns.append(pa.StringArray.from_buffers(n, offsets, pa.py_buffer(digits), present))
    return pa.RecordBatch.from_arrays(columns, schema=_TSV_SCHEMA)
