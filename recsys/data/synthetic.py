"""Generated data in Criteo's format, with a known best possible quality.

Row k is a pure function of (seed, k): any process can read any rows in any order, nothing is stored, and a split has
as many rows as asked for. A 64-bit hash of k gives every column an independent uniform number, the columns turn these
into integers and ids (`synthetic_columns`), and a teacher into the probability of a click (`synthetic_teacher`), of
which the label is a draw. The splits, and the rows that the teacher is calibrated on, lie in disjoint ranges of k, so
changing the length of one split leaves the other rows as they are.

The ids of real data follow no exact law, and their effects none at all: what this data can show is how methods compare
where many rare ids matter a little, against a bound that is known. It cannot show what they reach on Criteo.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from pydantic import Field

from configs.schema import Section
from recsys.data import exact, synthetic_teacher, synthetic_tsv
from recsys.data.batch import Rows
from recsys.data.criteo_schema import CARDINALITIES, DENSE_NAMES, FEATURE_NAMES
from recsys.data.synthetic_columns import Columns, id_columns
from recsys.data.synthetic_teacher import BestPossible, Effects, Teacher

GENERATOR_VERSION = 1
"""Goes up with every change that changes any row: fingerprints of old runs must not match new ones."""

BLOCK_ROWS = 4096  # the arrays of a block fit a core's cache
TSV_CHUNK_ROWS = 32768
CALIBRATION_ROWS = 2**17
RANGES = {"train": 0, "validation": 1, "test": 2, "calibration": 3}
RANGE_BITS = 60  # a split's rows are k = (range << 60) + index


class Options(Section):
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
    """n generated rows: integers (13, n) int64, ids (26, n) int64, probabilities (n,) float64, labels (n,) float32."""

    integers: np.ndarray
    ids: np.ndarray
    probabilities: np.ndarray
    labels: np.ndarray


class SyntheticCriteo:
    """Random access to the rows of the three splits. Reading changes no state, so threads may share it."""

    dense_names = DENSE_NAMES
    feature_names = FEATURE_NAMES

    def __init__(self, options: Options) -> None:
        self.options = options
        num_ids = tuple(_table_size(n, options) for n in CARDINALITIES[options.cardinalities])
        self.num_embeddings = tuple(n + 1 for n in num_ids)
        self._num_rows = {"train": options.train_rows, "validation": options.validation_rows, "test": options.test_rows}
        self._row_key = exact.random_keys(options.seed, "rows", 1)
        self._label_key = exact.random_keys(options.seed, "labels", 1)
        self._columns = Columns(id_columns(options.cardinalities), num_ids, options.seed)
        self._teacher = self._calibrated_teacher()
        self._best_possible: BestPossible | None = None

    def num_rows(self, split: str) -> int:
        if split not in self._num_rows:
            raise ValueError(f"split {split!r} is none of {', '.join(self._num_rows)}")
        return self._num_rows[split]

    def read(self, split: str, indices: np.ndarray) -> Rows:
        """Rows of the split at (n,) int64 indices, in the order asked for: dense (n, 13) = ln(1 + x), missing = 0.

        Raises IndexError for an index that the split does not have.
        """
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
        """True click probabilities (n,) float64 of the split's rows at (n,) int64 indices."""
        out = np.empty(len(indices))
        for rows, block in self._blocks(split, indices):
            out[rows] = block.probabilities
        return out

    def best_possible(self) -> BestPossible:
        """What the true probabilities score on the test split, computed on the first call."""
        if self._best_possible is None:
            indices = np.arange(self.num_rows("test"), dtype=np.int64)
            self._best_possible = synthetic_teacher.best_possible(self.probabilities("test", indices))
        return self._best_possible

    def fingerprint(self) -> str:
        """16 hex digits of all options and the generator's version."""
        identity = f"{GENERATOR_VERSION} {self.options.model_dump_json()}"
        return hashlib.sha256(identity.encode()).hexdigest()[:16]

    def write_tsv(self, path: Path, split: str, start: int = 0, stop: int | None = None) -> None:
        """Rows [start, stop) of the split as a raw Criteo file, see `synthetic_tsv`; stop = None: to its end."""
        stop = self.num_rows(split) if stop is None else stop
        if not 0 <= start < stop <= self.num_rows(split):
            raise IndexError(f"rows {start} to {stop - 1} of {split!r}, which has {self.num_rows(split)}")
        chunks = (np.arange(i, min(i + TSV_CHUNK_ROWS, stop)) for i in range(start, stop, TSV_CHUNK_ROWS))
        blocks = (block for chunk in chunks for _, block in self._blocks(split, chunk))
        synthetic_tsv.write(path, ((b.integers, b.ids, b.labels) for b in blocks), self.options.seed)

    def _blocks(self, split: str, indices: np.ndarray) -> Iterator[tuple[slice, Block]]:
        """The rows at `indices` in blocks, each with its place among them."""
        num_rows = self.num_rows(split)
        if len(indices) and (indices.min() < 0 or indices.max() >= num_rows):
            raise IndexError(f"rows {indices.min()} to {indices.max()} of {split!r}, which has {num_rows}")
        for start in range(0, len(indices), BLOCK_ROWS):
            rows = slice(start, start + BLOCK_ROWS)
            hashes = self._row_hashes(split, indices[rows])
            integers, ids = self._columns.draw(hashes)
            probabilities = self._teacher.probabilities(integers, ids)
            chance = exact.unit_interval(exact.draw(hashes, self._label_key)[0])
            yield rows, Block(integers, ids, probabilities, (chance < probabilities).astype(np.float32))

    def _row_hashes(self, row_range: str, indices: np.ndarray) -> np.ndarray:
        """64 mixed bits for each row, (n,) uint64, all different."""
        return exact.mix(indices + (RANGES[row_range] << RANGE_BITS), self._row_key)

    def _calibrated_teacher(self) -> Teacher:
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


def build(options: Options, cache_dir: Path) -> SyntheticCriteo:
    """The dataset; `cache_dir` is for datasets that keep files."""
    del cache_dir
    return SyntheticCriteo(options)


def _table_size(cardinality: int, options: Options) -> int:
    """Ids of a table, the missing one not counted."""
    scaled = max(options.minimum_table_size, round(cardinality * options.scale))
    return min(cardinality, scaled, options.max_num_embeddings - 1)
