import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torchrec.fx import symbolic_trace
from torchrec.modules.embedding_configs import PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from baselines import tt_rec
from baselines.tt_rec import EMPTY, Options, TTRecEmbeddingBagCollection, cell
from pss.method import CompressionRefused, EmbeddingRequest
from tests.baselines.test_tt_cores import reconstruct
from tests.baselines.tt_rec_tables import KEYS, cached_ids, mixed_kjt, mixed_tables, read, single
from tests.pss.jagged import materialise, pooled_by_cell, random_kjt, table
from tests.ranks import run_ranks


@pytest.mark.parametrize("cores", [3, 4])
@pytest.mark.parametrize("rank", [3, 4])
@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("is_cached", [False, True])
def test_lookup_equals_cell(cores: Any, rank: int, is_weighted: bool, is_cached: bool):
    share = 0.06 if is_cached else 0.0
    module = TTRecEmbeddingBagCollection(mixed_tables(), is_weighted, cores=cores, rank=rank, cache_share=share, seed=5)
    assert [bool(module.table_parts(t)[0]) for t in range(7)] == [True, False, True, True, True, True, False]
    if is_cached:
        module(mixed_kjt(4, is_weighted))
        module.end_step(1, 1)
        assert cached_ids(module)
    nn.init.normal_(module.memory)
    for max_length in (4, 0):
        features = mixed_kjt(max_length, is_weighted)
        expected = pooled_by_cell(module, cell, features)
        torch.testing.assert_close(module(features).values().double(), expected, rtol=1e-4, atol=1e-4)


def test_cell_is_the_formula_and_knows_the_bounds_of_its_table():
    module = TTRecEmbeddingBagCollection(mixed_tables(), rank=3)
    nn.init.normal_(module.memory)
    for index, config in enumerate(module.embedding_bag_configs()):
        cores, rows = module.table_parts(index)
        expected = reconstruct(cores)[: config.num_embeddings] if cores else rows
        torch.testing.assert_close(materialise(module, cell, index), expected)
    for row, col in [(211, 0), (-1, 0), (0, 16), (0, -1)]:
        with pytest.raises(IndexError, match="outside t: 211 x 16"):
            cell(module, 0, row, col)


