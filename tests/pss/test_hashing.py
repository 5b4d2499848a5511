import pytest
import torch

from pss.hashing import HASH_FAMILIES, AffineHash, build_hash, locate, mix64

EDGE_IDS = [0, 1, 2, 2**31 - 1, 2**31, 2**32 + 5, 2**53 + 1, 2**62, 2**63 - 2, 2**63 - 1, -1, -(2**63)]
SLOTS = [1, 2, 7, 1000, 2**30 + 3, AffineHash.PRIME]
WIDE_SLOTS = [2**31 - 1, 2**31, 2**31 + 1, 2**40 + 7]

NUM_EMBEDDINGS = (7, 2**40, 1, 12, 5)


def locations(family: str, seed: int, ids: torch.Tensor, slots: int, chunks: int = 4) -> torch.Tensor:
    """(V, chunks) of table 0."""
    constants = build_hash(family, seed, NUM_EMBEDDINGS).constants([0], chunks)
    return locate(ids, torch.zeros(1, dtype=torch.int64), constants, slots)


def test_mix64_gives_the_published_sequence_of_splitmix64():
    golden, state = 0x9E3779B97F4A7C15, 1234567
    assert [mix64(state + k * golden) for k in (1, 2, 3)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


@pytest.mark.parametrize(
    ("family", "slots"),
    [(family, slots) for family in HASH_FAMILIES for slots in SLOTS] + [("independent", slots) for slots in WIDE_SLOTS],
)
def test_tensors_and_python_integers_agree(family: str, slots: int):
    generator = torch.Generator().manual_seed(slots)
    ids = torch.cat([torch.tensor(EDGE_IDS), torch.randint(0, 2**63 - 1, (50,), generator=generator)])
    tables = [4, 0, 4, 1]
    for seed in (0, 7, 2**63 + 1):
        hash_ = build_hash(family, seed, NUM_EMBEDDINGS)
        got = locate(ids.unsqueeze(1), torch.arange(4), hash_.constants(tables, 5), slots)
        expected = [
            [[hash_.location(table, i, chunk, slots) for chunk in range(5)] for table in tables] for i in ids.tolist()
        ]
        assert got.tolist() == expected
        assert 0 <= int(got.min()) <= int(got.max()) < slots


@pytest.mark.parametrize("family", HASH_FAMILIES)
@pytest.mark.parametrize("first_id", [0, 2**62])
@pytest.mark.parametrize("stride", [1, 4096])
def test_locations_are_uniform(family: str, first_id: int, stride: int):
    ids, slots = first_id + stride * torch.arange(100_000), 997
    for column in locations(family, 3, ids, slots).t():
        expected = len(ids) / slots
        chi_square = ((column.bincount(minlength=slots) - expected) ** 2 / expected).sum()
        # Mean slots - 1, standard deviation √(2·slots); the affine hash spreads ids in a row too evenly, never worse.
        assert chi_square < slots + 5 * (2 * slots) ** 0.5


def shared_rows(found: torch.Tensor) -> float:
    """Share of rows that equal another row."""
    _, inverse, counts = found.unique(dim=0, return_inverse=True, return_counts=True)
    return float((counts[inverse] > 1).double().mean())


def test_affine_shares_whole_rows_and_independent_does_not():
    ids, slots = torch.randint(0, 10**7, (20_000,), generator=torch.Generator().manual_seed(0)).unique(), 20_000
    assert shared_rows(locations("affine", 1, ids, slots)) > 0.2
    assert shared_rows(locations("independent", 1, ids, slots)) == 0.0


def test_two_chunks_collide_together_no_more_than_by_chance():
    ids, slots = torch.arange(100_000), 1009
    found = locations("independent", 5, ids, slots, chunks=6)
    by_chance = len(ids) * (len(ids) - 1) / 2 / slots**2
    for i in range(6):
        for j in range(i):
            counts = (found[:, i] * slots + found[:, j]).bincount().double()
            pairs = float((counts * (counts - 1) / 2).sum())
            assert abs(pairs - by_chance) < 5 * by_chance**0.5


def test_tables_and_seeds_have_hashes_of_their_own():
    ids, slots = torch.arange(50_000), 1009
    hash_ = build_hash("independent", 0)
    by_table = locate(ids.unsqueeze(1), torch.arange(2), hash_.constants([0, 1], 1), slots).squeeze(-1)
    by_seed = [locations("independent", seed, ids, slots, chunks=1).squeeze(-1) for seed in (0, 1)]
    for one, other in [by_table.unbind(1), by_seed]:
        meetings = int((one == other).sum())
        assert abs(meetings - len(ids) / slots) < 5 * (len(ids) / slots) ** 0.5


def test_the_affine_hash_cannot_tell_ids_apart_beyond_its_prime():
    near, far = torch.tensor([5]), torch.tensor([5 + AffineHash.PRIME])
    assert torch.equal(locations("affine", 0, near, 10**6), locations("affine", 0, far, 10**6))
    assert not torch.equal(locations("independent", 0, near, 10**6), locations("independent", 0, far, 10**6))


def test_impossible_hashes_are_refused():
    known = r"known are \['affine', 'authors', 'independent'\]"
    with pytest.raises(ValueError, match=f"hash_family 'md5' is unknown: {known}"):
        build_hash("md5", 0)
    with pytest.raises(ValueError, match=f"'affine' reaches {AffineHash.PRIME} slots at most, not {2**31}"):
        build_hash("affine", 0).check_slots(2**31)


def test_the_authors_address_is_their_formula():
    """((id + offset)·R3 + (j // Z)·R2 + R1) % P % (|M| − Z + 1) + j % Z, for element j of a row, in Python integers."""
    hash_ = build_hash("authors", 5, NUM_EMBEDDINGS)
    r3, r2, r1 = (hash_._coefficient(k) for k in (0, 1, 3))  # pyright: ignore[reportAttributeAccessIssue]
    block_size, memory_size = 8, 1000
    for table, row, column in [(0, 6, 0), (1, 2**40 - 1, 17), (3, 0, 31), (4, 4, 8)]:
        row_of_all = sum(NUM_EMBEDDINGS[:table]) + row
        expected = (row_of_all * r3 + column // block_size * r2 + r1) % 2038074743 % (memory_size - block_size + 1)
        assert hash_.location(table, row, column // block_size, memory_size - block_size + 1) == expected
