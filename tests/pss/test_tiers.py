import numpy as np
import pytest
import torch
from pydantic import ValidationError

from pss.method import EmbeddingRequest
from pss.methods import frequency_robe, robe
from pss.methods.robe import RobeEmbeddingBagCollection, cell
from pss.tiers import check_counts, solve_private_rows, solve_tiers
from tests.pss.jagged import pooled_by_cell, random_kjt, table

COUNTS = [np.array([0, 90, 50, 50, 9, 8, 2, 0]), np.array([70, 60, 3, 3, 1]), np.array([5, 1, 0])]
TABLES = [table("a", 8, 8), table("b", 5, 8, ["b", "c"]), table("d", 3, 5)]


def test_a_tier_begins_at_the_first_rare_row_of_each_table():
    found = solve_tiers([[50, 0.25], [3, 0.1]], COUNTS, start=20, memory_size=120, smallest=8)
    assert found.bounds == [[4, 2, 1], [6, 4, 1]]
    assert found.sizes == [65, 25, 10]
    assert found.starts == [20, 85, 110]


def test_no_part_is_smaller_than_a_block():
    assert solve_tiers([[50, 0.01]], COUNTS, start=0, memory_size=100, smallest=8).sizes == [92, 8]
    with pytest.raises(ValueError, match="15 elements are too few for 2 parts of 8 or more"):
        solve_tiers([[50, 0.01]], COUNTS, start=0, memory_size=15, smallest=8)


def test_private_rows_are_those_of_the_largest_counts():
    """90 (a1), 60 (b1), then 50 (a2): three rows of 8 of the 31 elements asked for; the next would not fit."""
    found = solve_private_rows(TABLES, COUNTS, 31)
    assert found.bounds == [3, 2, 1]
    assert found.size == 24
    assert found.starts == [-8, 16 - 8, 24 - 5]  # row 1 of a at 0, of b at 16
    everything = solve_private_rows(TABLES, COUNTS, 10**6)
    assert everything.bounds == [7, 5, 2], "ids never seen, and row 0, have no row"
    assert everything.size == 6 * 8 + 4 * 8 + 5


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("block_size", [1, 3, 5, 8, 11])
@pytest.mark.parametrize("family", ["independent", "affine", "authors"])
def test_lookup_equals_cell(signed: bool, block_size: int, family: str):
    for tiers, private_share in (([[50, 0.2]], 0.0), ((), 0.4), ([[50, 0.2], [3, 0.1]], 0.4)):
        module = RobeEmbeddingBagCollection(
            TABLES, memory_size=60, block_size=block_size, hash_family=family, signed=signed, tiers=tiers,
            private_share=private_share, id_counts=COUNTS, seed=3,
        )  # fmt: skip
        features = random_kjt(["d", "a", "b", "c"], 6, max_id=3)
        torch.testing.assert_close(module(features).values().double(), pooled_by_cell(module, cell, features))
        ids = torch.arange(8)  # every row of the first table, one a bag
        for feature in ("a", "b", "c", "d"):
            rows = {"a": 8, "b": 5, "c": 5, "d": 3}[feature]
            group = next(g for g, names in enumerate(module._groups) if feature in names.feature_names)
            place = module._groups[group].feature_names.index(feature)
            found = module._rows(group, ids[:rows], torch.tensor([place])).double()
            index = {"a": 0, "b": 1, "c": 1, "d": 2}[feature]
            expected = [[cell(module, index, row, col) for col in range(found.shape[1])] for row in range(rows)]
            assert found.tolist() == expected


def test_rare_ids_read_only_their_part_and_frequent_ones_never():
    module = RobeEmbeddingBagCollection(TABLES, memory_size=100, block_size=4, tiers=[[50, 0.2]], id_counts=COUNTS)
    with torch.no_grad():
        module.memory.copy_(torch.arange(100.0))
    addresses = [[cell(module, 0, row, col) for col in range(8)] for row in range(8)]
    assert all(max(addresses[row]) < 80 for row in (0, 1, 2, 3))
    assert all(min(addresses[row]) >= 80 for row in (4, 5, 6, 7))


def test_private_rows_share_nothing():
    options = frequency_robe.Options(private_share=0.5, block_size=4)
    request = EmbeddingRequest(compression=1.3, id_counts=COUNTS)
    module = frequency_robe.build(TABLES, options, request)
    with torch.no_grad():
        module.memory.copy_(torch.arange(float(module.memory_size)))
    size = module.private.size
    assert 0.5 * module.memory_size - 8 < size <= 0.5 * module.memory_size
    seen: set[float] = set()
    for index, config in enumerate(TABLES):
        for row in range(config.num_embeddings):
            addresses = {cell(module, index, row, col) for col in range(config.embedding_dim)}
            if 1 <= row < module.private.bounds[index]:
                assert max(addresses) < size
                assert not addresses & seen
                seen |= addresses
            else:
                assert min(addresses) >= size
    assert len(seen) == size


def test_first_rows_of_tiers_and_private_rows_are_counted_as_stored():
    options = robe.Options(block_size=2, tiers=((50, 0.2), (3, 0.1)))
    module = robe.build(TABLES, options, EmbeddingRequest(compression=1.5, id_counts=COUNTS))
    full = 8 * 8 + 5 * 8 + 3 * 5
    assert module.stored_bytes() == 4 * module.memory_size + 8 * 2 * 3
    assert 4 * full / 1.5 - 4 < module.stored_bytes() <= 4 * full / 1.5


def test_a_state_dict_of_other_tiers_is_refused():
    one, two = (
        RobeEmbeddingBagCollection(TABLES, memory_size=100, tiers=tiers, block_size=4, id_counts=COUNTS)
        for tiers in ([[50, 0.2]], [[9, 0.2]])
    )
    with pytest.raises(ValueError, match="tiers is"):
        two.load_state_dict(one.state_dict())


@pytest.mark.parametrize(
    ("tiers", "message"),
    [
        ([[0, 0.1]], r"\[0, 0.1\] is no \[count, share\]"),
        ([[5, 0.0]], r"\[5, 0.0\] is no"),
        ([[5, 0.1], [5, 0.1]], "counts must fall"),
        ([[5, 0.6], [2, 0.4]], "leave nothing"),
    ],
)
def test_impossible_tiers_are_refused(tiers, message: str):
    with pytest.raises(ValueError, match=message):
        RobeEmbeddingBagCollection(TABLES, tiers=tiers, id_counts=COUNTS)
    with pytest.raises(ValidationError, match=message):
        robe.Options(tiers=tuple((int(count), share) for count, share in tiers))


def test_counts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="need to know how often ids occur"):
        RobeEmbeddingBagCollection(TABLES, tiers=[[5, 0.1]])
    with pytest.raises(ValueError, match="id_counts of table 'b': 4 for 5 rows"):
        check_counts(TABLES, [COUNTS[0], COUNTS[1][:4], COUNTS[2]])
    with pytest.raises(ValueError, match="id_counts of table 'd' rise"):
        check_counts(TABLES, [COUNTS[0], COUNTS[1], np.array([0, 1, 2])])
    with pytest.raises(ValueError, match="private_share must be below 1, not 1"):
        RobeEmbeddingBagCollection(TABLES, private_share=1, id_counts=COUNTS)
    with pytest.raises(ValueError, match="need circular = False"):
        RobeEmbeddingBagCollection(TABLES, tiers=[[5, 0.1]], id_counts=COUNTS, circular=True)
