import hashlib
import io
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from pss.hashing import HASH_FAMILIES, HashConstants
from pss.kernels.plan import RobePlan
from pss.method import EmbeddingRequest
from pss.methods import robe
from pss.methods.robe import RobeEmbeddingBagCollection, cell
from tests.pss.jagged import materialise, pooled_by_cell, random_kjt, table


def mixed_tables() -> list[EmbeddingBagConfig]:
    """Dimensions 8, 6 and 3, a shared feature, a table of two features, sum and mean."""
    return [
        table("t", 10, 8, ["a", "b"]),
        table("u", 9, 6, ["c"], PoolingType.MEAN),
        table("v", 10, 8, ["c"], PoolingType.MEAN),
        table("w", 10, 3, ["d"]),
        table("x", 10, 8, ["a"]),
    ]


# Z below, at and above the dimensions, dividing them and not.
BLOCK_SIZES = [1, 3, 8, 16]
KEYS = ["d", "a", "b", "c"]


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("family", HASH_FAMILIES)
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("circular", [False, True])
@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("kernel", ["auto", "plain"])
def test_lookup_equals_cell(
    block_size: int, family: str, signed: bool, circular: bool, is_weighted: bool, kernel: str
):  # fmt: skip
    module = RobeEmbeddingBagCollection(
        mixed_tables(), is_weighted, memory_size=60, block_size=block_size, hash_family=family, signed=signed,
        circular=circular, kernel=kernel, seed=5,
    )  # fmt: skip
    for max_length in (4, 0):
        features = random_kjt(KEYS, 3, max_id=9, max_length=max_length, weighted=is_weighted)
        pooled = module(features)
        assert pooled.keys() == ["a@t", "b", "c@u", "c@v", "d", "a@x"]
        torch.testing.assert_close(
            pooled.values().double(), pooled_by_cell(module, cell, features), rtol=1e-5, atol=1e-7
        )


@pytest.mark.parametrize("block_size", [1, 3, 8])
@pytest.mark.parametrize("circular", [False, True])
def test_any_table_can_be_flattened(block_size: int, circular: bool):
    module = RobeEmbeddingBagCollection(
        mixed_tables(), memory_size=60, block_size=block_size, flattened=True, circular=circular, signed=True
    )
    features = random_kjt(KEYS, 3, max_id=9)
    torch.testing.assert_close(module(features).values().double(), pooled_by_cell(module, cell, features))


def test_blocks_wrap_around_if_circular():
    """With |M| = Z a block that does not wrap starts at 0; a circular one anywhere, and holds every element once."""
    tables = [table("a", 50, 8)]
    straight, circular = (RobeEmbeddingBagCollection(tables, memory_size=8, circular=c) for c in (False, True))
    rows = materialise(circular, cell, 0)
    assert (materialise(straight, cell, 0) == straight.memory).all()
    assert (rows.sort(dim=1).values == circular.memory.sort().values).all()
    assert len(rows.unique(dim=0)) == 8


def test_the_authors_map_reads_the_head_of_one_block_where_z_exceeds_d():
    module = RobeEmbeddingBagCollection([table("a", 9, 3)], memory_size=40, block_size=8, hash_family="authors")
    windows = module.memory.unfold(0, 3, 1)[: 40 - 8 + 1]
    assert all((row == windows).all(1).any() for row in materialise(module, cell, 0))


def test_a_flattened_table_beyond_63_bits_is_refused():
    with pytest.raises(ValueError, match=r"'a' \(\d+ x 16\) has 2\^63 elements or more"):
        RobeEmbeddingBagCollection([table("a", 2**60, 16)], memory_size=40, block_size=1, flattened=True)


@pytest.mark.parametrize("dim", [16, 7])  # Z = 8 below and above
def test_rows_of_huge_tables(dim: int):
    module = RobeEmbeddingBagCollection([table("a", 2**63 - 1, dim), table("b", 2**63 - 1, dim)], memory_size=1000)
    ids = [0, 2**31 - 1, 2**31, 2**32 + 5, 2**53 + 1, 2**62 + 3, 2**63 - 2]
    features = KeyedJaggedTensor(["a", "b"], torch.tensor(ids * 2), lengths=torch.ones(14, dtype=torch.int64))
    assert torch.equal(module(features).values().double(), pooled_by_cell(module, cell, features))


