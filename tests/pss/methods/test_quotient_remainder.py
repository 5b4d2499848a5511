from fractions import Fraction
from itertools import product
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
from pss.methods import quotient_remainder
from pss.methods.quotient_remainder import Options, QuotientRemainderEmbeddingBagCollection, cell
from tests.pss.captures import CAPTURES
from tests.pss.jagged import materialise, pooled_by_cell, random_kjt, table

KEYS = ["d", "a", "b", "c"]
COMBINE = get_args(Options.model_fields["combine"].annotation)
DIGITS = ["mult", "add", "concat"]
META = torch.device("meta")


def mixed_tables() -> list[EmbeddingBagConfig]:
    """Dimensions 3, 4 and 5, a shared feature, a table of two features, sum and mean, 2 to 60 rows: 571 parameters."""
    return [
        table("t", 60, 4, ["a", "b"]),
        table("u", 9, 5, ["c"], PoolingType.MEAN),
        table("v", 30, 4, ["c"], PoolingType.MEAN),
        table("w", 2, 3, ["d"]),
        table("x", 40, 4, ["a"]),
    ]


def build(tables: list[EmbeddingBagConfig] | None = None, **arguments: Any) -> QuotientRemainderEmbeddingBagCollection:
    return QuotientRemainderEmbeddingBagCollection(
        tables or mixed_tables(), **({"compression": 4.0, "seed": 5, "init_scale": 0.5} | arguments)
    )


def rows_of(module: QuotientRemainderEmbeddingBagCollection, index: int) -> Tensor:
    """The whole table by the lookup: (num_embeddings, embedding_dim)."""
    group = next(g for g, group in enumerate(module._groups) if index in group.tables)
    ids = torch.arange(module.embedding_bag_configs()[index].num_embeddings)
    return module._rows(group, ids, torch.tensor(module._groups[group].tables.index(index)))


@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("partitions", [2, 3])
@pytest.mark.parametrize("compression", [1.0, 1.3, 2.0, 4.0, 8.0])  # whole, digits, hashed quotients
def test_every_row_of_every_table_equals_cell(combine: str, partitions: int, compression: float):
    module = build(combine=combine, partitions=partitions, compression=compression)
    for index in range(len(mixed_tables())):
        torch.testing.assert_close(rows_of(module, index), materialise(module, cell, index))


@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("family", HASH_FAMILIES)
def test_bags_equal_sums_of_cells(combine: str, is_weighted: bool, family: str):
    module = build(is_weighted=is_weighted, combine=combine, compression=6, hash_family=family)
    for max_length in (4, 0):
        features = random_kjt(KEYS, 3, max_id=2, max_length=max_length, weighted=is_weighted)
        pooled = module(features)
        assert pooled.keys() == ["a@t", "b", "c@u", "c@v", "d", "a@x"]
        torch.testing.assert_close(pooled.values().double(), pooled_by_cell(module, cell, features))


@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("partitions", [2, 3, 5])
def test_rows_of_huge_tables(combine: str, partitions: int):
    """Quotients beyond 2^53 are exact: no division of floats. Unequal digits make unequal rows."""
    tables = [table("a", 2**63 - 1, 5), table("b", 2**62 + 5, 5)]
    module = build(tables, combine=combine, partitions=partitions, compression=2.0**51)
    ids = [0, 2**31 - 1, 2**31, 2**32 + 5, 2**53 + 1, 2**62 + 3, 2**62 + 4]
    features = KeyedJaggedTensor(["a", "b"], torch.tensor(ids * 2), lengths=torch.ones(14, dtype=torch.int64))
    pooled = module(features).values()
    torch.testing.assert_close(pooled.double(), pooled_by_cell(module, cell, features), rtol=1e-6, atol=1e-6)
    assert pooled[:, :5].unique(dim=0).shape == (7, 5)


@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("compression", [1.0, 2.0, 5.0])
def test_any_int64_reads_inside_the_array(combine: str, compression: float):
    """Validation is upstream; a stray id must still not read out of bounds."""
    ids = torch.tensor([-1, -(2**63), -12345, 2**63 - 1])
    module = build([table("a", 10, 8)], combine=combine, compression=compression)
    values = module(KeyedJaggedTensor(["a"], ids, lengths=torch.tensor([4]))).values()
    assert values.isfinite().all()
    values.sum().backward()


