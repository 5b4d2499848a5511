"""The byte bound against numbers worked out by hand."""

import pytest

from recsys.bench.byte_bound import Traffic, bytes_moved, touched_elements
from recsys.bench.kernel_sizes import KernelSize

SIZE = KernelSize(embedding_dim=4, block_size=2, memory_bytes=400, batch_size=3, features=2, rows=40)
IDS = 200  # of 6 ids (48), 7 offsets (56) and 3 x 2 x 4 floats of output (96)
TOUCHED = 100 * (1 - 0.98**10)  # 5 distinct rows are 10 blocks, each of which covers 2 of 100 elements


def moved(operation, *traffic, cache_bytes=0):
    return bytes_moved(SIZE, operation, Traffic(*traffic), num_ids=6, distinct=5, cache_bytes=cache_bytes)


@pytest.mark.parametrize(
    ("operation", "traffic", "expected"),
    [
        ("forward", ("tables",), IDS + 4 * 20),
        ("backward", ("tables",), IDS + 2 * 4 * 20),
        ("backward", ("tables", "sparse"), IDS + 4 * 20 + 8 * 5),
        ("step", ("tables",), IDS + 4 * 20 + IDS + 2 * 4 * 20),
        ("step", ("tables", "sparse"), IDS + 4 * 20 + IDS + 2 * 4 * 20),
        ("step", ("tables", "fused", "row"), IDS + 4 * 20 + IDS + 2 * 4 * (20 + 5)),
        ("forward", ("array",), IDS + 4 * TOUCHED),
        ("backward", ("array",), IDS + 8 * TOUCHED),
        ("backward", ("array", "dense"), IDS + 400),
        ("backward", ("array", "sparse"), IDS + 12 * TOUCHED),
        ("step", ("array",), 2 * IDS + 12 * TOUCHED),
        ("step", ("array", "fused", "element"), 2 * IDS + 4 * TOUCHED + 16 * TOUCHED),
    ],
)
def test_bytes_by_hand(operation, traffic, expected):
    assert moved(operation, *traffic) == pytest.approx(expected)


def test_what_fits_the_cache_moves_nothing_but_ids_output_and_gradient():
    assert moved("forward", "array", cache_bytes=400) == IDS
    assert moved("step", "array", cache_bytes=400) == 2 * IDS
    assert moved("backward", "array", "dense", cache_bytes=400) == IDS
    assert moved("forward", "array", cache_bytes=399) > IDS
    assert moved("forward", "tables", cache_bytes=400) > IDS  # the tables are 640 bytes
    assert moved("forward", "tables", cache_bytes=640) == IDS


def test_state_must_fit_the_cache_too():
    assert moved("step", "array", "fused", "element", cache_bytes=799) > 2 * IDS
    assert moved("step", "array", "fused", "element", cache_bytes=800) == 2 * IDS


def test_no_more_than_all_of_the_array_is_touched():
    assert touched_elements(SIZE, "array", 1e6) == pytest.approx(100)
    assert touched_elements(SIZE, "array", 0) == 0


def test_blocks_of_flattened_tables_are_read_a_row_at_a_time():
    flattened = KernelSize(embedding_dim=4, block_size=8, memory_bytes=400, batch_size=3, features=2, rows=40)
    assert touched_elements(flattened, "array", 5) == pytest.approx(100 * (1 - 0.96**5))