@pytest.mark.parametrize("cores", [3, 4])
@pytest.mark.parametrize("max_length", [4, 0])
def test_gradient_is_that_of_the_materialised_table(cores: Any, max_length: int):
    """By autograd through an explicit reconstruction of every table, in float64, and F.embedding_bag."""
    module = TTRecEmbeddingBagCollection(mixed_tables(), True, cores=cores, rank=3)
    nn.init.normal_(module.memory, std=0.5)
    oracle = copy.deepcopy(module).double()
    features = mixed_kjt(max_length, True)
    features.weights().requires_grad_()
    scale = torch.linspace(-1, 1, sum(module._embedding_dims))
    (module(features).values() * scale).sum().backward()
    weights_grad, features.weights().grad = features.weights().grad, None

    outputs, by_name = [], features.to_dict()
    for index, config in enumerate(oracle.embedding_bag_configs()):
        parts, rows = oracle.table_parts(index)
        weight = reconstruct(parts)[: config.num_embeddings] if parts else rows
        for bags in (by_name[name] for name in config.feature_names):
            summed = F.embedding_bag(
                bags.values(), weight, bags.offsets(), mode="sum", per_sample_weights=bags.weights().double(),
                include_last_offset=True,
            )  # fmt: skip
            is_mean = config.pooling == PoolingType.MEAN
            outputs.append(summed / bags.lengths().clamp(min=1).unsqueeze(1) if is_mean else summed)
    (torch.cat(outputs, dim=1) * scale).sum().backward()
    assert module.memory.grad is not None
    torch.testing.assert_close(module.memory.grad.double(), oracle.memory.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weights_grad, features.weights().grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cores", [3, 4])
@pytest.mark.parametrize("rank", [2, 8, 32])
def test_tables_start_with_the_spread_of_full_ones(cores: Any, rank: int):
    tables = [table("a", 20_011, 16), table("b", 30_000, 7), table("c", 30, 16)]
    module = TTRecEmbeddingBagCollection(tables, cores=cores, rank=rank, init_scale=0.2, seed=1)
    for index, config in enumerate(tables):
        parts, rows = module.table_parts(index)
        weight = reconstruct(parts)[: config.num_embeddings] if parts else rows
        assert weight.std().item() == pytest.approx(0.2 / math.sqrt(3), rel=0.03 if parts else 0.1)
        assert abs(weight.mean()) < 0.02


def test_start_depends_on_the_seed_alone():
    torch.manual_seed(1)
    one = TTRecEmbeddingBagCollection(mixed_tables(), rank=3, seed=7)
    state = torch.get_rng_state()
    two = TTRecEmbeddingBagCollection(mixed_tables(), rank=3, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.memory, two.memory)
    other = TTRecEmbeddingBagCollection(mixed_tables(), rank=3, seed=8)
    assert not (other.memory == one.memory).any()
    nn.init.ones_(two.memory)
    two.reset_parameters()
    assert torch.equal(one.memory, two.memory)


SIZES = [5, 60, 700, 20_000]


@pytest.mark.parametrize("cores", [3, 4])
@pytest.mark.parametrize("share", [0.0, 0.005])
@pytest.mark.parametrize("compression", [1, 2.5, 10, 50, 100])
def test_compression_is_a_promise_over_all_tables(cores: Any, share: float, compression: float):
    tables = [table(f"t{n}", n, 16) for n in SIZES]
    options = Options(cores=cores, cache_share=share)
    module = tt_rec.build(tables, options, EmbeddingRequest(compression=compression))
    full = 4 * 16 * sum(SIZES)
    parameters, keys = module.memory.numel(), module.cached_keys.numel()
    assert module.stored_bytes() == 4 * parameters + 16 * keys
    assert 0.8 * full / compression <= module.stored_bytes() <= full / compression
    if share and compression > 1:
        assert keys == sum(int(share * n) for n, layout in zip(SIZES, module._layouts.values(), strict=True)
                           if layout.first_key >= 0) > 0  # fmt: skip
        assert module.read_counts.numel() >= 20_000
    assert not share or compression > 1 or keys == 0


@pytest.mark.parametrize("options", [{}, {"cores": 4}, {"cache_share": 0.01}, {"rank": 5}])
def test_what_cannot_be_reached_is_refused_with_the_nearest_that_can(options: dict[str, Any]):
    tables = [table(f"t{n}", n, 16) for n in SIZES]
    with pytest.raises(CompressionRefused, match="tt_rec reaches") as refused:
        tt_rec.build(tables, Options(**options), EmbeddingRequest(compression=10_000))
    nearest = refused.value.nearest
    module = tt_rec.build(tables, Options(**options), EmbeddingRequest(compression=nearest))
    assert nearest <= module.compression < 1.01 * nearest
    assert set(module.ranks) == {1, options.get("rank", 1)}


def test_a_refusal_asks_for_no_memory():
    tables = [table("a", 2**45, 16)]
    with pytest.raises(CompressionRefused):
        tt_rec.build(tables, Options(cache_share=0.01), EmbeddingRequest(compression=1000))


@pytest.mark.parametrize(
    "arguments",
    [
        {"cores": 2}, {"rank": 0}, {"cache_share": -0.1}, {"cache_share": 1.1}, {"cache_warmup": 2.0},
        {"cache_refresh_steps": -1}, {"init_scale": -1.0}, {"seed": -1}, {"compression": 0.5},
    ],
)  # fmt: skip
def test_impossible_arguments_are_refused(arguments: dict[str, Any]):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        TTRecEmbeddingBagCollection([table("a", 10, 4)], **arguments)


def test_options_are_checked():
    for bad in ({"cores": 5}, {"rank": 0}, {"cache_share": 2.0}, {"ranks": 3}):
        with pytest.raises(ValidationError):
            Options(**bad)  # pyright: ignore[reportArgumentType]


def test_defaults_work_at_toy_size():
    module = TTRecEmbeddingBagCollection([table("a", 10, 3)])
    assert module(random_kjt(["a"], 3)).values().shape == (3, 3)
    assert TTRecEmbeddingBagCollection([]).embedding_bag_configs() == []


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns, backward included."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("cores", [3, 4])
def test_no_table_is_ever_made(cores: Any):
    rows = 10**9
    module = TTRecEmbeddingBagCollection([table("a", rows, 16)], cores=cores, rank=4)
    ids = [0, 1, 2**29, rows - 1]
    with LargestTensor() as largest:
        found = read(module, ids)
        found.square().sum().backward()
    assert largest.elements <= module.memory.numel() < 100_000
    expected = [[cell(module, 0, row, col) for col in range(16)] for row in ids]
    torch.testing.assert_close(found, torch.tensor(expected))


def step_on(rank: int, world_size: int) -> list[Any]:
    """Six steps, with a cache that is filled and refreshed, on this rank's half of four bags of every feature."""
    module = TTRecEmbeddingBagCollection(
        mixed_tables(), rank=3, cache_share=0.03, cache_warmup=0.3, cache_refresh_steps=1, seed=2, init_scale=0.5
    )
    model: nn.Module = module
    if world_size > 1:
        model = DistributedDataParallel(module, broadcast_buffers=False, static_graph=True)
    optimizer = torch.optim.Adagrad(module.parameters(), lr=0.1)
    held = []
    for step in range(1, 7):
        bags = random_kjt(KEYS, 4, max_id=3, max_length=6, seed=step).to_dict()
        share = 4 // world_size
        mine = {name: jagged.to_dense()[rank * share : (rank + 1) * share] for name, jagged in bags.items()}
        lengths = torch.tensor([len(bag) for parts in mine.values() for bag in parts])
        ids = torch.cat([bag for parts in mine.values() for bag in parts])
        optimizer.zero_grad()
        (model(KeyedJaggedTensor(list(mine), ids, lengths=lengths)).values() - 1).square().sum(1).mean().backward()
        optimizer.step()
        module.end_step(step, 6)
        held.append(module.cached_keys.tolist())
    assert held[0] == [EMPTY] * module.cached_rows
    assert held[1] != held[5]
    return [module.memory.detach().numpy(), held, module.cached_places.tolist(), module.read_counts.tolist()]


@pytest.mark.dist
def test_two_ranks_equal_one_process():
    memory, *cache = step_on(0, 1)
    for found, *found_cache in run_ranks(step_on, 2):
        torch.testing.assert_close(torch.from_numpy(found), torch.from_numpy(memory), rtol=0, atol=2e-5)
        assert found_cache == cache


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"rank": 3}, "ranks is '1,3,3,1' here and '1,2,2,1' in the state dict"),
        ({"cores": 4}, "cores is 4 here and 3 in the state dict"),
        ({"cache_share": 0.01}, "cached_rows is 1 here and 2 in the state dict"),
    ],
)
def test_state_of_other_trains_is_refused(change: dict[str, Any], difference: str):
    with pytest.raises(ValueError, match=difference):
        single(**change).load_state_dict(single().state_dict())


