import pytest
import torch

from pss.method import CompressionRefused, EmbeddingRequest
from pss.methods import hashed_net
from pss.methods.hashed_net import HashedNetEmbeddingBagCollection, cell
from pss.methods.robe import RobeEmbeddingBagCollection
from tests.pss.jagged import materialise, pooled_by_cell, random_kjt, table

TABLES = [table("a", 9, 8), table("b", 10, 3, ["b", "c"]), table("d", 11, 8)]


@pytest.mark.parametrize("key", ["row_and_column", "flattened"])
@pytest.mark.parametrize("family", ["independent", "affine", "authors"])
@pytest.mark.parametrize("signed", [False, True])
def test_lookup_equals_cell(key: str, family: str, signed: bool):
    module = HashedNetEmbeddingBagCollection(TABLES, memory_size=20, key=key, signed=signed, hash_family=family, seed=4)
    features = random_kjt(["c", "a", "d", "b"], 4, max_id=9)
    torch.testing.assert_close(module(features).values().double(), pooled_by_cell(module, cell, features))


def test_row_and_column_is_robe_with_blocks_of_one():
    hashed = HashedNetEmbeddingBagCollection(TABLES, memory_size=20, key="row_and_column", signed=False, seed=2)
    robe = RobeEmbeddingBagCollection(TABLES, memory_size=20, block_size=1, seed=2)
    features = random_kjt(["a", "b", "c", "d"], 4, max_id=9)
    assert torch.equal(hashed(features).values(), robe(features).values())


def test_elements_of_a_row_are_hashed_apart():
    """With a place per element on average, a row of 8 has neighbours in M next to never; a block of ROBE always."""
    module = HashedNetEmbeddingBagCollection([table("a", 500, 8)], memory_size=4000, signed=False)
    with torch.no_grad():
        module.memory.copy_(torch.arange(4000.0))
    places = materialise(module, cell, 0)
    assert (places.diff(dim=1) == 1).float().mean() < 0.01


def test_build_takes_the_sections_keys():
    options = hashed_net.Options(key="row_and_column", signed=False, hash_family="affine", gradient="sparse")
    module = hashed_net.build(TABLES, options, EmbeddingRequest(compression=10, init_scale=0.5, seed=3))
    assert (module.memory_size, module.gradient) == (19, "sparse")
    assert (module.options.flattened, module.options.signed) == (False, False)
    assert module.location_hash.name == "affine"
    assert module.compression >= 10


def test_impossible_requests_are_refused():
    with pytest.raises(ValueError, match="key 'rows' is unknown: known are"):
        HashedNetEmbeddingBagCollection(TABLES, key="rows")
    with pytest.raises(CompressionRefused, match="hashed_net reaches 190 at most") as refused:
        hashed_net.build(TABLES, hashed_net.Options(), EmbeddingRequest(compression=1000))
    assert refused.value.nearest == 190
