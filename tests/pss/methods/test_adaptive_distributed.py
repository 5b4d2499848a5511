"""Methods that change while they train: two gloo ranks under DDP against one process on the same global batches."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from pss.methods.cafe import CafeEmbeddingBagCollection
from pss.methods.cce import CceEmbeddingBagCollection
from tests.pss.jagged import random_kjt, table
from tests.ranks import run_ranks

pytestmark = pytest.mark.dist

LOCAL_BATCH, STEPS = 6, 20
TABLES = [table("a", 200, 8), table("b", 300, 8)]
BUILDERS: dict[str, Any] = {
    "cafe": lambda: CafeEmbeddingBagCollection(TABLES, compression=4, decay=0.5, decay_every=5, init_scale=0.5),
    "cafe by frequency": lambda: CafeEmbeddingBagCollection(
        TABLES, compression=4, importance="frequency", threshold=3.0, update_every=2, init_scale=0.5
    ),
    "cce": lambda: CceEmbeddingBagCollection(TABLES, compression=4, init_scale=0.5),
}


class Model(nn.Module):
    """Pooled embeddings through fixed weights to one number a row."""

    def __init__(self, embeddings: nn.Module) -> None:
        super().__init__()
        self.embeddings = embeddings

    def forward(self, features: KeyedJaggedTensor) -> torch.Tensor:
        return self.embeddings(features).values() @ torch.linspace(-1, 2, 16)


def batch_of(step: int, rank: int, world_size: int) -> KeyedJaggedTensor:
    """This rank's rows of the global batch of 2 · LOCAL_BATCH rows; low ids more often than high ones."""
    drawn = random_kjt(["a", "b"], 2 * LOCAL_BATCH, max_id=10**6, seed=step)
    ids = ((drawn.values().double() / 10**6) ** 3 * 200).long()
    bags = ids.split(drawn.lengths().tolist())
    rows = range(2 * LOCAL_BATCH)[rank * 2 * LOCAL_BATCH // world_size :][: 2 * LOCAL_BATCH // world_size]
    mine = [bags[feature * 2 * LOCAL_BATCH + row] for feature in range(2) for row in rows]
    return KeyedJaggedTensor(
        ["a", "b"], torch.cat(mine), lengths=torch.tensor([len(bag) for bag in mine]), stride=len(rows)
    )


def train(rank: int, world_size: int) -> dict[str, Any]:
    """Per method, the state after every step."""
    found = {}
    for name, build in BUILDERS.items():
        embeddings = build()
        model = Model(embeddings)
        if world_size > 1:
            model = DistributedDataParallel(model, static_graph=True, broadcast_buffers=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        states = []
        for step in range(1, STEPS + 1):
            optimizer.zero_grad()
            (model(batch_of(step, rank, world_size)) - 1).square().mean().backward()
            optimizer.step()
            embeddings.end_step(step, STEPS)
            state = {
                key: value.numpy().copy() for key, value in embeddings.state_dict().items() if key != "_extra_state"
            }
            states.append(state)
        found[name] = states
    return found


@pytest.fixture(scope="module")
def trained() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    return run_ranks(train, 1)[0], run_ranks(train, 2)


@pytest.mark.parametrize("method", BUILDERS)
def test_two_ranks_equal_one_process(trained: tuple[dict[str, Any], list[dict[str, Any]]], method: str):
    one, two = trained
    for step in range(STEPS):
        for key, expected in one[method][step].items():
            np.testing.assert_array_equal(two[0][method][step][key], two[1][method][step][key])
            tolerance = 1e-5 if key == "sketch.scores" else 2e-6 if key == "memory" else 0
            np.testing.assert_allclose(two[0][method][step][key], expected, rtol=0, atol=tolerance, err_msg=key)


def test_the_ranks_saw_changes(trained: tuple[dict[str, Any], list[dict[str, Any]]]):
    _, (ranks, _) = trained
    for method in ("cafe", "cafe by frequency"):
        hot = [set(state["sketch.keys"][state["sketch.rows"] >= 0].tolist()) for state in ranks[method]]
        assert any(after - before for before, after in pairwise(hot))
        if method == "cafe":
            assert any(before - after for before, after in pairwise(hot))
    assert [int(state["clusterings"]) for state in ranks["cce"]][4::5] == [1, 2, 3, 3]
    assert (ranks["cce"][3]["pointers"] != ranks["cce"][-1]["pointers"]).any()
