import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from pss.hashing import HASH_FAMILIES
from pss.method import CompressionRefused, EmbeddingRequest
from pss.methods import hashing_trick
from pss.methods.hashing_trick import HashingTrickEmbeddingBagCollection, Options, cell, divide_rows
from tests.pss.captures import CAPTURES
from tests.pss.jagged import materialise, pooled_by_cell, random_kjt, table

KEYS = ["d", "a", "b", "c"]
ROWS = get_args(Options.model_fields["rows"].annotation)


def mixed_tables() -> list[EmbeddingBagConfig]:
    """Dimensions 3, 4 and 5, a shared feature, a table of two features, sum and mean, 2 to 60 rows."""
    return [
        table("t", 60, 4, ["a", "b"]),
        table("u", 9, 5, ["c"], PoolingType.MEAN),
        table("v", 30, 4, ["c"], PoolingType.MEAN),
        table("w", 2, 3, ["d"]),
        table("x", 40, 4, ["a"]),
    ]


def build(**arguments: Any) -> HashingTrickEmbeddingBagCollection:
    """At 4×: of the 571 parameters 142."""
    return HashingTrickEmbeddingBagCollection(mixed_tables(), **({"compression": 4.0, "seed": 5} | arguments))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("family", HASH_FAMILIES)
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("is_weighted", [False, True])
def test_lookup_equals_cell(rows: str, family: str, signed: bool, is_weighted: bool):
    module = build(is_weighted=is_weighted, rows=rows, hash_family=family, signed=signed)
    for max_length in (4, 0):
        features = random_kjt(KEYS, 3, max_id=2, max_length=max_length, weighted=is_weighted)
        pooled = module(features)
        assert pooled.keys() == ["a@t", "b", "c@u", "c@v", "d", "a@x"]
        expected = pooled_by_cell(module, cell, features)
        torch.testing.assert_close(pooled.values().double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rows", ROWS)
def test_every_row_of_every_table_equals_cell(rows: str):
    module = build(rows=rows, signed=True)
    for index, config in enumerate(mixed_tables()):
        group = next(g for g, group in enumerate(module._groups) if index in group.tables)
        feature = torch.tensor(module._groups[group].tables.index(index))
        found = module._rows(group, torch.arange(config.num_embeddings), feature)
        assert torch.equal(found, materialise(module, cell, index))


@pytest.mark.parametrize("rows", ROWS)
def test_rows_of_huge_tables(rows: str):
    tables = [table("a", 2**63 - 1, 5), table("b", 2**63 - 1, 5)]
    module = HashingTrickEmbeddingBagCollection(tables, compression=2.0**54, rows=rows, signed=True)
    assert module.memory_size == 5115  # of 5119.99
    ids = [0, 2**31 - 1, 2**31, 2**32 + 5, 2**53 + 1, 2**62 + 3, 2**63 - 2]
    features = KeyedJaggedTensor(["a", "b"], torch.tensor(ids * 2), lengths=torch.ones(14, dtype=torch.int64))
    assert torch.equal(module(features).values().double(), pooled_by_cell(module, cell, features))


@pytest.mark.parametrize("rows", ROWS)
def test_any_int64_reads_inside_the_array(rows: str):
    """Validation is upstream; a stray id must still not read out of bounds."""
    ids = torch.tensor([-1, -(2**63), -12345, 2**63 - 1])
    module = HashingTrickEmbeddingBagCollection([table("a", 10, 8)], compression=1, rows=rows, signed=True)
    values = module(KeyedJaggedTensor(["a"], ids, lengths=torch.tensor([4]))).values()
    assert values.isfinite().all()
    values.sum().backward()


def places(module: HashingTrickEmbeddingBagCollection, index: int) -> Tensor:
    """Which element of memory every cell of a table reads, from the lookup: (num_embeddings, embedding_dim)."""
    with torch.no_grad():
        module.memory.copy_(torch.arange(module.memory_size))
    group = next(g for g, group in enumerate(module._groups) if index in group.tables)
    ids = torch.arange(module.embedding_bag_configs()[index].num_embeddings)
    return module._rows(group, ids, torch.tensor(module._groups[group].tables.index(index))).long()


@pytest.mark.parametrize("rows", ROWS[1:])
def test_tables_share_no_row_and_leave_none_unused(rows: str):
    sizes = [500, 90, 3, 1, 2000]
    tables = [table(f"t{n}", n, 4) for n in sizes]
    module = HashingTrickEmbeddingBagCollection(tables, compression=10, rows=rows, seed=1)
    read = [set(places(module, index)[:, 0].tolist()) for index in range(len(sizes))]
    assert sum(map(len, read)) == len(set().union(*read))
    hit = [k if k == n else k * (1 - (1 - 1 / k) ** n) for k, n in zip(module.table_rows, sizes, strict=True)]
    assert sum(map(len, read)) == pytest.approx(sum(hit), rel=0.03)  # of k rows, n ids thrown at them
    assert sum(module.table_rows) * 4 == module.memory_size


def test_single_shares_all_rows_among_all_tables():
    module = HashingTrickEmbeddingBagCollection([table("a", 1000, 4), table("b", 1000, 3)], compression=20, seed=1)
    wide, narrow = places(module, 0), places(module, 1)
    assert (module.memory_size, module.row_sizes) == (87 * 4, [4, 4])
    assert len(set(wide[:, 0].tolist()) & set(narrow[:, 0].tolist())) > 80
    assert not torch.equal(wide[:, 0], narrow[:, 0])  # the table enters the hash
    assert torch.equal(narrow, narrow[:, :1] + torch.arange(3))


@pytest.mark.parametrize("rows", ROWS[1:])
def test_a_table_with_all_its_rows_is_stored_whole(rows: str):
    module = HashingTrickEmbeddingBagCollection([table("a", 7, 4), table("b", 1000, 4)], compression=1, rows=rows)
    assert module.memory_size == 4028
    assert torch.equal(places(module, 0), torch.arange(28).view(7, 4))
    assert torch.equal(places(module, 1), 28 + torch.arange(4000).view(1000, 4))


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ("proportional", [100, 10, 1, 999]),  # 1109 / 11100 of each, .9 of a row left for the two largest remainders
        ("sqrt", [246, 78, 6, 780]),  # the smallest is whole; 1104 / (√1000 + √100 + √10000) for each √n
        ("equal", [502, 100, 6, 502]),  # the two smallest are whole
    ],
)
def test_rows_of_every_table(rows: str, expected: list[int]):
    sizes = [1000, 100, 6, 10_000]
    tables = [table(f"t{n}", n, 2) for n in sizes]
    module = HashingTrickEmbeddingBagCollection(tables, compression=10, rows=rows)
    assert module.table_rows == expected
    assert module.memory_size == 2220  # of 2221