def test_fit_is_exact_at_full_ranks_and_falls_with_the_rank():
    generator = torch.Generator().manual_seed(0)
    tables = [table("a", 101, 7), table("b", 1, 7), table("c", 90, 16)]
    trained = [torch.randn(config.num_embeddings, config.embedding_dim, generator=generator) for config in tables]
    errors = []
    for rank in (1, 3, 4):
        module = TTRecEmbeddingBagCollection(tables, rank=rank, cache_share=0.02)
        read_all = KeyedJaggedTensor(["a", "b", "c"], torch.tensor([1, 0, 1]), lengths=torch.ones(3, dtype=torch.int64))
        module(read_all)
        module.end_step(1, 1)
        errors.append(module.fit(trained))
        assert cached_ids(module) == set()
        assert module.read_counts.sum() == 0
        squares = [(materialise(module, cell, t) - trained[t]).square().sum().item() for t in range(3)]
        norm = math.sqrt(sum(weight.square().sum().item() for weight in trained))
        assert squares[1] == 0
        assert math.sqrt(sum(squares)) / norm <= errors[-1] * (1 + 1e-5)  # and padding rows besides
        assert math.sqrt(sum(squares)) / norm >= 0.9 * errors[-1]
    assert errors == sorted(errors, reverse=True)
    with pytest.raises(ValueError, match="shapes"):
        module.fit(trained[:2])


def test_fit_finds_trains_again():
    """Where no row is there only to fill the train up."""
    tables = [table("a", 100, 7), table("b", 64, 16)]
    low, high = (TTRecEmbeddingBagCollection(tables, rank=rank, seed=rank) for rank in (3, 4))
    rows = [materialise(low, cell, index) for index in range(2)]
    assert high.fit(rows) < 1e-6
    for index in range(2):
        torch.testing.assert_close(materialise(high, cell, index), rows[index], rtol=1e-4, atol=1e-7)


def compiled(module: nn.Module) -> Any:
    torch._dynamo.reset()
    return torch.compile(module, fullgraph=True, backend="aot_eager")


def with_all_kinds_of_rows() -> TTRecEmbeddingBagCollection:
    """Computed, cached and whole ones; a and c are trains, e is whole."""
    tables = [table("a", 211, 16), table("e", 3, 16), table("c", 97, 7, pooling=PoolingType.MEAN)]
    module = TTRecEmbeddingBagCollection(tables, rank=3, cache_share=0.03)
    module(mixed_kjt(4))
    module.end_step(1, 1)
    assert len(cached_ids(module)) == 8
    return module


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("capture", [symbolic_trace, torch.jit.script, compiled, copy.deepcopy])  # pyright: ignore
def test_captured_module_gives_the_same(capture: Any):
    module = with_all_kinds_of_rows()
    captured = capture(module)
    for max_length in (0, 4):
        features = mixed_kjt(max_length, seed=3)
        torch.testing.assert_close(captured(features).values(), module(features).values())
    (expected,) = torch.autograd.grad(module(features).values().square().sum(), module.memory)
    captured(features).values().square().sum().backward()
    grad = captured.memory.grad if capture is copy.deepcopy else module.memory.grad
    torch.testing.assert_close(grad, expected)
    assert len(module._reads) == 3 * len(module._groups)  # the eager calls alone


def test_export_takes_whole_cached_and_computed_rows():
    module, features = with_all_kinds_of_rows(), mixed_kjt(4, seed=1)
    exported = torch.export.export(module, (features,), strict=False).module()
    torch.testing.assert_close(exported(features).values(), module(features).values())


def test_materialised_from_meta_is_the_module_built_in_place():
    module = TTRecEmbeddingBagCollection(mixed_tables(), device=torch.device("meta"), rank=3, cache_share=0.03, seed=3)
    features = mixed_kjt(4)
    assert module(features.to(torch.device("meta"))).values().device.type == "meta"
    module.to_empty(device=torch.device("cpu"))
    module.reset_parameters()
    here = TTRecEmbeddingBagCollection(mixed_tables(), rank=3, cache_share=0.03, seed=3)
    assert torch.equal(module(features).values(), here(features).values())
