"""Which rows a generated data set holds: the same ones however, wherever and in whatever order they are read.

Written files are parsed by plain Python, against the rows as read.
"""

import gzip
import hashlib
import lzma
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from recsys.data import synthetic
from recsys.data.criteo_tsv import DENSE_NAMES, FEATURE_NAMES
from recsys.data.synthetic import BLOCK_ROWS, GENERATOR_VERSION, RANGES, Options, SyntheticCriteo

SPLITS = ("train", "validation", "test")


def make(**options):
    return SyntheticCriteo.build(Options.model_validate(options), Path())


@pytest.fixture(scope="module")
def small():
    return make(scale=0.01)


def same(a, b):
    return all(np.array_equal(x, y) for x, y in ((a.dense, b.dense), (a.ids, b.ids), (a.labels, b.labels)))


def test_shapes_and_types(small):
    rows = small.read("train", np.arange(10))
    assert (rows.dense.shape, rows.ids.shape, rows.labels.shape) == ((10, 13), (10, 26), (10,))
    assert (rows.dense.dtype, rows.ids.dtype, rows.labels.dtype) == (np.float32, np.int64, np.float32)
    assert (small.dense_names, small.feature_names) == (DENSE_NAMES, FEATURE_NAMES)
    assert set(rows.labels.tolist()) <= {0.0, 1.0}
    assert len(small.read("train", np.empty(0, np.int64))) == 0


@pytest.mark.parametrize("count", [1, 2, 9, BLOCK_ROWS - 1, BLOCK_ROWS, BLOCK_ROWS + 1, 2 * BLOCK_ROWS + 5])
def test_rows_do_not_depend_on_what_else_is_read(small, count):
    whole = np.arange(3 * BLOCK_ROWS)
    rows, probabilities = small.read("train", whole), small.probabilities("train", whole)
    for indices in (whole[count : 2 * count], np.random.default_rng(count).integers(0, len(whole), count)):
        got = small.read("train", indices)
        assert np.array_equal(got.ids, rows.ids[indices])
        assert np.array_equal(got.dense, rows.dense[indices])
        assert np.array_equal(got.labels, rows.labels[indices])
        assert np.array_equal(small.probabilities("train", indices), probabilities[indices])


def test_ranks_together_read_the_whole(small):
    whole = small.read("train", np.arange(10_000))
    for world_size in (2, 3):
        parts = [small.read("train", np.arange(rank, 10_000, world_size)) for rank in range(world_size)]
        for rank, part in enumerate(parts):
            assert np.array_equal(part.ids, whole.ids[rank::world_size])
            assert np.array_equal(part.labels, whole.labels[rank::world_size])


def test_two_datasets_of_the_same_options_are_equal_and_another_seed_is_not(small):
    indices = np.arange(1000)
    assert same(make(scale=0.01).read("test", indices), small.read("test", indices))
    other = make(scale=0.01, seed=4)
    equal_ids = (other.read("test", indices).ids == small.read("test", indices).ids).mean(axis=0)
    assert equal_ids[2] < 0.03  # C3: 100,000 ids
    assert abs(np.corrcoef(other.probabilities("test", indices), small.probabilities("test", indices))[0, 1]) < 0.12


def test_splits_and_calibration_share_no_row(small):
    rows = [small.read(split, np.arange(20_000)) for split in SPLITS]
    distinct = {bytes(row) for r in rows for row in np.concatenate([r.ids, r.dense.view(np.int32)], axis=1)}
    assert len(distinct) == 60_000
    hashes = np.concatenate([small._row_hashes(name, np.arange(200_000)) for name in RANGES])
    assert len(RANGES) == 4
    assert len(np.unique(hashes)) == len(hashes)