@given(
    sizes=st.lists(st.tuples(st.integers(1, 10**6) | st.integers(1, 40), st.integers(1, 9)), min_size=1, max_size=9),
    weigh=st.sampled_from([float, math.sqrt, lambda size: 1.0]),
    share=st.floats(0, 1),
)
@settings(max_examples=300, deadline=None)
def test_budget_is_used_up_to_a_row(sizes: list[tuple[int, int]], weigh: Callable[[int], float], share: float):
    rows, dims = [n for n, _ in sizes], [d for _, d in sizes]
    full = sum(n * d for n, d in sizes)
    budget = int(share * full)
    weights = [weigh(n) for n in rows]
    found = divide_rows(weights, [1] * len(rows), rows, dims, budget)
    used = sum(n * d for n, d in zip(found, dims, strict=True))
    assert all(1 <= n <= most for n, most in zip(found, rows, strict=True))
    if budget < sum(dims):
        assert found == [1] * len(rows)
        return
    assert used <= budget
    unfilled = [d for n, most, d in zip(found, rows, dims, strict=True) if n < most]
    assert budget - used < max(unfilled, default=1)
    level = max((n - 1) / w for n, w in zip(found, weights, strict=True))  # where the last row was given at the latest
    assert all((n + 1) / w > level for n, w, most in zip(found, weights, rows, strict=True) if n < most)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("asked", [1, 1.7, 3, 10, 27.3])
