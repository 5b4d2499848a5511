"""What every dataset does alike, and what the registry makes of a path."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from configs.load import ConfigError
from recsys.data import dataset
from recsys.data.dataset import BestPossible, Dataset, count_ids
from recsys.data.registry import DATASETS, find_dataset
from recsys.data.synthetic import Options, SyntheticCriteo
from tests.recsys.data.array_rows import ArrayRows, make_rows


@pytest.mark.parametrize("kind", DATASETS.values(), ids=list(DATASETS))
def test_every_dataset_offers_what_a_registry_needs(kind):
    assert issubclass(kind, Dataset)
    assert not kind.__abstractmethods__
    assert kind.Options.model_config["extra"] == "forbid"
    knows_its_files = kind.from_path.__func__ is not Dataset.from_path.__func__
    assert bool(kind.files) == knows_its_files


@pytest.mark.parametrize("num_rows", [1, 15, 16, 17, 100])
def test_every_id_of_the_training_rows_is_counted(monkeypatch, num_rows):
    """And of no others: those of the test rows are all 4 and 6."""
    monkeypatch.setattr(dataset, "READ_ROWS", 16)
    i = np.arange(num_rows)
    train = make_rows(i % 2, np.stack([i % 3, i**2 % 7], axis=1))
    test = make_rows(np.zeros(50), np.full((50, 2), [4, 6]))
    first, second = count_ids(ArrayRows(train=train, test=test, num_embeddings=(5, 7)))
    assert first.tolist() == [sum(i % 3 == id for i in range(num_rows)) for id in range(5)]
    assert second.tolist() == [sum(i * i % 7 == id for i in range(num_rows)) for id in range(7)]
    assert first.dtype == second.dtype == np.int64


def test_ids_of_a_generated_world_are_counted(capsys):
    generated = SyntheticCriteo.build(Options(scale=0.001, train_rows=30_000, validation_rows=5), Path())
    counts = count_ids(generated)
    ids = generated.read("train", np.arange(30_000)).ids
    assert [len(table) for table in counts] == list(generated.num_embeddings)
    for table, own in zip(counts, ids.T, strict=True):
        assert table.tolist() == np.bincount(own, minlength=len(table)).tolist()
    assert capsys.readouterr().out == ""


def test_a_long_count_says_what_it_is(monkeypatch, capsys):
    monkeypatch.setattr(dataset, "LONG_COUNT_ROWS", 20)
    count_ids(ArrayRows(train=make_rows(np.zeros(20))))
    assert capsys.readouterr().out == "counting the ids of 20 training rows\n"


def test_held_out_rows_of_one_label_are_refused():
    one, both = make_rows(np.zeros(5000)), make_rows([0, 1])
    with pytest.raises(ValueError, match="all 5,000 test rows have the same label"):
        ArrayRows(test=one, validation=both).check()
    with pytest.raises(ValueError, match="all 2 validation rows"):
        ArrayRows(test=both, validation=make_rows([1, 1])).check()
    last = make_rows(np.arange(5000) == 4999)
    ArrayRows(test=last).check()


def test_a_target_beyond_the_best_possible_is_refused_with_that_value():
    rows, best = make_rows([0, 1]), BestPossible(auc=0.81, log_loss=0.4, base_rate=0.3)
    with pytest.raises(ValueError, match=r"target_auc = 0\.82: the best possible test AUC of these rows is 0\.8100"):
        ArrayRows(test=rows, best=best).check(0.82)
    ArrayRows(test=rows, best=best).check(0.80)
    ArrayRows(test=rows).check(0.99)


def test_rows_and_splits_that_do_not_exist_are_refused():
    rows = ArrayRows(train=make_rows(np.zeros(5)))
    assert len(rows.read("test", np.empty(0, np.int64))) == 0
    for indices in ([3, -1], [5]):
        with pytest.raises(IndexError, match="'train', which has 5"):
            rows.read("train", np.array(indices))
    with pytest.raises(ValueError, match="'tests' is none of train, validation, test"):
        rows.read("tests", np.array([0]))


class Claiming(ArrayRows):
    """Takes any file for its own."""

    files = "anything"

    @classmethod
    def from_path(cls, path):
        return {"file": str(path)}


def test_files_are_known_by_the_dataset_they_are_of(tmp_path, monkeypatch):
    ratings, text = tmp_path / "ml", tmp_path / "days"
    for path in (ratings, text):
        path.mkdir()
    (ratings / "README.txt").write_text("of MovieLens\n")
    for name in ("x_ratings.parquet", "movies.csv", "movies.html"):
        (ratings / name).write_bytes(b"PAR1\t\x00\n")
    (text / "day_0").write_bytes(b"0\t1\r\n")
    (text / "day_1.gz").write_bytes(gzip.compress(b"1\t2\n"))
    (text / "damaged.gz").write_bytes(b"not compressed")
    assert find_dataset(ratings) == (
        "movielens",
        [f'data.movielens.ratings="{ratings}/x_ratings.parquet"', f'data.movielens.movies="{ratings}/movies.csv"'],
    )
    for path in (text, text / "day_0", text / "damaged.gz"):
        assert find_dataset(str(path)) == ("criteo", [f'data.criteo.path="{path}"'])
    with pytest.raises(ConfigError, match="nowhere: no such file or directory"):
        find_dataset(tmp_path / "nowhere")
    (ratings / "movies.csv").unlink()
    (tmp_path / "empty").touch()
    for path in (ratings, tmp_path / "empty", ratings / "x_ratings.parquet"):
        with pytest.raises(
            ConfigError, match=r"files of no dataset\. Known are criteo: a Criteo TSV.*; movielens: a dir"
        ):
            find_dataset(path)
    monkeypatch.setitem(DATASETS, "claiming", Claiming)
    assert find_dataset(ratings) == ("claiming", [f'data.claiming.file="{ratings}"'])
    with pytest.raises(ConfigError, match="files of criteo and claiming: name one"):
        find_dataset(text)
