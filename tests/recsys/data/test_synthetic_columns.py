"""The columns against their stated laws, in closed form and plain `math`."""

import math
from statistics import NormalDist

import numpy as np
import pytest

from recsys.data import exact
from recsys.data.criteo_tsv import CARDINALITIES
from recsys.data.synthetic_columns import INTEGER_COLUMNS, KAGGLE_ID_COLUMNS, Columns, id_columns, normal_quantiles

N = 80_000
SIZES = CARDINALITIES["criteo_kaggle"]


@pytest.fixture(scope="module")
def drawn():
    """integers (13, N), ids (26, N)"""
    hashes = exact.mix(np.arange(N), exact.random_keys(5, "rows", 1))
    return Columns(KAGGLE_ID_COLUMNS, SIZES, seed=5).draw(hashes)


def test_distinct_ids_are_as_many_as_in_real_rows(drawn):
    distinct = sum(len(np.unique(ids[ids > 0])) for ids in drawn[1])
    assert distinct == pytest.approx(199_214, rel=0.01)


@pytest.mark.parametrize("f", range(26))
def test_ids_follow_the_stated_law(drawn, f):
    """Kolmogorov–Smirnov at one in 10⁵, plus half a bin for the table's linear interpolation."""
    column, n = KAGGLE_ID_COLUMNS[f], SIZES[f]
    ids = drawn[1][f]
    error = 4.5 * math.sqrt(column.missing * (1 - column.missing) / N)
    assert abs((ids == 0).mean() - column.missing) <= error
    ids, a, q = np.sort(ids[ids > 0]), 1 - column.exponent, column.shift
    upper = np.searchsorted(ids, np.unique(ids), side="right") / len(ids)
    law = [((r + q) ** a - q**a) / ((n + q) ** a - q**a) for r in np.unique(ids).tolist()]
    assert np.abs(upper - law).max() < 2.47 / math.sqrt(len(ids)) + 2**-13
    assert ids.max() <= n


@pytest.mark.parametrize("j", range(13))
def test_integers_follow_the_stated_law(drawn, j):
    column = INTEGER_COLUMNS[j]
    present = drawn[0][j][drawn[0][j] >= 0]
    error = 4.5 * math.sqrt(column.missing * (1 - column.missing) / N)
    assert abs(1 - len(present) / N - column.missing) <= error
    for bound in (1, 3, 10, 100, 1000, 100_000):
        law = NormalDist(column.log_mean, column.log_sd).cdf(math.log(bound))
        error = 4.5 * math.sqrt(law * (1 - law) / len(present)) + 2e-4
        assert abs((present < bound).mean() - law) <= error


def test_columns_that_are_blank_together(drawn):
    blank = np.concatenate([drawn[0] < 0, drawn[1] == 0])
    columns = [*INTEGER_COLUMNS, *KAGGLE_ID_COLUMNS]
    for i, a in enumerate(columns):
        for j, b in enumerate(columns[:i]):
            if a.missing and a.missing_group == b.missing_group:
                assert np.array_equal(blank[i], blank[j]), (i, j)
            elif a.missing * b.missing > 0.01:
                assert abs(np.corrcoef(blank[i], blank[j])[0, 1]) < 0.018, (i, j)
    complete = [
        np.argsort(np.argsort(ids)) for ids, c in zip(drawn[1], KAGGLE_ID_COLUMNS, strict=True) if not c.missing
    ]
    for i, column in enumerate(columns):
        if column.missing:
            assert max(abs(np.corrcoef(blank[i], ranks)[0, 1]) for ranks in complete) < 0.018, i


def test_columns_that_copy_each_other(drawn):
    def order_correlation(f, g):
        both = (drawn[1][f] > 0) & (drawn[1][g] > 0)
        first, second = (np.argsort(np.argsort(drawn[1][c][both], kind="stable")) for c in (f, g))
        return np.corrcoef(first, second)[0, 1]

    assert order_correlation(2, 11) > 0.94  # C3, C12: both copy with .98
    assert order_correlation(1, 14) > 0.75  # C2, C15: .9
    assert abs(order_correlation(2, 6)) < 0.02  # C3, C7: different groups
    assert abs(order_correlation(2, 25)) < 0.02  # C26 copies nothing


def test_terabyte_columns_are_matched_by_size():
    columns = id_columns("criteo_tb")
    assert sorted(columns) == sorted(KAGGLE_ID_COLUMNS)
    by_size = np.argsort(CARDINALITIES["criteo_tb"]), np.argsort(CARDINALITIES["criteo_kaggle"])
    for terabyte, kaggle in zip(*by_size, strict=True):
        assert columns[terabyte] == KAGGLE_ID_COLUMNS[kaggle]


def test_normal_quantiles_are_far_from_a_rounding_boundary():
    inverse = NormalDist().inv_cdf
    millionths = [1e6 * inverse(min(max(i / 4096, 1e-4), 1 - 1e-4)) for i in range(4097)]
    assert min(abs(x - math.floor(x) - 0.5) for x in millionths) > 1e-6  # log's error here: about 1e-9
    assert normal_quantiles().tolist() == [round(x) / 1e6 for x in millionths]
