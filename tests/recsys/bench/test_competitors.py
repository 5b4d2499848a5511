"""Competitors compute the same thing: the same bags, and the same parameters after a step of SGD."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from pss.kernels import robe_bags
from recsys.bench.byte_bound import Traffic
from recsys.bench.competitors import COMPETITORS, EMBEDDING_BAG, LEARNING_RATE, PLAIN_DENSE, Shared, reads_little
from recsys.bench.kernel_bench import GRIDS
from recsys.bench.kernel_sizes import KernelSize, build_batches

CPU = torch.device("cpu")
SIZE = KernelSize(8, 4, 4_000, 16, features=3, rows=60)
SIZES = [SIZE, replace(SIZE, ids_per_bag=10, ids="zipf"), replace(SIZE, block_size=1), replace(SIZE, block_size=32)]
ON_ARRAY = [name for name, c in COMPETITORS.items() if c.storage == "array"]
ON_TABLES = [name for name, c in COMPETITORS.items() if c.storage == "tables"]
needs_kernels = pytest.mark.skipif(not robe_bags.is_available("cpu"), reason="no kernels on this machine")


def shared(size, seed=0):
    numbers = torch.rand(size.full_bytes // 4 + size.memory_size, generator=torch.Generator().manual_seed(seed)) - 0.5
    return Shared(numbers[: size.full_bytes // 4].clone(), numbers[size.full_bytes // 4 :].clone())


def gradient_of(size):
    return torch.rand(size.batch_size, size.features * size.embedding_dim, generator=torch.Generator().manual_seed(1))


def look_up(name, size):
    """Bags (B, F·d) of a batch, and the parameters after a step; whatever the order of the competitor's own output."""
    (batch,), state = build_batches(size, 1, CPU), shared(size)
    lookup, gradient = COMPETITORS[name].build(size, state, CPU), gradient_of(size)
    bags = lookup.forward(batch)
    by_feature = (size.features, size.batch_size, size.embedding_dim)
    if name == EMBEDDING_BAG:
        gradient = gradient.view(by_feature[1], by_feature[0], -1).transpose(0, 1).reshape(bags.shape)
    bags.backward(gradient)
    lookup.update()
    bags = bags.detach()
    if name == EMBEDDING_BAG:
        bags = bags.view(by_feature).transpose(0, 1).reshape(size.batch_size, -1)
    parameters = state.array if COMPETITORS[name].storage == "array" else state.tables
    return bags, parameters


def full_table_reference(size):
    (batch,), state = build_batches(size, 1, CPU), shared(size)
    weight = state.tables.view(-1, size.embedding_dim).requires_grad_()
    bags = F.embedding_bag(batch.table_ids, weight, batch.offsets[:-1], mode="sum")
    bags = bags.view(size.features, size.batch_size, -1).transpose(0, 1).reshape(size.batch_size, -1)
    bags.backward(gradient_of(size))
    return bags.detach(), (weight - LEARNING_RATE * weight.grad).detach().flatten()


def learning_rate_steps(before, after):
    """Differences in units in which a missing gradient shows."""
    return (after - before) / LEARNING_RATE


@needs_kernels
@pytest.mark.parametrize("size", SIZES, ids=lambda size: size.label)
@pytest.mark.parametrize("name", ON_ARRAY)
def test_forms_of_robe_agree_with_plain_pytorch(name, size):
    bags, parameters = look_up(name, size)
    expected_bags, expected = look_up(PLAIN_DENSE, size)
    torch.testing.assert_close(bags, expected_bags)
    if COMPETITORS[name].traffic.state == "none":
        before = shared(size).array
        torch.testing.assert_close(
            learning_rate_steps(before, parameters), learning_rate_steps(before, expected), atol=2e-3, rtol=0
        )
    assert not torch.equal(parameters, shared(size).array)


@pytest.mark.parametrize("size", SIZES[:2], ids=lambda size: size.label)
@pytest.mark.parametrize("name", ON_TABLES)
def test_full_tables_agree_with_embedding_bag(name, size):
    bags, parameters = look_up(name, size)
    expected_bags, expected = full_table_reference(size)
    torch.testing.assert_close(bags, expected_bags)
    if COMPETITORS[name].traffic.state == "none":
        before = shared(size).tables
        torch.testing.assert_close(
            learning_rate_steps(before, parameters), learning_rate_steps(before, expected), atol=2e-3, rtol=0
        )
    assert not torch.equal(parameters, shared(size).tables)


@pytest.mark.parametrize("name", COMPETITORS)
def test_what_a_competitor_says_of_itself(name):
    competitor = COMPETITORS[name]
    like = competitor.same_forward_as
    assert len(competitor.label) <= 19
    assert competitor.meaning
    assert like is None or (
        COMPETITORS[like].same_forward_as is None and COMPETITORS[like].storage == competitor.storage
    )
    assert competitor.extra_bytes(SIZE) > 0
    assert isinstance(competitor.traffic, Traffic)
    assert any(name in grid.competitors for grid in GRIDS.values())


def test_fbgemm_refuses_odd_dimensions_with_a_reason():
    size = replace(SIZE, embedding_dim=6)
    with pytest.raises(ValueError, match="multiple of 4, not 6"):
        COMPETITORS["tbe_sgd"].build(size, shared(size), CPU)


def test_the_sparse_gradient_is_for_batches_that_read_little():
    assert not reads_little(SIZE)
    assert reads_little(replace(SIZE, memory_bytes=4 * 16 * 3 * 8 * 41))
