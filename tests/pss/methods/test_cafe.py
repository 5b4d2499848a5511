import io
from typing import Any

import numpy as np
import pytest
import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from pss.method import CompressionRefused, EmbeddingRequest
from pss.methods import cafe
from pss.methods.cafe import CafeEmbeddingBagCollection, HotSketch, cell
from tests.pss.jagged import materialise, pooled_by_cell, random_kjt, table


def mixed_tables() -> list[EmbeddingBagConfig]:
    """Dimensions 8 and 3, a shared feature, sum and mean."""
    return [
        table("t", 40, 8, ["a", "b"]),
        table("u", 50, 3, ["c"], PoolingType.MEAN),
        table("v", 60, 8, ["c"], PoolingType.MEAN),
    ]


KEYS = ["c", "a", "b"]


def one_per_bag(name: str, ids: list[int]) -> KeyedJaggedTensor:
    return KeyedJaggedTensor([name], torch.tensor(ids), lengths=torch.ones(len(ids), dtype=torch.int64))


def train(module: CafeEmbeddingBagCollection, features: list[KeyedJaggedTensor], first: int = 1) -> None:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for step, batch in enumerate(features, first):
        optimizer.zero_grad()
        values = module(batch).values()
        (values * torch.linspace(-1, 2, values.shape[1])).square().sum().backward()
        optimizer.step()
        module.end_step(step, 100)


def batches(count: int, weighted: bool = False, start: int = 0) -> list[KeyedJaggedTensor]:
    return [random_kjt(KEYS, 6, max_id=40, weighted=weighted, seed=start + seed) for seed in range(count)]


def hot_ids(module: CafeEmbeddingBagCollection, index: int) -> set[int]:
    """Ids of a table whose key is in the sketch with a row."""
    hot = set(module.sketch.keys[module.sketch.rows >= 0].tolist())
    rows = range(module.embedding_bag_configs()[index].num_embeddings)
    return {row for row in rows if module.key_hash.location(index, row, 0, cafe.KEYS) in hot}


@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("max_length", [4, 0])
def test_lookup_equals_cell_before_and_after_migrations(is_weighted: bool, max_length: int):
    module = CafeEmbeddingBagCollection(mixed_tables(), is_weighted, compression=2, update_every=2, init_scale=1.0)
    features = random_kjt(KEYS, 6, max_id=40, max_length=max_length, weighted=is_weighted, seed=99)
    seen = []
    for round in range(3):
        found = module(features).values().double()
        torch.testing.assert_close(found, pooled_by_cell(module, cell, features), rtol=1e-5, atol=1e-6)
        seen.append([hot_ids(module, index) for index in range(3)])
        train(module, batches(4, is_weighted, 10 * round), first=4 * round + 1)
    assert seen[0] == [set(), set(), set()]
    assert all(seen[1])
    assert seen[1] != seen[2]


def test_rows_of_huge_tables():
    module = CafeEmbeddingBagCollection([table("a", 2**63 - 1, 8), table("b", 2**63 - 1, 8)], compression=2.0**60)
    ids = [0, 2**31 - 1, 2**31, 2**32 + 5, 2**53 + 1, 2**62 + 3, 2**63 - 2]
    features = KeyedJaggedTensor(["a", "b"], torch.tensor(ids * 2), lengths=torch.ones(14, dtype=torch.int64))
    for _ in range(2):
        assert torch.equal(module(features).values().double(), pooled_by_cell(module, cell, features))
        train(module, [features])
    assert (module.sketch.rows >= 0).sum() > 1


def test_tables_of_equal_ids_are_told_apart():
    module = CafeEmbeddingBagCollection([table("a", 1000, 8), table("b", 1000, 8)], compression=2)
    keys = {module.key_hash.location(index, row, 0, cafe.KEYS) for index in range(2) for row in range(1000)}
    assert len(keys) == 2000
    assert not torch.equal(materialise(module, cell, 0), materialise(module, cell, 1))


def test_cell_knows_the_bounds_of_its_table():
    module = CafeEmbeddingBagCollection([table("a", 10, 4)])
    for row, col in [(10, 0), (-1, 0), (0, 4), (0, -1)]:
        with pytest.raises(IndexError, match=r"outside a: 10 x 4"):
            cell(module, 0, row, col)


@pytest.mark.parametrize("asked", [1.0, 3.0, 30.0, 100.0])
@pytest.mark.parametrize("hot_share", [0.01, 0.7, 0.99])
def test_all_that_is_stored_is_within_the_budget(asked: float, hot_share: float):
    """Counted here from the file a state dict makes, without its pickled frame, and from the shapes."""
    tables = [table("a", 3000, 16), table("b", 500, 8)]
    budget = 4 * (3000 * 16 + 500 * 8) / asked
    module = cafe.build(tables, cafe.Options(hot_share=hot_share), EmbeddingRequest(compression=asked))
    private, shared = module.private_rows, module.shared_rows
    stored = private * (16 * 4 + 4 * (8 + 4 + 4)) + shared * 16 * 4
    assert module.stored_bytes() == stored
    assert sum(value.nbytes for name, value in module.state_dict().items() if name != "_extra_state") == stored
    assert budget - 128 < stored <= budget
    assert private == 1 or abs(private * 128 - hot_share * budget) <= 64 + 128
    assert [name for name, _ in module.named_parameters()] == ["memory"]


