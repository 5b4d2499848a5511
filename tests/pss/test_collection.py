"""The contract of TorchRec's EmbeddingBagCollection, kept by a method whose parameters are the tables themselves.

`TableCollection` shares nothing, so the module it stands in for is the oracle: same numbers, keys and errors. The
jagged arithmetic is tested here with it.
"""

import copy
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.modules.fused_embedding_modules import fuse_embedding_optimizer
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingBagCollection
from torchrec.modules.mc_modules import (
    DistanceLFU_EvictionPolicy,
    ManagedCollisionCollection,
    MCHManagedCollisionModule,
)
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from pss.collection import ComputedEmbeddingBagCollection
from tests.pss.jagged import random_kjt, table


class TableCollection(ComputedEmbeddingBagCollection):
    """All tables, flattened one after the other, in one parameter."""

    def _lay_out(self, compression: float, id_counts: Any) -> None:
        sizes = [config.num_embeddings * config.embedding_dim for config in self.embedding_bag_configs()]
        self._starts = [[sum(sizes[:index]) for index in group.tables] for group in self._groups]

    def _allocate(self, device: torch.device | None) -> None:
        self.memory = nn.Parameter(torch.empty(self._full_parameters, device=device))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.memory)

    def _rows(self, group: int, ids: Tensor, feature: Tensor) -> Tensor:
        dim = self._groups[group].embedding_dim
        start = torch.tensor(self._starts[group])[feature] + ids * dim
        return self.memory[start.unsqueeze(-1) + torch.arange(dim)]

    def _identity(self) -> dict[str, int | str | bool]:
        return {}


def build_pair(tables: list[EmbeddingBagConfig], is_weighted: bool = False) -> tuple[TableCollection, nn.Module]:
    """Ours and TorchRec's with the same numbers."""
    torch.manual_seed(0)
    ours, oracle = TableCollection(tables, is_weighted), EmbeddingBagCollection(copy.deepcopy(tables), is_weighted)
    sizes = [config.num_embeddings * config.embedding_dim for config in tables]
    with torch.no_grad():
        for parameter, part in zip(oracle.parameters(), ours.memory.split(sizes), strict=True):
            parameter.copy_(part.view_as(parameter))
    return ours, oracle


def assert_same(ours: nn.Module, oracle: nn.Module, features: KeyedJaggedTensor) -> KeyedTensor:
    """Same output and, for a loss that tells all outputs apart, same gradients."""
    got, expected = ours(features), oracle(features)
    assert got.keys() == expected.keys()
    assert got.length_per_key() == expected.length_per_key()
    assert got.values().dtype == torch.float32
    torch.testing.assert_close(got.values(), expected.values())
    scale = torch.randn(expected.values().shape, generator=torch.Generator().manual_seed(1))
    for module, output in [(ours, got), (oracle, expected)]:
        module.zero_grad()
        (output.values() * scale).sum().backward()
    grads = [
        nn.utils.parameters_to_vector([p.grad for p in m.parameters() if p.grad is not None]) for m in (ours, oracle)
    ]
    torch.testing.assert_close(grads[0], grads[1])
    return got


LAYOUTS = {
    "one table": [table("a", 10, 4)],
    "one feature each": [table("a", 10, 4), table("b", 7, 4), table("c", 10, 4)],
    "two dimensions": [table("a", 10, 4), table("b", 7, 3), table("c", 10, 4)],
    "mean and sum": [table("a", 10, 4, pooling=PoolingType.MEAN), table("b", 7, 4), table("c", 10, 3)],
    "shared table": [table("t", 7, 4, ["c", "a"]), table("u", 10, 4, ["b"])],
    "shared feature": [table("t", 7, 4, ["a", "b"]), table("u", 10, 3, ["b", "c"]), table("v", 9, 4, ["b"])],
    "other order": [table("c", 10, 4), table("a", 7, 4)],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("max_length", [4, 0])
def test_equals_torchrec(layout: str, max_length: int):
    ours, oracle = build_pair(LAYOUTS[layout])
    assert_same(ours, oracle, random_kjt(["a", "b", "c"], 5, max_id=7, max_length=max_length))


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "mean and sum"])
@pytest.mark.parametrize("max_length", [4, 0])
def test_weighted_equals_torchrec_with_the_gradient_of_the_weights(layout: str, max_length: int):
    ours, oracle = build_pair(LAYOUTS[layout], is_weighted=True)
    features = random_kjt(["a", "b", "c"], 5, max_id=7, max_length=max_length, weighted=True)
    assert_same(ours, oracle, features)
    grads = []
    for module in (ours, oracle):
        weights = features.weights().clone().requires_grad_()
        values = module(KeyedJaggedTensor(features.keys(), features.values(), weights, features.lengths())).values()
        (values * torch.arange(values.numel()).view_as(values)).sum().backward()
        grads.append(weights.grad)
    torch.testing.assert_close(grads[0], grads[1])


