"""Criteo's click logs (Kaggle display advertising, 1TB) as a dataset: label, 13 integers, 26 categories per row.

    dense   log(1 + max(x, 0)), blank = 0
    ids     a dictionary of the training rows, or the raw 32-bit value modulo the table's size (`recsys.data.ids`)
    splits  in time order: the last `test_fraction` of the rows, before them `validation_fraction`, before them train

The text is read once into a cache (`recsys.data.criteo_cache`) named after the data's content and the settings that
shape it; later runs map that into memory and never open the text again except to see that it is the same file.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from configs.schema import Section
from recsys.data.criteo_cache import file_state, hash_content, publish_once, write_ids, write_rows
from recsys.data.criteo_tsv import (
    CARDINALITIES,
    DENSE_NAMES,
    FEATURE_NAMES,
    Malformed,
    find_files,
    looks_like_criteo,
)
from recsys.data.dataset import Dataset, Rows, check_fractions
from recsys.data.ids import Encoder, Modulo, build_dictionary

CACHE_VERSION = 1  # raise whenever the same text and settings would give other arrays

_logger = logging.getLogger(__name__)


class Options(Section):
    """Which rows of Criteo's are taken, and how they become features."""

    path: str = Field(min_length=1)
    """The text: a file (plain, .gz, .xz, .zst), a directory of such files, or a glob; several are one log, in natural
    order of their names (day_2 before day_10)."""
    test_fraction: float = Field(default=0.2, gt=0, lt=1)
    """Last part of all rows: the test split."""
    validation_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Part before it; 0 = no validation split."""
    ids: Literal["dictionary", "modulo"] = "dictionary"
    """dictionary = the training rows' values by falling frequency from 1, anything else 0; modulo = raw 32-bit value
    mod the table's size, blank 0."""
    min_count: int = Field(default=1, ge=1)
    """dictionary: values rarer than this in training become id 0; with 1, no training row has id 0."""
    cardinalities: Literal["criteo_kaggle", "criteo_tb"] = "criteo_kaggle"
    """modulo: whose published numbers of distinct values size the tables."""
    max_num_embeddings: int | None = Field(default=None, ge=1)
    """No table gets more rows than this; unset = no limit."""
    max_malformed_fraction: float = Field(default=0.001, ge=0, le=1)
    """The run stops when more of the lines than this are malformed."""

    @model_validator(mode="after")
    def _leave_training_rows(self) -> Self:
        check_fractions(self.validation_fraction, self.test_fraction)
        return self


