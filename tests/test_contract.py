"""What every embedding method must satisfy, over the registry: a new line there is tested here without an edit.

The oracle is the method's own `cell`, its paper's formula in plain Python; the lookup must agree with it in value and,
through directional derivatives, in gradient. A method that is placed by sharding is tested as placed on one rank.
Methods are tested compressed. What one cannot do its file declares (`pss.method.EmbeddingMethod`, and in capitals
`pss.collection.EmbeddingHooks`); then it is tested that it cannot.
"""

import io
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from baselines.sharded import local_parts
from configs.schema import OptimizerSection, ParallelismSection
from pss.method import CompressionRefused, EmbeddingRequest
from recsys.embedding.hooks import find_hooks, hooks_of
from recsys.embedding.registry import METHODS
from recsys.embedding.sizes import count_full_parameters, count_parameters, state_tensors
from recsys.embedding.tables import build_tables
from recsys.train.description import embedding_bytes
from recsys.train.optim import build_optimizers, embedding_state_bytes
from recsys.train.parallelism import apply_parallelism, unwrapped
from tests.ranks import run_ranks

CPU = torch.device("cpu")
FEATURES, SIZES, DIM = ("a", "b", "c"), (5, 40, 300), 8
COMPRESSION = 4.0
SGD = OptimizerSection(dense_learning_rate=0.1, embedding="sgd", embedding_learning_rate=1.0)
ADAGRAD = OptimizerSection(dense_learning_rate=0.1, embedding="adagrad", embedding_learning_rate=0.1, adagrad_eps=1e-3)

pytestmark = pytest.mark.filterwarnings("ignore:Please use DTensor")


class Holder(torch.nn.Module):
    """The smallest model around an embedding: a fixed projection of all pooled columns to one number a row."""

    def __init__(self, embedding):
        super().__init__()
        self.embedding = embedding
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, features):
        values = pooled(self.embedding(features))
        weights = torch.linspace(-1, 1, values.shape[1]) + 0.3
        return (values * weights).sum(1) * self.scale


def pooled(embeddings):
    """KeyedTensor -> (B, ΣD) in the order of FEATURES: sharded modules return their keys in an order of their own."""
    by_name = embeddings.to_dict()
    return torch.cat([by_name[name] for name in FEATURES if name in by_name], dim=1)


def build(method, tables=None, compression=None, seed=3, **kwargs):
    """The method's module at 4x, or at the highest compression that it declares."""
    tables = tables or build_tables(FEATURES, SIZES, DIM)
    entry = METHODS[method]
    asked = compression or min(COMPRESSION, entry.max_compression)
    request = EmbeddingRequest(compression=asked, init_scale=0.5, seed=seed, id_counts=counts(tables), **kwargs)
    return entry.build(tables, entry.Options(), request)


