"""Two gloo ranks under DDP, DistributedModelParallel and TorchRec's pipelines against one process."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.model_parallel import DistributedModelParallel, get_default_sharders
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.train_pipeline import TrainPipelineBase, TrainPipelineSparseDist
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from pss.methods.robe import RobeEmbeddingBagCollection
from tests.pss.jagged import random_kjt, table
from tests.ranks import run_ranks

pytestmark = pytest.mark.dist

WORLD_SIZE, LOCAL_BATCH, STEPS = 2, 4, 4
CPU = torch.device("cpu")


@dataclass
class Batch(Pipelineable):
    """What a pipeline moves: jagged features and labels (B,)."""

    features: KeyedJaggedTensor
    labels: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        return Batch(self.features.to(device, non_blocking), self.labels.to(device, non_blocking=non_blocking))

    def record_stream(self, stream: Any) -> None:
        self.features.record_stream(stream)

    def pin_memory(self) -> "Batch":
        return self


class Model(nn.Module):
    """Embeddings, one linear layer with fixed weights, mean squared error."""

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        super().__init__()
        tables = [table("a", 10, 8), table("b", 10, 3)]
        self.embeddings = RobeEmbeddingBagCollection(tables, device=device, memory_size=40, seed=seed, init_scale=1.0)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        pooled = self.embeddings(batch.features).values()
        output = pooled @ torch.arange(11.0)
        return ((output - batch.labels) ** 2).mean(), output


def global_batches() -> list[Batch]:
    """The same on every rank: WORLD_SIZE · LOCAL_BATCH rows each."""
    rows = WORLD_SIZE * LOCAL_BATCH
    return [Batch(random_kjt(["a", "b"], rows, seed=step), torch.arange(rows) / 10) for step in range(STEPS)]


def local_batches(rank: int) -> list[Batch]:
    """This rank's rows of each global batch."""
    mine = slice(rank * LOCAL_BATCH, (rank + 1) * LOCAL_BATCH)
    parts = []
    for batch in global_batches():
        lengths = batch.features.lengths().view(2, -1)
        bags = batch.features.values().split(lengths.flatten().tolist())
        rows = range(lengths.size(1))[mine]
        values = torch.cat([bags[feature * lengths.size(1) + row] for feature in range(2) for row in rows])
        features = KeyedJaggedTensor(["a", "b"], values, lengths=lengths[:, mine].reshape(-1), stride=LOCAL_BATCH)
        parts.append(Batch(features, batch.labels[mine]))
    return parts


def train(model: nn.Module, batches: list[Batch]) -> np.ndarray:
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    for batch in batches:
        optimizer.zero_grad()
        model(batch)[0].backward()
        optimizer.step()
    return memory_of(model)


def train_piped(pipeline: Callable[..., Any], model: nn.Module, batches: list[Batch]) -> np.ndarray:
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    running, data = pipeline(model, optimizer, CPU), iter(batches)
    for _ in drain(running, data):
        pass
    return memory_of(model)


def drain(pipeline: Any, data: Iterator[Batch]) -> Iterator[Any]:
    while True:
        try:
            yield pipeline.progress(data)
        except StopIteration:
            return


def memory_of(model: nn.Module) -> np.ndarray:
    (memory,) = model.parameters()
    return memory.detach().numpy().copy()


def load_state(model: DistributedModelParallel, source: DistributedModelParallel) -> None:
    state: Any = source.state_dict()  # not reusable: load_state_dict renames its keys in place
    model.load_state_dict(state)


def train_on_rank(rank: int, world_size: int) -> dict[str, Any]:
    """Trains the same model in every way; what each made of the memory, and what was asked on the way."""
    batches, found = local_batches(rank), {}
    found["ddp"] = train(DistributedDataParallel(Model(CPU)), batches)
    planner = EmbeddingShardingPlanner(topology=Topology(world_size=world_size, compute_device="cpu"))
    found["plan"] = planner.plan(Model(torch.device("meta")), get_default_sharders()).plan
    sharded = DistributedModelParallel(Model(torch.device("meta")), device=CPU)
    found["dmp start"] = memory_of(sharded)
    found["dmp"] = train(sharded, batches)
    found["dmp state"] = sorted(sharded.state_dict())
    try:
        load_state(DistributedModelParallel(Model(CPU, seed=1), device=CPU), sharded)
    except ValueError as error:
        found["dmp refusal"] = str(error)
    again = DistributedModelParallel(Model(torch.device("meta")), device=CPU)
    load_state(again, sharded)
    found["dmp loaded"] = memory_of(again)
    for pipeline in (TrainPipelineBase, TrainPipelineSparseDist):
        model = DistributedModelParallel(Model(torch.device("meta")), device=CPU)
        found[pipeline.__name__] = train_piped(pipeline, model, batches)
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(train_on_rank, WORLD_SIZE)


@pytest.mark.parametrize("way", ["ddp", "dmp", "TrainPipelineBase", "TrainPipelineSparseDist"])
def test_two_ranks_equal_one_process_on_the_whole_batch(ranks: list[dict[str, Any]], way: str):
    expected = train(Model(CPU), global_batches())
    assert np.abs(expected - memory_of(Model(CPU))).max() > 0.1
    for found in ranks:
        np.testing.assert_allclose(found[way], expected, rtol=1e-5, atol=1e-6)
    assert np.array_equal(ranks[0][way], ranks[1][way])


def test_the_planner_leaves_it_to_ddp(ranks: list[dict[str, Any]]):
    assert all(found["plan"] == {} for found in ranks)


def test_dmp_materialises_the_start_of_the_seed(ranks: list[dict[str, Any]]):
    for found in ranks:
        assert np.array_equal(found["dmp start"], memory_of(Model(CPU)))


def test_dmp_loads_its_own_state_and_refuses_another_hash(ranks: list[dict[str, Any]]):
    for found in ranks:
        assert found["dmp state"] == ["embeddings._extra_state", "embeddings.memory"]
        assert np.array_equal(found["dmp loaded"], found["dmp"])
        assert "seed is 1 here and 0 in the state dict" in found["dmp refusal"]
