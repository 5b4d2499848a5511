from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from pss.method import CompressionRefused, EmbeddingRequest
from pss.methods import jlt
from pss.methods.jlt import JltEmbeddingBagCollection, cell
from tests.pss.captures import CAPTURES, COPIES
from tests.pss.jagged import materialise, pooled_by_cell, random_kjt, table

SKETCHES: dict[str, dict[str, Any]] = {
    "sparse": {"sketch": "sparse", "rows": 12, "nonzeros": 3},
    "hashing": {"sketch": "sparse", "rows": 12, "nonzeros": 1},
    "achlioptas": {"sketch": "achlioptas", "rows": 12},
    "gaussian": {"sketch": "gaussian", "rows": 12},
}
KEYS = ["d", "a", "b", "c"]
META = torch.device("meta")


def mixed_tables() -> list[EmbeddingBagConfig]:
    """Dimensions 8, 6 and 3, a shared feature, a table of two features, sum and mean."""
    return [
        table("t", 10, 8, ["a", "b"]),
        table("u", 9, 6, ["c"], PoolingType.MEAN),
        table("v", 10, 8, ["c"], PoolingType.MEAN),
        table("w", 10, 3, ["d"]),
    ]


def all_rows(module: JltEmbeddingBagCollection) -> Tensor:
    """The rows of every table, one after the other, of tables of one embedding_dim."""
    sizes = [config.num_embeddings for config in module.embedding_bag_configs()]
    return torch.cat([module._rows(0, torch.arange(size), torch.tensor([t])) for t, size in enumerate(sizes)]).detach()


@pytest.fixture(params=SKETCHES)
def sketch(request: pytest.FixtureRequest) -> dict[str, Any]:
    return SKETCHES[request.param]


@pytest.mark.parametrize("is_weighted", [False, True])
def test_lookup_equals_cell(sketch: dict[str, Any], is_weighted: bool):
    module = JltEmbeddingBagCollection(mixed_tables(), is_weighted, seed=5, **sketch)
    for max_length in (4, 0):
        features = random_kjt(KEYS, 3, max_id=9, max_length=max_length, weighted=is_weighted)
        pooled = module(features)
        assert pooled.keys() == ["a", "b", "c@u", "c@v", "d"]
        torch.testing.assert_close(
            pooled.values().double(), pooled_by_cell(module, cell, features), rtol=1e-5, atol=1e-7
        )


@pytest.mark.parametrize("name", ["sparse", "hashing", "achlioptas"])
def test_rows_of_huge_tables(name: str):
    module = JltEmbeddingBagCollection([table("a", 2**63 - 1, 3), table("b", 2**63 - 1, 3)], **SKETCHES[name])
    ids = [0, 2**31 - 1, 2**31, 2**32 + 5, 2**53 + 1, 2**62 + 3, 2**63 - 2]
    features = KeyedJaggedTensor(["a", "b"], torch.tensor(ids * 2), lengths=torch.ones(14, dtype=torch.int64))
    torch.testing.assert_close(module(features).values().double(), pooled_by_cell(module, cell, features))
    stray = KeyedJaggedTensor(["a", "b"], torch.tensor([-1, -(2**63)]), lengths=torch.ones(2, dtype=torch.int64))
    assert module(stray).values().isfinite().all()


def test_cell_knows_the_bounds_of_its_table(sketch: dict[str, Any]):
    module = JltEmbeddingBagCollection([table("a", 10, 4)], **sketch)
    for row, col in [(10, 0), (-1, 0), (0, 4), (0, -1)]:
        with pytest.raises(IndexError, match=r"outside a: 10 x 4"):
            cell(module, 0, row, col)


def units(module: JltEmbeddingBagCollection) -> list[Tensor]:
    """The tables by `cell` for every slot of memory set to 1 alone: (|M|, num_embeddings, embedding_dim) each."""
    tables: list[list[Tensor]] = []
    before = module.memory.detach().clone()
    for slot in range(module.memory_size):
        module.memory.data.zero_()[slot] = 1.0
        tables.append([materialise(module, cell, index) for index in range(len(module.embedding_bag_configs()))])
    module.memory.data.copy_(before)
    return [torch.stack(of_slots) for of_slots in zip(*tables, strict=True)]