def counts(tables):
    """A few frequent ids and many rare ones in every table, by falling frequency as the datasets number them."""
    if max(table.num_embeddings for table in tables) > 10**6:
        return None
    return [60 // (1 + np.arange(table.num_embeddings)) for table in tables]


def place(method, embedding, optimizer, world_size=1):
    """(model placed on the ranks of the default group, its optimizer, names of the embedding parameters)"""
    names = [f"embedding.{name}" for name, _ in embedding.named_parameters()]
    model = apply_parallelism(
        Holder(embedding), METHODS[method].placement, ParallelismSection(world_size=world_size), optimizer,
        local_batch_size=8, init_scale=0.5, seed=3, device=CPU,
    )  # fmt: skip
    return model, build_optimizers(model, names, optimizer), names


def ragged(weighted=False, copies=1, seed=0):
    """Bags of 0 to 4 ids, B = 6, for the three features; with weights if asked."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 5, len(FEATURES) * 6)
    lengths[[0, 7]] = 0
    ids = np.concatenate([rng.integers(0, SIZES[i // 6], n) for i, n in enumerate(lengths)])
    return KeyedJaggedTensor(
        list(FEATURES),
        torch.from_numpy(ids),
        torch.from_numpy(rng.normal(size=len(ids)).astype(np.float32)) if weighted else None,
        torch.from_numpy(lengths),
    )


def table_of(method, placed, table, rows, dim=DIM):
    """(rows, dim) float64 of a table, cell by cell."""
    cell, module = METHODS[method].cell, unwrapped(placed).embedding
    return np.array([[cell(module, table, row, col) for col in range(dim)] for row in range(rows)])


def pooled_by_cells(method, placed, features, mean=False):
    """What the lookup must return: (B, ΣD) float64 from cells alone."""
    blocks = []
    for index, (name, rows) in enumerate(zip(FEATURES, SIZES, strict=True)):
        table, jagged = table_of(method, placed, index, rows), features[name]
        ids, ends = jagged.values().numpy(), np.cumsum(jagged.lengths().numpy())
        weights = jagged.weights().numpy() if features.weights_or_none() is not None else np.ones(len(ids))
        block = []
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            total = (weights[start:end, None] * table[ids[start:end]]).sum(0)
            block.append(total / max(1, end - start) if mean else total)
        blocks.append(np.stack(block))
    return np.concatenate(blocks, axis=1)


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_bags_are_sums_of_cells(method, mean, weighted):
    tables = build_tables(FEATURES, SIZES, DIM)
    for table in tables:
        table.pooling = PoolingType.MEAN if mean else PoolingType.SUM
    embedding = build(method, tables, is_weighted=weighted)
    features = ragged(weighted)
    placed, _, _ = place(method, embedding, SGD)
    if weighted and mean and not METHODS[method].has_weighted_mean:
        with pytest.raises(NotImplementedError):
            pooled(unwrapped(placed).embedding(features))
        return
    result = pooled(unwrapped(placed).embedding(features))
    expected = pooled_by_cells(method, placed, features, mean)
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result.detach().numpy(), expected, rtol=1e-5, atol=1e-6)


def parameters(placed, names):
    """name -> the whole parameter on this one rank, a view that can be written to."""
    state = unwrapped(placed).state_dict()
    whole = {}
    for name in names:
        ((tensor, _, _),) = local_parts(state[name])
        whole[name] = tensor.detach()
    return whole


def test_the_gradient_is_that_of_the_table_it_stands_for(method):
    """⟨gradient, v⟩ equals the change of the loss, computed from cells in float64, along random directions v."""
    embedding = build(method)
    placed, optimizer, names = place(method, embedding, SGD)
    features = ragged()
    weights = np.linspace(-1, 1, DIM * len(SIZES)) + 0.3

    def loss_by_cells():
        return float((pooled_by_cells(method, placed, features) * weights.astype(np.float32)).sum())

    values = parameters(placed, names)
    before = {name: value.clone() for name, value in values.items()}
    placed(features).sum().backward()
    optimizer.step()
    gradient = {name: (before[name] - value) / SGD.embedding_learning_rate for name, value in values.items()}
    assert any(g.abs().sum() > 0 for g in gradient.values())
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        direction = {name: torch.randn(value.shape, generator=generator) for name, value in values.items()}
        losses = []
        for step in (1e-2, -1e-2):
            for name, value in values.items():
                value.copy_(before[name] + step * direction[name])
            losses.append(loss_by_cells())
        expected = (losses[0] - losses[1]) / 2e-2
        slope = sum(float((gradient[name].double() * direction[name].double()).sum()) for name in values)
        assert slope == pytest.approx(expected, rel=2e-3, abs=2e-3)


def test_what_is_stored_is_exact_and_within_the_budget(method):
    embedding, tables = build(method), build_tables(FEATURES, SIZES, DIM)
    hooks, state = hooks_of(embedding), state_tensors(embedding).values()
    in_state = sum(value.numel() * value.element_size() for value in state)
    if hooks.IS_SMALLER_AFTER_TRAINING:
        assert hooks.stored_bytes() < in_state
    else:
        assert hooks.stored_bytes() == in_state + 8 * hooks.stored_numbers()
    assert hooks.stored_bytes() <= 4 * count_full_parameters(tables) / min(COMPRESSION, METHODS[method].max_compression)


def test_every_rank_holds_the_parameters_that_are_counted(method):
    embedding = build(method)
    parameters_built = count_parameters(embedding)
    placed, _, names = place(method, embedding, SGD)
    assert embedding_bytes(placed, names) == 4 * parameters_built
    assert sum(value.numel() for value in parameters(placed, names).values()) == parameters_built


@pytest.mark.parametrize("method", [name for name, entry in METHODS.items() if entry.max_compression < COMPRESSION])
def test_no_more_is_reached_than_declared(method):
    beyond = METHODS[method].max_compression * 1.01
    with pytest.raises(CompressionRefused):
        build(method, compression=beyond)


def test_impossible_compression_is_refused(method):
    with pytest.raises(ValueError, match="compression"):
        build(method, compression=0.5)


@pytest.mark.parametrize("section", [SGD, ADAGRAD], ids=["sgd", "adagrad"])
def test_optimizer_state_has_the_size_it_claims(method, section):
    embedding = build(method)
    stored = count_parameters(embedding)
    placed, optimizer, names = place(method, embedding, section)
    placed(ragged()).sum().backward()
    optimizer.step()
    assert embedding_state_bytes(optimizer, names) == {"sgd": 0, "adagrad": 4 * stored}[section.embedding]


def use_optimizer(kind, **arguments):
    """Train by that optimizer, a step for each batch."""

    def use(model, batches):
        optimizer = kind(model.parameters(), lr=0.01, **arguments)
        for features in batches:
            optimizer.zero_grad()
            model(features).sum().backward()
            optimizer.step()

    return use


def use_clipping(model, batches):
    """Clip the gradients' norm to a tenth of what it is before every step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for features in batches:
        optimizer.zero_grad()
        model(features).sum().backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1 * norm)
        clipped = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        torch.testing.assert_close(clipped, 0.1 * norm)
        optimizer.step()


