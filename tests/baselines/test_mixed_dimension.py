import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torchrec.fx import symbolic_trace
from torchrec.modules.embedding_configs import PoolingType

from baselines import full, mixed_dimension
from baselines.mixed_dimension import Block, MixedDimensionEmbeddingBagCollection, cell, divide_rows, solve_dims
from pss.method import CompressionRefused, EmbeddingRequest
from tests.pss.jagged import materialise, pooled_by_cell, random_kjt, table

KEYS = ["d", "a", "b", "c"]


def mixed_tables():
    """Three widths, a table of two features, a feature of two tables, sum and mean; in no order of the widths."""
    return [
        table("t", 90, 8, ["a", "b"]),
        table("u", 60, 5, ["c"], PoolingType.MEAN),
        table("v", 50, 8, ["c"], PoolingType.MEAN),
        table("w", 9, 3, ["d"]),
        table("x", 70, 8, ["a"]),
    ]


def dims(module):
    return [block.dim for block in module.blocks]


@pytest.mark.parametrize("blocks", ["tables", "popularity"])
@pytest.mark.parametrize("compression", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("is_weighted", [False, True])
def test_lookup_equals_cell(blocks, compression, is_weighted):
    module = MixedDimensionEmbeddingBagCollection(
        mixed_tables(), is_weighted, compression=compression, blocks=blocks, popularity_blocks=3, init_scale=1.0
    )
    for max_length in (4, 0):
        features = random_kjt(KEYS, 6, max_id=9, max_length=max_length, weighted=is_weighted)
        for name in KEYS[1:]:
            features[name].values().square_().remainder_(47)  # ids of every block
        pooled = module(features).values()
        torch.testing.assert_close(pooled.double(), pooled_by_cell(module, cell, features), rtol=1e-5, atol=1e-6)


def test_a_table_is_its_rows_times_its_projection():
    """Layout and gradients against plain matrices: t whole and short, u whole, w wider and short."""
    tables = [table("w", 40, 10), table("t", 20, 6), table("u", 3, 6)]
    module = MixedDimensionEmbeddingBagCollection(
        tables, compression=2.5, blocks="popularity", popularity_blocks=2, alpha=0.2, init_scale=1.0
    )
    described = [(b.table, b.start, b.stop, b.dim) for b in module.blocks]
    assert described == [(1, 0, 4, 6), (1, 4, 20, 2), (2, 0, 1, 6), (2, 1, 3, 6), (0, 0, 5, 2), (0, 5, 40, 2)]
    rows, projections = (p.detach().clone().requires_grad_() for p in module.parameters())
    whole, short, one, two, head, tail = rows.split([24, 32, 6, 12, 10, 70])
    p_short, p_head, p_tail = projections.split([12, 20, 20])
    t = torch.cat([whole.view(4, 6), short.view(16, 2) @ p_short.view(2, 6)])
    u = torch.cat([one.view(1, 6), two.view(2, 6)])
    w = torch.cat([head.view(5, 2) @ p_head.view(2, 10), tail.view(35, 2) @ p_tail.view(2, 10)])
    for features in (random_kjt(["t", "w", "u"], 30, max_id=3), random_kjt(["t", "w", "u"], 9, max_id=3, max_length=0)):
        features["w"].values()[:] = features["w"].values() * 13
        features["t"].values()[:] = features["t"].values() * 9
        found = module(features)
        expected = []
        for name, weight in (("w", w), ("t", t), ("u", u)):
            part = features[name]
            bags = part.values().split(part.lengths().tolist())
            expected.append(torch.stack([weight[bag].sum(0) for bag in bags]))
        expected = torch.cat(expected, dim=1)
        torch.testing.assert_close(found.values(), expected)
        scale = torch.randn(expected.shape)
        gradients = torch.autograd.grad((found.values() * scale).sum(), list(module.parameters()))
        wanted = torch.autograd.grad((expected * scale).sum(), [rows, projections], retain_graph=True)
        torch.testing.assert_close(gradients, wanted)


@pytest.mark.parametrize(
    ("compression", "power_of_two", "expected"),
    [
        # n^-α = .3162, .1, .03162. λ < 63.25, or the largest table gets 2: ⌊λ n^-α⌋ = 19, 6, 1. What is left of the
        # 2,020,200 is 958,488: too little for 2, enough to round 6.3 up.
        (8.0, False, [16, 7, 1]),
        (7.5, False, [16, 10, 2]),  # λ < 94.87: 30, 9, 2; 9.49 is rounded up
        (8.0, True, [16, 4, 1]),  # λ < 44.7: 14.1, 4.47, 1.41
        (1.0, False, [16, 16, 16]),
        (1.0, True, [16, 16, 16]),
        (15.9, False, [7, 1, 1]),  # λ < 20: 6, 1.99, 0.6; of 5,724 left, b would take 10,016 more, a takes 116
    ],
)
def test_dimensions_follow_the_power_rule(compression, power_of_two, expected):
    tables = [table("a", 100, 16), table("b", 10_000, 16), table("c", 1_000_000, 16)]
    module = MixedDimensionEmbeddingBagCollection(
        tables, device=torch.device("meta"), compression=compression, alpha=0.25, round_to_power_of_two=power_of_two
    )
    assert dims(module) == expected


def test_alpha_0_is_one_dimension_and_alpha_1_the_same_parameters():
    tables = [table("a", 300, 64), table("b", 3000, 64), table("c", 30_000, 64)]
    options: dict[str, Any] = {"device": torch.device("meta"), "compression": 16.0}
    assert dims(MixedDimensionEmbeddingBagCollection(tables, alpha=0.0, **options)) == [4, 4, 3]
    assert dims(MixedDimensionEmbeddingBagCollection(tables, alpha=1.0, **options)) == [64, 20, 1]


def test_what_is_left_goes_to_blocks_that_were_rounded_down():
    """100 popular rows and 10 that are hardly used: of 424, (100 + 16)·3 + (10 + 16)·1 leaves 50."""
    blocks = [Block(0, 0, 100, 0.01, embedding_dim=16), Block(0, 100, 110, 1e-6, embedding_dim=16)]
    assert [block.dim for block in solve_dims(blocks, 1.0, 424)] == [3, 1]  # 26 more would fit, but λ·p < 1
    assert [block.dim for block in solve_dims(blocks, 0.1, 424)] == [3, 2]  # 3.98 and 1.59


def test_short_rows_are_used_only_where_they_are_smaller():
    block = Block(0, 0, 5, 0.2, embedding_dim=8)  # whole: 40
    assert [block.with_dim(dim).dim for dim in (0, 1, 3, 4, 8, 9)] == [1, 1, 3, 8, 8, 8]  # 3: 39, 4: 52
    assert Block(0, 0, 8, 0.1, embedding_dim=8).with_dim(4).dim == 8  # 64 either way


def test_blocks_have_equal_shares_of_the_accesses():
    counts = [np.array([7, 3, 3, 1, 1, 0, 0, 0, 0]), np.zeros(2, dtype=np.int64)]  # 8 4 4 2 2 1 1 1 1 with one more
    tables = [table("a", 9, 8), table("b", 2, 4)]
    found = [tuple(block) for block in divide_rows(tables, 3, counts)]
    assert found[:2] == [(1, 0, 1, 0.5, 4, 1), (1, 1, 2, 0.5, 4, 1)]
    assert found[2:] == [(0, 0, 1, 8 / 24, 8, 1), (0, 1, 3, 8 / 24 / 2, 8, 1), (0, 3, 9, 8 / 24 / 6, 8, 1)]
    assert [tuple(block) for block in divide_rows(tables, 1, counts)] == [(1, 0, 2, 0.5, 4, 1), (0, 0, 9, 1 / 9, 8, 1)]


def test_without_counts_ids_are_taken_to_fall_as_one_over_their_rank():
    blocks = divide_rows([table("a", 10**6, 8)], 3, None)
    assert [block.start for block in blocks] == [0, 99, 9999]
    harmonic = np.concatenate([[0], np.cumsum(1 / (1 + np.arange(10**6)))])
    shares = [(harmonic[b.stop] - harmonic[b.start]) / harmonic[-1] / (b.stop - b.start) for b in blocks]
    np.testing.assert_allclose([block.popularity for block in blocks], shares, rtol=0.1)
    far = divide_rows([table("a", 2**40, 8)], 4, None)
    assert [block.start for block in far] == [0, 2**10 - 1, 2**20 - 1, 2**30 - 1]


def test_the_budget_is_kept_and_used_up():
    tables = mixed_tables()
    whole = sum(t.num_embeddings * t.embedding_dim for t in tables)
    options = itertools.product((1.0, 1.1, 2.0, 3.3), ("tables", "popularity"), (0.0, 0.3, 1.0), (False, True))
    for compression, blocks, alpha, power_of_two in options:
        module = MixedDimensionEmbeddingBagCollection(
            tables, compression=compression, blocks=blocks, alpha=alpha, round_to_power_of_two=power_of_two
        )
        stored = sum(parameter.numel() for parameter in module.parameters())
        assert module.compression == whole / stored >= compression
        assert all(1 <= b.dim <= b.embedding_dim for b in module.blocks)
        assert [b for b in module.blocks if b.start == 0] == sorted(
            (b for b in module.blocks if b.start == 0), key=lambda b: (b.embedding_dim, b.table)
        )
        assert sum(b.stop - b.start for b in module.blocks) == sum(t.num_embeddings for t in tables)
        if not power_of_two and compression > 1:
            assert whole / compression - stored < 90 + 8, (compression, blocks, alpha)  # a dimension of the largest


def test_more_budget_never_shortens_a_block():
    blocks = divide_rows([table("a", 30, 16), table("b", 500, 16), table("c", 7000, 16)], 3, None)
    before = [0] * len(blocks)
    for budget in range(8_000, 120_000, 500):
        solved = solve_dims(blocks, 0.5, budget, True)
        assert sum(b.rows_size + b.projection_size for b in solved) <= budget
        assert all(b.dim >= d for b, d in zip(solved, before, strict=True))
        before = [b.dim for b in solved]


def test_too_high_compression_names_the_nearest():
    tables = [table("a", 100, 8), table("b", 3, 4)]  # 812 parameters; one column: 100 + 8 and 3 + 4
    with pytest.raises(
        CompressionRefused, match=r"compression = 8: mixed_dimension reaches 7.06087 at most"
    ) as refused:
        MixedDimensionEmbeddingBagCollection(tables, compression=8.0)
    assert refused.value.nearest == 7.06
    module = mixed_dimension.build(tables, mixed_dimension.Options(), EmbeddingRequest(compression=7.06))
    assert dims(module) == [1, 1]


@pytest.mark.parametrize("compression", [1.0, 2.0, 5.0, 14.0])
def test_the_start_has_the_spread_of_full_tables(compression):
    tables = [table("a", 20_000, 16), table("b", 3000, 16), table("c", 400, 16)]
    module = MixedDimensionEmbeddingBagCollection(
        tables, compression=compression, blocks="popularity", popularity_blocks=2, init_scale=0.03
    )
    for index, config in enumerate(tables):
        for block in (b for b in module.blocks if b.table == index and b.stop - b.start > 300):
            ids = torch.arange(block.start, block.stop)
            feature = torch.tensor(index)
            rows = module._rows(0, ids, feature).detach()
            assert rows.std().item() == pytest.approx(0.03 / math.sqrt(3), rel=0.08), (config.name, block)
            assert abs(rows.mean().item()) < 0.1 * 0.03
    assert compression == 1.0 or min(dims(module)) < 16


def test_uncompressed_it_is_the_full_tables_to_the_bit():
    tables = [table("a", 100, 8), table("b", 30, 5)]
    request = EmbeddingRequest(init_scale=0.5, seed=4)
    module = mixed_dimension.build(tables, mixed_dimension.Options(blocks="popularity"), request)
    assert module.projections is None
    oracle = full.build([table("a", 100, 8), table("b", 30, 5)], full.Options(), request)
    for index in range(2):
        weight = list(oracle.parameters())[index]
        assert torch.equal(materialise(module, cell, index), weight)
    features = random_kjt(["a", "b"], 5, max_length=0)
    assert torch.equal(module(features).values(), oracle(features).values())


def test_the_start_depends_on_the_seed_alone():
    def parameters(seed):
        module = MixedDimensionEmbeddingBagCollection(mixed_tables(), compression=3.0, seed=seed)
        return torch.cat([parameter.detach() for parameter in module.parameters()])

    torch.manual_seed(1)
    one, state = parameters(7), torch.get_rng_state()
    two = parameters(7)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one, two)
    assert (one != parameters(8)).float().mean() > 0.99