def pieces_read(module: QuotientRemainderEmbeddingBagCollection, index: int) -> list[frozenset[int]]:
    """For every row of a table the elements of memory that it reads, found by their gradients."""
    reads = []
    with torch.no_grad():
        module.memory.uniform_(1, 2)
    for row in rows_of(module, index):
        (gradient,) = torch.autograd.grad(row.sum(), module.memory, retain_graph=True)
        reads.append(frozenset(gradient.nonzero().flatten().tolist()))
    return reads


@pytest.mark.parametrize("combine", DIGITS)
@pytest.mark.parametrize("partitions", [2, 3])
@pytest.mark.parametrize("compression", [1.1, 1.7, 3.0, 5.0])
def test_partitions_are_complementary(combine: str, partitions: int, compression: float):
    """Every id has a combination of its own where the budget allows, and tables share no element."""
    tables = [table("a", 200, 6), table("b", 90, 7), table("c", 3, 6)]
    module = build(tables, combine=combine, partitions=partitions, compression=compression, gradient="dense")
    assert not any(any(stored.is_hashed) for stored in module.stored)
    reads = [pieces_read(module, index) for index in range(3)]
    for config, of_table in zip(tables, reads, strict=True):
        assert len(set(of_table)) == config.num_embeddings
    whole = [frozenset().union(*of_table) for of_table in reads]
    assert sum(map(len, whole)) == len(frozenset().union(*whole))


@pytest.mark.parametrize(("combine", "rows"), [("mult", [37, 3]), ("add", [37, 3]), ("concat", [78, 2])])
def test_frequent_ids_share_no_row_of_the_first_partition(combine: str, rows: list[int]):
    """40 rows of 4, or 80 of each half: as few quotients as tell 100 ids apart, all others remainders."""
    module = build([table("a", 100, 4)], combine=combine, compression=2.5)
    assert module.stored[0].rows == rows
    first = [min(read) for read in pieces_read(module, 0)[: rows[0]]]
    width = 2 if combine == "concat" else 4
    assert first == [width * row for row in range(rows[0])]


def test_digits_by_hand():
    """87 = (1·4 + 3)·11 + 10 in radices 11, 4, 3; and in radices 4, 4, 4 with the quotient 5 of 4·4 hashed."""
    module = build([table("a", 115, 3)], combine="concat", partitions=3, compression=19)
    with torch.no_grad():
        module.memory.copy_(torch.arange(18))
    assert module.stored[0].rows == [11, 4, 3]
    assert rows_of(module, 0)[87].tolist() == [10, 11 + 3, 15 + 1]
    module = build([table("a", 115, 3)], combine="concat", partitions=3, compression=28)
    with torch.no_grad():
        module.memory.copy_(torch.arange(12))
    assert module.stored[0].rows == [4, 4, 4]
    assert rows_of(module, 0)[87].tolist() == [3, 4 + 1, 8 + module.location_hash.location(0, 5, 2, 1 << 62) % 4]


def test_chunks_have_hashes_of_their_own():
    """Equation (1) of the PSS paper: 300 ids in 20 rows a piece share pieces, but not whole rows."""
    module = build([table("a", 300, 6)], combine="chunked", partitions=3, compression=15)
    reads = [tuple(sorted(read)) for read in pieces_read(module, 0)]
    assert module.stored[0].rows == [20, 20, 20]
    for piece in range(3):
        assert len({read[2 * piece] for read in reads}) == 20
        assert all(40 * piece <= read[2 * piece] < 40 * piece + 40 for read in reads)
    assert len(set(reads)) > 290  # 300² / 2 / 20³ = 6 pairs meet