def test_what_is_too_small_is_refused_with_what_can_be_asked():
    tables = [table("a", 100, 8)]  # 3200 bytes; at least 2 rows of 32 and a bucket of 64: 128
    with pytest.raises(CompressionRefused, match=r"cafe reaches 25 at most") as error:
        cafe.build(tables, cafe.Options(), EmbeddingRequest(compression=25.1))
    module = cafe.build(tables, cafe.Options(), EmbeddingRequest(compression=error.value.nearest))
    assert (module.private_rows, module.shared_rows, module.compression) == (1, 1, 25)
    with pytest.raises(ValueError, match="compression must be at least 1"):
        cafe.build(tables, cafe.Options(), EmbeddingRequest(compression=0.5))


def test_tables_start_with_the_spread_asked_for():
    module = CafeEmbeddingBagCollection([table("a", 4000, 16)], compression=4, init_scale=0.3, seed=2)
    ids = one_per_bag("a", list(range(4000)))
    values = module(ids).values()
    assert values.std().item() == pytest.approx(0.3 / 3**0.5, rel=0.03)
    again = CafeEmbeddingBagCollection([table("a", 4000, 16)], compression=4, init_scale=0.3, seed=2)
    assert torch.equal(module.memory, again.memory)
    train(module, [ids])
    module.reset_parameters()
    assert torch.equal(module(ids).values(), values)


@pytest.mark.parametrize("importance", ["gradient", "frequency"])
def test_importance_is_the_norm_of_each_occurrences_gradient(importance: Any):
    """In units of the table's mean, from gradients worked out by hand: d loss / d row = weight · column."""
    tables = [table("a", 3000, 2), table("b", 3000, 2)]
    module = CafeEmbeddingBagCollection(tables, True, compression=1, importance=importance)
    weights = torch.tensor([3.0, 4.0, 5.0, 0.5, 1.5])
    features = KeyedJaggedTensor(
        ["a", "b"], torch.tensor([7, 7, 9, 7, 8]), weights=weights, lengths=torch.tensor([2, 1, 1, 1])
    )
    columns = torch.tensor([[1.0, 0.0, 0.6, 0.8], [3.0, 4.0, 0.0, 2.0]])
    (module(features).values() * columns).sum().backward()
    module.end_step(1, 10)
    if importance == "frequency":
        expected = {(0, 7): 2.0, (0, 9): 1.0, (1, 7): 1.0, (1, 8): 1.0}
    else:
        of_a, of_b = 3 + 4 + 5 * 5, 0.5 + 1.5 * 2
        expected = {(0, 7): 7 * 3 / of_a, (0, 9): 25 * 3 / of_a, (1, 7): 0.5 * 2 / of_b, (1, 8): 3 * 2 / of_b}
    scores = dict(zip(module.sketch.keys.flatten().tolist(), module.sketch.scores.flatten().tolist(), strict=True))
    scores.pop(-1)
    assert scores == pytest.approx(
        {module.key_hash.location(*cell, 0, cafe.KEYS): value for cell, value in expected.items()}, rel=1e-5
    )


def test_the_hottest_ids_of_a_zipf_stream_become_hot():
    tables, rng = [table("a", 8000, 4), table("b", 3000, 4)], np.random.default_rng(0)
    module = CafeEmbeddingBagCollection(tables, compression=10, init_scale=0.1)
    counts = [np.zeros(8000), np.zeros(3000)]
    numbered = [rng.permutation(len(count)) for count in counts]
    for step in range(100):
        ids = []
        for count, number in zip(counts, numbered, strict=True):
            share = 1 / np.arange(1, len(count) + 1) ** 1.4
            ids.append(number[rng.choice(len(count), 256, p=share / share.sum())])
            np.add.at(count, ids[-1], 1)
        features = KeyedJaggedTensor(
            ["a", "b"], torch.from_numpy(np.concatenate(ids)), lengths=torch.ones(512, dtype=torch.int64)
        )
        (module(features).values() * torch.randn(256, 8)).sum().backward()
        module.end_step(step + 1, 100)
    assert module.private_rows == 154
    hot = [hot_ids(module, index) for index in range(2)]
    assert sum(map(len, hot)) == 154
    ranked = sorted(((-count, index, row) for index in range(2) for row, count in enumerate(counts[index])))[:100]
    assert sum(row in hot[index] for _, index, row in ranked) >= 90