def test_made_real_from_the_meta_device():
    module = MixedDimensionEmbeddingBagCollection(mixed_tables(), device=torch.device("meta"), compression=3.0)
    assert all(parameter.is_meta for parameter in module.parameters())
    module.to_empty(device="cpu").reset_parameters()
    for parameter, expected in zip(
        module.parameters(),
        MixedDimensionEmbeddingBagCollection(mixed_tables(), compression=3.0).parameters(),
        strict=True,
    ):
        assert torch.equal(parameter, expected)


def test_state_of_other_blocks_is_refused():
    tables = [table("a", 100, 8), table("b", 30, 8)]
    saved = MixedDimensionEmbeddingBagCollection(tables, compression=2.0).state_dict()
    assert list(saved) == ["rows", "projections", "_extra_state"]
    assert saved["_extra_state"]["blocks"] == "a[0:100] x 3, b[0:30] x 5"
    with pytest.raises(ValueError, match=r"blocks is 'a\[0:100\] x 3, b\[0:30\] x 4' here and 'a\[0:100\] x 3"):
        MixedDimensionEmbeddingBagCollection(tables, compression=2.0, alpha=0.0).load_state_dict(saved)


def test_captures_and_empty_batches():
    module = MixedDimensionEmbeddingBagCollection(mixed_tables(), compression=3.0, blocks="popularity")
    features = random_kjt(KEYS, 4, max_id=9)
    expected = module(features).values()
    assert torch.equal(symbolic_trace(module)(features).values(), expected)
    assert torch.equal(torch.jit.script(module)(features).values(), expected)
    no_ids = random_kjt(KEYS, 4, max_id=9)
    no_ids = type(no_ids)(KEYS, torch.empty(0, dtype=torch.int64), lengths=torch.zeros(16, dtype=torch.int64))
    assert torch.equal(module(no_ids).values(), torch.zeros(4, 8 + 8 + 5 + 8 + 3 + 8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 1.5}, "alpha must be at most 1, not 1.5"),
        ({"blocks": "ids"}, "blocks 'ids' is unknown"),
        ({"blocks": "popularity", "popularity_blocks": 0}, "popularity_blocks must be at least 1, not 0"),
        ({"id_counts": [np.ones(9)]}, "id_counts of table 'a' has 9 ids, not 10"),
        ({"compression": 0.5}, "compression must be at least 1"),
    ],
)
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MixedDimensionEmbeddingBagCollection([table("a", 10, 4)], **arguments)


def test_options_are_checked():
    bad_values: list[dict[str, Any]] = [{"alpha": -0.1}, {"blocks": "ids"}, {"popularity_blocks": 0}, {"dim": 3}]
    for bad in bad_values:
        with pytest.raises(ValidationError):
            mixed_dimension.Options(**bad)