def test_weighted_mean_divides_by_the_number_of_ids():
    ours = TableCollection([table("a", 3, 2, pooling=PoolingType.MEAN)], is_weighted=True)
    features = KeyedJaggedTensor(["a"], torch.tensor([0, 2, 1]), torch.tensor([0.5, 3.0, 2.0]), torch.tensor([2, 0, 1]))
    rows = ours.memory.view(3, 2)
    expected = torch.stack([(0.5 * rows[0] + 3 * rows[2]) / 2, torch.zeros(2), 2 * rows[1]])
    torch.testing.assert_close(ours(features).values(), expected)


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("lengths_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("max_length", [4, 0])
def test_any_integer_types(ids_dtype: torch.dtype, lengths_dtype: torch.dtype, max_length: int):
    ours, _ = build_pair(LAYOUTS["two dimensions"])
    expected = ours(random_kjt(["a", "b", "c"], 5, max_id=7, max_length=max_length)).values()
    features = random_kjt(
        ["a", "b", "c"], 5, max_id=7, max_length=max_length, ids_dtype=ids_dtype, lengths_dtype=lengths_dtype
    )
    assert torch.equal(ours(features).values(), expected)


def test_offsets_serve_as_well_as_lengths():
    ours, oracle = build_pair(LAYOUTS["one feature each"])
    with_lengths = random_kjt(["a", "b", "c"], 5, max_id=7)
    assert_same(
        ours, oracle, KeyedJaggedTensor(with_lengths.keys(), with_lengths.values(), offsets=with_lengths.offsets())
    )


@pytest.mark.parametrize(("layout", "batch"), [("mean and sum", 1), ("mean and sum", 3), ("one feature each", 0)])
def test_empty_bags_give_zeros(layout: str, batch: int):
    ours = TableCollection(LAYOUTS[layout])
    lengths = torch.zeros(3 * batch, dtype=torch.int64)
    features = KeyedJaggedTensor(["a", "b", "c"], torch.empty(0, dtype=torch.int64), lengths=lengths, stride=batch)
    assert torch.equal(ours(features).values(), torch.zeros(batch, sum(ours(features).length_per_key())))


def test_variable_batches_are_expanded_by_their_inverse_indices():
    ours, oracle = build_pair([table("b", 7, 4), table("a", 10, 4), table("c", 10, 3)])
    features = KeyedJaggedTensor(
        ["a", "b", "c"],
        values=torch.tensor([1, 2, 3, 4, 5, 6, 0, 1]),
        lengths=torch.tensor([2, 0, 1, 1, 1, 3]),
        stride_per_key_per_rank=[[2], [1], [3]],
        inverse_indices=(["a", "b", "c"], torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [2, 0, 1, 2]])),
    )
    assert assert_same(ours, oracle, features).values().shape == (4, 11)


@pytest.mark.parametrize("lengths", [[1, 0, 2, 1], [1, 1, 1, 1]])
def test_variable_batches_without_inverse_indices_are_refused(lengths: list[int]):
    features = KeyedJaggedTensor(
        ["a", "b"], torch.tensor([1, 2, 3, 4]), lengths=torch.tensor(lengths), stride_per_key_per_rank=[[1], [3]]
    )
    with pytest.raises(ValueError, match=r"batch sizes \[1, 3\] differ"):
        TableCollection([table("a", 10, 4), table("b", 10, 4)])(features)


def test_takes_a_tensor_dict():
    ours, _ = build_pair(LAYOUTS["other order"])
    features = random_kjt(["a", "b", "c"], 5, max_id=7)
    by_name = features.to_dict()
    tensors = {
        name: torch.nested.nested_tensor_from_jagged(part.values(), lengths=part.lengths(), offsets=part.offsets())
        for name, part in by_name.items()
    }
    assert torch.equal(ours(TensorDict(tensors)).values(), ours(features).values())  # pyright: ignore[reportArgumentType]


def test_extra_features_are_ignored_and_a_missing_one_is_named():
    ours, oracle = build_pair([table("b", 10, 4)])
    assert_same(ours, oracle, random_kjt(["a", "b", "c"], 3))
    with pytest.raises(KeyError, match="feature b is not in the batch"):
        ours(random_kjt(["a", "c"], 3))


def test_missing_weights_are_refused():
    with pytest.raises(AssertionError, match="doesn't have weights"):
        TableCollection([table("a", 10, 4)], is_weighted=True)(random_kjt(["a"], 3))


