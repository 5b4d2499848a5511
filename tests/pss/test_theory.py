import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import chi2
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from launch.theory import main
from pss.hashing import HASH_FAMILIES
from pss.methods.robe import RobeEmbeddingBagCollection
from pss.theory.bounds import BOUNDS, Net, SecondMoment, SingularValues, count_important, importance, pairwise_eps
from pss.theory.identical import identical_share
from tests.pss.jagged import table

ALL = pytest.mark.parametrize("bound", BOUNDS, ids=lambda bound: type(bound).__name__)


def test_known_values():
    """By hand, with ln 200 = 5.29831737, √128 = 11.3137085, ln 9 = 2.19722458 and t = 0.876953125 / 2."""
    assert SecondMoment().macro_rows(16, 0.5, 0.01) == 108_800  # 272 / 0.0025
    assert SecondMoment().micro_rows(16, 0.5, 0.01, 0.5, 64) == 1_740_800  # 64 · 17 / (0.01 · 0.0625)
    assert SingularValues().macro_rows(128, 0.5, 0.01) == math.ceil((14.5689770 / 0.22474487) ** 2) == 4_203
    assert Net().macro_rows(128, 0.5, 0.01) == math.ceil(286.54306327 / (0.04806543 - 0.01405041)) == 8_425
    assert pairwise_eps(0.5) == 1.25


def test_micro_is_macro_of_one_more_dimension_a_smaller_error_and_a_share_of_the_risk():
    for bound in (Net(), SingularValues()):
        assert bound.micro_rows(16, 0.5, 0.1, 0.2, 10) == bound.macro_rows(17, 0.1, 0.01)
        assert bound.micro_eps(16, 5000, 0.1, 0.2, 10) == pytest.approx(bound.macro_eps(17, 5000, 0.01) / 0.2)


@ALL
@pytest.mark.parametrize("eps", [0.01, 0.3, 0.99])
@pytest.mark.parametrize("dim", [1, 16, 300])
def test_the_least_k_for_an_error_and_the_least_error_at_a_k_agree(bound, dim, eps):
    rows = bound.macro_rows(dim, eps, 0.05)
    assert bound.macro_eps(dim, rows, 0.05) <= eps * (1 + 1e-12) < bound.macro_eps(dim, rows - 1, 0.05) * (1 + 1e-9)
    rows = bound.micro_rows(dim, eps, 0.05, 0.4, 7)
    assert bound.micro_eps(dim, rows, 0.05, 0.4, 7) <= eps * (1 + 1e-12)
    assert eps < bound.micro_eps(dim, rows - 1, 0.05, 0.4, 7) * (1 + 1e-9)


def test_the_net_promises_nothing_where_its_tail_does_not_reach():
    assert Net().macro_eps(16, 100, 0.05) == math.inf
    assert math.isfinite(Net().macro_eps(16, 600, 0.05))


@pytest.mark.parametrize("k", [1, 10, 100, 3000])
def test_the_tail_is_above_the_exact_one_of_a_gaussian_sketch(k):
    """k‖Sx‖²/‖x‖² is χ² with k degrees of freedom. One vector is a net of one point: d = 0."""
    for t in np.linspace(0.05, 0.99, 20):
        delta = 2 * math.exp(-k * _tail(t))
        assert chi2.sf(k * (1 + t), k) + chi2.cdf(k * (1 - t), k) <= delta
        if 1e-9 < delta < 1:
            promised = Net()._eps(0, k, delta)
            assert promised * 0.876953125 == pytest.approx(t, rel=1e-6)


def test_a_point_within_a_quarter_of_the_eigenvector_sees_the_share_of_the_norm_that_the_bound_takes():
    """Worst is a matrix whose other eigenvalue is as large with the other sign; all others show more."""
    eps = 0.5
    share = brentq(lambda c: (16 * math.log(9) + math.log(200)) / _tail(c * eps) - Net()._rows(16, eps, 0.01), 0.1, 1)
    rng, least = np.random.default_rng(0), 1.0
    for other in np.linspace(-1, 1, 21):
        v, z = np.linalg.qr(rng.standard_normal((5, 2)))[0].T
        x = v * (1 - 1 / 32) + z * math.sqrt(1 - (1 - 1 / 32) ** 2)
        assert np.linalg.norm(x - v) == pytest.approx(1 / 4)
        least = min(least, abs(x @ (np.outer(v, v) + other * np.outer(z, z)) @ x))
    assert share == pytest.approx(least, abs=1e-9)


def _tail(t):
    return t * t / 4 - t**3 / 6


@pytest.mark.parametrize("rho", [0.02, 0.1, 0.5, 1.0])
def test_no_table_has_more_important_rows_than_counted(rho):
    rng = np.random.default_rng(0)
    for exponent in (0.0, 0.5, 1.0):
        rows = rng.standard_normal((400, 5)) * (np.arange(400)[:, None] + 1.0) ** -exponent
        assert (importance(rows) > rho).sum() <= count_important(400, 5, rho)
    orthogonal = np.concatenate([np.eye(5)] * 4)  # σ_max = 2, every row of importance 1/2
    assert (importance(orthogonal) > 0.499).sum() == count_important(400, 5, 0.5)
    assert count_important(40_000_000, 128, 0.1) == 12_800


