from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from baselines import full
from configs.load import ConfigError, load_config
from recsys.embedding.tables import build_tables
from recsys.models.frame import Model, SparseFeatures
from recsys.models.registry import MODELS
from recsys.runs.phases import FORWARD
from recsys.train.registry import CHOICES
from tests.recsys.models.model_oracles import ORACLES, find_oracle
from tests.recsys.train.toy_models import (
    DIM,
    FEATURES,
    NUM_DENSE,
    SIZES,
    VARIANTS,
    build_toy,
    dense_parameters,
    one_id_a_bag,
    random_batch,
    tables_of,
)

CONFIGS = Path(__file__).parents[3] / "configs"
F = len(FEATURES)


@pytest.mark.parametrize("model", MODELS.values(), ids=list(MODELS))
def test_every_model_offers_what_the_registry_needs(model):
    assert issubclass(model, Model)
    assert not model.__abstractmethods__
    assert model.Options.model_config["extra"] == "forbid"


def test_a_model_without_a_formula_is_told_where_to_write_it():
    assert set(ORACLES) <= set(MODELS)
    with pytest.raises(pytest.fail.Exception, match=r"'new' has no formula .*tests/recsys/models/model_oracles\.py"):
        find_oracle("new")


@pytest.mark.parametrize("variant", VARIANTS)
def test_dense_weights_depend_on_the_seed_alone(variant):
    """The same on all ranks and for all methods, whatever was drawn before; and drawing them disturbs nobody."""
    torch.manual_seed(1)
    first = dense_parameters(build_toy(variant, "full"))
    state = torch.get_rng_state()
    second = dense_parameters(build_toy(variant, "robe"))
    assert torch.equal(state, torch.get_rng_state())
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = dense_parameters(build_toy(variant, "full", seed=1))
    assert not all(torch.equal(first[name], other[name]) for name in first)


