"""The form of a shared array's gradient, over every method that lets it be chosen, in one process and on two ranks."""

import numpy as np
import pytest
import torch
from torch import nn

from configs.schema import OptimizerSection, ParallelismSection
from pss import shared_array
from pss.method import EmbeddingRequest
from pss.methods.robe import RobeEmbeddingBagCollection
from pss.shared_array import read_chunks
from recsys.embedding.registry import METHODS
from recsys.train.optim import build_optimizers
from recsys.train.parallelism import apply_parallelism, unwrapped
from tests.pss.jagged import random_kjt, table
from tests.ranks import run_ranks

SHARED = [name for name, method in METHODS.items() if "gradient" in method.Options.model_fields]
TABLES = [table("a", 50, 8), table("b", 40, 8), table("c", 60, 8)]


def build(method: str, gradient: str):
    options = METHODS[method].Options(gradient=gradient)
    counts = [60 // (1 + np.arange(config.num_embeddings)) for config in TABLES]
    return METHODS[method].build(TABLES, options, EmbeddingRequest(compression=4, init_scale=0.5, id_counts=counts))


class Model(nn.Module):
    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, features):
        return (self.embedding(features).values() ** 2).sum(1) * self.scale


@pytest.mark.parametrize("method", SHARED)
def test_sparse_and_dense_gradients_are_the_same_numbers(method: str):
    features = random_kjt(["a", "b", "c"], 5, max_id=40)
    gradients = {}
    for gradient in ("dense", "sparse"):
        module = build(method, gradient)
        Model(module)(features).sum().backward()
        gradients[gradient] = module.memory.grad
    assert gradients["sparse"].is_sparse
    assert not gradients["dense"].is_sparse
    coalesced = gradients["sparse"].coalesce()
    torch.testing.assert_close(coalesced.to_dense(), gradients["dense"])
    assert 0 < len(coalesced.values()) <= gradients["dense"].numel()


def train(rank: int, world_size: int, gradient: str, optimizer_name: str) -> list[np.ndarray]:
    section = OptimizerSection(
        dense_learning_rate=0.01, embedding=optimizer_name, embedding_learning_rate=0.1, adagrad_eps=1e-3
    )  # pyright: ignore[reportArgumentType]
    placed = apply_parallelism(
        Model(build("robe", gradient)), "replicate", ParallelismSection(world_size=world_size), section,
        local_batch_size=3, init_scale=0.5, seed=0, device=torch.device("cpu"),
    )  # fmt: skip
    optimizer = build_optimizers(placed, ["embedding.memory"], section)
    for step in range(4):
        # Ranks touch different slots, and different numbers of them.
        features = random_kjt(["a", "b", "c"], 3, max_id=40, seed=10 * step + rank)
        optimizer.zero_grad(set_to_none=True)
        loss = placed(features).sum()
        loss.backward()
        optimizer.step()
    model = unwrapped(placed)
    return [model.embedding.memory.detach().numpy(), model.scale.detach().numpy()]


def _both(rank: int, world_size: int) -> dict:
    return {(g, o): train(rank, world_size, g, o) for g in ("dense", "sparse") for o in ("sgd", "adagrad")}


@pytest.mark.dist
def test_sparse_gradients_are_averaged_over_ranks():
    first, second = run_ranks(_both, 2)
    for optimizer in ("sgd", "adagrad"):
        for found in (first["sparse", optimizer], second["sparse", optimizer]):
            for value, expected in zip(found, first["dense", optimizer], strict=True):
                np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
        assert np.array_equal(first["sparse", optimizer][0], second["sparse", optimizer][0])


@pytest.mark.parametrize(("memory_size", "expected"), [(40 * 24 * 10, "dense"), (40 * 24 * 10 + 1, "sparse")])
def test_auto_is_settled_by_what_a_batch_reads(memory_size: int, expected: str):
    module = RobeEmbeddingBagCollection(TABLES, memory_size=memory_size)
    module.choose_gradient(10)
    assert module.gradient == expected