def test_importance_is_the_norm_over_the_largest_singular_value():
    rows = np.array([[3.0, 4.0], [0.0, 0.0], [6.0, 8.0]])  # rank 1, σ = √125
    np.testing.assert_allclose(importance(rows), np.array([5, 0, 10]) / math.sqrt(125))
    with pytest.raises(ValueError, match="zeros"):
        importance(np.zeros((3, 2)))


@pytest.mark.parametrize(
    ("wrong", "name"),
    [({"eps": 0.0}, "eps"), ({"eps": 1.0}, "eps"), ({"eps": math.nan}, "eps"), ({"delta": 1.5}, "delta"),
     ({"rho": 0.0}, "rho"), ({"rho": 1.1}, "rho"), ({"dim": 0}, "dim"), ({"important": 0}, "important")],
)  # fmt: skip
def test_arguments_out_of_range_are_named(wrong, name):
    good = {"dim": 16, "eps": 0.5, "delta": 0.01, "rho": 1.0, "important": 3}
    SecondMoment().micro_rows(**good)
    with pytest.raises(ValueError, match=rf"{name} must be .* not {next(iter(wrong.values())):g}"):
        SecondMoment().micro_rows(**{**good, **wrong})


@pytest.mark.parametrize("family", HASH_FAMILIES)
@pytest.mark.parametrize(("dim", "block_size", "memory_size"), [(8, 4, 40), (6, 4, 60), (3, 3, 1200)])
def test_the_identical_share_is_what_the_lookup_shows(family, dim, block_size, memory_size):
    """A memory of distinct numbers makes rows equal exactly where their places are."""
    ids, found = 120, []
    for seed in range(4):
        module = RobeEmbeddingBagCollection(
            [table("t", ids, dim)], memory_size=memory_size, block_size=block_size, hash_family=family, seed=seed
        )
        with torch.no_grad():
            module.memory.copy_(torch.arange(memory_size))
        kjt = KeyedJaggedTensor(["t"], torch.arange(ids), lengths=torch.ones(ids, dtype=torch.int64))
        rows = [tuple(row) for row in module(kjt).values().tolist()]
        expected = sum(rows.count(row) > 1 for row in rows) / ids
        found.append(identical_share(ids, dim, memory_size, block_size, family, seed))
        assert found[-1] == expected
    assert max(found) > 0
    assert min(found) < 1


def test_identical_refuses_blocks_wider_than_a_row():
    with pytest.raises(ValueError, match=r"block_size must be at least 1 and at most .* not 16"):
        identical_share(10, 8, 100, 16, "independent", 0)


def run(words):
    """`pss-bench theory` with these words."""
    assert main(words.split(), standalone_mode=False) is None


def test_the_default_command_prints_k_size_and_compression(capsys):
    run("--rows 40000000 --dim 128 --eps 0.5 --delta 0.01 --rho 0.5")
    lines = capsys.readouterr().out.splitlines()
    (macro,) = [line for line in lines if "macro" in line and "singular values" in line]
    assert macro.split()[-5:] == ["4,203", "537,984", "2.15", "MB", "9,517×"]
    (micro,) = [line for line in lines if "micro, ρ = 0.5" in line and "second moment" in line]
    assert "none: k ≥ rows" in micro
    assert any("(ε² + 2ε) = 1.25" in line for line in lines)


def test_identical_prints_every_family(capsys):
    run("identical --rows 500 --dim 8 --block-size 4 --memory-mb 0.001 --seeds 2")
    out = capsys.readouterr().out
    for family in HASH_FAMILIES:
        assert f" {family} " in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--rows 10 --dim 4 --eps 1.5", "eps must be in (0, 1) and at least 1e-09, not 1.5"),
        ("--rows 10 --dim 4 --delta 0", "delta must be in (0, 1)"),
        ("--rows 10 --dim 4 --rho 0.5,2", "rho must be in (0, 1] and at least 1e-09, not 2"),
        ("--rows 0 --dim 4", "rows must be at least 1 and below 2^63, not 0"),
        ("--rows 4 --dim x", "'--dim': 'x' is not a valid integer"),
        ("--rows 4", "--dim"),
        ("--rows 4 --dim 4 measure", "measure"),
        ("", "identical"),
        ("identical --block-size 65", "block_size must be at least 1 and at most embedding_dim = 64"),
        ("identical --memory-mb 0", "'--memory-mb': 0.0 is not in the range x>=1e-05"),
        ("measure --sizes 64,30000", "more would not compress it, not 30000"),
        ("measure --seeds 5", "seeds must be at least 19 for delta 0.05, not 5"),
        ("measure --sketch magic", "'magic'"),
        ("measure --sizes 100 --nonzeros 7", "multiple of 7, not 100"),
        ("measure --table /nowhere.npy", "/nowhere.npy does not exist"),
        ("measure --table random --exponent 1", "--exponent"),
        ("measure --table x.npy --rows 5", "--rows is of a generated table"),
    ],
)
def test_mistakes_exit_with_2_and_say_which(words, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(words.split())
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
