import numpy as np
import pytest
import torch

from baselines import full
from baselines.full import INITIAL_BLOCK_ROWS, fill_initial_rows
from pss.method import EmbeddingRequest
from recsys.embedding.tables import build_tables


def filled(rows, cols, **where):
    weight = torch.full((rows, cols), torch.nan)
    fill_initial_rows(weight, table=2, seed=7, init_scale=0.5, embedding_dim=6, **where)
    return weight


@pytest.mark.parametrize(
    ("rows", "cols", "row", "col"),
    [(10, 6, 0, 0), (10, 3, 0, 3), (300, 2, INITIAL_BLOCK_ROWS - 100, 1), (1, 1, INITIAL_BLOCK_ROWS, 5)],
)
def test_a_part_starts_as_in_the_whole_table(rows, cols, row, col):
    whole = filled(INITIAL_BLOCK_ROWS + 250, 6)
    part = filled(rows, cols, row_offset=row, col_offset=col)
    assert torch.equal(part, whole[row : row + rows, col : col + cols])


def test_initial_rows_are_uniform_and_differ_by_table_and_seed():
    weight = torch.empty(20_000, 4)
    fill_initial_rows(weight, table=0, seed=1, init_scale=0.01)
    assert weight.abs().max() <= 0.01
    np.testing.assert_allclose(weight.std().item(), 0.01 / np.sqrt(3), rtol=0.02)
    for table, seed in ((1, 1), (0, 2)):
        other = torch.empty_like(weight)
        fill_initial_rows(other, table=table, seed=seed, init_scale=0.01)
        assert abs(np.corrcoef(weight.ravel(), other.ravel())[0, 1]) < 0.02


def test_compression_is_refused():
    with pytest.raises(ValueError, match=r"embedding.compression = 2: .* set embedding.compression=1 or less"):
        full.build(build_tables(["f"], [10], 4), full.Options(), EmbeddingRequest(compression=2.0))
