import io
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.nn.parallel import DistributedDataParallel
from torchrec.fx import symbolic_trace
from torchrec.modules.embedding_configs import PoolingType

from baselines import full, pruned
from baselines.pruned import PrunedEmbeddingBagCollection, cell
from pss.method import CompressionRefused, EmbeddingRequest
from tests.pss.jagged import materialise, pooled_by_cell, random_kjt, table
from tests.ranks import run_ranks

KEYS = ["a", "b", "c"]


def mixed_tables():
    return [table("t", 10, 8, ["a"]), table("u", 9, 5, ["b"], PoolingType.MEAN), table("v", 40, 8, ["c", "a"])]


def even_tables():
    return [table("t", 10, 8, ["a"]), table("u", 9, 8, ["b"], PoolingType.MEAN), table("v", 40, 8, ["c", "a"])]


def weights_of(module):
    return torch.cat([weight.detach().reshape(-1) for weight in module.parameters()])


def masks_of(module):
    return torch.cat([module.pruned(dim).reshape(-1) for dim in module.dims])


def train(module, steps, total_steps, optimizer=None, seed=0):
    """Steps `steps` of `total_steps` on random bags; what they do follows from their number."""
    optimizer = optimizer or torch.optim.Adagrad(module.parameters(), lr=0.05)
    for step in steps:
        optimizer.zero_grad()
        module(random_kjt(KEYS, 8, max_id=9, seed=seed + step)).values().square().mean().backward()
        optimizer.step()
        module.end_step(step, total_steps)


