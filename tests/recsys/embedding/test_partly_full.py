"""Small tables whole beside a method that compresses the others: the same numbers as either has by itself."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torchrec.modules.embedding_configs import PoolingType

from baselines import full
from configs.schema import EmbeddingSection, OptimizerSection, ParallelismSection
from pss.method import CompressionRefused, EmbeddingRequest
from pss.methods import robe
from recsys.embedding import partly_full
from recsys.embedding.partly_full import PartlyFullEmbeddingBagCollection
from recsys.embedding.registry import METHODS, build_embedding
from recsys.embedding.sizes import count_full_parameters, count_parameters, stored_bytes
from recsys.runs.ranks import Ranks
from recsys.train.checkpoint import Checkpoints
from recsys.train.optim import build_optimizers
from recsys.train.parallelism import apply_parallelism, unwrapped
from tests.pss.jagged import random_kjt, table
from tests.ranks import run_ranks

CPU = torch.device("cpu")
SEED = 3
WHOLE, WHOLE_PARAMETERS = ("b", "d"), (10 + 49) * 8
REST_PARAMETERS = (300 + 50) * 8


def four_tables(**kwargs):
    """Below 50 rows are b and d, the second and the last; table c is just too large."""
    return [table(name, rows, 8, **kwargs) for name, rows in (("a", 300), ("b", 10), ("c", 50), ("d", 49))]


def section(method="robe", compression=4.0, below=50, options=None):
    options = options or METHODS[method].Options()
    return EmbeddingSection(
        method=method, compression=compression, init_scale=0.5, whole_tables_below=below, options=options
    )


def build(*args, tables=None, **kwargs):
    return build_embedding(section(*args, **kwargs), tables or four_tables(), seed=SEED, device=CPU)


def features(seed=0, **kwargs):
    return random_kjt(["d", "c", "b", "a"], 6, max_id=10, seed=seed, **kwargs)


def request(**changes):
    return replace(EmbeddingRequest(init_scale=0.5, seed=SEED), **changes)


@pytest.mark.parametrize("pooling", list(PoolingType)[:2])
def test_it_returns_what_full_tables_and_the_method_return(pooling):
    """Whole tables start as among full tables; the method has what they leave of the budget for the others alone."""
    tables = four_tables(pooling=pooling)
    found = build(tables=tables)(features())
    assert found.keys() == ["a", "b", "c", "d"]
    baseline = full.build(four_tables(pooling=pooling), full.Options(), request())(features())
    budget = (WHOLE_PARAMETERS + REST_PARAMETERS) // 4 - WHOLE_PARAMETERS
    others = [t for t in four_tables(pooling=pooling) if t.name not in WHOLE]
    method = robe.RobeEmbeddingBagCollection(others, memory_size=budget, seed=SEED, init_scale=0.5)(features())
    for name in ("a", "b", "c", "d"):
        assert torch.equal(found[name], (baseline if name in WHOLE else method)[name]), name
    assert found.values().shape == (6, 32)


def test_weights_reach_both_parts():
    module = partly_full.build(
        "robe", lambda rest, asked: robe.build(rest, robe.Options(), asked), four_tables(),
        request(compression=4.0, is_weighted=True), 50,
    )  # fmt: skip
    weighted, plain = features(weighted=True), features()
    assert module.is_weighted()
    ones = random_kjt(["d", "c", "b", "a"], 6, max_id=10, weighted=True)
    ones._weights = torch.ones_like(ones.weights())
    assert torch.equal(module(ones).values(), build()(plain).values())
    assert not torch.equal(module(weighted).values(), module(ones).values())


def test_a_feature_of_two_tables_and_dimensions_of_their_own():
    tables = [
        table("large", 300, 8, ["x", "y"]),
        table("small", 10, 4, ["y"]),
        table("other", 200, 8, ["z"]),
    ]
    module = build(tables=tables, compression=3.0)
    batch = random_kjt(["x", "y", "z"], 5, max_id=10)
    found = module(batch)
    assert found.keys() == ["x", "y@large", "y@small", "z"]
    assert found.length_per_key() == [8, 8, 4, 8]
    small = full.build(tables, full.Options(), request())(batch)["y@small"]
    assert torch.equal(found["y@small"], small)
    assert torch.equal(found["y@large"], module.rest(batch)["y"])
    assert module.embedding_bag_configs() is tables


@pytest.mark.parametrize("compression", [1.0, 1.7, 7 / 3, 4.0, 5.9, 6.91])
def test_the_budget_is_over_all_tables_and_is_used_up(compression):
    module = build("robe", compression, options=robe.Options(block_size=1))
    budget = int(count_full_parameters(four_tables()) / compression)
    assert count_parameters(module) == budget
    assert stored_bytes(module) == 4 * budget
    assert module.compression == pytest.approx(count_full_parameters(four_tables()) / budget)
    assert module.device == CPU


@pytest.mark.parametrize("block_size", [1, 8])
@pytest.mark.parametrize("asked", [6.917, 6.95, 500.0])
def test_more_than_the_whole_tables_leave_is_refused_with_what_can_be_had(block_size, asked):
    """Of 3,272 parameters the whole tables have 472: at 6.95x nothing is left beside them, at 6.917x one is."""
    options = robe.Options(block_size=block_size)
    if (block_size, asked) == (1, 6.917):
        assert count_parameters(build("robe", asked, options=options)) == 473
        return
    with pytest.raises(CompressionRefused, match=r"robe with tables below 50 rows whole reaches 6\.[89]") as refused:
        build("robe", asked, options=options)
    nearest = refused.value.nearest
    assert nearest == pytest.approx(3272 / (472 + block_size), rel=1e-3)
    assert count_parameters(build("robe", nearest, options=options)) <= 472 + block_size + 1


def test_a_method_that_cannot_compress_says_so_for_all_tables():
    assert count_parameters(build("full", 1.0)) == 3272
    with pytest.raises(CompressionRefused, match="full with tables below 50 rows whole") as refused:
        build("full", 2.0)
    assert refused.value.nearest == 1.0


def test_where_all_tables_are_small_they_are_the_full_tables():
    module, baseline = build(compression=1.0, below=301), full.build(four_tables(), full.Options(), request())
    for (name, found), (other, expected) in zip(
        module.state_dict().items(), baseline.state_dict().items(), strict=True
    ):  # fmt: skip
        assert name == other
        assert torch.equal(found, expected)
    with pytest.raises(CompressionRefused, match="which all are") as refused:
        build(compression=2.0, below=301)
    assert refused.value.nearest == 1.0


@pytest.mark.parametrize("below", [0, 10])
def test_where_no_table_is_small_the_method_has_them_all(below):
    assert torch.equal(build(below=below)(features()).values(), build(below=0)(features()).values())
    assert isinstance(build(below=below), robe.RobeEmbeddingBagCollection)


def test_a_method_that_shards_refuses_it():
    with pytest.raises(ValueError, match=r"embedding\.whole_tables_below = 50: sharded"):
        build("sharded", 1.0)
    build("sharded", 1.0, below=0)


def counts():
    return [np.full(t.num_embeddings, i) for i, t in enumerate(four_tables())]


@pytest.mark.parametrize(("below", "expected"), [(0, [0, 1, 2, 3]), (50, [0, 2])])
def test_a_method_gets_the_counts_it_needs_of_the_tables_it_has(monkeypatch, below, expected):
    requests = []

    def record(tables, options, asked):
        requests.append(asked)
        return robe.build(tables, options, asked)

    class Counting(robe.Options):
        @property
        def needs_id_counts(self) -> bool:
            return True

    fake = {"Options": Counting, "placement": "replicate", "build": record}
    monkeypatch.setitem(METHODS, "counting", SimpleNamespace(**fake))
    build_embedding(section("counting", below=below), four_tables(), seed=SEED, device=CPU, id_counts=counts)
    assert [int(own[0]) for own in requests[0].id_counts] == expected


def test_nothing_is_counted_for_a_method_that_does_not_ask():
    def count():
        raise AssertionError("a pass over the data for nothing")

    for below in (0, 50):
        build_embedding(section(below=below), four_tables(), seed=SEED, device=CPU, id_counts=count)


def test_a_state_dict_restores_both_parts_and_refuses_others():
    module = build()
    for parameter in module.parameters():
        parameter.data += 1
    state = module.state_dict()
    names = {"whole.embedding_bags.b.weight", "whole.embedding_bags.d.weight", "rest.memory", "rest._extra_state"}
    assert state.keys() == names
    other = build()
    other.load_state_dict(state)
    for name in names - {"rest._extra_state"}:
        assert torch.equal(other.state_dict()[name], state[name])
    with pytest.raises((RuntimeError, ValueError)):
        build(below=20).load_state_dict(state)


class Model(torch.nn.Module):
    """A fixed projection of all columns to one number a row."""

    def __init__(self, embedding):
        super().__init__()
        self.embedding = embedding
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, batch):
        values = self.embedding(batch).values()
        return (values * torch.linspace(-1, 1, values.shape[1])).sum(1) * self.scale


def place(gradient, world_size=1):
    """(model, its optimizer), placed on the ranks of the default group."""
    embedding = build(options=robe.Options(gradient=gradient))
    assert isinstance(embedding, PartlyFullEmbeddingBagCollection)
    optimizers = OptimizerSection(dense_learning_rate=0.1, embedding="adagrad", embedding_learning_rate=0.1)
    model = apply_parallelism(
        Model(embedding), "replicate", ParallelismSection(world_size=world_size), optimizers,
        local_batch_size=6 // world_size, init_scale=0.5, seed=SEED, device=CPU,
    )  # fmt: skip
    names = [f"embedding.{name}" for name, _ in embedding.named_parameters()]
    return model, build_optimizers(model, names, optimizers)


def train(rank, world_size, gradient):
    """Five steps on this rank's share of six rows -> all columns of ten rows after it."""
    model, optimizer = place(gradient, world_size)
    for step in range(5):
        ids = torch.randint(0, 10, (4, 6), generator=torch.Generator().manual_seed(step))
        share = ids[:, rank * 6 // world_size : (rank + 1) * 6 // world_size]
        optimizer.zero_grad(set_to_none=True)
        ((model(one_id_each(share)) - 1) ** 2).mean().backward()
        optimizer.step()
    return columns(unwrapped(model).embedding)


def columns(embedding):
    return embedding(one_id_each(torch.arange(10).expand(4, 10))).values().detach().numpy()


def one_id_each(ids):
    """ids (4 features, rows) -> bags of one id."""
    batch = random_kjt(["a", "b", "c", "d"], ids.shape[1], max_length=0)
    batch._values = ids.reshape(-1).contiguous()
    return batch


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Ranks(0, 1, CPU)
    dist.destroy_process_group()


@pytest.mark.dist
@pytest.mark.parametrize("gradient", ["dense", "sparse"])
def test_two_ranks_equal_one_process(one_rank, gradient):
    one = train(0, 1, gradient)
    changed = np.abs(one - columns(build())).reshape(10, 4, 8).max(axis=(0, 2))
    assert (changed > 0.1).all(), "every table learns"
    for found in run_ranks(train, 2, gradient):
        np.testing.assert_allclose(found, one, rtol=0, atol=2e-6)


def test_a_checkpoint_restores_both_parts_and_their_optimizers(one_rank, tmp_path):
    checkpoints = Checkpoints(tmp_path, {}, 1, one_rank)
    (saved, optimizer), (loaded, other) = place("dense"), place("dense")
    for model, own, steps in ((saved, optimizer, 2), (loaded, other, 1)):
        for _ in range(steps):
            model(features()).sum().backward()
            own.step()
    checkpoints.save(2, saved, optimizer, {"step": 2})
    path = checkpoints.newest()
    assert path is not None
    assert not np.array_equal(columns(loaded.embedding), columns(saved.embedding))
    assert checkpoints.load(path, loaded, other) == {"step": 2}
    for model, own in ((saved, optimizer), (loaded, other)):
        own.zero_grad()
        model(features(1)).sum().backward()
        own.step()
    assert np.array_equal(columns(loaded.embedding), columns(saved.embedding))
