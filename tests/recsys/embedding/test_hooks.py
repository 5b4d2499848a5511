"""What training asks of embedding modules: of ours, of TorchRec's own, and of both in one."""

import pytest
import torch
from torch import nn
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from baselines.tt_rec import TTRecEmbeddingBagCollection
from pss.methods.robe import RobeEmbeddingBagCollection
from recsys.embedding.hooks import find_hooks, hooks_of
from recsys.embedding.partly_full import PartlyFullEmbeddingBagCollection
from tests.pss.jagged import table


def test_torchrecs_own_module_needs_nothing():
    module = EmbeddingBagCollection([table("a", 10, 4)])
    hooks = hooks_of(module)
    assert hooks.stored_bytes() == 160
    assert hooks.choose_gradient(8) == "dense"
    assert (hooks.fused_update, hooks.lookup_kernel) == (False, "dense")
    hooks.end_step(1, 2)
    with pytest.raises(ValueError, match="EmbeddingBagCollection cannot be fitted"):
        hooks.fit([torch.zeros(10, 4)])
    assert find_hooks(nn.Sequential(module)) == {}


def test_a_method_without_an_update_in_its_backward_pass_refuses_one():
    module = TTRecEmbeddingBagCollection([table("a", 10, 4)])
    with pytest.raises(ValueError, match=r"TTRec.* has no update in its backward pass"):
        module.fuse_update(torch.optim.SGD(module.parameters(), lr=0.1))


def test_parts_of_a_model_are_found_by_name_and_of_two_the_compressed_one_speaks():
    tables = [table("a", 10, 4), table("b", 50, 4)]
    rest = RobeEmbeddingBagCollection(tables[1:], memory_size=40, block_size=4, kernel="plain")
    partly = PartlyFullEmbeddingBagCollection(tables, EmbeddingBagCollection(tables[:1]), rest)
    model = nn.ModuleDict({"embedding": partly})
    assert find_hooks(model) == {"embedding": partly, "embedding.rest": rest}
    assert (partly.lookup_kernel, partly.stored_bytes()) == ("plain", 4 * (40 + 40))