def use_scaler(model, batches):
    """Scale losses: each step is that of the loss itself."""
    scaler, optimizer = torch.amp.GradScaler("cpu"), torch.optim.SGD(model.parameters(), lr=0.01)
    for features in batches:
        optimizer.zero_grad()
        gradients = torch.autograd.grad(model(features).sum(), list(model.parameters()))
        before = [p.detach().clone() for p in model.parameters()]
        scaler.scale(model(features).sum()).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        for p, old, gradient in zip(model.parameters(), before, gradients, strict=True):
            torch.testing.assert_close(p.detach(), old - 0.01 * gradient.to_dense())


USES = {
    "SGD": use_optimizer(torch.optim.SGD),
    "Adagrad": use_optimizer(torch.optim.Adagrad),
    "momentum": use_optimizer(torch.optim.SGD, momentum=0.9),
    "weight decay": use_optimizer(torch.optim.SGD, weight_decay=0.1),
    **{
        kind.__name__: use_optimizer(kind)
        for kind in (
            torch.optim.Adam, torch.optim.AdamW, torch.optim.Adamax, torch.optim.NAdam, torch.optim.RAdam,
            torch.optim.Adadelta, torch.optim.RMSprop, torch.optim.ASGD, torch.optim.Rprop,
        )
    },
    "clipping": use_clipping,
    "scaler": use_scaler,
}  # fmt: skip
TAKE_SPARSE = ("SGD", "Adagrad", "scaler")