@pytest.mark.parametrize("family", HASH_FAMILIES)
@pytest.mark.parametrize("dim", [16, 7])
def test_int32_ids_do_not_overflow(family: str, dim: int):
    module = RobeEmbeddingBagCollection([table("a", 2**31, dim)], memory_size=1000, hash_family=family)
    ids, lengths = torch.tensor([0, 2**30, 2**31 - 1]), torch.tensor([1, 2])
    long, short = (KeyedJaggedTensor(["a"], ids.to(t), lengths=lengths.to(t)) for t in (torch.int64, torch.int32))
    assert torch.equal(module(short).values(), module(long).values())


@pytest.mark.parametrize("family", HASH_FAMILIES)
def test_signs_are_independent_of_locations(family: str):
    module = RobeEmbeddingBagCollection([table("a", 10**6, 8)], memory_size=1000, hash_family=family, signed=True)
    blocks, feature, plan = torch.arange(20_000), torch.zeros(1, dtype=torch.int64), module._plan[0]
    signs = 1.0 - 2.0 * robe.locate(blocks, feature, plan.signs[0], 2)
    upper_half = robe.locate(blocks, feature, plan.location, plan.slots[0]) >= plan.slots[0] // 2
    for half in (signs[upper_half], signs[~upper_half]):
        assert abs(half.mean()) < 5 / half.numel() ** 0.5


def test_any_int64_reads_inside_the_array():
    """Validation is upstream; a stray id must still not read out of bounds."""
    ids = torch.tensor([-1, -(2**63), -12345, 2**63 - 1])
    for block_size in BLOCK_SIZES:
        module = RobeEmbeddingBagCollection([table("a", 10, 8)], memory_size=16, block_size=block_size, signed=True)
        values = module(KeyedJaggedTensor(["a"], ids, lengths=torch.tensor([4]))).values()
        assert values.isfinite().all()
        values.sum().backward()


def test_cell_knows_the_bounds_of_its_table():
    module = RobeEmbeddingBagCollection([table("a", 10, 4)])
    for row, col in [(10, 0), (-1, 0), (0, 4), (0, -1)]:
        with pytest.raises(IndexError, match=r"outside a: 10 x 4"):
            cell(module, 0, row, col)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("max_length", [4, 0])
def test_gradient_is_that_of_the_materialised_table(block_size: int, max_length: int):
    """dL/dM from dL/dE: every cell of the table hands its gradient to the slot it reads."""
    module = RobeEmbeddingBagCollection(
        [table("a", 10, 8), table("b", 10, 8)], True, memory_size=40, block_size=block_size, signed=True
    )
    features = random_kjt(["a", "b"], 4, max_length=max_length, weighted=True)
    features.weights().requires_grad_()
    scale = torch.arange(4 * 16).view(4, 16) / 10
    (module(features).values() * scale).sum().backward()
    weights_grad, features.weights().grad = features.weights().grad, None

    expected = torch.zeros(40)
    for index, name in enumerate(["a", "b"]):
        weight, bags = materialise(module, cell, index).requires_grad_(), features.to_dict()[name]
        output = F.embedding_bag(
            bags.values(),
            weight,
            bags.offsets(),
            mode="sum",
            per_sample_weights=bags.weights(),
            include_last_offset=True,
        )
        (output * scale[:, 8 * index : 8 * index + 8]).sum().backward()
        assert weight.grad is not None
        for slot in range(40):  # the slot's derivative of the whole table is 0, 1 or -1 in every cell
            unit = RobeEmbeddingBagCollection(
                module.embedding_bag_configs(), True, memory_size=40, block_size=block_size, signed=True
            )
            nn.init.zeros_(unit.memory)
            unit.memory.data[slot] = 1.0
            expected[slot] += (materialise(unit, cell, index) * weight.grad).sum()
    torch.testing.assert_close(module.memory.grad, expected)
    torch.testing.assert_close(weights_grad, features.weights().grad)


def identity_locate(blocks: Tensor, feature: Tensor, constants: HashConstants, slots: int) -> Tensor:
    """Chunk j of row i of an 8-column table t at t·80 + 8·i + 4·j: the tables themselves, one after the other."""
    start = torch.tensor(constants.table_keys)[feature] + 8 * blocks
    return start.unsqueeze(-1) + 4 * torch.arange(len(constants.chunk_keys))