def test_compression_is_kept(rows: str, asked: float):
    module = build(compression=asked, rows=rows)
    assert module.stored_bytes() == 4 * module.memory_size <= 4 * 571 / asked
    assert module.memory_size > 571 / asked - 5


@pytest.mark.parametrize(("rows", "reached"), [("single", 571 / 5), ("equal", 571 / 20)])
def test_refusal_names_what_can_be_asked(rows: Any, reached: float):
    options = hashing_trick.Options(rows=rows)
    with pytest.raises(CompressionRefused, match=r"embedding.compression = 1000: hashing_trick reaches") as refusal:
        hashing_trick.build(mixed_tables(), options, EmbeddingRequest(compression=1000))
    assert 0.999 * reached < refusal.value.nearest <= reached
    module = hashing_trick.build(mixed_tables(), options, EmbeddingRequest(compression=refusal.value.nearest))
    assert set(module.table_rows) == {1}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("max_length", [4, 0])
def test_gradient_is_that_of_the_materialised_table(rows: str, max_length: int):
    """dL/dM from dL/dE, dense and sparse: every cell of a table hands its gradient to the element it reads."""
    tables = [table("a", 50, 4), table("b", 50, 4)]
    features = random_kjt(["a", "b"], 6, max_id=50, max_length=max_length, weighted=True)
    scale, grads = torch.arange(6 * 8).view(6, 8) / 10, {}
    for gradient in ("dense", "sparse"):
        module = HashingTrickEmbeddingBagCollection(
            tables, True, compression=5, rows=rows, signed=True, gradient=gradient
        )
        (module(features).values() * scale).sum().backward()
        assert module.memory.grad is not None
        assert module.memory.grad.is_sparse == (gradient == "sparse")
        grads[gradient] = module.memory.grad.to_dense()
    torch.testing.assert_close(grads["sparse"], grads["dense"])

    expected = torch.zeros(module.memory_size)
    for index, name in enumerate("ab"):
        weight, bags = materialise(module, cell, index).requires_grad_(), features[name]
        output = F.embedding_bag(
            bags.values(), weight, bags.offsets(), mode="sum", per_sample_weights=bags.weights(),
            include_last_offset=True,
        )  # fmt: skip
        (output * scale[:, 4 * index : 4 * index + 4]).sum().backward()
        assert weight.grad is not None
        memory = module.memory.detach().clone()
        signed = materialise(module, cell, index)
        read = places(module, index).abs()
        signs = torch.where(signed == memory[read], 1.0, -1.0)
        expected.index_add_(0, read.flatten(), (signs * weight.grad).flatten())
        with torch.no_grad():
            module.memory.copy_(memory)
    torch.testing.assert_close(grads["dense"], expected)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("signed", [False, True])
def test_tables_start_with_the_asked_spread(rows: str, signed: bool):
    tables = [table("a", 3000, 16), table("b", 5, 16)]
    module = HashingTrickEmbeddingBagCollection(tables, compression=4, rows=rows, signed=signed, init_scale=0.3)
    start = materialise(module, cell, 0)
    assert start.std().item() == pytest.approx(0.3 / 3**0.5, rel=0.02)
    assert start.abs().max() <= 0.3