def test_the_length_of_a_split_changes_no_row(small):
    longer = make(scale=0.01, train_rows=10**12, validation_rows=7, test_rows=2000)
    for split, count in (("train", 500), ("validation", 7), ("test", 500)):
        assert same(longer.read(split, np.arange(count)), small.read(split, np.arange(count)))
    assert len(longer.read("train", np.array([10**12 - 1]))) == 1


def test_rows_outside_a_split_are_refused(small):
    for indices in ([-1], [100_000], [0, 100_000, 5]):
        with pytest.raises(IndexError, match=r"of 'test', which has 100000"):
            small.read("test", np.array(indices))
    with pytest.raises(ValueError, match="split 'calibration' is none of train, validation, test"):
        small.read("calibration", np.arange(3))


@pytest.mark.parametrize(
    ("version", "options", "expected"),
    [
        (1, {}, "7d56ec467c8961da"),
        (1, {"cardinalities": "criteo_tb", "base_rate": 0.03, "scale": 0.1, "seed": 1}, "bc9fa6e0630a5f27"),
    ],
)
def test_rows_are_those_of_this_version(version, options, expected):
    """A change that fails here changes what every seed means: raise GENERATOR_VERSION, and update both columns."""
    dataset, digest = make(**options), hashlib.sha256()
    for split in SPLITS:
        for _, block in dataset._blocks(split, np.arange(5000)):
            for values in block:
                digest.update(np.ascontiguousarray(values).tobytes())
    assert (GENERATOR_VERSION, digest.hexdigest()[:16]) == (version, expected)


@pytest.mark.parametrize(
    ("options", "C1", "C3", "C9"),
    [
        ({}, 1461, 10131228, 4),
        ({"scale": 0.1}, 147, 1013124, 4),
        ({"scale": 1e-6, "minimum_table_size": 2}, 3, 11, 3),
        ({"max_num_embeddings": 1000}, 1000, 1000, 4),
        ({"max_num_embeddings": 2}, 2, 2, 2),
    ],
)
def test_table_sizes(options, C1, C3, C9):
    dataset = make(**options)
    assert tuple(dataset.num_embeddings[i] for i in (0, 2, 8)) == (C1, C3, C9)
    ids = dataset.read("train", np.arange(5000)).ids
    assert ids.min() == 0
    assert (ids.max(axis=0) < np.array(dataset.num_embeddings)).all()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", -1), ("seed", 1.5), ("cardinalities", "criteo"), ("scale", 0.0), ("scale", 1.01),
        ("scale", float("nan")), ("minimum_table_size", 0), ("max_num_embeddings", 1), ("base_rate", 0.0),
        ("base_rate", 1.0), ("train_rows", 0), ("train_rows", 2**60), ("validation_rows", -1), ("test_rows", 1),
        ("rare_id_rows", 0.5), ("rare_id_rows", float("inf")), ("main_sd", -0.1), ("interaction_sd", 11.0),
        ("numeric_sd", "0.5"), ("unknown", 1),
    ],
)  # fmt: skip
def test_bad_options_are_named(key, value):
    with pytest.raises(ValidationError, match=f"1 validation error for Options\n{key}\n"):
        Options.model_validate({key: value})


def test_fingerprint_follows_every_option(monkeypatch):
    changed = {
        "seed": 2, "cardinalities": "criteo_tb", "scale": 0.5, "minimum_table_size": 7, "max_num_embeddings": 99,
        "base_rate": 0.1, "train_rows": 5, "validation_rows": 5, "test_rows": 5, "rare_id_rows": 5.0, "main_sd": 0.1,
        "interaction_sd": 0.1, "numeric_sd": 0.1,
    }  # fmt: skip
    assert set(changed) == set(Options.model_fields)

    def fingerprint(**options):
        dataset = SyntheticCriteo.__new__(SyntheticCriteo)
        dataset.options = Options.model_validate(options)
        return dataset.fingerprint()

    fingerprints = [fingerprint(), *(fingerprint(**{key: value}) for key, value in changed.items())]
    assert fingerprints[0] == make().fingerprint()
    monkeypatch.setattr("recsys.data.synthetic.GENERATOR_VERSION", GENERATOR_VERSION + 1)
    fingerprints.append(fingerprint())
    assert len(set(fingerprints)) == len(changed) + 2