@pytest.mark.parametrize(
    ("name", "gradient"), [*((name, "dense") for name in SKETCHES), ("sparse", "sparse"), ("hashing", "sparse")]
)
@pytest.mark.parametrize("max_length", [4, 0])
def test_gradient_is_that_of_the_materialised_table(name: str, gradient: str, max_length: int):
    tables = [table("a", 10, 4), table("b", 10, 3)]
    module = JltEmbeddingBagCollection(tables, True, gradient=gradient, **SKETCHES[name])
    features = random_kjt(["a", "b"], 4, max_length=max_length, weighted=True)
    scale = torch.arange(4.0 * 7).view(4, 7) / 10
    (module(features).values() * scale).sum().backward()
    expected = torch.zeros(module.memory_size)
    for key, of_slots, part in zip("ab", units(module), scale.split([4, 3], dim=1), strict=True):
        bags = features[key]
        bag = torch.repeat_interleave(torch.arange(4), bags.lengths())
        grad_table = torch.zeros(of_slots.shape[1:]).index_add_(0, bags.values(), bags.weights()[:, None] * part[bag])
        expected += (of_slots * grad_table).sum((1, 2))
    assert module.memory.grad is not None
    assert module.memory.grad.is_sparse == (gradient == "sparse")
    torch.testing.assert_close(module.memory.grad.to_dense(), expected)


@pytest.mark.parametrize("name", ["achlioptas", "gaussian"])
def test_blocks_of_columns_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch):
    """16 ids at a time, of 37 with the same columns of S."""
    module, features = JltEmbeddingBagCollection([table("a", 10, 4)], **SKETCHES[name]), random_kjt(["a"], 37)
    found = []
    for entries in (1, 1 << 18):
        monkeypatch.setattr(jlt, "_CPU_BLOCK_ENTRIES", entries)
        module.zero_grad()
        values = module(features).values()
        (values * torch.arange(4)).sum().backward()
        assert module.memory.grad is not None
        found.append((values.detach(), module.memory.grad))
    torch.testing.assert_close(found[0], found[1])


K = 64


def sketch_matrix(name: str, seed: int = 0) -> Tensor:
    """Sᵀ (N, K) of two tables of 1,500 and 500 rows: what the lookup reads of M = identity."""
    options: dict[str, Any] = SKETCHES[name] | {"rows": K, "nonzeros": 4 if name == "sparse" else 1, "seed": seed}
    module = JltEmbeddingBagCollection([table("a", 1500, K), table("b", 500, K)], **options)
    module.memory.data.copy_(torch.eye(K).view(-1))
    return all_rows(module).double()


@pytest.mark.parametrize("name", SKETCHES)
@pytest.mark.parametrize("seed", [0, 1])
def test_columns_are_of_unit_norm_and_nearly_orthogonal(name: str, seed: int):
    """For all four, E SᵀS is the identity and inner products of different columns have variance 1 / k."""
    matrix = sketch_matrix(name, seed)
    gram = matrix @ matrix.t()
    norms, products = gram.diagonal(), gram[torch.triu(torch.ones_like(gram), 1).bool()]
    spread = {"sparse": 0.0, "hashing": 0.0, "achlioptas": 2 / K, "gaussian": 2 / K}[name]  # variance of the norms
    assert abs(norms.mean() - 1) <= 5 * (spread / 2000) ** 0.5 + 1e-6
    assert abs(norms.var() - spread) < 0.2 * spread + 1e-9
    assert abs(products.mean()) < 5 * (1 / K / products.numel()) ** 0.5
    assert abs(products.var() * K - 1) < 0.03
    assert gram.diagonal(1500).abs().mean() < 0.2  # the same row of the two tables


@pytest.mark.parametrize("name", SKETCHES)
def test_rows_of_the_sketch_are_alike_and_uncorrelated(name: str):
    matrix = sketch_matrix(name)
    moment = {"sparse": 4 / 4**2, "hashing": 1.0, "achlioptas": 3 / K, "gaussian": 3 / K}[name] / K  # E entry⁴
    squares = (moment - 1 / K**2) ** 0.5
    assert (matrix.mean(0).abs() < 5 * (1 / K / 2000) ** 0.5).all()
    assert (matrix.square().mean(0) - 1 / K).abs().max() < 5 * squares / 2000**0.5
    # Two rows: entries of the same sparse column and block are never both non-zero.
    correlation = torch.corrcoef(matrix.t()) - torch.eye(K)
    assert correlation.abs().max() < 6 * 2000**-0.5 * (squares * K if name in ("sparse", "hashing") else 1)


