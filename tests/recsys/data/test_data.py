from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from recsys.data.batch import Rows
from recsys.data.data import RowOrder, TrainingBatches, check_data, count_ids, data, evaluation_batches
from recsys.data.synthetic import Options, build
from recsys.data.synthetic_teacher import BestPossible

CPU = torch.device("cpu")


class Numbered:
    """Row i of a split has i as its dense value, label parity and both ids: what a batch holds can be read off."""

    dense_names, feature_names, num_embeddings = ("I1",), ("a", "b"), (10**6, 10**6)

    def __init__(self, train, test=0):
        self.rows = {"train": train, "validation": 0, "test": test}

    def num_rows(self, split):
        return self.rows[split]

    def read(self, split, indices):
        assert indices.max() < self.rows[split]
        dense = indices[:, None].astype(np.float32)
        return Rows(dense, np.stack([indices, indices + 500], axis=1), (indices % 2).astype(np.float32))


def training(num_rows, world_size=1, rank=0, batch=8, window=16, seed=0):
    return TrainingBatches(
        Numbered(num_rows), global_batch_size=batch, rank=rank, world_size=world_size, shuffle_window_rows=window,
        seed=seed, device=CPU,
    )  # fmt: skip


def seen(batches, start, stop):
    iterator = batches.from_step(start)
    return [next(iterator).dense_features[:, 0].long().tolist() for _ in range(start, stop)]


def test_a_batch_holds_its_rows():
    batch = next(training(40).from_step(0))
    rows = batch.dense_features[:, 0].long()
    ids = batch.sparse_features.to_dict()
    assert batch.sparse_features.keys() == ["a", "b"]
    for name, shift in (("a", 0), ("b", 500)):
        assert torch.equal(ids[name].values(), rows + shift)
        assert ids[name].lengths().tolist() == [1] * 8
    assert torch.equal(batch.labels, (rows % 2).float())


@pytest.mark.parametrize(("feature", "id_"), [(0, -1), (1, 10**6), (1, -(2**40))])
def test_an_id_outside_its_table_stops_the_run_and_is_named(feature, id_):
    class Damaged(Numbered):
        def read(self, split, indices):
            rows = super().read(split, indices)
            rows.ids[indices == 13, feature] = id_
            return rows

    named = rf"row 13 of the train rows: id {id_} of feature '{'ab'[feature]}' is not in \[0, 1000000\)"
    batches = TrainingBatches(
        Damaged(40), global_batch_size=8, rank=0, world_size=1, shuffle_window_rows=16, seed=0, device=CPU
    )
    with pytest.raises(ValueError, match=named):
        next(batches.from_step(0))
    with pytest.raises(ValueError, match=named):
        count_ids(Damaged(40))
    with pytest.raises(ValueError, match=rf"row 13 of the test rows: id {id_}"):
        list(evaluation_batches(Damaged(1, 40), "test", global_batch_size=8, rank=0, world_size=1, device=CPU))


@pytest.mark.parametrize("window", [1, 7, 16, 45, 1000])
@pytest.mark.parametrize("epoch", [0, 3])
def test_an_epoch_is_a_permutation_read_in_any_pieces(window, epoch):
    order = RowOrder(45, window, seed=1)
    whole = order.rows(epoch, 0, 45)
    assert sorted(whole.tolist()) == list(range(45))
    pieces = [RowOrder(45, window, seed=1).rows(epoch, a, min(a + 4, 45)) for a in range(0, 45, 4)]
    assert np.concatenate(pieces).tolist() == whole.tolist()