@pytest.mark.parametrize("family", HASH_FAMILIES)
def test_half_the_ids_have_a_minus_sign_whatever_their_row(family: str):
    arguments: dict[str, Any] = {"compression": 2000.0, "hash_family": family, "seed": 3}
    tables = [table("a", 20_000, 1)]
    plain = HashingTrickEmbeddingBagCollection(tables, **arguments)
    signed = HashingTrickEmbeddingBagCollection(tables, signed=True, **arguments)
    ids, feature = torch.arange(20_000), torch.tensor(0)
    ratio = signed._rows(0, ids, feature) / plain._rows(0, ids, feature)
    assert set(ratio.flatten().tolist()) == {1.0, -1.0}
    for row in places(plain, 0).unique():
        chosen = ratio[places(plain, 0) == row]
        assert abs(chosen.mean()) < 5 / len(chosen) ** 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": "most"}, "rows 'most' is unknown: known are"),
        ({"compression": 0.5}, "compression must be at least 1 and finite, not 0.5"),
        ({"hash_family": "md5"}, "hash_family 'md5' is unknown"),
        ({"init_scale": -1.0}, "init_scale must be at least 0, not -1.0"),
        ({"gradient": "blocked"}, "gradient 'blocked' is unknown"),
    ],
)
def test_impossible_arguments_are_refused(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        build(**arguments)


def test_more_rows_than_the_hash_reaches_are_refused():
    meta = torch.device("meta")
    with pytest.raises(ValueError, match="reaches 2038074743 slots at most, not 2147483648"):
        HashingTrickEmbeddingBagCollection([table("a", 2**33, 1)], device=meta, compression=4, hash_family="affine")


def test_cell_knows_the_bounds_of_its_table():
    for row, col in [(60, 0), (-1, 0), (0, 4), (0, -1)]:
        with pytest.raises(IndexError, match=r"outside t: 60 x 4"):
            cell(build(), 0, row, col)


def test_build_takes_the_sections_keys():
    options = hashing_trick.Options(rows="equal", hash_family="affine", signed=True, gradient="sparse")
    request = EmbeddingRequest(compression=10, init_scale=0.5, seed=3)
    module = hashing_trick.build([table("a", 100, 8)], options, request)
    assert (module.table_rows, module.options.signed, module.seed, module.gradient) == ([10], True, 3, "sparse")
    assert (module.options.rows, module.location_hash.name, module.init_scale) == ("equal", "affine", 0.5)
    for bad in ({"rows": "most"}, {"hash_family": "md5"}, {"gradient": "both"}, {"cap": 3}):
        with pytest.raises(ValidationError):
            hashing_trick.Options(**bad)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"seed": 6}, "seed is 6 here and 5 in the state dict"),
        ({"rows": "equal"}, "rows is 'equal' here and 'sqrt' in the state dict"),
        ({"hash_family": "affine"}, "hash_family is 'affine' here and 'independent' in the state dict"),
        ({"signed": True}, "signed is True here and False in the state dict"),
        ({"compression": 5.0}, "table_rows is '"),
    ],
)
def test_state_of_another_hash_is_refused(change: dict[str, Any], difference: str):
    saved = nn.Sequential(build(rows="sqrt")).state_dict()
    assert list(saved) == ["0.memory", "0._extra_state"]
    module = build(**({"rows": "sqrt"} | change))
    before = module.memory.detach().clone()
    with pytest.raises(ValueError, match=difference):
        nn.Sequential(module).load_state_dict(saved)
    assert torch.equal(module.memory, before)


@pytest.mark.parametrize("capture", CAPTURES)
def test_captured_module_gives_the_same(capture: str):
    torch._dynamo.reset()
    module, features = build(rows="equal", signed=True), random_kjt(KEYS, 4, max_id=2, seed=1)
    torch.testing.assert_close(CAPTURES[capture](module, features)(features).values(), module(features).values())


def test_defaults_work_at_toy_size():
    module = HashingTrickEmbeddingBagCollection([table("a", 10, 3), table("b", 10, 5)])
    assert module(random_kjt(["a", "b"], 3)).values().shape == (3, 8)
    assert (module.options.rows, module.memory_size) == ("single", 5)  # one row: less than the default 1000×