@pytest.mark.parametrize("unit", ["values", "rows"])
@pytest.mark.parametrize("is_weighted", [False, True])
def test_lookup_equals_cell(unit, is_weighted):
    tables = even_tables() if unit == "rows" else mixed_tables()
    module = PrunedEmbeddingBagCollection(tables, is_weighted, compression=3.0, unit=unit, start=0.0, end=1.0)
    module.end_step(100, 200)
    assert 0 < masks_of(module).float().mean() < 1
    for mode in (True, False):
        for max_length in (4, 0):
            features = random_kjt(KEYS, 5, max_id=9, max_length=max_length, weighted=is_weighted)
            found = module.train(mode)(features).values()
            torch.testing.assert_close(found.double(), pooled_by_cell(module, cell, features), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("unit", ["values", "rows"])
@pytest.mark.parametrize("compression", [1.05, 2.0, 4.0, 40.0, 150.0])
def test_stored_bytes_are_those_of_really_packed_arrays(unit, compression):
    tables = [table("a", 3000, 8), table("b", 17, 8)]
    module = PrunedEmbeddingBagCollection(tables, compression=compression, unit=unit, init_scale=1.0).eval()
    rows = np.concatenate([materialise(module, cell, index).numpy() for index in range(2)])
    kept = rows != 0 if unit == "values" else (rows != 0).any(1)
    values, bitmap = rows[kept], np.packbits(kept)
    indices = np.flatnonzero(kept).astype(np.int32)
    packed = values.nbytes + min(bitmap.nbytes, indices.nbytes)
    assert module.stored_bytes() == packed <= 4 * rows.size / compression < packed + 4 * (9 if unit == "rows" else 2)
    assert (bitmap.nbytes < indices.nbytes) == (compression < 40)


def test_uncompressed_nothing_is_pruned():
    module = PrunedEmbeddingBagCollection(mixed_tables(), compression=1.0)
    module.end_step(50, 100)
    assert module.compression == 1
    assert not masks_of(module).any()
    features = random_kjt(KEYS, 5, max_id=9)
    assert torch.equal(module(features).values(), module.eval()(features).values())


def test_training_starts_from_the_full_tables():
    tables = [table("a", 100, 8), table("b", 30, 5), table("c", 70, 8)]
    module = pruned.build(tables, pruned.Options(), EmbeddingRequest(compression=4.0, init_scale=0.5, seed=4))
    oracle = full.build(tables, full.Options(), EmbeddingRequest(init_scale=0.5, seed=4))
    for index, weight in enumerate(oracle.parameters()):
        assert torch.equal(materialise(module, cell, index), weight)
    features = random_kjt(["a", "b", "c"], 5, max_length=0)
    assert torch.equal(module(features).values(), oracle(features).values())


def test_the_schedule_is_cubic():
    """s_f · (1 − (1 − (t − 20) / 40)³) every 10 of 100 steps, from 20 to 60."""
    module = PrunedEmbeddingBagCollection(even_tables(), compression=4.0, start=0.2, end=0.6, every_steps=10)
    final = module.units - module.kept_units
    seen = {}
    for step in range(1, 101):
        before = masks_of(module)
        module.end_step(step, 100)
        if not torch.equal(masks_of(module), before):
            seen[step] = int(masks_of(module).sum())
        assert (masks_of(module) | ~before).all()
    shares = {30: 1 - 0.75**3, 40: 1 - 0.5**3, 50: 1 - 0.25**3, 60: 1.0}
    assert seen == {step: int(final * share) for step, share in shares.items()}
    assert final == module.units - (4 * 472 // 4 - 59) // 4  # 472 values: a bitmap of 59 bytes, the rest 4 bytes each


@pytest.mark.parametrize(
    ("start", "end", "every_steps", "total_steps", "expected"),
    [
        (0.0, 1.0, 3, 10, [3, 6, 9, 10]),  # the last step of the span, whether or not it is one of every 3
        (0.5, 0.5, 100, 10, [5]),
        (0.0, 0.0, 100, 10, [1]),
        (1.0, 1.0, 7, 10, [10]),
        (0.1, 0.5, 100, 4, [2]),
    ],
)
def test_steps_at_which_units_are_pruned(start, end, every_steps, total_steps, expected):
    module = PrunedEmbeddingBagCollection(even_tables(), compression=4.0, start=start, end=end, every_steps=every_steps)
    seen, before = [], 0
    for step in range(1, total_steps + 1):
        module.end_step(step, total_steps)
        if int(masks_of(module).sum()) != before:
            seen.append(step)
        before = int(masks_of(module).sum())
    assert seen == expected
    assert before == module.units - module.kept_units


@pytest.mark.parametrize("unit", ["values", "rows"])
def test_the_smallest_of_all_tables_are_pruned(unit):
    tables = even_tables() if unit == "rows" else mixed_tables()
    module = PrunedEmbeddingBagCollection(tables, compression=3.0, unit=unit, start=0.0, end=1.0)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in module.parameters():
            weight.normal_(generator=generator)
        module.weight(8)[:10] *= 0.1  # one table smaller than the others
    before = [materialise(module, cell, index).numpy() for index in range(3)]
    module.end_step(100, 200)  # 1 - 0.5³ of what is pruned in the end
    for count in (int(0.875 * (module.units - module.kept_units)), module.units - module.kept_units):
        after = [materialise(module, cell, index).numpy() for index in range(3)]
        sizes = [np.abs(part).ravel() if unit == "values" else np.sqrt((part**2).sum(1)) for part in before]
        order = np.argsort(np.concatenate(sizes))
        wanted = np.ones(len(order), dtype=bool)
        wanted[order[:count]] = False
        values = np.concatenate([part.ravel() for part in before])
        wanted = wanted if unit == "values" else np.repeat(wanted, 8)
        np.testing.assert_array_equal(np.concatenate([part.ravel() for part in after]), values * wanted)
        assert not after[0].all(1).any()  # the small table is hit hardest
        module.eval()


def test_pruned_values_stay_zero_and_the_others_train():
    module = PrunedEmbeddingBagCollection(mixed_tables(), compression=3.0, start=0.0, end=0.5, every_steps=1)
    momentum = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    train(module, range(1, 21), 40, momentum)
    masks, weights = masks_of(module), weights_of(module)
    assert (weights[masks] == 0).all()
    assert int(masks.sum()) == module.units - module.kept_units
    train(module, range(21, 31), 40, torch.optim.Adagrad(module.parameters(), lr=0.05))
    assert (weights_of(module)[masks] == 0).all()
    assert (weights_of(module) != weights)[~masks].any()
    assert torch.equal(masks_of(module), masks)
    features = random_kjt(KEYS, 5, max_id=9)
    assert torch.equal(module(features).values(), module.eval()(features).values())


def test_pruned_stays_pruned_whatever_its_value_or_the_schedule():
    module = PrunedEmbeddingBagCollection(mixed_tables(), compression=3.0, start=0.25, end=1.0, every_steps=50)
    module.end_step(100, 200)
    masks = masks_of(module)
    with torch.no_grad():  # as an optimizer with momentum would move them
        for dim in module.dims:
            module.weight(dim)[module.pruned(dim)] = 9.0
    module.end_step(100, 400)  # a longer training, resumed: nothing would be pruned yet
    assert torch.equal(masks_of(module), masks)
    assert sum(int((materialise(module.eval(), cell, index) == 9).sum()) for index in range(3)) == 0
    module.train().end_step(200, 200)
    assert int(masks_of(module).sum()) == module.units - module.kept_units
    assert masks_of(module)[masks].all()


def test_every_evaluation_is_of_the_promised_size():
    module = PrunedEmbeddingBagCollection(mixed_tables(), compression=3.0, start=0.2, end=0.8, every_steps=5)
    train(module, range(1, 30), 100)
    masks, weights = masks_of(module), weights_of(module)
    assert 0 < int(masks.sum()) < module.units - module.kept_units
    module.eval()
    rows = [materialise(module, cell, index) for index in range(3)]
    assert sum(int((part == 0).sum()) for part in rows) == module.units - module.kept_units
    module.train()
    assert torch.equal(masks_of(module), masks)
    assert torch.equal(weights_of(module), weights)
    train(module, range(30, 101), 100)
    assert int(masks_of(module).sum()) == module.units - module.kept_units


def test_rows_of_zeros():
    """Equal sizes: at least as many are pruned as must be, and nothing else than zeros."""
    module = PrunedEmbeddingBagCollection(even_tables(), compression=1.5, unit="rows", init_scale=0.0)
    with torch.no_grad():
        module.weight(8)[3:7] = 1.0
    module.end_step(50, 100)
    assert module.pruned(8).tolist() == [not 3 <= row < 7 for row in range(59)]
    assert materialise(module.eval(), cell, 0)[3:7].eq(1.0).all()


def test_resumed_in_the_middle_it_goes_on_as_it_would_have():
    def built():
        module = PrunedEmbeddingBagCollection(mixed_tables(), compression=3.0, start=0.1, end=0.7, every_steps=4)
        return module, torch.optim.Adagrad(module.parameters(), lr=0.05)

    whole, optimizer = built()
    train(whole, range(1, 31), 60, optimizer)
    file = io.BytesIO()
    torch.save([whole.state_dict(), optimizer.state_dict()], file)
    train(whole, range(31, 61), 60, optimizer)
    file.seek(0)
    state, optimizer_state = torch.load(file, weights_only=True)
    assert list(state) == ["weight_8", "weight_5", "pruned_8", "pruned_5", "_extra_state"]
    resumed, optimizer = built()
    resumed.load_state_dict(state)
    optimizer.load_state_dict(optimizer_state)
    assert 0 < int(masks_of(resumed).sum()) < resumed.units - resumed.kept_units
    train(resumed, range(31, 61), 60, optimizer)
    assert torch.equal(weights_of(resumed), weights_of(whole))
    assert torch.equal(masks_of(resumed), masks_of(whole))
    with pytest.raises(ValueError, match="kept_units is 233 here and 134 in the state dict"):
        PrunedEmbeddingBagCollection(mixed_tables(), compression=1.8).load_state_dict(state)


def _train_rank(rank, world_size):
    module = PrunedEmbeddingBagCollection(mixed_tables(), compression=3.0, start=0.0, end=0.8, every_steps=2)
    placed = DistributedDataParallel(module, broadcast_buffers=False, static_graph=True)
    optimizer = torch.optim.Adagrad(placed.parameters(), lr=0.05)
    for step in range(1, 13):
        optimizer.zero_grad()
        placed(random_kjt(KEYS, 8, max_id=9, seed=100 * rank + step)).values().square().mean().backward()
        optimizer.step()
        module.end_step(step, 20)
    module.eval()
    return [masks_of(module).numpy(), weights_of(module).numpy(), module.smaller(8).numpy()]


@pytest.mark.dist
def test_ranks_prune_alike():
    one, two = run_ranks(_train_rank, 2)
    for found, other in zip(one, two, strict=True):
        np.testing.assert_array_equal(found, other)
    assert 0 < one[0].sum() < 445 - 134  # still on the way


def test_too_high_compression_names_the_nearest():
    tables = [table("a", 100, 8), table("b", 2, 8)]  # 816 values; one with its index takes 8 bytes, one row 36
    for unit, reached, nearest in (("values", 408, 408.0), ("rows", 90.6667, 90.66)):
        with pytest.raises(CompressionRefused, match=f"pruned by {unit} reaches {reached} at most") as refused:
            PrunedEmbeddingBagCollection(tables, compression=409.0, unit=unit)
        assert refused.value.nearest == nearest
        assert PrunedEmbeddingBagCollection(tables, compression=nearest, unit=unit).kept_units == 1


def test_far_tables_are_refused_before_they_are_made():
    with pytest.raises(ValueError, match="take 32768 GiB"):
        PrunedEmbeddingBagCollection([table("a", 2**40, 8)], compression=2.0**33)
    assert pruned.most_units(2**43, 1, 4096) == 341  # indices of 8 bytes
    assert pruned.kept_bytes(2**32, 10, 1) == 80
    assert pruned.kept_bytes(2**32 + 1, 10, 1) == 120


def test_traces_and_is_made_real_from_the_meta_device():
    module = PrunedEmbeddingBagCollection(mixed_tables(), compression=3.0, start=0.0, end=1.0)
    module.end_step(100, 200)
    features = random_kjt(KEYS, 3, max_id=9)
    for mode in (True, False):
        expected = module.train(mode)(features).values()
        assert torch.equal(symbolic_trace(module)(features).values(), expected)
    other = PrunedEmbeddingBagCollection(mixed_tables(), compression=3.0, device=torch.device("meta"))
    other.to_empty(device="cpu").reset_parameters()
    module.train().reset_parameters()
    assert torch.equal(weights_of(other), weights_of(module))
    assert not masks_of(other).any()
    assert not masks_of(module).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"unit": "tables"}, "unit 'tables' is unknown"),
        ({"start": 0.6, "end": 0.5}, "start = 0.6 is after end = 0.5"),
        ({"every_steps": 0}, "every_steps must be at least 1, not 0"),
        ({"unit": "rows"}, r"unit = 'rows' needs tables of one embedding_dim, not {'t': 8, 'u': 5, 'v': 8}"),
        ({"compression": 0.5}, "compression must be at least 1 and finite, not 0.5"),
    ],
)
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PrunedEmbeddingBagCollection(mixed_tables(), **arguments)


def test_options_are_checked():
    bad_values: list[dict[str, Any]] = [
        {"unit": "tables"}, {"start": -0.1}, {"end": 1.1}, {"every_steps": 0}, {"start": 0.6}, {"sparsity": 0.9}
    ]  # fmt: skip
    for bad in bad_values:
        with pytest.raises(ValidationError):
            pruned.Options(**bad)