def test_rows_stay_in_their_window_and_windows_move():
    order = RowOrder(160, 16, seed=2)
    windows = order.rows(0, 0, 160).reshape(10, 16)
    assert (windows // 16 == windows[:, :1] // 16).all()
    places, inner = windows[:, 0] // 16, windows % 16
    assert places.tolist() != list(range(10))
    assert len({tuple(row) for row in inner.tolist()}) == 10, "every window has an order of its own"
    later = order.rows(1, 0, 160).reshape(10, 16)
    assert (later[:, 0] // 16).tolist() != places.tolist(), "every epoch has an order of windows of its own"
    same_window = later[(later[:, 0] // 16) == places[0]]
    assert (same_window[0] % 16).tolist() != inner[0].tolist()


def test_epochs_and_seeds_have_their_own_order_and_zero_means_file_order():
    assert seen(training(40), 0, 5) != seen(training(40), 5, 10)
    assert seen(training(40), 0, 5) != seen(training(40, seed=1), 0, 5)
    assert seen(training(40, window=0), 0, 2) == [list(range(8)), list(range(8, 16))]


def test_an_epoch_leaves_out_only_what_fills_no_batch():
    batches = training(45)
    assert batches.steps_per_epoch == 5
    rows = list(chain.from_iterable(seen(batches, 0, 5)))
    assert len(set(rows)) == len(rows) == 40


def test_ranks_share_the_global_batch_of_one_process():
    whole = seen(training(1000, batch=12), 0, 100)
    shares = [seen(training(1000, world_size=3, rank=r, batch=12), 0, 100) for r in range(3)]
    assert [list(chain.from_iterable(parts)) for parts in zip(*shares, strict=True)] == whole


def test_any_step_can_be_the_first():
    assert seen(training(1000), 130, 140) == seen(training(1000), 0, 140)[130:]


def test_too_few_rows_for_a_batch_are_refused():
    with pytest.raises(ValueError, match=r"global_batch_size = 8 exceeds the 7 rows"):
        training(7)


@pytest.mark.parametrize(("num_rows", "world_size"), [(20, 1), (21, 2), (3, 2), (16, 2), (17, 4)])
def test_evaluation_counts_every_row_once_in_equal_batches(num_rows, world_size):
    counted, shapes = [], []
    for rank in range(world_size):
        batches = list(
            evaluation_batches(
                Numbered(1, num_rows), "test", global_batch_size=8, rank=rank, world_size=world_size, device=CPU
            )
        )
        shapes.append([len(batch.labels) for batch, _ in batches])
        for batch, count in batches:
            counted += batch.dense_features[:count, 0].long().tolist()
    assert sorted(counted) == list(range(num_rows))
    assert all(shape == shapes[0] and set(shape) == {8 // world_size} for shape in shapes)


class Repeated(Numbered):
    """Rows of the training split have the ids (i % 3, i² % 7) in tables of 5 and 7 rows."""

    num_embeddings = (5, 7)

    def read(self, split, indices):
        assert split == "train", "ids of other rows are not for training"
        rows = super().read(split, indices)
        return Rows(rows.dense, np.stack([indices % 3, indices**2 % 7], axis=1), rows.labels)


@pytest.mark.parametrize("num_rows", [1, 15, 16, 17, 100])
def test_every_id_of_the_training_rows_is_counted(monkeypatch, num_rows):
    monkeypatch.setattr(data, "READ_ROWS", 16)
    first, second = count_ids(Repeated(num_rows, test=50))
    rows = range(num_rows)
    assert first.tolist() == [sum(i % 3 == id for i in rows) for id in range(5)]
    assert second.tolist() == [sum(i * i % 7 == id for i in rows) for id in range(7)]
    assert first.dtype == second.dtype == np.int64


def test_ids_of_a_generated_world_are_counted(capsys):
    dataset = build(Options(scale=0.001, train_rows=30_000, validation_rows=5), Path())
    counts = count_ids(dataset)
    ids = dataset.read("train", np.arange(30_000)).ids
    assert [len(table) for table in counts] == list(dataset.num_embeddings)
    for table, own in zip(counts, ids.T, strict=True):
        assert table.tolist() == np.bincount(own, minlength=len(table)).tolist()
    assert capsys.readouterr().out == ""


def test_a_long_count_says_what_it_is(monkeypatch, capsys):
    monkeypatch.setattr(data, "LONG_COUNT_ROWS", 20)
    count_ids(Repeated(20))
    assert capsys.readouterr().out == "counting the ids of 20 training rows\n"


class Labelled:
    """Rows whose labels are given, and a best possible AUC."""

    dense_names, feature_names, num_embeddings = ("I1",), ("a",), (10,)

    def __init__(self, test, validation=(0, 1), best=None):
        self.labels = {"test": np.array(test, np.float32), "validation": np.array(validation, np.float32)}
        self.best = best

    def num_rows(self, split):
        return len(self.labels[split])

    def read(self, split, indices):
        labels = self.labels[split][indices]
        return Rows(np.zeros((len(labels), 1), np.float32), np.zeros((len(labels), 1), np.int64), labels)

    def best_possible(self):
        return self.best


def test_held_out_rows_of_one_label_are_refused():
    with pytest.raises(ValueError, match="all 5,000 test rows have the same label"):
        check_data(Labelled(np.zeros(5000)), None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="all 2 validation rows"):
        check_data(Labelled([0, 1], validation=[1, 1]), None)  # type: ignore[arg-type]
    last = np.zeros(5000)
    last[-1] = 1
    check_data(Labelled(last, validation=[]), None)  # type: ignore[arg-type]


def test_a_target_beyond_the_best_possible_is_refused_with_that_value():
    best = BestPossible(auc=0.81, log_loss=0.4, base_rate=0.3)
    with pytest.raises(ValueError, match=r"target_auc = 0\.82: the best possible test AUC of these rows is 0\.8100"):
        check_data(Labelled([0, 1], best=best), 0.82)  # type: ignore[arg-type]
    check_data(Labelled([0, 1], best=best), 0.80)  # type: ignore[arg-type]
    check_data(Labelled([0, 1]), 0.99)  # type: ignore[arg-type]