@given(
    sizes=st.lists(st.tuples(st.integers(1, 10**7) | st.integers(1, 40), st.integers(3, 9)), min_size=1, max_size=7),
    combine=st.sampled_from(COMBINE),
    partitions=st.integers(2, 3),
    compression=st.floats(1, 3) | st.floats(1, 1e5),
)
@settings(max_examples=300, deadline=None)
def test_budget_is_used_up_to_a_row(sizes: list[tuple[int, int]], combine: str, partitions: int, compression: float):
    """Concat: and less than another row a table, for halves that are left over."""
    tables = [table(f"t{i}", n, d) for i, (n, d) in enumerate(sizes)]
    module = build(tables, combine=combine, partitions=partitions, device=META, compression=compression)
    fewest = sum(d * min(n, partitions if combine in ("mult", "add") else 1) for n, d in sizes)
    budget = int(sum(n * d for n, d in sizes) // Fraction(compression))
    if budget < fewest:
        assert module.memory_size == fewest
        return
    unused = budget - module.memory_size
    assert 0 <= unused < max(d for _, d in sizes) + (sum(d for _, d in sizes) if combine == "concat" else 0)


@pytest.mark.parametrize(
    ("compression", "rows"),
    [  # 200, 15 and 90 rows tell the ids of the three apart
        (30, [[100, 100], [50, 1], [136, 15]]),  # 401 rows: the small one is whole, the last has what is left, 151
        (100, [[27, 26], [10, 5], [26, 26]]),  # 120 rows: the small one has its 15, the others 53 and 52
    ],
)
def test_small_tables_come_first(compression: float, rows: list[list[int]]):
    tables = [table("a", 10_000, 4), table("b", 50, 4), table("c", 2000, 4)]
    assert [stored.rows for stored in build(tables, combine="mult", compression=compression).stored] == rows


@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("compression", [2.0, 8.0])
@pytest.mark.parametrize("max_length", [4, 0])
def test_gradient_is_that_of_the_materialised_table(combine: str, compression: float, max_length: int):
    """Dense and sparse are equal, and those of the table, cell by cell, put through the derivatives of the formula."""
    tables = [table("a", 30, 4), table("b", 3, 4)]
    features = random_kjt(["a", "b"], 6, max_id=3, max_length=max_length, weighted=True)
    scale, grads = torch.arange(6 * 8).view(6, 8) / 10, {}
    arguments: dict[str, Any] = {"combine": combine, "compression": compression, "is_weighted": True}
    for gradient in ("dense", "sparse"):
        module = build(tables, gradient=gradient, **arguments)
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
        for slot in range(module.memory_size):  # every number of the table is linear in one element of memory
            moved = build(tables, **arguments)
            moved.memory.data[slot] += 1
            expected[slot] += ((materialise(moved, cell, index) - weight.detach()) * weight.grad).sum()
    torch.testing.assert_close(grads["dense"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("partitions", [2, 3])
@pytest.mark.parametrize("compression", [2.0, 20.0, 200.0])
def test_tables_start_with_the_asked_spread(combine: str, partitions: int, compression: float):
    """Over 40 seeds: a table of few rows is far from its expectation."""
    arguments: dict[str, Any] = {"combine": combine, "partitions": partitions, "compression": compression}
    tables = [table("a", 2000, 6), table("b", 5, 6)]
    starts = [[rows_of(build(tables, seed=seed, **arguments), index) for seed in range(40)] for index in (0, 1)]
    for start in starts:
        assert torch.cat(start).std().item() == pytest.approx(0.5 / 3**0.5, rel=0.1)


def test_start_is_a_function_of_the_seed():
    one = build(compression=3)
    assert torch.equal(one.memory, build(compression=3).memory)
    assert not torch.equal(one.memory, build(compression=3, seed=6).memory)
    other = build(compression=3, device=META).to_empty(device="cpu")
    other.reset_parameters()
    assert torch.equal(one.memory, other.memory)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"combine": "max"}, "combine 'max' is unknown: known are"),
        ({"partitions": 1}, "partitions must be at least 2, not 1"),
        ({"combine": "concat", "partitions": 4}, "table 'w' has embedding_dim 3, too few for the 4 partitions"),
        ({"compression": 0.5}, "compression must be at least 1 and finite, not 0.5"),
        ({"hash_family": "md5"}, "hash_family 'md5' is unknown"),
        ({"gradient": "blocked"}, "gradient 'blocked' is unknown"),
    ],
)
def test_impossible_arguments_are_refused(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        build(**arguments)


@pytest.mark.parametrize("combine", COMBINE)
def test_refusal_names_what_can_be_asked(combine: Any):
    """One row in both partitions: 2·(4 + 5 + 4 + 3 + 4) of the 571 parameters; one row of each in two pieces: half."""
    options = quotient_remainder.Options(combine=combine)
    with pytest.raises(CompressionRefused, match=r"compression = 1000: quotient_remainder reaches") as refusal:
        quotient_remainder.build(mixed_tables(), options, EmbeddingRequest(compression=1000))
    reached = 571 / (40 if combine in ("mult", "add") else 20)
    assert 0.999 * reached < refusal.value.nearest <= reached
    module = quotient_remainder.build(mixed_tables(), options, EmbeddingRequest(compression=refusal.value.nearest))
    assert module.memory_size == round(571 / reached)


def test_more_rows_than_the_hash_reaches_are_refused():
    arguments: dict[str, Any] = {"combine": "chunked", "device": META, "hash_family": "affine"}
    with pytest.raises(ValueError, match="reaches 2038074743 slots at most, not 2147483648"):
        build([table("a", 2**33, 2)], compression=4, **arguments)
    assert not build([table("a", 2**33, 2)], compression=1, **arguments).stored[0].is_hashed[0]


def test_cell_knows_the_bounds_of_its_table():
    for row, col in [(60, 0), (-1, 0), (0, 4), (0, -1)]:
        with pytest.raises(IndexError, match=r"outside t: 60 x 4"):
            cell(build(), 0, row, col)


def test_build_takes_the_sections_keys():
    options = quotient_remainder.Options(combine="add", partitions=3, hash_family="affine", gradient="sparse")
    request = EmbeddingRequest(compression=10, init_scale=0.25, seed=3)
    module = quotient_remainder.build([table("a", 100, 8)], options, request)
    assert (module.options.combine, module.options.partitions, module.seed, module.gradient) == ("add", 3, 3, "sparse")
    assert (module.location_hash.name, module.init_scale, module.memory_size) == ("affine", 0.25, 80)
    for bad in ({"combine": "max"}, {"partitions": 1}, {"hash_family": "md5"}, {"collisions": 3}):
        with pytest.raises(ValidationError):
            quotient_remainder.Options(**bad)  # pyright: ignore[reportArgumentType]


def test_gradient_form_counts_the_rows_of_every_partition():
    """60 ids read 240 elements, less than 1/40 of 12,400; from each of two partitions they are more."""
    tables = [table("a", 3100, 4)]
    for combine, form in (("concat", "sparse"), ("mult", "dense")):
        module = build(tables, combine=combine, compression=1)
        module.gradient = "auto"
        module.choose_gradient(60)
        assert module.gradient == form


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"seed": 6}, "seed is 6 here and 5 in the state dict"),
        ({"combine": "add"}, "combine is 'add' here and 'mult' in the state dict"),
        ({"partitions": 3}, "partitions is 3 here and 2 in the state dict"),
        ({"hash_family": "affine"}, "hash_family is 'affine' here and 'independent' in the state dict"),
        ({"compression": 5.0}, "table_rows is '"),
    ],
)
def test_state_of_other_partitions_is_refused(change: dict[str, Any], difference: str):
    saved = nn.Sequential(build()).state_dict()
    assert list(saved) == ["0.memory", "0._extra_state"]
    module = build(**change)
    before = module.memory.detach().clone()
    with pytest.raises(ValueError, match=difference):
        nn.Sequential(module).load_state_dict(saved)
    assert torch.equal(module.memory, before)


@pytest.mark.parametrize(("combine", "capture"), [*product(["mult"], CAPTURES), ("concat", "fx"), ("concat", "script")])
def test_captured_module_gives_the_same(capture: str, combine: str):
    torch._dynamo.reset()
    module, features = build(combine=combine, compression=6), random_kjt(KEYS, 4, max_id=2, seed=1)
    torch.testing.assert_close(CAPTURES[capture](module, features)(features).values(), module(features).values())


def test_defaults_work_at_toy_size():
    module = QuotientRemainderEmbeddingBagCollection([table("a", 10, 3), table("b", 10, 5)])
    assert module(random_kjt(["a", "b"], 3)).values().shape == (3, 8)
    assert (module.options.combine, module.memory_size) == ("mult", 16)  # a row in each: less than the default 1000×