def test_sparse_has_one_entry_in_every_block_of_rows():
    blocks = sketch_matrix("sparse").view(2000, 4, K // 4)
    assert ((blocks != 0).sum(2) == 1).all()
    assert (blocks[blocks != 0].abs() == 0.5).all()
    chosen = blocks.abs().argmax(2)
    for other in range(1, 4):  # the places in two blocks agree as often as chance has it
        assert abs((chosen[:, 0] == chosen[:, other]).double().mean() - 1 / 16) < 5 * (1 / 16 / 2000) ** 0.5


def test_achlioptas_frequencies():
    entries = sketch_matrix("achlioptas").flatten() / (3 / K) ** 0.5
    for value, share in ((0, 2 / 3), (1, 1 / 6), (-1, 1 / 6)):
        found = (entries - value).abs() < 1e-6
        assert abs(found.double().mean() - share) < 5 * (share * (1 - share) / entries.numel()) ** 0.5


def test_gaussian_is_normal():
    entries = sketch_matrix("gaussian").flatten() * K**0.5
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3), (6, 15)):
        variance = {1: 1, 2: 2, 3: 15, 4: 96, 6: 10170}[power]
        assert abs(entries.pow(power).mean() - moment) < 5 * (variance / entries.numel()) ** 0.5
    for bound in (0.5, 1.0, 2.0):
        share = float(torch.special.erf(torch.tensor(bound / 2**0.5)))
        assert abs((entries.abs() < bound).double().mean() - share) < 5 * (0.25 / entries.numel()) ** 0.5


def test_gaussian_is_the_same_everywhere():
    """Literal numbers: a checkpoint of `gaussian` means nothing under another S."""
    columns = JltEmbeddingBagCollection([table("a", 10, 4)], sketch="gaussian", rows=3, seed=7).columns
    torch.testing.assert_close(columns[0], torch.tensor([-0.70760554, -1.56627655, 0.33727020]))


def test_one_nonzero_is_the_signed_hashing_trick():
    module = JltEmbeddingBagCollection([table("a", 200, 4)], rows=8, nonzeros=1)
    matrix = module.memory.detach().view(8, 4)
    rows = all_rows(module)
    plus, minus = (rows[:, None] == matrix).all(2), (rows[:, None] == -matrix).all(2)
    assert ((plus.sum(1) + minus.sum(1)) == 1).all()
    assert plus.any(0).all()
    assert minus.any(0).all()


@pytest.mark.parametrize("name", SKETCHES)
def test_rows_start_with_the_spread_of_full_tables(name: str):
    options: dict[str, Any] = SKETCHES[name] | {"rows": 256, "nonzeros": 4 if name == "sparse" else 1}
    module = JltEmbeddingBagCollection([table("a", 1000, 64)], init_scale=0.1, **options)
    rows = all_rows(module)
    assert rows.std().item() == pytest.approx(0.1 / 3**0.5, rel=0.03)


def test_sizes():
    tables = [table("a", 100, 16), table("b", 23, 8)]  # 1784 parameters
    cases: list[tuple[int, dict[str, Any], int]] = [
        (10, {"nonzeros": 4}, 8),
        (10, {"nonzeros": 5}, 10),
        (10, {"sketch": "achlioptas"}, 11),
        (10, {"sketch": "gaussian"}, 11),
        (1000, {"nonzeros": 4}, 4),
    ]
    for compression, options, rows in cases:
        module = JltEmbeddingBagCollection(tables, compression=compression, **options)
        assert (module.rows, module.memory_size, module.stored_bytes()) == (rows, 16 * rows, 64 * rows)
        assert [(name, p.numel()) for name, p in module.named_parameters()] == [("memory", 16 * rows)]
        assert list(module.state_dict()) == ["memory", "_extra_state"]
    assert JltEmbeddingBagCollection([]).memory_size == 4


@pytest.mark.parametrize("options", [{"nonzeros": 4}, {"nonzeros": 1}, {"sketch": "achlioptas"}])
def test_build_refuses_and_names_what_it_reaches(options: dict[str, Any]):
    tables, section = [table("a", 100, 16)], jlt.Options(**options)
    with pytest.raises(CompressionRefused) as refusal:
        jlt.build(tables, section, EmbeddingRequest(compression=101))
    least = options.get("nonzeros", 1)
    assert refusal.value.nearest == 100 / least
    assert jlt.build(tables, section, EmbeddingRequest(compression=refusal.value.nearest)).rows == least