def test_an_unknown_form_is_refused():
    with pytest.raises(ValueError, match="gradient 'spares' is unknown: known are"):
        RobeEmbeddingBagCollection(TABLES, gradient="spares")


def test_reads_runs_of_the_array():
    memory = torch.arange(10.0)
    read = read_chunks(memory, torch.tensor([[0, 7], [3, 3]]), 3)
    assert read.tolist() == [[[0, 1, 2], [7, 8, 9]], [[3, 4, 5], [3, 4, 5]]]


@pytest.mark.parametrize("width", [1, 3, 8])
@pytest.mark.parametrize("block_elements", [1, 7, 1 << 16])
def test_gradient_is_that_of_indexing(width: int, block_elements: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shared_array, "_CPU_BLOCK_ELEMENTS", block_elements)
    generator = torch.Generator().manual_seed(width)
    memory = torch.randn(20, generator=generator, requires_grad=True)
    locations = torch.randint(0, 20 - width + 1, (5, 6), generator=generator)
    grad = torch.randn(5, 6, width, generator=generator)
    read_chunks(memory, locations, width).backward(grad)
    reference = memory.detach().clone().requires_grad_()
    reference[locations.unsqueeze(-1) + torch.arange(width)].backward(grad)
    assert memory.grad is not None
    torch.testing.assert_close(memory.grad, reference.grad)


def test_differentiable_twice():
    memory = torch.randn(9, dtype=torch.float64, requires_grad=True)
    locations = torch.tensor([0, 4, 4, 6])
    assert torch.autograd.gradcheck(lambda m: read_chunks(m, locations, 3) ** 2, memory)
    assert torch.autograd.gradgradcheck(lambda m: read_chunks(m, locations, 3) ** 2, memory)


def test_reads_nothing_at_no_location():
    memory = torch.randn(9, requires_grad=True)
    read = read_chunks(memory, torch.empty(0, 2, dtype=torch.int64), 3)
    assert read.shape == (0, 2, 3)
    read.sum().backward()
    assert memory.grad is not None
    assert not memory.grad.any()


def test_the_traceable_formula_is_the_same():
    memory, locations = torch.randn(9), torch.tensor([[0, 4], [4, 6]])
    assert torch.equal(shared_array._read_addresses(memory, locations, 3), read_chunks(memory, locations, 3))


@pytest.mark.parametrize("width", [1, 3, 8])
@pytest.mark.parametrize("aligned", [False, True])
def test_the_sparse_gradient_is_the_dense_one_coalesced(width: int, aligned: bool):
    """Repeated, overlapping and, if aligned, only repeated runs; every slot once, in order, and no untouched one."""
    generator = torch.Generator().manual_seed(width)
    memory = torch.randn(40, dtype=torch.float64, generator=generator, requires_grad=True)
    locations = torch.randint(0, 4, (5, 6), generator=generator) * (8 if aligned else 3)
    grad = torch.randn(5, 6, width, dtype=torch.float64, generator=generator)
    (dense,) = torch.autograd.grad(read_chunks(memory, locations, width, "dense"), memory, grad)
    (sparse,) = torch.autograd.grad(read_chunks(memory, locations, width, "sparse"), memory, grad)
    assert sparse.is_sparse
    assert sparse.is_coalesced()
    slots = sparse.indices()[0]
    assert slots.tolist() == sorted({location + z for location in locations.flatten().tolist() for z in range(width)})
    torch.testing.assert_close(sparse.to_dense(), dense)


def test_auto_is_sparse_where_few_slots_are_read():
    for size, is_sparse in ((40 * 6, False), (40 * 6 + 1, True)):
        memory = torch.zeros(size, requires_grad=True)
        read_chunks(memory, torch.tensor([0, 9]), 3, "auto").sum().backward()
        assert memory.grad is not None
        assert memory.grad.is_sparse == is_sparse


def test_no_chunk_has_an_empty_sparse_gradient():
    memory = torch.randn(9, requires_grad=True)
    read_chunks(memory, torch.empty(0, dtype=torch.int64), 3, "sparse").sum().backward()
    assert memory.grad is not None
    assert memory.grad._nnz() == 0