def ragged(batch_size):
    """Bags of 0 to 2 ids for every feature."""
    rng = np.random.default_rng(4)
    lengths = rng.integers(0, 3, F * batch_size)
    ids = np.concatenate([rng.integers(0, SIZES[i // batch_size], n) for i, n in enumerate(lengths)])
    return KeyedJaggedTensor(list(FEATURES), torch.from_numpy(ids), lengths=torch.from_numpy(lengths))


def pooled_by_cells(embedding, features, row):
    """For every table the sum of the bag's rows, read number by number."""
    found = []
    for index, table in enumerate(embedding.embedding_bag_configs()):
        jagged = features[table.feature_names[0]]
        ids = jagged.values()[jagged.offsets()[row] : jagged.offsets()[row + 1]].tolist()
        found.append([sum(full.cell(embedding, index, i, d) for i in ids) for d in range(table.embedding_dim)])
    return found


@pytest.mark.parametrize("num_dense", [NUM_DENSE, 0])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_the_formula_in_plain_loops(variant, num_dense):
    architecture, options = VARIANTS[variant]
    if architecture == "dlrm" and num_dense == 0:
        with pytest.raises(ValueError, match="'dlrm' needs dense features, and the data has none"):
            build_toy(variant, num_dense=0)
        return
    model = build_toy(variant, num_dense=num_dense)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in dense_parameters(model).values():
            parameter.uniform_(-0.8, 0.8, generator=generator)  # biases too, some of which start at zero
    dense, features = torch.randn(3, num_dense, generator=generator), ragged(3)
    found = model(dense, features)
    assert found.shape == (3, 1)
    assert found.dtype == torch.float32

    weights = {name: p.detach().double().numpy() for name, p in dense_parameters(model).items()}
    (embedding,) = (module for module in model.modules() if isinstance(module, EmbeddingBagCollection))
    for row in range(3):
        pooled = pooled_by_cells(embedding, features, row)
        first_order = [u for (u,) in pooled[F:]]
        expected = find_oracle(architecture)(
            weights, MODELS[architecture].Options(**options), dense[row].tolist(), pooled[:F], first_order
        )
        assert found[row].item() == pytest.approx(expected, rel=1e-5, abs=1e-5)


def layers(*sizes):
    return sum(i * o + o for i, o in pairwise(sizes))


N, M, PAIRS, BOTH = F * DIM + NUM_DENSE, F + NUM_DENSE, F * (F - 1) // 2, F * (F - 1) * DIM + NUM_DENSE
COUNTS = {
    "dlrm": layers(NUM_DENSE, 5, DIM) + layers(DIM + PAIRS + F, 4, 3, 1),
    "dlrm_projection": layers(NUM_DENSE, 64, DIM)
    + layers((F + 1) * DIM, 5, 2 * DIM)
    + layers((F + 1) * DIM, 5, 3 * DIM)
    + layers(DIM + 2 * 3, 64, 32, 1),
    "dlrm_dcn": layers(NUM_DENSE, 64, DIM)
    + 2 * (2 * (F + 1) * DIM * 2 + (F + 1) * DIM)
    + layers((F + 1) * DIM, 64, 32, 1),
    "dcn": 2 * (N + N) + N + layers(N, 4, 3, 1),
    "autoint": NUM_DENSE * DIM + 4 * DIM * 10 + 4 * 10 * 10 + M * 10 + layers(M * DIM, 4, 1),
    "autoint_alone": NUM_DENSE * DIM + 4 * DIM * 32 + 2 * 4 * 32 * 32 + M * 32 + 1,
    "deepfm": NUM_DENSE + layers(N, 4, 3, 1),
    "xdeepfm": NUM_DENSE + 3 * F * F + 2 * 3 * F + 5 + layers(N, 4, 1),
    "fibinet": NUM_DENSE + 2 * F * (F // 2) + 2 * PAIRS * DIM**2 + layers(BOTH, 4, 1),
    "fibinet_each": NUM_DENSE + 2 * F * (F // 3) + 2 * (F - 1) * DIM**2 + layers(BOTH, 64, 32, 1),
    "fibinet_all": NUM_DENSE + 2 * F * (F // 3) + 2 * DIM**2 + layers(BOTH, 64, 32, 1),
}


@pytest.mark.parametrize("variant", COUNTS)
def test_parameters_are_as_many_as_the_formula_has(variant):
    model = build_toy(variant)
    assert sum(p.numel() for p in dense_parameters(model).values()) == COUNTS[variant]
    columns = DIM + (VARIANTS[variant][0] in ("deepfm", "xdeepfm", "fibinet"))
    assert sum(p.numel() for p in model.parameters()) == COUNTS[variant] + columns * sum(SIZES)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_gradient_reaches_every_parameter(variant):
    model = build_toy(variant)
    dense, ids, _ = random_batch(64)
    model(dense, one_id_a_bag(ids)).sum().backward()
    unreached = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert unreached == []


@pytest.mark.parametrize("architecture", MODELS)
def test_every_phase_is_a_part_of_the_model_and_has_a_place_in_reports(architecture):
    parts = {name.rpartition(".")[2] for name, _ in build_toy(architecture).named_modules()}
    phases = MODELS[architecture].PHASES
    assert phases.keys() <= parts
    assert set(phases.values()) <= set(FORWARD)


def test_units_are_dropped_in_training_only():
    options = MODELS["deepfm"].Options(dropout=0.5)
    embedding = EmbeddingBagCollection(tables_of("deepfm"))
    model = MODELS["deepfm"].build(
        embedding, num_dense=NUM_DENSE, embedding_dim=DIM, options=options, device=torch.device("cpu")
    )
    dense, ids, _ = random_batch(8)
    features = one_id_a_bag(ids)
    assert not torch.equal(model(dense, features), model(dense, features))
    model.eval()
    assert torch.equal(model(dense, features), model(dense, features))


class Reversed(torch.nn.Module):
    """A collection that returns its tables in the opposite order, as a sharded one may, and first-order ones wider."""

    def __init__(self, tables):
        super().__init__()
        self.tables = tables

    def embedding_bag_configs(self):
        return self.tables

    def forward(self, features):
        values = {
            f"{table.feature_names[0]}@{table.name}": torch.arange(max(4, table.embedding_dim)) + 10.0 * place
            for place, table in enumerate(self.tables)
        }
        names = list(values)[::-1]
        return KeyedTensor(names, [len(values[n]) for n in names], torch.cat([values[n] for n in names])[None])


def test_columns_are_found_by_name():
    tables = build_tables(("a", "b"), (5, 7), 4, first_order=True)
    vectors, numbers = SparseFeatures(Reversed(tables), first_order=True)(None)  # type: ignore[arg-type]
    assert vectors.tolist() == [[[0, 1, 2, 3], [10, 11, 12, 13]]]
    assert numbers.tolist() == [[20, 30]]


def test_tables_and_model_must_agree_on_first_order_terms():
    for first_order, message in ((True, "0 first-order tables, but the model reads 4"), (False, "4 first-order")):
        tables = tables_of("dcn" if first_order else "deepfm")
        with pytest.raises(ValueError, match=message):
            SparseFeatures(EmbeddingBagCollection(tables), first_order=first_order)


def test_fibinet_needs_a_pair():
    embedding = EmbeddingBagCollection(build_tables(("a",), (5,), DIM, first_order=True))
    with pytest.raises(ValueError, match="'fibinet' needs two sparse features, and the data has 1"):
        MODELS["fibinet"].build(
            embedding, num_dense=1, embedding_dim=DIM, options=MODELS["fibinet"].Options(), device=torch.device("cpu")
        )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.dcn.cross_layers=0", "model.dcn.cross_layers = 0"),
        ("model.dlrm.interaction=outer", "model.dlrm.interaction = 'outer'.*'dot', 'projection' or 'dcn'"),
        ("model.dlrm.top_mlp=[]", r"model.dlrm.top_mlp: \[\]: TorchRec's DLRM needs at least one hidden layer"),
        ("model.dlrm.projection_rows=[2,0]", r"model.dlrm.projection_rows: \[2, 0\]: every layer needs"),
        ("model.dlrm.projection_rows=[2]", "model.dlrm.projection_rows.1 is missing|model.dlrm.projection_rows"),
        ("model.deepfm.top_mlp=[64,0]", r"model.deepfm.top_mlp: \[64, 0\]: every layer needs at least one unit"),
        ("model.deepfm.dropout=1.0", "model.deepfm.dropout = 1.0"),
        ("model.deepfm.heads=2", "model.deepfm.heads = 2: unknown key.*known: dropout, top_mlp"),
        ("model.xdeepfm.feature_maps=[]", r"model.xdeepfm.feature_maps: \[\]: the network needs at least one layer"),
        ("model.autoint.heads=0", "model.autoint.heads = 0"),
        ("model.fibinet.bilinear=none", "model.fibinet.bilinear = 'none'.*'all', 'each' or 'interaction'"),
        ("model.fibinet.reduction_ratio=0", "model.fibinet.reduction_ratio = 0"),
        ("model.architecture=deepmf", "model.architecture = 'deepmf': unknown.*did you mean deepfm"),
    ],
)
def test_impossible_options_are_refused_by_key_and_value(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(CONFIGS / "debug.toml", [override], CHOICES)


def test_first_order_tables_follow_the_others_over_the_same_ids():
    tables = build_tables(("a", "b"), (5, 7), 4, first_order=True)
    assert [(t.name, t.num_embeddings, t.embedding_dim, t.feature_names) for t in tables] == [
        ("t_a", 5, 4, ["a"]),
        ("t_b", 7, 4, ["b"]),
        ("linear_a", 5, 1, ["a"]),
        ("linear_b", 7, 1, ["b"]),
    ]
    assert [table.name for table in build_tables(("a", "b"), (5, 7), 4)] == ["t_a", "t_b"]
