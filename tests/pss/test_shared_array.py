"""The form of a shared array's gradient, over every method that lets it be chosen, in one process and on two ranks."""

import numpy as np
import pytest
import torch
from torch import nn

from configs.request import EmbeddingRequest
from configs.schema import OptimizerSection, ParallelismSection
from pss.methods.robe import RobeEmbeddingBagCollection
from recsys.embedding.embeddings import METHODS
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
    module.settle_gradient(10)
    assert module.gradient == expected


def test_an_unknown_form_is_refused():
    with pytest.raises(ValueError, match="gradient 'spares' is unknown: known are"):
        RobeEmbeddingBagCollection(TABLES, gradient="spares")