def test_weights_of_another_type_are_converted():
    ours, oracle = build_pair([table("a", 10, 4)], is_weighted=True)
    features = random_kjt(["a"], 3, weighted=True)
    doubled = KeyedJaggedTensor(["a"], features.values(), features.weights().double(), features.lengths())
    torch.testing.assert_close(ours(doubled).values(), oracle(features).values())  # of the same type, too


def test_a_batch_of_all_ones_lengths_but_several_bags_is_not_confused_with_one_id_per_bag():
    ours, oracle = build_pair([table("a", 10, 4), table("b", 10, 4)])
    for lengths in ([1, 1, 1, 1], [2, 0, 1, 1], [0, 2, 2, 0], [1, 0, 1, 1]):
        values = torch.arange(sum(lengths))
        assert_same(ours, oracle, KeyedJaggedTensor(["a", "b"], values, lengths=torch.tensor(lengths)))


def test_constructor_refuses_what_torchrec_refuses():
    with pytest.raises(ValueError, match="Duplicate table name a"):
        TableCollection([table("a", 10, 4), table("a", 10, 4)])
    with pytest.raises(ValueError, match="pooling"):
        TableCollection([table("a", 10, 4, pooling=PoolingType.NONE)])
    with pytest.raises(ValueError, match="embedding_dim of table 'a' must be at least 1, not 0"):
        TableCollection([table("a", 10, 0)])


def test_no_tables_construct_but_have_no_output():
    for module in (TableCollection([]), EmbeddingBagCollection([])):
        with pytest.raises(ValueError):  # noqa: PT011  two modules, two messages
            module(random_kjt(["a"], 3))


def test_a_table_without_features_serves_the_feature_of_its_name():
    tables = [EmbeddingBagConfig(name="a", num_embeddings=10, embedding_dim=4)]
    ours = TableCollection(tables)
    assert tables[0].feature_names == ["a"]
    assert ours.embedding_bag_configs() is tables
    assert ours(random_kjt(["a"], 3)).keys() == ["a"]


def test_fuse_embedding_optimizer_builds_no_tables_in_its_place():
    model = nn.Sequential(TableCollection([table("a", 10, 4)]))
    fused = fuse_embedding_optimizer(model, torch.optim.SGD, {"lr": 0.1}, torch.device("cpu"))
    assert isinstance(fused[0], TableCollection)  # pyright: ignore[reportIndexIssue]


def test_managed_collision_accepts_it():
    tables = [table("a", 20, 4)]
    remap = MCHManagedCollisionModule(
        zch_size=20, device=torch.device("cpu"), eviction_interval=2, eviction_policy=DistanceLFU_EvictionPolicy()
    )
    collection = ManagedCollisionCollection({"a": remap}, tables)  # pyright: ignore[reportArgumentType]
    module = ManagedCollisionEmbeddingBagCollection(TableCollection(tables), collection)  # pyright: ignore[reportArgumentType]
    pooled, _ = module(KeyedJaggedTensor(["a"], torch.tensor([10**12, 5, 7]), lengths=torch.tensor([2, 1])))
    assert isinstance(pooled, KeyedTensor)
    assert pooled.values().shape == (2, 4)


def test_compression_counts_parameters():
    ours = TableCollection([table("a", 10, 4), table("b", 7, 3)])
    assert ours.compression == 1.0
    assert ours.parameter_budget(2.0) == 30
    assert ours.parameter_budget(1.5) == 40
    for bad in (0.99, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"compression must be at least 1 and finite, not {bad}"):
            ours.parameter_budget(bad)


def test_state_of_other_tables_is_refused_before_anything_is_copied():
    ours = TableCollection([table("a", 10, 4), table("b", 10, 4)])
    other = TableCollection([table("b", 10, 4), table("a", 10, 4)])
    before = ours.memory.detach().clone()
    with pytest.raises(
        ValueError, match=r"tables is \['a: 10 x 4', 'b: 10 x 4'\] here and \['b: 10 x 4', 'a: 10 x 4'\]"
    ):
        ours.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="_extra_state is not in the state dict"):
        ours.load_state_dict({"memory": other.memory})
    assert torch.equal(ours.memory, before)
    ours.load_state_dict({}, strict=False)


def test_jagged_tensors_need_no_stride_of_their_own():
    """A KeyedJaggedTensor made of a dict knows neither stride nor offsets."""
    ours, oracle = build_pair(LAYOUTS["one feature each"])
    parts = {name: JaggedTensor(torch.tensor([1, 2]), lengths=torch.tensor([0, 2])) for name in ("c", "b", "a")}
    assert_same(ours, oracle, KeyedJaggedTensor.from_jt_dict(parts))
