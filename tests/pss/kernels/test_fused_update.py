"""Updates within the backward pass: those of the optimizer, and what is refused."""

import copy

import pytest
import torch
from torch import Tensor

from pss.kernels import robe_bags
from pss.methods.robe import RobeEmbeddingBagCollection
from tests.pss.jagged import random_kjt, table
from tests.pss.kernels.lookups import build, random_ids

pytestmark = pytest.mark.skipif(not robe_bags.is_available("cpu"), reason="no C++ compiler: there are no CPU kernels")


@pytest.mark.parametrize("name", ["Z = 1", "Z = 16", "odd Z", "flattened, Z > d", "tiers and private rows"])
@pytest.mark.parametrize("rule", ["sgd", "adagrad"])
def test_fused_update_is_the_optimizers_step(name: str, rule: str, threads: int):
    def train(fused: bool) -> tuple[Tensor, Tensor | None]:
        module = build(name, gradient="dense", fused_update=fused)
        if rule == "sgd":
            optimizer = torch.optim.SGD([module.memory], lr=0.1)
        else:
            optimizer = torch.optim.Adagrad([module.memory], lr=0.1, eps=1e-3)
        if fused:
            module.fuse_update(optimizer)
        for step in range(20):
            optimizer.zero_grad()
            optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
            features = random_ids(3, 7, seed=step, weighted=False, ids_dtype=torch.int64)
            (module(features).values() ** 2).mean().backward()
            assert (module.memory.grad is None) == fused
            optimizer.step()
        return module.memory.detach(), optimizer.state[module.memory].get("sum")

    (ours, our_sums), (theirs, their_sums) = train(True), train(False)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    if rule == "adagrad":
        torch.testing.assert_close(our_sums, their_sums, rtol=1e-5, atol=1e-9)


def test_adagrad_in_buckets_is_adagrad(threads: int):
    """|M| beyond what is summed at once."""
    size = (4 << 20) + 17
    module = RobeEmbeddingBagCollection([table("a", 10**6, 32)], memory_size=size, block_size=8, gradient="dense")
    other = copy.deepcopy(module)
    features, gradient = random_kjt(["a"], 300, max_id=10**6, max_length=3), torch.randn(300, 32)
    fused, unfused = (torch.optim.Adagrad(m.parameters(), lr=0.1) for m in (module, other))
    module.fuse_update(fused)
    for each in (module, other):
        each(features).values().backward(gradient)
    unfused.step()
    torch.testing.assert_close(module.memory, other.memory, rtol=1e-5, atol=1e-7)


def test_what_cannot_be_fused_is_refused():
    module = build("Z = 8")
    for optimizer, what in (
        (torch.optim.SGD([module.memory], lr=0.1, weight_decay=0.01), "SGD with weight_decay = 0.01"),
        (torch.optim.SGD([module.memory], lr=0.1, momentum=0.9), "SGD with momentum = 0.9"),
        (torch.optim.Adagrad([module.memory], lr=0.1, lr_decay=0.5), "Adagrad with lr_decay = 0.5"),
        (torch.optim.Adam([module.memory]), "knows SGD and Adagrad, not Adam"),
    ):
        with pytest.raises(ValueError, match=what):
            module.fuse_update(optimizer)
    plain = build("Z = 8", kernel="plain")
    with pytest.raises(ValueError, match="fused_update needs the kernels"):
        plain.fuse_update(torch.optim.SGD([plain.memory], lr=0.1))
    mixed = RobeEmbeddingBagCollection([table("a", 9, 8), table("b", 9, 4)], memory_size=50, block_size=4)
    mixed.fuse_update(torch.optim.SGD([mixed.memory], lr=0.1))
    with pytest.raises(ValueError, match="Adagrad needs tables of one embedding_dim and pooling, not 2"):
        mixed.fuse_update(torch.optim.Adagrad([mixed.memory], lr=0.1))
