"""Which rows a batch holds: every epoch a permutation, any step the first, equal shares for all ranks."""

from itertools import chain

import numpy as np
import pytest
import torch

from recsys.data.batches import RowOrder, TrainingBatches, evaluation_batches
from recsys.data.dataset import count_ids
from tests.recsys.data.array_rows import ArrayRows, make_rows

CPU = torch.device("cpu")


def numbered(n):
    """Row i has i as its dense value, its parity as label, and i and i + 500 as ids: a batch can be read off."""
    i = np.arange(n)
    return make_rows(i % 2, np.stack([i, i + 500], axis=1), i[:, None])


def dataset_of(train, test=0):
    return ArrayRows(train=numbered(train), test=numbered(test), num_embeddings=(10**6, 10**6))


def training(num_rows, world_size=1, rank=0, batch=8, window=16, seed=0):
    return TrainingBatches(
        dataset_of(num_rows), global_batch_size=batch, rank=rank, world_size=world_size, shuffle_window_rows=window,
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
    damaged = numbered(40)
    damaged.ids[13, feature] = id_
    dataset = ArrayRows(train=damaged, test=damaged, num_embeddings=(10**6, 10**6))
    named = rf"row 13 of the train rows: id {id_} of feature '{'ab'[feature]}' is not in \[0, 1000000\)"
    batches = TrainingBatches(
        dataset, global_batch_size=8, rank=0, world_size=1, shuffle_window_rows=16, seed=0, device=CPU
    )
    with pytest.raises(ValueError, match=named):
        next(batches.from_step(0))
    with pytest.raises(ValueError, match=named):
        count_ids(dataset)
    with pytest.raises(ValueError, match=rf"row 13 of the test rows: id {id_}"):
        list(evaluation_batches(dataset, "test", global_batch_size=8, rank=0, world_size=1, device=CPU))


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
                dataset_of(1, num_rows), "test", global_batch_size=8, rank=rank, world_size=world_size, device=CPU
            )
        )
        shapes.append([len(batch.labels) for batch, _ in batches])
        for batch, count in batches:
            counted += batch.dense_features[:count, 0].long().tolist()
    assert sorted(counted) == list(range(num_rows))
    assert all(shape == shapes[0] and set(shape) == {8 // world_size} for shape in shapes)
