import pytest
import torch

from pss.methods.cce_layout import lay_out, solve_layout
from tests.pss.jagged import table

TABLES = [table("a", 3000, 16), table("b", 500, 6), table("c", 7, 16), table("d", 900, 5)]


def bytes_of(chunks: int, clusters: int, helper_rows: int) -> int:
    """Table by table: whole, or codebooks, helper tables and pointers; and the counter."""
    own_chunks = {16: {1: 1, 2: 2, 3: 2, 4: 4}, 6: {1: 1, 2: 2, 3: 3, 4: 3}, 5: dict.fromkeys((1, 2, 3, 4), 1)}
    pointer = 1 if clusters <= 256 else 2 if clusters <= 65536 else 4
    total, is_any_clustered = 0, False
    for config in TABLES:
        dim, ids = config.embedding_dim, config.num_embeddings
        whole = 4 * dim * ids
        clustered = 4 * dim * (clusters + helper_rows) + ids * own_chunks[dim][chunks] * pointer
        total += min(whole, clustered)
        is_any_clustered |= clustered < whole
    return total + 8 * is_any_clustered


FULL = 4 * (3000 * 16 + 500 * 6 + 7 * 16 + 900 * 5)


@pytest.mark.parametrize("chunks", [1, 2, 3, 4])
@pytest.mark.parametrize("compression", [1, 1.3, 4, 9, 20, 35])
def test_the_most_that_fits_is_found(chunks: int, compression: float):
    budget = int(FULL / compression)
    layout = solve_layout(TABLES, chunks, budget)
    assert layout.stored_bytes == bytes_of(chunks, layout.clusters, layout.helper_rows)
    fitting = [k for k in range(2, 3001) if bytes_of(chunks, k, k) <= budget]
    if not fitting:
        assert (layout.clusters, layout.helper_rows) == (2, 2)
        return
    assert layout.clusters == max(fitting)
    rows = max(h for h in range(layout.clusters, 3001) if bytes_of(chunks, layout.clusters, h) <= budget)
    assert layout.helper_rows == rows
    assert budget - 4 * (16 + 6 + 16 + 5) < layout.stored_bytes <= budget


def test_unset_chunks_leave_half_of_the_budget_to_the_rows():
    chosen = [solve_layout(TABLES, None, int(FULL / compression)).chunks for compression in (2, 6, 8, 16, 25, 45)]
    assert chosen == sorted(chosen, reverse=True)
    assert set(chosen) == {4, 3, 1}
    for compression, chunks in zip((2, 6, 8, 16), chosen, strict=False):
        budget = int(FULL / compression)
        layout = solve_layout(TABLES, None, budget)
        assert layout.pointer_bytes <= budget / 2
        if chunks < 4:
            more = solve_layout(TABLES, chunks + 1, budget)
            assert more.pointer_bytes > budget / 2 or more.clusters == 2


def test_places_do_not_overlap_and_fill_everything():
    layout = lay_out(TABLES, 4, 30, 40)
    elements, pointers = [], []
    for config, place in zip(TABLES, layout.places, strict=True):
        rows = config.num_embeddings if place.is_whole else 30 + 40
        elements += range(place.start, place.start + rows * config.embedding_dim)
        if not place.is_whole:
            pointers += range(place.pointer_start, place.pointer_start + config.num_embeddings * place.chunks)
    assert elements == list(range(layout.memory_size))
    assert pointers == list(range(layout.pointers))
    assert [place.is_whole for place in layout.places] == [False, False, True, False]
    assert [place.chunks for place in layout.places] == [4, 3, 4, 1]


@pytest.mark.parametrize(
    ("clusters", "dtype"), [(256, torch.uint8), (257, torch.int16), (65536, torch.int16), (65537, torch.int32)]
)
def test_a_pointer_is_no_wider_than_needed(clusters: int, dtype: torch.dtype):
    assert lay_out([table("a", 10**7, 4)], 1, clusters, 2).pointer_dtype == dtype


def test_a_table_of_2_to_the_62_rows_is_laid_out():
    layout = solve_layout([table("a", 2**62, 16)], None, 2**30)
    assert layout.stored_bytes == 2**62 + 4 * 16 * 4 + 8
