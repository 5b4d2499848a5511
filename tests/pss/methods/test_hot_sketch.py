from typing import Any

import numpy as np
import pytest
import torch

from pss.methods.hot_sketch import HotSketch

FREE = (-1, 0.0, -1)


class PlainSketch:
    """The same sketch in dictionaries and loops: buckets of [key, score, row]."""

    def __init__(self, buckets: int, slots: int, hot_rows: int) -> None:
        self.buckets: list[list[list[Any]]] = [[list(FREE) for _ in range(slots)] for _ in range(buckets)]
        self.hot_rows = hot_rows

    def add(self, importance: dict[int, float]) -> set[int]:
        """Returns the keys that had a slot before and still have."""
        before = {slot[0] for bucket in self.buckets for slot in bucket}
        for index, bucket in enumerate(self.buckets):
            mine = {key: value for key, value in importance.items() if key % len(self.buckets) == index}
            known = {slot[0]: slot for slot in bucket}
            new = sorted((-value, key) for key, value in mine.items() if key not in known)
            for key in mine.keys() & known.keys():
                known[key][1] += mine[key]
            open_slots = [slot for slot in bucket if slot[2] < 0]
            if new and open_slots:
                least = min(open_slots, key=lambda slot: slot[1])
                least[0] = new[0][1]
                least[1] += -new[0][0]
        return {slot[0] for bucket in self.buckets for slot in bucket} & before & set(importance)

    def migrate(self, may_rise: set[int], threshold: float | None) -> set[int]:
        slots = [slot for bucket in self.buckets for slot in bucket]
        pool = [slot for slot in slots if slot[2] >= 0 or slot[0] in may_rise]
        if threshold is None:
            threshold = sorted([slot[1] for slot in pool] + [0] * self.hot_rows, reverse=True)[self.hot_rows - 1]
        high = [slot for slot in pool if slot[1] >= threshold and slot[1] > 0]
        for slot in slots:
            slot[2] = slot[2] if any(slot is other for other in high) else -1
        free = sorted(set(range(self.hot_rows)) - {slot[2] for slot in slots})
        rising = sorted((slot for slot in high if slot[2] < 0), key=lambda slot: -slot[1])[: len(free)]
        for slot, row in zip(rising, free, strict=False):
            slot[2] = row
        return {int(slot[0]) for slot in rising}


def filled(plain: PlainSketch) -> np.ndarray:
    """(buckets, slots, 3)"""
    return np.array(plain.buckets)


def contents(sketch: HotSketch) -> np.ndarray:
    return torch.stack([sketch.keys.double(), sketch.scores.double(), sketch.rows.double()], -1).numpy()


def batch(rng: np.random.Generator, ids: int, count: int) -> dict[int, float]:
    """Distinct keys, the low ones more often, with importance in steps of 1/4: sums are exact and ties happen."""
    keys = np.unique((ids * rng.random(count) ** 3).astype(int))
    return {int(key): float(rng.integers(0, 9)) / 4 for key in keys}