def test_an_id_becomes_hot_without_a_jump_and_cold_with_its_shared_row():
    module = CafeEmbeddingBagCollection([table("a", 200, 8)], compression=4, threshold=5.0, decay=0.6, decay_every=9)
    everything = one_per_bag("a", list(range(200)))
    ids = [5, 6, 5, 6, 5]
    for step in (1, 2, 3):
        (module(one_per_bag("a", ids)).values() - 1).square().sum().backward()
        before = module(everything).values()
        module.end_step(step, 20)
        assert torch.equal(module(everything).values(), before)
        assert hot_ids(module, 0) == [set(), {5}, {5, 6}][step - 1]
    shared = before.detach()[[5, 6]]
    with torch.no_grad():
        module.memory[: module.private_rows * 8] += 1
    torch.testing.assert_close(module(one_per_bag("a", [5, 6, 7])).values()[:2], shared + 1)
    module.end_step(9, 20)  # scores of about 9 and 6 fall to 5.4 and 3.6
    assert hot_ids(module, 0) == {5}
    found = module(one_per_bag("a", [5, 6])).values()
    torch.testing.assert_close(found, shared + torch.tensor([[1.0], [0.0]]))


def test_a_hot_ids_row_is_its_own():
    module = CafeEmbeddingBagCollection([table("a", 500, 4)], compression=8)
    train(module, [one_per_bag("a", [3, 4, 5])] * 6)
    module.zero_grad()
    module(one_per_bag("a", [3])).values().sum().backward()
    assert module.memory.grad is not None
    touched = module.memory.grad.view(-1, 4).sum(1).nonzero().flatten().tolist()
    assert len(touched) == 1
    assert touched[0] < module.private_rows
    with torch.no_grad():
        module.memory[4 * touched[0]] = 9.0
    assert [row for row in range(500) if cell(module, 0, row, 0) == 9.0] == [3]


def test_only_training_steps_count():
    module = CafeEmbeddingBagCollection([table("a", 50, 4)], compression=2)
    module.eval()
    module(one_per_bag("a", [1, 2])).values().sum().backward()
    module.train()
    with torch.no_grad():
        module(one_per_bag("a", [1, 2]))
    module(one_per_bag("a", [1, 2]))  # no backward
    module.end_step(1, 10)
    assert (module.sketch.keys == -1).all()


@pytest.mark.parametrize(("every", "decays"), [(1, 3), (3, 3), (8, 2)])
def test_scores_decay_by_steps_whatever_the_updates(every: int, decays: int):
    module = CafeEmbeddingBagCollection([table("a", 50, 4)], update_every=every, decay=0.5, decay_every=4)
    module.sketch.scores.fill_(1)
    for step in range(1, 16):
        module.end_step(step, 15)
        assert step % every == 0 or not module._seen
    assert (module.sketch.scores == 0.5**decays).all()


def test_a_state_dict_resumes_between_migrations():
    arguments: dict[str, Any] = {"compression": 3, "update_every": 2, "decay_every": 3, "seed": 4}
    straight = CafeEmbeddingBagCollection(mixed_tables(), **arguments)
    train(straight, batches(8))
    file = io.BytesIO()
    torch.save(straight.state_dict(), file)
    file.seek(0)
    resumed = CafeEmbeddingBagCollection(mixed_tables(), **arguments)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for module in (straight, resumed):
        train(module, batches(7, start=8), first=9)
    for name, value in straight.state_dict().items():
        if name != "_extra_state":
            assert torch.equal(value, resumed.state_dict()[name])
    assert list(straight.state_dict()) == ["memory", "_extra_state", "sketch.keys", "sketch.scores", "sketch.rows"]


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"seed": 5}, "seed is 5 here and 0 in the state dict"),
        ({"hot_share": 0.3}, "private_rows is 2 here and 5 in the state dict"),
        ({"slots_per_bucket": 2}, "slots_per_bucket is 2 here and 4 in the state dict"),
    ],
)
def test_state_of_another_sketch_is_refused(change: dict[str, Any], difference: str):
    arguments: dict[str, Any] = {"compression": 2}
    saved = CafeEmbeddingBagCollection([table("a", 50, 8)], **arguments).state_dict()
    with pytest.raises(ValueError, match=difference):
        CafeEmbeddingBagCollection([table("a", 50, 8)], **(arguments | change)).load_state_dict(saved)


@pytest.mark.parametrize(
    "arguments",
    [
        {"hot_share": 0.0},
        {"hot_share": 1.0},
        {"slots_per_bucket": 0},
        {"threshold": 0.0},
        {"decay": 1.5},
        {"decay_every": 0},
        {"update_every": 0},
        {"importance": "luck"},
    ],
)
def test_impossible_arguments_are_refused(arguments: dict[str, Any]):
    ((name, value),) = arguments.items()
    with pytest.raises(ValueError, match=rf"{name}.*{value!r}"):
        CafeEmbeddingBagCollection([table("a", 10, 4)], **arguments)


def test_meta_device():
    module = CafeEmbeddingBagCollection(mixed_tables(), device=torch.device("meta"), compression=2)
    module = module.to_empty(device="cpu")
    module.reset_parameters()
    expected = CafeEmbeddingBagCollection(mixed_tables(), compression=2)
    for name, value in expected.state_dict().items():
        if name != "_extra_state":
            assert torch.equal(value, module.state_dict()[name])


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
