"""The parity anchor: every sharding trains exactly like the unsharded tables on the concatenated batch."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from baselines import full, sharded
from configs.schema import OptimizerSection, ParallelismSection
from pss.method import EmbeddingRequest
from recsys.data.batches import build_batch
from recsys.data.dataset import Rows
from recsys.embedding.tables import build_tables
from recsys.models.registry import build_model
from recsys.train.optim import build_optimizers
from recsys.train.parallelism import apply_parallelism, unwrapped
from tests.ranks import run_ranks

SIZES, DIM, NUM_DENSE, GLOBAL_BATCH, STEPS = (7, 300, 50, 1000), 8, 3, 24, 6
FEATURES = tuple(f"f{i}" for i in range(len(SIZES)))
MODEL = SimpleNamespace(architecture="dlrm", embedding_dim=DIM)


def global_batches():
    rng = np.random.default_rng(3)
    for _ in range(STEPS):
        ids = np.stack([rng.integers(0, n, GLOBAL_BATCH) for n in SIZES], axis=1)
        ids[: GLOBAL_BATCH // 2] = ids[0]  # repeated rows: an optimizer must see their gradients summed, not in turn
        dense = rng.normal(size=(GLOBAL_BATCH, NUM_DENSE)).astype(np.float32)
        yield Rows(dense, ids.astype(np.int64), rng.integers(0, 2, GLOBAL_BATCH).astype(np.float32))


def train(rank, world_size, method, sharding, optimizer_name):
    """Six steps -> (losses of this rank, {table: [(weights, first row, first column)]} that it holds)."""
    from recsys.models.dlrm import Options

    optimizer_section = OptimizerSection(
        dense=optimizer_name,
        dense_learning_rate=0.1,
        embedding=optimizer_name,
        embedding_learning_rate=0.5,
        adagrad_eps=1e-3,  # not small beside the gradients: its place in the formula shows, and noise does not grow
    )
    device = torch.device("cpu")
    module = {"full": full, "sharded": sharded}[method].METHOD
    embedding = module.build(
        build_tables(FEATURES, SIZES, DIM), full.Options(), EmbeddingRequest(init_scale=0.3, seed=5)
    )
    section = SimpleNamespace(**vars(MODEL), options=Options(bottom_mlp=(8,), top_mlp=(8,)))
    model = build_model(section, embedding, num_dense=NUM_DENSE, seed=1, device=device)
    prefix = "sparse_arch.embedding_bag_collection"
    names = [f"{prefix}.{name}" for name, _ in embedding.named_parameters()]
    model = apply_parallelism(
        model, module.placement, ParallelismSection(world_size=world_size, sharding=sharding), optimizer_section,
        local_batch_size=GLOBAL_BATCH // world_size, init_scale=0.3, seed=5, device=device,
    )  # fmt: skip
    optimizer = build_optimizers(model, names, optimizer_section)
    losses = []
    for rows in global_batches():
        share = GLOBAL_BATCH // world_size
        batch = build_batch(rows[rank * share : (rank + 1) * share], FEATURES, device)
        optimizer.zero_grad(set_to_none=True)
        logits = model(batch.dense_features, batch.sparse_features).squeeze(1)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, batch.labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    state = unwrapped(model).state_dict()
    held = {name: [(w.detach().numpy().copy(), r, c) for w, r, c in sharded.local_parts(state[name])] for name in names}
    return losses, held


def together(results):
    """Mean losses over ranks and whole tables from the parts of all ranks."""
    losses = np.mean([losses for losses, _ in results], axis=0)
    tables = {}
    for name, rows in zip(results[0][1], SIZES, strict=True):
        table = np.full((rows, DIM), np.nan, np.float32)
        for _, held in results:
            for part, row, col in held[name]:
                table[row : row + part.shape[0], col : col + part.shape[1]] = part
        tables[name] = table
    return losses, tables


SHARDINGS = ("planner", "table_wise", "row_wise", "column_wise", "table_row_wise", "data_parallel")
LAYOUTS = [("full", "planner"), *(("sharded", sharding) for sharding in SHARDINGS)]


def train_all(rank, world_size, layouts):
    return {(o, *layout): train(rank, world_size, *layout, o) for o in ("sgd", "adagrad") for layout in layouts}


@pytest.fixture(scope="module")
def one_process():
    return run_ranks(train_all, 1, LAYOUTS[:1])


@pytest.fixture(scope="module")
def two_ranks():
    return run_ranks(train_all, 2, LAYOUTS)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_two_ranks_train_like_one_process(one_process, two_ranks, layout, optimizer):
    losses, tables = together([result[optimizer, "full", "planner"] for result in one_process])
    found_losses, found = together([result[optimizer, *layout] for result in two_ranks])
    np.testing.assert_allclose(found_losses, losses, rtol=1e-6)
    for name, table in tables.items():
        scale = np.abs(table).max()
        np.testing.assert_allclose(found[name], table, rtol=0, atol=1e-6 * scale, err_msg=name)


def _plan(rank, world_size, sharding, sizes=SIZES):
    device = torch.device("cpu")
    model = torch.nn.Module()
    model.embedding = sharded.build(
        build_tables(FEATURES, sizes, DIM), full.Options(), EmbeddingRequest(init_scale=0.3, seed=5)
    )
    rule = sharded.FusedRule(name="sgd", learning_rate=1.0, eps=1e-8)
    placed = sharded.shard(
        model, sharding=sharding, optimizer=rule, local_batch_size=8, init_scale=0.3, seed=5, device=device
    )
    cells = []
    for table, rows in enumerate(SIZES):
        try:
            cells.append(sharded.cell(placed.module.embedding, table, rows - 1, DIM - 1))
        except KeyError:
            cells.append(None)
    return sharded.describe_plan(placed), cells


@pytest.mark.dist
def test_the_plan_says_what_each_rank_holds_and_cells_are_found_there():
    (plan, cells), (other_plan, other_cells) = run_ranks(_plan, 2, "column_wise")
    assert plan == other_plan
    for row, num_embeddings in zip(plan, SIZES, strict=True):
        assert row["sharding"] == "column_wise"
        assert row["bytes_per_rank"] == {0: 2 * num_embeddings * DIM, 1: 2 * num_embeddings * DIM}
    reference = full.build(build_tables(FEATURES, SIZES, DIM), full.Options(), EmbeddingRequest(init_scale=0.3, seed=5))
    for table, rows in enumerate(SIZES):
        # The last column is on one rank alone.
        assert sorted([cells[table] is None, other_cells[table] is None]) == [False, True]
        value = cells[table] if cells[table] is not None else other_cells[table]
        assert value == full.cell(reference, table, rows - 1, DIM - 1)


def _no_plan(rank, world_size):
    try:
        _plan(rank, world_size, "table_wise", (10**11,) * len(SIZES))
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.dist
def test_a_failing_planner_fails_on_every_rank():
    for text in run_ranks(_no_plan, 2):
        assert "parallelism.sharding = 'table_wise': TorchRec's planner found no plan: PlannerError" in text