def tensors(importance: dict[int, float]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(list(importance), dtype=torch.int64), torch.tensor(list(importance.values()))


@pytest.mark.parametrize("threshold", [None, 6.0])
def test_it_does_what_loops_over_keys_do(threshold: float | None):
    rng, plain, sketch = np.random.default_rng(0), PlainSketch(7, 2, 6), HotSketch(7, 2, 6)
    became_cold = was_blocked = False
    for step in range(200):
        importance = batch(rng, 60, 12)
        again = plain.add(importance)
        met_again = sketch.add(*tensors(importance))
        assert set(sketch.keys[met_again].tolist()) == again
        np.testing.assert_array_equal(contents(sketch), filled(plain))
        before = {slot[0] for bucket in plain.buckets for slot in bucket if slot[2] >= 0}
        risen = plain.migrate(again, threshold)
        keys, rows = sketch.migrate(met_again, threshold)
        np.testing.assert_array_equal(contents(sketch), filled(plain))
        assert set(keys.tolist()) == risen
        assert torch.equal(sketch.find(keys), rows)
        if step in (70, 140):
            sketch.decay(1 / 32)
            for bucket in plain.buckets:
                for slot in bucket:
                    slot[1] /= 32
        hot = {slot[0] for bucket in plain.buckets for slot in bucket if slot[2] >= 0}
        became_cold |= bool(before - hot)
        was_blocked |= any(all(slot[2] >= 0 for slot in bucket) for bucket in plain.buckets)
    assert became_cold
    assert was_blocked


def test_find_knows_hot_keys_alone():
    sketch = HotSketch(4, 2, 3)
    sketch.add(torch.tensor([1, 2, 3]), torch.tensor([1.0, 5.0, 9.0]))
    sketch.migrate(sketch.keys >= 0, 4.0)
    assert sketch.find(torch.tensor([[3, 2], [1, 7]])).tolist() == [[0, 1], [-1, -1]]  # 7 shares the bucket of 3


def test_the_slot_of_a_hot_key_is_kept():
    sketch = HotSketch(1, 2, 2)
    sketch.add(torch.tensor([4]), torch.tensor([1.0]))
    sketch.migrate(sketch.keys >= 0)
    for key in range(10, 20):
        sketch.add(torch.tensor([key]), torch.tensor([5.0]))
    assert sketch.find(torch.tensor([4])).item() == 0
    assert sketch.keys.tolist() == [[4, 19]]
    assert sketch.scores.tolist() == [[1.0, 50.0]]  # every newcomer takes over the score of the one before
    sketch.migrate(sketch.keys >= 0, 6.0)
    assert sketch.find(torch.tensor([4, 19])).tolist() == [-1, 0]


def test_a_newcomer_is_not_hot_before_it_is_met_again():
    sketch = HotSketch(1, 1, 1)
    for key, is_hot in ((1, False), (2, False), (3, False), (3, True)):
        met_again = sketch.add(torch.tensor([key]), torch.tensor([1.0]))
        sketch.migrate(met_again)
        assert (sketch.find(torch.tensor([key])) >= 0).item() == is_hot


def test_no_row_is_given_twice_and_none_without_importance():
    sketch, rng = HotSketch(20, 4, 20), np.random.default_rng(1)
    sketch.add(torch.arange(40), torch.zeros(40))
    assert sketch.migrate(sketch.keys >= 0)[0].numel() == 0
    for step in range(50):
        sketch.add(*tensors(batch(rng, 300, 60)))
        sketch.migrate(sketch.keys >= 0)
        rows = sketch.rows[sketch.rows >= 0]
        assert rows.unique().numel() == rows.numel() <= 20
        assert rows.numel() == 20 or step < 10


def test_nothing_to_add():
    sketch = HotSketch(3, 2, 1)
    sketch.add(torch.empty(0, dtype=torch.int64), torch.empty(0))
    assert sketch.migrate(sketch.keys >= 0)[0].numel() == 0
    assert (sketch.keys == -1).all()


def test_the_most_frequent_keys_of_a_zipf_stream_are_hot():
    rng, sketch, total = np.random.default_rng(2), HotSketch(100, 4, 100), np.zeros(20_000)
    share = 1 / np.arange(1, 20_001) ** 1.1
    numbers = rng.integers(0, 2**62, 20_000)
    for _ in range(150):
        drawn = rng.choice(20_000, size=512, p=share / share.sum())
        ids, counts = np.unique(drawn, return_counts=True)
        total[ids] += counts
        order = np.argsort(numbers[ids])
        sketch.add(torch.from_numpy(numbers[ids[order]]), torch.from_numpy(counts[order]).double())
        sketch.migrate(sketch.keys >= 0)
    is_hot = sketch.find(torch.from_numpy(numbers[np.argsort(-total)[:100]])) >= 0
    assert is_hot[:80].double().mean() >= 0.95
    assert is_hot.double().mean() >= 0.85  # one key at a time, as in SpaceSaving, it is .62


def test_reset_forgets():
    sketch = HotSketch(3, 2, 2)
    sketch.add(torch.tensor([5]), torch.tensor([1.0]))
    sketch.migrate(sketch.keys >= 0)
    sketch.reset()
    np.testing.assert_array_equal(contents(sketch), np.broadcast_to(FREE, (3, 2, 3)))