class Criteo(Dataset):
    """A cache that was built, memory-mapped: any number of processes may open it."""

    Options = Options
    files = "a Criteo TSV (plain, .gz, .xz or .zst), or a directory of such files"
    dense_names = DENSE_NAMES
    feature_names = FEATURE_NAMES

    def __init__(self, directory: Path) -> None:
        """Raise ValueError when the arrays are not those the metadata speaks of."""
        self.metadata: dict[str, Any] = json.loads((directory / "metadata.json").read_text())
        """rows, lines, malformed (by kind), malformed_examples, splits (name -> first, rows, clicks), num_embeddings,
        settings, content, files, fingerprint, version."""
        self.num_embeddings = tuple(self.metadata["num_embeddings"])
        self.splits = {name: split["rows"] for name, split in self.metadata["splits"].items()}
        self._labels = _map_array(directory / "labels.npy", (self.metadata["rows"],))
        self._dense = _map_array(directory / "dense.npy", (self.metadata["rows"], len(DENSE_NAMES)))
        self._ids = _map_array(directory / "ids.npy", (self.metadata["rows"], len(FEATURE_NAMES)))

    @classmethod
    def from_path(cls, path: Path) -> dict[str, str] | None:
        """Return the options for a file or directory where every file begins with tab-separated text."""
        try:
            files = find_files(str(path))
        except (FileNotFoundError, ValueError):  # there is none, or one of them has no bytes
            return None
        return {"path": str(path.resolve())} if all(map(looks_like_criteo, files)) else None

    @classmethod
    def build(cls, options: Options, cache_dir: Path) -> Self:
        """Return the dataset from its cache in `cache_dir`; one process of a machine builds that first if need be.

        Raises FileNotFoundError when there is no data at `options.path`; ValueError, naming path, split and what was
        found, when a file is empty, cut off, or changes while it is read, when more than `max_malformed_fraction` of
        its lines are malformed, and when a split has no rows or labels of one class only, for which AUC is undefined.
        """
        files = find_files(options.path)
        cache_dir.mkdir(parents=True, exist_ok=True)
        states = [file_state(file) for file in files]
        identity = {
            "version": CACHE_VERSION,
            "content": hash_content(files, cache_dir),
            "settings": _shaping_settings(options),
        }
        fingerprint = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=16).hexdigest()

        def write(directory: Path) -> None:
            found = _write_arrays(directory, options, files)
            if [file_state(file) for file in files] != states:
                raise ValueError(f"Criteo data: {options.path} changed while it was read")
            metadata = {"fingerprint": fingerprint, **identity, "files": [str(file) for file in files], **found}
            (directory / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")

        directory = cache_dir / f"criteo-{fingerprint}"
        publish_once(directory, write)
        dataset = cls(directory)
        # The cache may have been built under a more lenient limit, which does not shape it.
        found = dataset.metadata
        counts, examples = Counter(found["malformed"]), found["malformed_examples"]
        Malformed(options.path, options.max_malformed_fraction, found["lines"], counts, examples).check()
        return dataset

    def read_split(self, split: str, indices: np.ndarray) -> Rows:
        at = indices + self.metadata["splits"][split]["first"]
        return Rows(
            dense=self._dense[at], ids=self._ids[at].astype(np.int64), labels=self._labels[at].astype(np.float32)
        )

    def fingerprint(self) -> str:
        """Return the identity of content and settings, the same on every machine."""
        return self.metadata["fingerprint"]


def _shaping_settings(options: Options) -> dict[str, Any]:
    """Return the settings that decide what the arrays hold."""
    relevant = {"dictionary": {"min_count"}, "modulo": {"cardinalities"}}[options.ids]
    shared = {"test_fraction", "validation_fraction", "ids", "max_num_embeddings"}
    return options.model_dump(include=shared | relevant)


def _write_arrays(directory: Path, options: Options, files: Sequence[Path]) -> dict[str, Any]:
    """Fill `directory` with the arrays; return what the metadata says of them."""
    malformed = Malformed(options.path, options.max_malformed_fraction)
    rows = write_rows(directory, files, malformed)
    if not rows:
        raise ValueError(f"Criteo data: {options.path}: no rows in {malformed.lines} lines")
    splits = _split_rows(options, np.load(directory / "labels.npy", mmap_mode="r"))

    def build_encoder(f: int, values: pa.ChunkedArray) -> Encoder:
        if options.ids == "dictionary":
            return build_dictionary(values, options.min_count, options.max_num_embeddings)
        published = CARDINALITIES[options.cardinalities][f]
        return Modulo(min(published, options.max_num_embeddings or published))

    num_embeddings = write_ids(directory, splits["train"]["rows"], build_encoder)
    if malformed.counts:
        _logger.warning("%s\n  they are left out", malformed)
    return {
        "rows": rows,
        "lines": malformed.lines,
        "malformed": malformed.counts,
        "malformed_examples": malformed.examples,
        "splits": splits,
        "num_embeddings": num_embeddings,
    }


def _split_rows(options: Options, labels: np.ndarray) -> dict[str, dict[str, int]]:
    """Return for each split of labels (n,) in time order its first row, its number of rows, and how many are clicks.

    Raises ValueError when a split that was asked for is empty or has one class only.
    """
    n = len(labels)
    num_test = round(n * options.test_fraction)
    num_validation = round(n * options.validation_fraction)
    bounds = np.cumsum([0, n - num_validation - num_test, num_validation, num_test]).tolist()
    splits = {}
    for split, first, end in zip(("train", "validation", "test"), bounds, bounds[1:], strict=False):
        clicks = int(labels[first:end].sum(dtype=np.int64))
        splits[split] = {"first": first, "rows": end - first, "clicks": clicks}
        wanted = split != "validation" or options.validation_fraction > 0
        if wanted and end == first:
            raise ValueError(f"Criteo data: {options.path}: split {split!r} is empty: {n} rows in all")
        if wanted and clicks in (0, end - first):
            raise ValueError(
                f"Criteo data: {options.path}: split {split!r} has {clicks} clicks in {end - first} rows "
                f"(rows {first} to {end - 1} of {n}): AUC is undefined with one class only"
            )
    return splits


def _map_array(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Return the array of a cache's file, memory-mapped."""
    array = np.load(path, mmap_mode="r")
    if array.shape != shape:
        raise ValueError(f"cache {path} has shape {array.shape}, its metadata says {shape}: delete {path.parent}")
    return array.view(np.ndarray)
