"""The rows that TT-Rec caches: which, what they learn, and what a checkpoint keeps of them."""

import io

import pytest
import torch
from torch import nn

from baselines import tt_rec
from baselines.tt_rec import cell
from tests.baselines.test_tt_cores import reconstruct
from tests.baselines.tt_rec_tables import cached_ids, read, single
from tests.pss.jagged import pooled_by_cell, random_kjt


def test_the_cache_takes_the_most_frequent_rows_and_changes_no_output(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tt_rec, "FILL_ROWS", 1)
    module = single(cache_warmup=0.5)
    everything = list(range(100))
    module.eval()
    before = read(module, everything)  # not counted
    module.train()
    for step in range(1, 4):
        read(module, [7, 7, 7, 42, 42, 99, 3])
        module.end_step(step, 6)
        assert cached_ids(module) == (set() if step < 3 else {7, 42})
    assert module.read_counts.nonzero().flatten().tolist() == [3, 7, 42, 99]
    assert module.read_counts[[3, 7, 42, 99]].tolist() == [3, 9, 6, 3]
    torch.testing.assert_close(module.eval()(random_kjt(["a"], 9, max_id=100)).values(), pooled_by_cell(
        module, cell, random_kjt(["a"], 9, max_id=100)).float())  # fmt: skip
    torch.testing.assert_close(read(module, everything), before)


def test_cached_rows_learn_in_the_cache_alone():
    module = single(cache_warmup=0.0)
    read(module, [7, 42])
    module.end_step(1, 10)
    computed = reconstruct(module.table_parts(0)[0])
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    read(module, [7, 42, 7]).sum().backward()
    assert module.memory.grad is not None
    assert not module.memory.grad[: -2 * 8].any()  # nothing for the train
    optimizer.step()
    torch.testing.assert_close(reconstruct(module.table_parts(0)[0]), computed)
    torch.testing.assert_close(read(module, [7, 42, 8]), computed[[7, 42, 8]] - torch.tensor([[2.0], [1.0], [0.0]]))


def test_a_refresh_keeps_what_staying_rows_learned_and_forgets_the_evicted():
    module = single(cache_warmup=0.0, cache_refresh_steps=2)
    for ids, step in [([7, 42, 42], 1), ([7], 2)]:
        read(module, ids)
        module.end_step(step, 10)
    places = dict(zip(module.cached_keys.tolist(), module.cached_places.tolist(), strict=True))
    with torch.no_grad():
        module.table_parts(0)[1].fill_(5.0)
    read(module, [3, 3, 3])
    assert cached_ids(module) == {7, 42}  # until the refresh is due
    module.end_step(3, 10)
    assert cached_ids(module) == {3, 7}  # 7 and 42 have been read twice: the smaller wins
    computed = reconstruct(module.table_parts(0)[0])
    torch.testing.assert_close(
        read(module, [7, 42, 3]), torch.stack([torch.full((8,), 5.0), computed[42], computed[3]])
    )
    assert dict(zip(module.cached_keys.tolist(), module.cached_places.tolist(), strict=True)) == {
        7: places[7], 3: places[42],
    }  # fmt: skip
    read(module, [42])
    read(module, [7, 7, 5, 5, 5])
    module.end_step(4, 10)
    module.end_step(5, 10)
    assert cached_ids(module) == {3, 7}  # a tie of 3, 42 and 5 at three reads: the cached one stays


def test_a_cache_that_is_not_refreshed_stops_counting():
    module = single(cache_warmup=0.0, cache_refresh_steps=0)
    for step in (1, 2, 3):
        read(module, [step])
        module.end_step(step, 3)
    assert cached_ids(module) == {1}  # and an empty place
    assert module.read_counts.sum() == 1
    assert module._reads == []


def test_reads_of_a_forward_without_a_step_are_counted_with_the_next():
    module = single(cache_warmup=0.0)
    read(module, [4, 4])
    read(module, [4, 5])
    module.end_step(1, 1)
    assert module.read_counts[[4, 5]].tolist() == [3, 1]
    module.end_step(2, 2)
    assert module.read_counts.sum() == 4


def test_state_dict_carries_the_cache_and_its_counts():
    module = single(cache_warmup=0.0, cache_refresh_steps=2)
    read(module, [7, 42, 42])
    module.end_step(1, 10)
    nn.init.normal_(module.memory)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = single(cache_warmup=0.0, cache_refresh_steps=2)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(read(other, [7, 42, 1]), read(module, [7, 42, 1]))
    for resumed in (module, other):
        read(resumed, [3, 3, 3])  # 7 has been read twice, 42 three times
        resumed.end_step(3, 10)
        assert cached_ids(resumed) == {3, 42}
    assert torch.equal(module.cached_keys, other.cached_keys)
