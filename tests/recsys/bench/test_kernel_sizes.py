"""Sizes, batches and what they hold."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from recsys.bench.kernel_sizes import Axes, KernelSize, build_batches, paper_sizes, reduced_sizes
from recsys.bench.table2 import TABLE2

CPU = torch.device("cpu")
SMALL = KernelSize(8, 4, 4_000, 64, features=3, rows=300)


def test_the_reduced_grid_is_of_the_full_one():
    full, reduced = Axes().sizes(10_000_000), reduced_sizes(10_000_000)
    assert len(full) == 3 * 4 * 3 * 2 * 2 * 2 == len(set(full))
    assert set(reduced) < set(full)
    assert len(set(reduced)) == len(reduced)


def test_every_value_of_every_axis_is_in_the_reduced_grid():
    reduced, axes = reduced_sizes(10_000_000), Axes()
    for name, values in (("embedding_dim", axes.embedding_dims), ("block_size", axes.block_sizes)):
        assert {getattr(size, name) for size in reduced} == set(values)
    assert {size.memory_bytes for size in reduced} == {round(mb * 1e6) for mb in axes.memory_mb}
    assert {(size.ids, size.ids_per_bag) for size in reduced} >= {("zipf", 1), ("zipf", 10), ("uniform", 10)}


def test_sizes_of_table_2():
    sizes = paper_sizes()
    assert len(sizes) == len(set(sizes)) == 7 * 7
    (largest,) = (s for s in sizes if s.rows == 256_000_000 and round(s.compression) == 10)
    assert largest.memory_size == 256_000_000 * 128 // 10
    assert (largest.embedding_dim, largest.batch_size, largest.features, largest.block_size) == (128, 10_240, 1, 32)


def test_every_row_of_table_2_is_measured_at_every_n():
    sizes = paper_sizes()
    for block in TABLE2:
        for key in block.ms:
            held = [size for size in sizes if block.holds(size, key)]
            assert sorted(size.rows for size in held) == sorted({size.rows for size in sizes}), (block.title, key)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"memory_bytes": 12}, "M of 1.2e-05 MB is 3 elements, fewer than one block of Z = 4"),
        ({"block_size": 0}, "block_size must be at least 1, not 0"),
        ({"embedding_dim": -1}, "embedding_dim must be at least 1, not -1"),
        ({"rows": 2}, "rows must be at least one for each of 3 features, not 2"),
        ({"ids": "normal"}, "ids 'normal' are unknown: known are ['uniform', 'zipf']"),
    ],
)
def test_what_cannot_be_is_refused(change, said):
    with pytest.raises(ValueError, match=said.replace("[", r"\[").replace(".", r"\.")):
        replace(SMALL, **change)


def test_bytes_of_a_size():
    assert (SMALL.memory_size, SMALL.rows_per_table, SMALL.full_bytes) == (1_000, 100, 4 * 300 * 8)
    assert (SMALL.output_bytes, SMALL.expected_ids) == (4 * 64 * 3 * 8, 192)
    assert replace(SMALL, ids_per_bag=10).expected_ids == 1_920


@pytest.mark.parametrize("ids", ["uniform", "zipf"])
@pytest.mark.parametrize("ids_per_bag", [1, 10])
def test_batches_hold_the_same_ids_in_every_form(ids, ids_per_bag):
    size = replace(SMALL, ids=ids, ids_per_bag=ids_per_bag)
    first, second = build_batches(size, 2, CPU)
    assert first.features.keys() == ["f0", "f1", "f2"]
    assert first.features.stride() == 64
    assert torch.equal(first.features.values(), first.ids)
    assert torch.equal(first.features.offsets(), first.offsets)
    bag = torch.repeat_interleave(torch.arange(3 * 64), first.offsets.diff())
    assert torch.equal(first.table_ids, first.ids + bag // 64 * 100)
    assert 0 <= int(first.ids.min()) <= int(first.ids.max()) < 100
    assert first.distinct == len(first.table_ids.unique())
    assert not torch.equal(first.ids[:64], second.ids[:64])
    again, _ = build_batches(size, 2, CPU)
    assert torch.equal(first.ids, again.ids)


def test_bags_of_several_ids_have_the_mean_asked_for_and_some_are_empty():
    (batch,) = build_batches(replace(SMALL, batch_size=5_000, ids_per_bag=10), 1, CPU)
    lengths = batch.offsets.diff()
    assert lengths.double().mean() == pytest.approx(10, abs=0.2)
    assert (int(lengths.min()), int(lengths.max())) == (0, 20)


def test_zipf_ids_fall_off_as_the_law_says_and_are_not_neighbours():
    size = replace(SMALL, batch_size=100_000, ids="zipf", features=1, rows=1_000)
    (batch,) = build_batches(size, 1, CPU)
    counts = np.bincount(batch.ids.numpy(), minlength=1_000)
    order = counts.argsort()[::-1]
    law = np.arange(1, 1_001) ** -1.05
    assert counts[order[:5]] / 100_000 == pytest.approx(law[:5] / law.sum(), rel=0.1)
    assert abs(int(order[0]) - int(order[1])) > 1
    assert (counts > 0).sum() > 900  # the spreading of ranks over the table is one to one