@pytest.mark.parametrize("use", USES)
def test_it_is_trained_by_whatever_trains_an_embedding_bag_collection(method, use):
    """Not placed, as in other people's code, and with a batch of one id, where a gradient may be sparse, then a full
    one."""
    embedding = build(method, build_tables(FEATURES, (5, 40, 3000), DIM))
    if any(p.is_meta for p in embedding.parameters()):
        embedding = embedding.to_empty(device=CPU)
        for p in embedding.parameters():
            torch.nn.init.uniform_(p)
    model = Holder(embedding)
    one_id = KeyedJaggedTensor(list(FEATURES), torch.tensor([1]), lengths=torch.tensor([0, 0, 1]))
    before = [p.detach().clone() for p in model.parameters()]
    if hooks_of(embedding).SENDS_SPARSE_GRADIENT and use not in TAKE_SPARSE:
        with pytest.raises((RuntimeError, NotImplementedError)):
            USES[use](model, [one_id, ragged()])
        return
    USES[use](model, [one_id, ragged()])
    assert all(p.isfinite().all() for p in model.parameters())
    assert any(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


FINGERPRINT = """
import sys
import torch.distributed as dist
from tests.test_contract import *
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
for method in sys.argv[1:]:
    print("fingerprint", method, fingerprint(method))
"""


def fingerprint(method):
    """What the method returns before training, to the bit."""
    placed, _, _ = place(method, build(method), SGD)
    return pooled(unwrapped(placed).embedding(ragged())).detach().numpy().tobytes().hex()


def selected_methods(request):
    """The methods for which the tests that ask for this fixture run: those that -k leaves."""
    items = [item for item in request.session.items if request.fixturename in item.fixturenames]
    return sorted({item.callspec.params["method"] for item in items if item.path == request.path})


@pytest.fixture(scope="module")
def fingerprints(request):
    """Of every selected method, in another process."""
    command = [sys.executable, "-W", "ignore", "-c", FINGERPRINT, *selected_methods(request)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = [line.split() for line in run.stdout.splitlines() if line.startswith("fingerprint")]
    return {name: bits for _, name, bits in lines}


def test_the_same_seed_gives_the_same_bits_in_another_process(fingerprints, method):
    assert fingerprints[method] == fingerprint(method)


def test_a_state_dict_restores_every_row(method):
    source, _, names = place(method, build(method), SGD)
    for value in parameters(source, names).values():
        value.copy_(torch.rand_like(value))
    target, _, _ = place(method, build(method), SGD)
    unwrapped(target).load_state_dict(unwrapped(source).state_dict())
    features = ragged()
    assert torch.equal(pooled(unwrapped(target).embedding(features)), pooled(unwrapped(source).embedding(features)))


def test_a_state_dict_says_which_hash_its_parameters_are_for(method):
    """Loaded into a module of another seed they are refused by that name, or mean the same rows; never other ones."""
    embedding, other = build(method), build(method, seed=4)
    constants = {name: value for name, value in embedding.state_dict().items() if not isinstance(value, torch.Tensor)}
    file = io.BytesIO()
    torch.save(constants, file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == constants
    source, target = (unwrapped(place(method, module, SGD)[0]) for module in (embedding, other))
    if any(value.get("seed") for value in constants.values()):
        with pytest.raises(ValueError, match="seed is 4 here and 3 in the state dict"):
            target.load_state_dict(source.state_dict())
        return
    target.load_state_dict(source.state_dict())
    features = ragged()
    assert torch.equal(pooled(target.embedding(features)), pooled(source.embedding(features)))


def test_ids_above_2_to_the_31(method):
    """A method reads the far rows of a table of 2^40 right, or declares that it holds something for every row."""
    rows, entry = 2**40, METHODS[method]
    table = EmbeddingBagConfig(name="far", embedding_dim=DIM, num_embeddings=rows, feature_names=["a"])
    compression = 2.0**20  # 32 MiB
    if entry.stores_every_row or entry.Options().needs_id_counts:
        with pytest.raises(ValueError, match=r"compression|GiB|how often ids occur"):
            build(method, [table], compression=compression)
        return
    embedding = build(method, [table], compression=compression)
    ids = torch.tensor([0, 2**31, 2**31 + 1, 2**32, rows - 1])
    read = pooled(embedding(KeyedJaggedTensor(["a"], ids, lengths=torch.ones(5, dtype=torch.int64))))
    expected = [[entry.cell(embedding, 0, row, col) for col in range(DIM)] for row in ids.tolist()]
    np.testing.assert_allclose(read.detach().numpy(), expected, rtol=1e-5, atol=1e-6)


def test_the_loss_falls_in_50_steps(method):
    placed, optimizer, _ = place(method, build(method), ADAGRAD)
    rng = torch.Generator().manual_seed(1)
    features = ragged()
    target = torch.randn(6, generator=rng)
    losses = []
    for step in range(50):
        optimizer.zero_grad(set_to_none=True)
        loss = ((placed(features) - target) ** 2).mean()
        loss.backward()
        optimizer.step()
        end_step(placed, step + 1, 50)
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0], losses


def end_step(placed, step, total_steps):
    """What the trainer does after every optimizer step."""
    for hooks in find_hooks(unwrapped(placed)).values():
        hooks.end_step(step, total_steps)


def _train(rank, world_size, methods):
    """Four Adagrad steps on this rank's share of six bags -> per method every pooled row of all features after it."""
    rows_after = {}
    for method in methods:
        placed, optimizer, _ = place(method, build(method), ADAGRAD, world_size)
        share = 6 // world_size
        for step in range(4):
            features = ragged(seed=step)
            bags = [features[name].to_dense()[rank * share : (rank + 1) * share] for name in FEATURES]
            lengths = torch.tensor([len(bag) for bags_of_one in bags for bag in bags_of_one])
            ids = torch.cat([bag for bags_of_one in bags for bag in bags_of_one])
            optimizer.zero_grad(set_to_none=True)
            (placed(KeyedJaggedTensor(list(FEATURES), ids, lengths=lengths)) ** 2).mean().backward()
            optimizer.step()
            end_step(placed, step + 1, 4)
        everything = KeyedJaggedTensor(
            list(FEATURES),
            torch.cat([torch.arange(max(SIZES)) % rows for rows in SIZES]),
            lengths=torch.ones(len(SIZES) * max(SIZES), dtype=torch.int64),
        )
        rows_after[method] = pooled(unwrapped(placed).embedding(everything)).detach().numpy()
    return rows_after


@pytest.fixture(scope="module")
def trained(request):
    """The rows of every selected method: trained in one process, and on two ranks."""
    methods = selected_methods(request)
    return run_ranks(_train, 1, methods)[0], run_ranks(_train, 2, methods)


@pytest.mark.dist
def test_two_ranks_equal_one_process(trained, method):
    one, two = trained
    for rank in two:
        np.testing.assert_allclose(rank[method], one[method], rtol=0, atol=2e-6)
