import pytest
import torch
import torch.distributed as dist

from configs.schema import OptimizerSection
from pss.kernels import robe_bags
from pss.methods.robe import RobeEmbeddingBagCollection
from recsys.runs.ranks import Ranks
from recsys.train.checkpoint import Checkpoints
from recsys.train.optim import build_optimizers, optimizer_factory
from tests.pss.jagged import random_kjt, table


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sgd", [1 - 0.1 * 2.0, 1 - 0.1 * 2.0 - 0.1 * -1.0]),
        ("adagrad", [1 - 0.1 * 2 / (2 + 1e-3), 1 - 0.1 * 2 / (2 + 1e-3) + 0.1 * 1 / (5**0.5 + 1e-3)]),
        # m = .1·2, v = .001·4, corrected 2 and 4; then m = .9·.2 − .1, v = .003996 + .001, corrected by .19, .001999
        ("adam", [1 - 0.1, 0.9 - 0.1 * (0.08 / 0.19) / (0.004996 / 0.001999) ** 0.5]),
    ],
)
def test_each_rule_is_its_formula(name, expected):
    weight = torch.ones(1, dtype=torch.float64, requires_grad=True)
    optimizer = optimizer_factory(name, 0.1, adagrad_eps=1e-3)([weight])
    for gradient, value in zip((2.0, -1.0), expected, strict=True):
        weight.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        assert weight.item() == pytest.approx(value, abs=1e-7)


@pytest.fixture(scope="module")
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Ranks(0, 1, torch.device("cpu"))
    dist.destroy_process_group()


@pytest.mark.parametrize("dense", ["sgd", "adagrad", "adam"])
def test_a_run_from_a_checkpoint_goes_on_as_if_it_had_not_stopped(one_rank, tmp_path, dense):
    section = OptimizerSection(dense=dense, dense_learning_rate=0.1, embedding_learning_rate=0.1)
    rows = torch.randn(5, 8, 3, generator=torch.Generator().manual_seed(0))

    def steps(model, optimizer, start, stop):
        for step in range(start, stop):
            optimizer.zero_grad()
            (model(rows[step]) ** 2).mean().backward()
            optimizer.step()

    def build():
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
        return model, build_optimizers(model, ["2.weight"], section)

    checkpoints = Checkpoints(tmp_path, {}, 1, one_rank)
    straight, optimizer = build()
    steps(straight, optimizer, 0, 3)
    checkpoints.save(3, straight, optimizer, {})
    steps(straight, optimizer, 3, 5)
    resumed, optimizer = build()
    checkpoints.load(tmp_path / "step_3", resumed, optimizer)
    steps(resumed, optimizer, 3, 5)
    for found, expected in zip(resumed.parameters(), straight.parameters(), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("rule", ["sgd", "adagrad"])
def test_a_fused_update_is_the_same_run_and_continues_from_a_checkpoint(one_rank, tmp_path, rule):
    """Its state is the optimizer's, so a checkpoint of one form even continues in the other."""
    if not robe_bags.is_available("cpu"):
        pytest.skip("no C++ compiler: there is no fused update")
    section = OptimizerSection(
        dense="sgd", dense_learning_rate=0.1, embedding=rule, embedding_learning_rate=0.1, adagrad_eps=1e-3
    )

    def build(is_fused):
        embedding = RobeEmbeddingBagCollection(
            [table("a", 50, 8), table("b", 50, 8)], memory_size=100, block_size=4, gradient="dense",
            fused_update=is_fused,
        )  # fmt: skip
        model = torch.nn.ModuleDict({"embedding": embedding})
        return embedding, model, build_optimizers(model, ["embedding.memory"], section)

    def steps(embedding, optimizer, start, stop):
        for step in range(start, stop):
            optimizer.zero_grad(set_to_none=True)
            (embedding(random_kjt(["a", "b"], 6, max_id=50, seed=step)).values() ** 2).sum().backward()
            assert (embedding.memory.grad is None) == embedding.fused_update
            optimizer.step()

    checkpoints = Checkpoints(tmp_path, {}, 1, one_rank)
    straight, _, optimizer = build(False)
    steps(straight, optimizer, 0, 5)
    stopped, model, optimizer = build(True)
    steps(stopped, optimizer, 0, 3)
    assert stopped.lookup_kernel == "robe_bags, fused update"
    checkpoints.save(3, model, optimizer, {})
    for is_fused in (True, False):
        resumed, model, optimizer = build(is_fused)
        checkpoints.load(tmp_path / "step_3", model, optimizer)
        steps(resumed, optimizer, 3, 5)
        torch.testing.assert_close(resumed.memory, straight.memory, rtol=1e-5, atol=1e-7)