def test_build_takes_the_sections_keys():
    options = jlt.Options(sketch="sparse", nonzeros=2, gradient="sparse")
    module = jlt.build([table("a", 100, 8)], options, EmbeddingRequest(compression=10, init_scale=0.5, seed=3))
    assert (module.rows, module.nonzeros, module.gradient, module.seed) == (10, 2, "sparse", 3)
    assert 0.4 < module.memory.abs().max() <= 0.5
    wrong: list[dict[str, Any]] = [{"nonzeros": 0}, {"sketch": "srht"}, {"rows": 3}, {"max_sketch_bytes": -1}]
    for bad in wrong:
        with pytest.raises(ValidationError):
            jlt.Options(**bad)
    small = jlt.Options(sketch="gaussian", max_sketch_bytes=3999)
    with pytest.raises(ValueError, match="would need 4,000 bytes"):
        jlt.build([table("a", 100, 8)], small, EmbeddingRequest(compression=10))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sketch": "srht"}, "sketch 'srht' is unknown"),
        ({"nonzeros": 0}, "nonzeros must be at least 1, not 0"),
        ({"rows": 6}, "rows must be a positive multiple of 4, not 6"),
        ({"rows": 0, "sketch": "gaussian"}, "rows must be at least 1, not 0"),
        ({"compression": 0.5}, "compression must be at least 1"),
        ({"sketch": "gaussian", "gradient": "sparse"}, "gradient 'sparse' with sketch 'gaussian'"),
        ({"sketch": "achlioptas", "gradient": "sparse"}, "gradient 'sparse' with sketch 'achlioptas'"),
        ({"sketch": "gaussian", "rows": 100, "max_sketch_bytes": 3999}, "4,000 bytes for its 100 x 10 numbers"),
    ],
)
def test_impossible_arguments_are_refused(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        JltEmbeddingBagCollection([table("a", 10, 4)], **arguments)


def test_the_form_of_the_gradient_settles():
    """4 non-zeros of 16 columns for each of two features: 128 elements a row of the batch."""
    tables = [table("a", 10**6, 16), table("b", 10**6, 16)]
    for batch_size, gradient in [(10, "sparse"), (10000, "dense")]:
        module = JltEmbeddingBagCollection(tables, rows=4000)
        assert module.elements_per_row() == 128
        module.choose_gradient(batch_size)
        assert module.gradient == gradient
    module = JltEmbeddingBagCollection(tables, rows=4000, sketch="achlioptas")
    assert module.gradient == "dense"


@pytest.mark.parametrize("change", [{"seed": 5}, {"rows": 24}, {"nonzeros": 2}, {"sketch": "achlioptas"}])
def test_state_of_another_sketch_is_refused(change: dict[str, Any]):
    options: dict[str, Any] = {"rows": 12, "nonzeros": 3, "seed": 4}
    saved = JltEmbeddingBagCollection(mixed_tables(), **options).state_dict()
    (key,) = change
    with pytest.raises(ValueError, match=f"{key} is .* here and .* in the state dict"):
        JltEmbeddingBagCollection(mixed_tables(), **(options | change)).load_state_dict(saved)


@pytest.mark.parametrize("restore", ["reset_parameters", "load_state_dict"])
def test_materialised_from_meta_is_the_module_built_in_place(sketch: dict[str, Any], restore: str):
    """S, which is not in the state, comes back whether the module is started anew or loaded."""
    expected = JltEmbeddingBagCollection(mixed_tables(), seed=3, **sketch)
    module = JltEmbeddingBagCollection(mixed_tables(), device=META, seed=3, **sketch)
    features = random_kjt(KEYS, 4, max_id=9)
    assert module(features.to(META)).values().shape == (4, 33)
    module.to_empty(device="cpu")
    nn.init.zeros_(module.columns)
    if restore == "reset_parameters":
        module.reset_parameters()
    else:
        module.load_state_dict(expected.state_dict())
    assert torch.equal(module(features).values(), expected(features).values())


@pytest.mark.parametrize("name", ["sparse", "achlioptas", "gaussian"])
@pytest.mark.parametrize("capture", CAPTURES)
def test_captured_module_trains_the_same(name: str, capture: str):
    torch._dynamo.reset()
    module, features = JltEmbeddingBagCollection(mixed_tables(), **SKETCHES[name]), random_kjt(KEYS, 4, max_id=9)
    expected = module(features).values()
    expected.square().sum().backward()
    captured: Any = CAPTURES[capture](module, features)
    grad, module.memory.grad = module.memory.grad, None
    found = captured(features).values()
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    trained = captured if capture in COPIES else module
    torch.testing.assert_close(trained.memory.grad, grad)


def test_reduced_precision_still_returns_fp32(sketch: dict[str, Any]):
    module = JltEmbeddingBagCollection(mixed_tables(), **sketch).to(torch.bfloat16)
    values = module(random_kjt(KEYS, 4, max_id=9)).values()
    assert values.dtype == torch.float32
    values.sum().backward()