def test_text_equals_what_is_read(tmp_path):
    dataset = SyntheticCriteo.build(Options(), Path())
    dataset.write_tsv(tmp_path / "train.tsv", "train", 0, 20_000)
    lines = [line.split("\t") for line in (tmp_path / "train.tsv").read_text().split("\n")[:-1]]
    rows = dataset.read("train", np.arange(20_000))
    assert {len(line) for line in lines} == {40}
    assert [float(line[0]) for line in lines] == rows.labels.tolist()
    dense = [[math.log1p(int(cell)) if cell else 0.0 for cell in line[1:14]] for line in lines]
    np.testing.assert_array_max_ulp(rows.dense, np.array(dense, np.float32), maxulp=1)
    for f in range(26):
        pairs = Counter(zip((line[14 + f] for line in lines), rows.ids[:, f].tolist(), strict=True))
        assert len({text for text, _ in pairs}) == len({id_ for _, id_ in pairs}) == len(pairs)
        assert all((text == "") == (id_ == 0) for text, id_ in pairs)
        assert all(len(text) in (0, 8) and text == text.lower() for text, _ in pairs)


def test_category_codes_undo():
    """Every step inverted: two ids never share a code, whatever the size of the table."""
    ids = np.concatenate([np.arange(100_000), 2**32 - 1 - np.arange(100_000)])
    key = 0x123456789ABCDEF0
    codes = synthetic.category_codes(ids, key).astype(np.uint64).tolist()
    undone = []
    for x in codes:
        x ^= (x >> 13) ^ (x >> 26)
        x = x * pow(0x85EBCA6B, -1, 2**32) % 2**32
        x ^= (x >> 15) ^ (x >> 30)
        undone.append((x * pow(0x9E3779B1, -1, 2**32) % 2**32) ^ (key & 0xFFFFFFFF))
    assert undone == ids.tolist()


def test_files_are_compressed_by_suffix_and_cut_by_rows(small, tmp_path):
    small.write_tsv(tmp_path / "day_0", "validation", 100, 40_000)
    text = (tmp_path / "day_0").read_bytes()
    assert text.count(b"\n") == 39_900
    for suffix in (".gz", ".zst", ".xz"):
        small.write_tsv(tmp_path / f"day_0{suffix}", "validation", 100, 40_000)
    assert gzip.decompress((tmp_path / "day_0.gz").read_bytes()) == text
    assert lzma.decompress((tmp_path / "day_0.xz").read_bytes()) == text
    with pa.input_stream(str(tmp_path / "day_0.zst"), compression="zstd") as stream:
        assert stream.read() == text
    small.write_tsv(tmp_path / "part", "validation", 35_000, 36_000)
    assert (tmp_path / "part").read_bytes() == b"".join(text.splitlines(keepends=True)[34_900:35_900])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["day_0", "day_0.gz", "day_0.xz", "day_0.zst", "part"]


@pytest.mark.parametrize(("start", "stop"), [(0, 100_001), (-1, 5), (5, 5), (6, 5)])
def test_rows_outside_a_split_are_refused_before_writing(small, tmp_path, monkeypatch, start, stop):
    monkeypatch.setattr(synthetic, "_write_tsv", lambda *_: pytest.fail("began to write"))
    with pytest.raises(IndexError, match=f"rows {start} to {stop - 1} of 'validation', which has 100000"):
        small.write_tsv(tmp_path / "beyond", "validation", start, stop)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(small, tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text("old")

    def fail_later():
        yield next(small._blocks("train", np.arange(3)))[1]
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        synthetic._write_tsv(path, fail_later(), 1)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("train.tsv", "old")]
