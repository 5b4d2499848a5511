import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from baselines import tt_cores
from baselines.tt_cores import choose_form, choose_ranks, decompose, digits, draw_train, factor_dim, factor_rows


def reconstruct(cores: list[Tensor]) -> Tensor:
    """The table (∏ n_k, ∏ d_k) that cores (n_k, r_{k-1}, d_k, r_k) stand for, by the formula."""
    table = cores[0].new_ones(1, 1, 1)
    for core in cores:
        table = torch.einsum("nda,iaje->nidje", table, core)
        table = table.reshape(table.shape[0] * table.shape[1], table.shape[2] * table.shape[3], -1)
    return table.squeeze(2)


def random_cores(rows: list[int], dims: list[int], ranks: list[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = zip(rows, ranks, dims, ranks[1:], strict=False)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


@pytest.mark.parametrize("cores", [3, 4])
def test_row_factors_cover_the_table_and_are_nearly_equal(cores: int):
    for rows in [*range(1, 300), 997, 1000, 1001, 10131227, 10**8, 2**40 + 15, 2**62]:
        factors = factor_rows(rows, cores)
        assert len(factors) == cores
        assert math.prod(factors) >= rows
        assert max(factors) - min(factors) <= 1 + max(factors) / 2
        if rows >= 10**6:
            assert math.prod(factors) < 1.05 * rows
            assert max(factors) - min(factors) <= 1
    assert factor_rows(300, 3) == [7, 7, 7]
    assert factor_rows(40, 3) == [4, 3, 4]


def test_dim_factors_are_exact_and_the_large_ones_at_the_ends():
    expected = {1: [1, 1, 1], 7: [7, 1, 1], 8: [2, 2, 2], 12: [3, 2, 2], 16: [4, 2, 2], 64: [4, 4, 4], 90: [6, 3, 5]}
    assert {dim: factor_dim(dim, 3) for dim in expected} == expected
    assert factor_dim(16, 4) == [2, 2, 2, 2]
    assert factor_dim(24, 4) == [3, 2, 2, 2]
    for dim in range(1, 130):
        assert math.prod(factor_dim(dim, 4)) == dim


def test_digits():
    radices = [3, 4, 5]
    found = [digits(number, radices) for number in range(60)]
    assert found == [[a, b, c] for a in range(3) for b in range(4) for c in range(5)]


def test_ranks_are_the_largest_within_the_budget():
    sizes = [(5, 8), (40, 8), (300, 8), (10**5, 8), (10**5, 3)]

    def stored(ranks: list[int]) -> int:
        total = 0
        for n, d in sizes:
            shapes = zip(factor_rows(n, len(ranks) - 1), factor_dim(d, len(ranks) - 1), pairwise(ranks), strict=True)
            total += min(n * d, sum(n_k * d_k * left * right for n_k, d_k, (left, right) in shapes))
        return total

    for cores, budget in [(3, 900), (3, 5000), (3, 6000), (4, 5000), (4, 6000), (3, 10**5), (4, 500_000)]:
        ranks = choose_ranks(sizes, budget, cores, 0.0)
        assert ranks[0] == ranks[-1] == 1
        assert stored(ranks) <= budget
        inner = ranks[1:-1]
        assert inner == sorted(inner, reverse=True)
        assert inner[0] - inner[-1] <= 1
        grows = inner.index(inner[-1])  # the first of the lowest, or, where all are equal, the first of all
        assert stored([1, *inner[:grows], inner[grows] + 1, *inner[grows + 1 :], 1]) > budget
    assert choose_ranks(sizes, 1, 3, 0.0) == [1, 1, 1, 1]
    everything = sum(n * d for n, d in sizes)
    assert stored(choose_ranks(sizes, everything, 3, 0.0)) == everything


def test_a_table_is_whole_where_that_is_no_larger():
    train = 2 * (10 * 2 * 4) + 10 * 2 * 4 * 4
    assert choose_form(1000, 8, [1, 4, 4, 1], 0.0) == (train, [10, 10, 10], 0)
    assert choose_form(1000, 8, [1, 4, 4, 1], 0.0509) == (train + 50 * (8 + 4), [10, 10, 10], 50)
    assert choose_form(1000, 8, [1, 4, 4, 1], 0.7) == (8000, [], 0)
    assert choose_form(5, 8, [1, 4, 4, 1], 0.0) == (40, [], 0)
    assert choose_form(8, 8, [1, 1, 1, 1], 0.0) == (12, [2, 2, 2], 0)


@pytest.mark.parametrize("rows", [[12, 10, 11], [5, 6, 4, 5], [2, 2, 2]])
@pytest.mark.parametrize("rank", [2, 7, 32])
def test_a_drawn_table_has_the_wanted_spread(rows: list[int], rank: int):
    dims = factor_dim(16, len(rows))
    ranks = [1, *[rank] * (len(rows) - 1), 1]
    shapes = list(zip(rows, ranks, dims, ranks[1:], strict=False))
    cores = draw_train(shapes, 0.3, torch.Generator().manual_seed(5))
    assert [core.shape for core in cores] == shapes
    table = reconstruct(cores)
    assert table.square().mean().sqrt() == pytest.approx(0.3, rel=1e-9)
    assert tt_cores.table_norm(cores) == pytest.approx(float(table.norm()), rel=1e-12)
    if rows[0] > 2:
        assert table.std() == pytest.approx(0.3, rel=0.03)


def test_core_entries_are_a_gaussian_without_its_middle():
    (core,) = draw_train([(100, 1, 1000, 1)], 1.0, torch.Generator().manual_seed(0))
    reference = np.random.default_rng(0).normal(size=4_000_000)
    reference = reference[np.abs(reference) >= 2]
    reference /= np.sqrt(np.mean(reference**2))
    quantiles = [0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99]
    values = core.flatten().numpy()
    for sign in (1, -1):
        found, expected = (np.quantile((sign * x)[sign * x > 0], quantiles) for x in (values, reference))
        np.testing.assert_allclose(found, expected, rtol=0.01)
    assert abs((values > 0).mean() - 0.5) < 0.01


def test_products_and_gradients_in_blocks(monkeypatch: pytest.MonkeyPatch):
    """Of 7 ids, in blocks of 3 and all at once, against the materialised table and finite differences."""
    cores = [core.requires_grad_() for core in random_cores([3, 2, 4], [2, 3, 1], [1, 2, 3, 1])]
    digits_of = torch.tensor([[0, 2, 1, 2, 2, 0, 0], [1, 0, 1, 1, 0, 1, 1], [3, 0, 1, 2, 0, 3, 3]])
    ids = (digits_of[0] * 2 + digits_of[1]) * 4 + digits_of[2]
    for size in (3, 100):
        monkeypatch.setattr(tt_cores, "_block_size", lambda cores, size=size: size)
        torch.testing.assert_close(tt_cores._MultiplySlices.apply(digits_of, *cores), reconstruct(cores)[ids])
        assert torch.autograd.gradcheck(lambda *given: tt_cores._MultiplySlices.apply(digits_of, *given), cores)


def test_blocks_are_bounded():
    cores = [torch.zeros(2, 1, 4, 64), torch.zeros(2, 64, 2, 64)]
    assert tt_cores._block_size(cores) == 2**20 // (64 * 2 * 64)
    assert tt_cores._block_size([torch.zeros(1, 1, 2**21, 1)]) == 1


@pytest.mark.parametrize(("rows", "dims"), [([4, 3, 5], [4, 2, 2]), ([3, 2, 2, 4], [3, 1, 1, 2])])
def test_tt_svd_is_exact_at_full_ranks(rows: list[int], dims: list[int]):
    table = torch.randn(math.prod(rows) - 2, math.prod(dims), generator=torch.Generator().manual_seed(0))
    full = 64  # more than any unfolding has
    ranks = [1, *[full] * (len(rows) - 1), 1]
    cores, cut = decompose(table, rows, dims, ranks)
    assert [core.shape for core in cores] == list(zip(rows, ranks, dims, ranks[1:], strict=False))
    found = reconstruct(cores)
    torch.testing.assert_close(found[:-2], table.double(), rtol=0, atol=1e-12)
    assert found[-2:].abs().max() < 1e-12
    assert cut == 0


def test_tt_svd_finds_a_train_again():
    cores = random_cores([4, 3, 5], [2, 2, 2], [1, 3, 2, 1])
    found, cut = decompose(reconstruct(cores), [4, 3, 5], [2, 2, 2], [1, 3, 2, 1])
    torch.testing.assert_close(reconstruct(found), reconstruct(cores))
    assert cut < 1e-20


@pytest.mark.parametrize("ranks", [[1, 2, 3, 1], [1, 5, 1, 1]])
def test_tt_svd_error_is_what_was_cut_off(ranks: list[int]):
    """And within the bounds by the singular values of the table's unfoldings."""
    rows, dims = [4, 3, 5], [2, 3, 2]
    table = torch.randn(60, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    cores, cut = decompose(table, rows, dims, ranks)
    assert (reconstruct(cores) - table).square().sum().item() == pytest.approx(cut, rel=1e-10)
    tensor = table.view(*rows, *dims).permute(0, 3, 1, 4, 2, 5).numpy()
    tails = []
    for k in (1, 2):
        unfolding = tensor.reshape(math.prod(rows[:k]) * math.prod(dims[:k]), -1)
        tails.append((np.linalg.svd(unfolding, compute_uv=False)[ranks[k] :] ** 2).sum())
    assert max(tails) <= cut * (1 + 1e-10)
    assert cut <= sum(tails) * (1 + 1e-10)