@pytest.mark.parametrize("optimizer", [partial(torch.optim.SGD, lr=0.1), partial(torch.optim.Adagrad, lr=0.1)])
@pytest.mark.parametrize("max_length", [4, 0])
def test_without_collisions_it_is_torchrecs_module(
    optimizer: Callable[..., torch.optim.Optimizer], max_length: int, monkeypatch: pytest.MonkeyPatch
):
    """An injective map changes nothing, to the bit for one id per bag; otherwise TorchRec sums in another order."""
    monkeypatch.setattr(robe, "locate", identity_locate)
    tables = [table("a", 10, 8), table("b", 10, 8, pooling=PoolingType.MEAN), table("c", 10, 8)]
    ours = RobeEmbeddingBagCollection(tables, memory_size=240, block_size=4, kernel="plain")
    ours._plan = [
        plan._replace(location=plan.location._replace(table_keys=[80 * index for index in group.tables]))
        for plan, group in zip(ours._plan, ours._groups, strict=True)
    ]
    oracle = EmbeddingBagCollection(tables)
    with torch.no_grad():
        for parameter, part in zip(oracle.parameters(), ours.memory.split(80), strict=True):
            parameter.copy_(part.view_as(parameter))
    optimizers = [optimizer(module.parameters()) for module in (ours, oracle)]
    assert_equal = partial(torch.testing.assert_close, rtol=0, atol=0 if max_length == 0 else 1e-6)
    for step in range(5):
        features = random_kjt(["a", "b", "c"], 6, max_length=max_length, seed=step)
        target = torch.randn(6, 24, generator=torch.Generator().manual_seed(step))
        outputs = [module(features).values() for module in (ours, oracle)]
        assert_equal(*outputs)
        for output, update in zip(outputs, optimizers, strict=True):
            update.zero_grad()
            ((output - target) ** 2).mean().backward()
            update.step()
        assert_equal(ours.memory, nn.utils.parameters_to_vector(oracle.parameters()))


def test_sizes():
    tables = [table("a", 100, 16), table("b", 23, 16)]  # 1968 parameters
    assert RobeEmbeddingBagCollection(tables, compression=10).memory_size == 196
    assert RobeEmbeddingBagCollection(tables, compression=10).compression >= 10
    assert RobeEmbeddingBagCollection(tables, compression=1).memory_size == 1968
    assert RobeEmbeddingBagCollection(tables).memory_size == 8  # one block: less than the default 1000×
    module = RobeEmbeddingBagCollection(tables, compression=10, memory_size=123)
    assert module.compression == 16
    assert [(name, p.numel()) for name, p in module.named_parameters()] == [("memory", 123)]
    assert list(module.buffers()) == []


