"""The Criteo dataset against plain Python: features, ids, splits, and what it refuses."""

import os
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from recsys.data.criteo import Criteo, Options
from recsys.data.dataset import Rows
from tests.recsys.data.criteo_rows import (
    CACHE_ARRAYS,
    draw_rows,
    expect_dense,
    expect_dictionary,
    expect_labels,
    expect_modulo,
    replace_cell,
    write_rows,
    write_text,
)

DATA = Path(os.environ.get("PSS_BENCH_DATA", Path(__file__).parents[3] / "../shared/data"))
REAL_FILE = DATA / "criteo_dac80k.tsv.xz"
SPLITS = ("train", "validation", "test")


def read_all(dataset: Criteo) -> Rows:
    """All rows in the order of the file."""
    parts = [dataset.read(split, np.arange(dataset.num_rows(split))) for split in SPLITS]
    return Rows(
        dense=np.concatenate([part.dense for part in parts]),
        ids=np.concatenate([part.ids for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
    )


@pytest.fixture
def rows() -> list[str]:
    return draw_rows(300)


@pytest.fixture
def path(tmp_path: Path, rows: list[str]) -> str:
    return str(write_rows(tmp_path / "day.tsv", rows))


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "cache"


def test_dense_features_labels_and_types(path: str, rows: list[str], cache_dir: Path) -> None:
    dataset = Criteo.build(Options(path=path), cache_dir)
    found = read_all(dataset)
    np.testing.assert_allclose(found.dense, expect_dense(rows), rtol=1e-6)
    np.testing.assert_array_equal(found.labels, expect_labels(rows))
    assert (found.dense.dtype, found.ids.dtype, found.labels.dtype) == (np.float32, np.int64, np.float32)
    assert (dataset.dense_names[0], dataset.dense_names[-1], len(dataset.dense_names)) == ("I1", "I13", 13)
    assert (dataset.feature_names[0], dataset.feature_names[-1], len(dataset.feature_names)) == ("C1", "C26", 26)
    assert dataset.best_possible() is None


@pytest.mark.parametrize("chunk_rows", [1 << 25, 64])
@pytest.mark.parametrize(("min_count", "cap"), [(1, None), (4, None), (1, 6), (3, 20), (1000, None), (1, 1)])
def test_dictionary_of_the_training_rows(
    path: str,
    rows: list[str],
    cache_dir: Path,
    min_count: int,
    cap: int | None,
    chunk_rows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("recsys.data.criteo_cache.CHUNK_ROWS", chunk_rows)
    monkeypatch.setattr("recsys.data.criteo_cache.INTERLEAVED_ROWS", 77)
    dataset = Criteo.build(Options(path=path, min_count=min_count, max_num_embeddings=cap), cache_dir)
    ids, sizes = expect_dictionary(rows, dataset.num_rows("train"), min_count, cap)
    assert dataset.num_embeddings == sizes
    np.testing.assert_array_equal(read_all(dataset).ids, ids)


def test_ids_of_a_table_worked_out_by_hand(tmp_path: Path, cache_dir: Path) -> None:
    """C2 in ten training rows: a blank and b twice each, c three times, d, e and f once; unseen 7 in the test rows."""
    cells = ["b", "c", "", "d", "c", "b", "e", "", "c", "f", "c", "7", "", "0000000B", "F"]
    rows = [replace_cell(row, 15, cell) for row, cell in zip(draw_rows(15), cells, strict=True)]
    path = str(write_rows(tmp_path / "day.tsv", rows))
    dataset = Criteo.build(Options(path=path, test_fraction=1 / 3, validation_fraction=0.0), cache_dir)
    c2 = read_all(dataset).ids[:, 1]
    assert c2.tolist() == [3, 1, 2, 4, 1, 3, 5, 2, 1, 6, 1, 0, 2, 3, 6]
    assert dataset.num_embeddings[1] == 7


@pytest.mark.parametrize("split", ["validation", "test"])
def test_what_only_later_rows_hold_leaves_no_trace(
    path: str, rows: list[str], tmp_path: Path, cache_dir: Path, split: str
) -> None:
    """However often a value stands in a later split, it changes neither table nor training ids, and is id 0."""
    before = Criteo.build(Options(path=path), cache_dir)
    first = before.metadata["splits"][split]["first"]
    changed = [replace_cell(row, 14, "deadbeef") if k >= first else row for k, row in enumerate(rows)]
    after = Criteo.build(Options(path=str(write_rows(tmp_path / "changed.tsv", changed))), cache_dir)
    assert after.num_embeddings == before.num_embeddings
    train = np.arange(after.num_rows("train"))
    np.testing.assert_array_equal(after.read("train", train).ids, before.read("train", train).ids)
    assert not after.read(split, np.arange(after.num_rows(split))).ids[:, 0].any()


@pytest.mark.parametrize("cap", [None, 100])
@pytest.mark.parametrize("cardinalities", ["criteo_kaggle", "criteo_tb"])
def test_modulo(path: str, rows: list[str], cache_dir: Path, cardinalities, cap: int | None) -> None:
    options = Options(path=path, ids="modulo", cardinalities=cardinalities, max_num_embeddings=cap)
    dataset = Criteo.build(options, cache_dir)
    ids, sizes = expect_modulo(rows, cardinalities, cap)
    assert dataset.num_embeddings == sizes
    np.testing.assert_array_equal(read_all(dataset).ids, ids)


@pytest.mark.parametrize(("n", "test", "validation"), [(300, 0.2, 0.1), (101, 0.25, 0.2), (60, 0.5, 0.0)])
def test_splits_are_in_time_order_and_cover_every_row(
    tmp_path: Path, cache_dir: Path, n: int, test: float, validation: float
) -> None:
    rows = draw_rows(n, seed=n)
    path = str(write_rows(tmp_path / "day.tsv", rows))
    dataset = Criteo.build(Options(path=path, test_fraction=test, validation_fraction=validation), cache_dir)
    num_test, num_validation = round(n * test), round(n * validation)
    assert [dataset.num_rows(s) for s in SPLITS] == [n - num_test - num_validation, num_validation, num_test]
    np.testing.assert_allclose(read_all(dataset).dense, expect_dense(rows), rtol=1e-6)
    assert sum(s["clicks"] for s in dataset.metadata["splits"].values()) == expect_labels(rows).sum()


def test_read_takes_any_order_and_repeats(path: str, rows: list[str], cache_dir: Path) -> None:
    dataset = Criteo.build(Options(path=path), cache_dir)
    wanted = np.array([5, 0, 5, 29, 17], np.int64)
    found = dataset.read("validation", wanted)
    np.testing.assert_allclose(found.dense, expect_dense(rows)[210 + wanted], rtol=1e-6)
    assert len(dataset.read("test", np.empty(0, np.int64))) == 0


@pytest.mark.parametrize("index", [-1, 60])
def test_read_refuses_rows_of_other_splits(path: str, cache_dir: Path, index: int) -> None:
    dataset = Criteo.build(Options(path=path), cache_dir)
    with pytest.raises(IndexError, match="'test', which has 60"):
        dataset.read("test", np.array([3, index]))
    with pytest.raises(ValueError, match="'tests' is none of train, validation, test"):
        dataset.read("tests", np.array([0]))


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_compression_changes_nothing(path: str, rows: list[str], tmp_path: Path, cache_dir: Path, suffix: str) -> None:
    Criteo.build(Options(path=path), cache_dir / "plain")
    Criteo.build(Options(path=str(write_rows(tmp_path / f"day.tsv{suffix}", rows))), cache_dir / "compressed")
    [plain], [compressed] = cache_dir.glob("plain/*/ids.npy"), cache_dir.glob("compressed/*/ids.npy")
    for name in CACHE_ARRAYS:
        assert plain.with_name(name).read_bytes() == compressed.with_name(name).read_bytes()


@pytest.mark.parametrize("form", ["directory", "glob"])
def test_several_files_are_one_log_in_order_of_their_days(
    path: str, rows: list[str], tmp_path: Path, cache_dir: Path, form: str
) -> None:
    days = tmp_path / "days"
    days.mkdir()
    for day, name in enumerate(["day_0", "day_2.gz", "day_10"]):
        write_rows(days / name, rows[100 * day : 100 * (day + 1)])
    (days / ".hidden").write_text("not a row")
    one = Criteo.build(Options(path=path), cache_dir)
    several = Criteo.build(Options(path=str(days if form == "directory" else days / "day_*")), cache_dir)
    np.testing.assert_array_equal(read_all(several).ids, read_all(one).ids)
    np.testing.assert_array_equal(read_all(several).dense, read_all(one).dense)
    assert several.fingerprint() != one.fingerprint()


def test_missing_and_empty_files_are_named(tmp_path: Path, cache_dir: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.tsv"):
        Criteo.build(Options(path=str(tmp_path / "absent.tsv")), cache_dir)
    with pytest.raises(ValueError, match=r"empty.tsv is empty \(0 bytes\)"):
        Criteo.build(Options(path=str(write_text(tmp_path / "empty.tsv", ""))), cache_dir)
    with pytest.raises(ValueError, match=r"empty.gz: no rows in 0 lines"):
        Criteo.build(Options(path=str(write_text(tmp_path / "empty.gz", ""))), cache_dir)
    with pytest.raises(ValueError, match=r"labels.tsv:1: columns: 1 instead of 40: '1'"):
        Criteo.build(Options(path=str(write_text(tmp_path / "labels.tsv", "1\n0\n" * 50))), cache_dir)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("label", ["0", "1"])
def test_a_split_of_one_class_is_refused(tmp_path: Path, cache_dir: Path, split: str, label: str) -> None:
    spans = {"train": range(70), "validation": range(70, 80), "test": range(80, 100)}
    rows = [replace_cell(row, 0, label) if k in spans[split] else row for k, row in enumerate(draw_rows(100))]
    path = str(write_rows(tmp_path / "day.tsv", rows))
    n = len(spans[split])
    with pytest.raises(ValueError, match=rf"day.tsv: split '{split}' has {int(label) * n} clicks in {n} rows"):
        Criteo.build(Options(path=path), cache_dir)
    assert not list(cache_dir.glob("criteo-*/metadata.json"))


def test_an_empty_split_is_refused(tmp_path: Path, cache_dir: Path) -> None:
    rows = [replace_cell(row, 0, str(k % 2)) for k, row in enumerate(draw_rows(8))]
    path = str(write_rows(tmp_path / "day.tsv", rows))
    with pytest.raises(ValueError, match="split 'validation' is empty: 8 rows in all"):
        Criteo.build(Options(path=path, test_fraction=0.25, validation_fraction=0.01), cache_dir)
    without = Options(path=path, test_fraction=0.25, validation_fraction=0.0)
    assert Criteo.build(without, cache_dir).num_rows("validation") == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"test_fraction": 0.0},
        {"test_fraction": 0.5, "validation_fraction": 0.5},
        {"min_count": 0},
        {"ids": "hash"},
        {"cardinalities": "avazu"},
        {"max_num_embeddings": 0},
        {"max_malformed_fraction": -0.1},
        {"path": ""},
        {"min_cuont": 2},
    ],
)
def test_options_are_bounded(wrong: dict) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        Options(**{"path": "day.tsv", **wrong})


@pytest.mark.skipif(not REAL_FILE.exists(), reason=f"no real Criteo rows at {REAL_FILE} (set PSS_BENCH_DATA)")
def test_the_real_rows(cache_dir: Path) -> None:
    dataset = Criteo.build(Options(path=str(REAL_FILE)), cache_dir)
    assert [dataset.num_rows(split) for split in SPLITS] == [56_000, 8_000, 16_000]
    assert dataset.metadata["splits"]["test"]["first"] == 64_000
    assert dataset.metadata["malformed"] == {}
    found = read_all(dataset)
    assert found.labels.mean() == pytest.approx(0.2245, abs=5e-5)
    assert (found.ids >= 0).all()
    assert (found.ids < np.array(dataset.num_embeddings)).all()
    assert (found.ids[:56_000] > 0).all()
    # The most frequent id of each category is the one it was numbered for.
    assert all(np.bincount(found.ids[:56_000, f]).argmax() == 1 for f in range(26))