def test_defaults_work_at_toy_size():
    module = RobeEmbeddingBagCollection([table("a", 10, 3)])
    assert module(random_kjt(["a"], 3)).values().shape == (3, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_size": 0}, "block_size must be at least 1, not 0"),
        ({"compression": 0.5}, "compression must be at least 1 and finite, not 0.5"),
        ({"memory_size": 7}, "memory_size must be at least block_size = 8, not 7"),
        ({"hash_family": "md5"}, "hash_family 'md5' is unknown"),
        ({"init_scale": -1.0}, "init_scale must be at least 0, not -1.0"),
        (
            {"memory_size": 2**31 + 7, "hash_family": "affine", "device": torch.device("meta")},
            "reaches 2038074743 slots",
        ),
    ],
)
def test_impossible_arguments_are_refused(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        RobeEmbeddingBagCollection([table("a", 10, 4)], **arguments)


def test_build_takes_the_sections_keys():
    options = robe.Options(block_size=4, hash_family="affine", signed=True)
    module = robe.build([table("a", 100, 8)], options, EmbeddingRequest(compression=10, init_scale=0.5, seed=3))
    assert (module.memory_size, module.options.block_size, module.options.signed, module.seed) == (80, 4, True, 3)
    assert module.location_hash.name == "affine"
    assert 0.4 < module.memory.abs().max() <= 0.5
    for bad in ({"block_size": 0}, {"hash_family": "md5"}, {"chunk": 3}):
        with pytest.raises(ValidationError):
            robe.Options(**bad)  # pyright: ignore[reportArgumentType]


def test_start_depends_on_the_seed_alone():
    torch.manual_seed(1)
    one = RobeEmbeddingBagCollection(mixed_tables(), memory_size=5000, seed=7)
    state = torch.get_rng_state()
    two = RobeEmbeddingBagCollection(mixed_tables(), memory_size=5000, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.memory, two.memory)
    assert not torch.equal(one.memory, RobeEmbeddingBagCollection(mixed_tables(), memory_size=5000, seed=8).memory)
    assert one.memory.abs().max() <= 0.01
    assert abs(one.memory.mean()) < 5 * 0.01 / 3**0.5 / 5000**0.5
    nn.init.ones_(two.memory)
    two.reset_parameters()
    assert torch.equal(one.memory, two.memory)


def fingerprint() -> str:
    """Of the memory after one step."""
    module = RobeEmbeddingBagCollection(mixed_tables(), memory_size=100, signed=True, seed=11)
    module(random_kjt(KEYS, 5, max_id=9)).values().square().sum().backward()
    assert module.memory.grad is not None
    stepped = module.memory.detach() - module.memory.grad
    return hashlib.sha256(stepped.numpy().tobytes()).hexdigest()


def test_another_process_finds_the_same_bits():
    program = "from tests.pss.methods.test_robe import fingerprint; print(fingerprint())"
    command = [sys.executable, "-W", "ignore", "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert result.stdout.strip() == fingerprint()


def test_state_dict_round_trip():
    module = RobeEmbeddingBagCollection(mixed_tables(), memory_size=100, seed=4)
    nn.init.normal_(module.memory)
    state = module.state_dict()
    assert list(state) == ["memory", "_extra_state"]
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    other = RobeEmbeddingBagCollection(mixed_tables(), memory_size=100, seed=4)
    other.load_state_dict(torch.load(file, weights_only=True))
    features = random_kjt(KEYS, 5, max_id=9)
    assert torch.equal(module(features).values(), other(features).values())


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"seed": 5}, "seed is 5 here and 4 in the state dict"),
        ({"block_size": 4}, "block_size is 4 here and 8 in the state dict"),
        ({"hash_family": "affine"}, "hash_family is 'affine' here and 'independent' in the state dict"),
        ({"signed": True}, "signed is True here and False in the state dict"),
        ({"memory_size": 101}, "memory_size is 101 here and 100 in the state dict"),
    ],
)
def test_state_of_another_hash_is_refused(change: dict[str, Any], difference: str):
    saved = nn.Sequential(RobeEmbeddingBagCollection(mixed_tables(), memory_size=100, seed=4)).state_dict()
    arguments: dict[str, Any] = {"memory_size": 100, "seed": 4}
    module = RobeEmbeddingBagCollection(mixed_tables(), **(arguments | change))
    before = module.memory.detach().clone()
    with pytest.raises(ValueError, match=difference):
        nn.Sequential(module).load_state_dict(saved)
    assert torch.equal(module.memory, before)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_distributed_checkpoint_round_trip(tmp_path: Path):
    def load_into(module: RobeEmbeddingBagCollection) -> None:
        state = {"model": nn.Sequential(module).state_dict()}
        load(state, checkpoint_id=tmp_path, no_dist=True)
        nn.Sequential(module).load_state_dict(state["model"])

    module = RobeEmbeddingBagCollection(mixed_tables(), memory_size=100)
    nn.init.normal_(module.memory)
    save({"model": nn.Sequential(module).state_dict()}, checkpoint_id=tmp_path, no_dist=True)
    other = RobeEmbeddingBagCollection(mixed_tables(), memory_size=100)
    load_into(other)
    assert torch.equal(module.memory, other.memory)
    with pytest.raises(ValueError, match="seed is 1 here and 0 in the state dict"):
        load_into(RobeEmbeddingBagCollection(mixed_tables(), memory_size=100, seed=1))


def test_used_twice_in_one_step():
    module = RobeEmbeddingBagCollection(mixed_tables(), memory_size=100)
    batches = [random_kjt(KEYS, 5, max_id=9, seed=seed) for seed in (0, 1)]
    grads = []
    for batch in batches:
        module.zero_grad()
        module(batch).values().square().sum().backward()
        assert module.memory.grad is not None
        grads.append(module.memory.grad.clone())
    module.zero_grad()
    torch.stack([module(batch).values().square().sum() for batch in batches]).sum().backward()
    torch.testing.assert_close(module.memory.grad, grads[0] + grads[1])


def test_a_group_is_a_plan_of_plain_numbers():
    """What a kernel gets: no tensors, nothing to move between devices."""
    module = RobeEmbeddingBagCollection(mixed_tables(), memory_size=100, block_size=3)
    plan = module._plan[0]
    assert isinstance(plan, RobePlan)
    assert (plan.embedding_dim, plan.block_size, plan.slots) == (8, 3, [98])
    assert (len(plan.location.table_keys), len(plan.location.chunk_keys), plan.signs) == (3, 3, [])
