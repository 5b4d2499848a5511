from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from pss import least_squares
from pss.least_squares import Fit, adjoint, compress
from pss.methods import jlt, quotient_remainder, robe
from pss.methods.jlt import JltEmbeddingBagCollection
from pss.methods.quotient_remainder import QuotientRemainderEmbeddingBagCollection
from pss.methods.robe import RobeEmbeddingBagCollection
from tests.pss.jagged import materialise, table


def configs() -> list[EmbeddingBagConfig]:
    """Two dimensions, a table of two features, 30·6 + 20·6 + 9·4 = 336 numbers."""
    return [table("a", 30, 6, ["a", "b"]), table("c", 20, 6), table("d", 9, 4)]


MODULES: dict[str, tuple[Callable[..., float], Callable[[], Any]]] = {
    "robe": (robe.cell, lambda: RobeEmbeddingBagCollection(configs(), memory_size=40, block_size=4, signed=True)),
    "robe, sparse gradient": (
        robe.cell, lambda: RobeEmbeddingBagCollection(configs(), memory_size=40, block_size=4, gradient="sparse"),
    ),
    "hashing": (jlt.cell, lambda: JltEmbeddingBagCollection(configs(), rows=8, nonzeros=1)),
    "sparse": (jlt.cell, lambda: JltEmbeddingBagCollection(configs(), rows=9, nonzeros=3)),
    "achlioptas": (jlt.cell, lambda: JltEmbeddingBagCollection(configs(), rows=8, sketch="achlioptas")),
    "gaussian": (jlt.cell, lambda: JltEmbeddingBagCollection(configs(), rows=8, sketch="gaussian")),
    "qr add": (
        quotient_remainder.cell,
        lambda: QuotientRemainderEmbeddingBagCollection(configs(), compression=3, combine="add"),
    ),
    "qr concat": (
        quotient_remainder.cell,
        lambda: QuotientRemainderEmbeddingBagCollection(configs(), compression=3, combine="concat"),
    ),
}  # fmt: skip


def targets(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(c.num_embeddings, c.embedding_dim, generator=generator) for c in configs()]


def counts() -> list[np.ndarray]:
    """By falling frequency; two of them 0."""
    return [60 // (1 + np.arange(30)), 60 // (1 + np.arange(20)), np.array([9, 8, 7, 6, 5, 4, 3, 0, 0])]


def design(module: Any, cell: Callable[..., float]) -> Tensor:
    """A by `cell` alone, (numbers of all tables, |M|) float64."""
    before, columns = module.memory.detach().clone(), []
    for slot in range(module.memory_size):
        module.memory.data.zero_()[slot] = 1.0
        columns.append(torch.cat([materialise(module, cell, index).flatten() for index in range(3)]))
    module.memory.data.copy_(before)
    return torch.stack(columns, dim=1).double()


def flat_weights(row_weights: list[np.ndarray] | None) -> Tensor:
    """One weight for every number of the tables."""
    weights = row_weights or [np.ones(c.num_embeddings) for c in configs()]
    return torch.cat([
        torch.from_numpy(w).double().repeat_interleave(c.embedding_dim) for c, w in zip(configs(), weights, strict=True)
    ])  # fmt: skip


@pytest.mark.parametrize("row_weights", [None, counts()], ids=["alike", "weighted"])
@pytest.mark.parametrize("name", MODULES)
def test_it_is_the_least_squares_solution(name: str, row_weights: list[np.ndarray] | None):
    cell, build = MODULES[name]
    module = build()
    matrix, wanted = design(module, cell), torch.cat([t.flatten() for t in targets()]).double()
    fit = compress(module, targets(), row_weights=row_weights, tolerance=1e-9)
    assert fit.gradient_ratio <= 1e-9
    root = flat_weights(row_weights).sqrt()
    scaled, wanted_scaled = root[:, None] * matrix, root * wanted
    solution = torch.linalg.lstsq(scaled, wanted_scaled[:, None], driver="gelsd").solution[:, 0]
    memory = module.memory.detach().double()
    torch.testing.assert_close(scaled @ memory, scaled @ solution, rtol=1e-5, atol=1e-5)
    if torch.linalg.matrix_rank(scaled) == module.memory_size:
        torch.testing.assert_close(memory, solution, rtol=1e-5, atol=1e-5)
    left = (scaled @ solution - wanted_scaled).square()
    assert fit.relative_error == pytest.approx((left.sum() / wanted_scaled.square().sum()).item() ** 0.5, rel=1e-5)
    parts = zip(left.split([180, 120, 36]), wanted_scaled.split([180, 120, 36]), strict=True)
    expected = [(error.sum() / norm.square().sum()).item() ** 0.5 for error, norm in parts]
    assert fit.table_errors == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("row_weights", [None, counts()], ids=["alike", "weighted"])
def test_robe_gets_the_mean_over_signed_collisions(row_weights: list[np.ndarray] | None):
    module = RobeEmbeddingBagCollection(configs(), memory_size=150, block_size=4, signed=True, seed=2)
    module.memory.data.copy_(torch.arange(1.0, 151.0))  # so that a number tells its slot and sign
    total, weight_of = [0.0] * 150, [0.0] * 150
    for index, numbers in enumerate(targets()):
        for row in range(numbers.shape[0]):
            weight = float(row_weights[index][row]) if row_weights else 1.0
            for col in range(numbers.shape[1]):
                read = robe.cell(module, index, row, col)
                slot = int(abs(read)) - 1
                total[slot] += weight * numbers[row, col].item() * (1 if read > 0 else -1)
                weight_of[slot] += weight
    fit = compress(module, targets(), row_weights=row_weights)
    means = [t / w if w > 0 else 0.0 for t, w in zip(total, weight_of, strict=True)]
    assert 0.0 in means  # slots that no row reads
    assert torch.equal(module.memory, torch.tensor(means))
    assert fit.iterations == 1


@pytest.mark.parametrize("name", MODULES)
def test_adjoint_is_the_transposed_lookup(name: str):
    cell, build = MODULES[name]
    module = build()
    before = module.memory.detach().clone()
    numbers = torch.cat([t.flatten() for t in targets()]).double()
    matrix = design(module, cell)
    for row_weights in (None, counts()):
        expected = matrix.t() @ (flat_weights(row_weights) * numbers)
        torch.testing.assert_close(adjoint(module, targets(), row_weights), expected.float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(module.memory, before)
    assert module.memory.grad is None


def test_adjoint_of_a_sketch_is_s_times_e():
    module = JltEmbeddingBagCollection(configs(), rows=8, sketch="gaussian")
    padded = torch.cat([torch.nn.functional.pad(t, (0, 6 - t.shape[1])) for t in targets()])
    torch.testing.assert_close(adjoint(module, targets()).view(8, 6), module.columns.t() @ padded)


def test_a_sum_over_collisions_is_no_average():
    """Why `compress` does not read S E back."""
    module = JltEmbeddingBagCollection(configs(), rows=8, nonzeros=1)
    fit = compress(module, targets())
    module.memory.data.copy_(adjoint(module, targets()))
    back = torch.cat([materialise(module, jlt.cell, index).flatten() for index in range(3)])
    wanted = torch.cat([t.flatten() for t in targets()])
    assert fit.relative_error < 1 < ((back - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("name", MODULES)
def test_blocks_of_rows_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch):
    _, build = MODULES[name]
    whole, parts = build(), build()
    compress(whole, targets(), row_weights=counts())
    monkeypatch.setattr(least_squares, "_BLOCK_ELEMENTS", 1)  # so |M| elements at a time
    assert parts.memory_size < 180
    compress(parts, targets(), row_weights=counts())
    torch.testing.assert_close(parts.memory, whole.memory)


@pytest.mark.parametrize("sketch", ["gaussian", "sparse"])
def test_error_falls_with_the_memory(sketch: str):
    errors = []
    for rows in (4, 16, 32, 256):
        fit = compress(JltEmbeddingBagCollection(configs(), rows=rows, sketch=sketch), targets(), max_iterations=500)
        assert fit.gradient_ratio <= 1e-6
        errors.append(fit.relative_error)
    assert errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[0] > 0.9
    assert errors[3] < 1e-4  # more rows of M than rows of tables


def test_rows_of_weight_zero_do_not_matter():
    changed = targets()
    changed[2][7:] = 100.0
    memories = []
    for tables in (targets(), changed):
        module = JltEmbeddingBagCollection(configs(), rows=8)
        compress(module, tables, row_weights=counts())
        memories.append(module.memory.detach())
    assert torch.equal(*memories)


def test_conjugate_gradients_end_with_the_eigenvalues():
    """H = S W Sᵀ has 6 different ones, the same for every column; descent without conjugation takes many more steps."""
    module = JltEmbeddingBagCollection([table("a", 30, 4)], rows=6, sketch="gaussian")
    fit = compress(module, [torch.arange(120.0).view(30, 4)], row_weights=counts()[:1], tolerance=1e-9)
    assert fit.iterations <= 6
    assert fit.gradient_ratio <= 1e-9


def test_it_stops_at_the_last_iteration_and_says_so():
    module = JltEmbeddingBagCollection(configs(), rows=40)
    fit = compress(module, targets(), row_weights=counts(), max_iterations=2)
    assert fit.iterations == 2
    assert 1e-6 < fit.gradient_ratio < 1
    assert fit.relative_error < 1


def test_tables_of_zeros_and_parameters():
    module = RobeEmbeddingBagCollection(configs(), memory_size=40)
    fit = compress(module, [torch.nn.Parameter(torch.zeros_like(t)) for t in targets()])
    assert fit == Fit(0.0, [0.0, 0.0, 0.0], 0, 0.0)
    assert not module.memory.any()
    assert module.memory.requires_grad
    fit = compress(module, [torch.zeros(30, 6), *targets()[1:]])
    assert fit.table_errors[0] == float("inf")
    assert fit.relative_error < 1


class AffineRobe(RobeEmbeddingBagCollection):
    def _rows(self, group: int, ids: Tensor, feature: Tensor) -> Tensor:
        return super()._rows(group, ids, feature) + 1.0


class RoundedRobe(RobeEmbeddingBagCollection):
    def _rows(self, group: int, ids: Tensor, feature: Tensor) -> Tensor:
        return super()._rows(group, ids, feature).bfloat16().float()


@pytest.mark.parametrize(
    "module",
    [
        QuotientRemainderEmbeddingBagCollection(configs(), compression=3, combine="mult"),
        AffineRobe(configs(), memory_size=40),
        RoundedRobe(configs(), memory_size=40),
    ],
    ids=["product", "affine", "rounded"],
)
def test_what_is_not_linear_is_refused(module: Any):
    before = module.memory.detach().clone()
    with pytest.raises(ValueError, match=rf"table '\w' of {type(module).__name__} is not linear in its memory"):
        compress(module, targets())
    assert torch.equal(module.memory, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e, w: (e[:2], w), "tables has 2 entries for 3 tables"),
        (lambda e, w: ([e[0], e[1][:-1], e[2]], w), r"tables of 'c' must be \(20, 6\), not \(19, 6\)"),
        (lambda e, w: ([e[0] * float("nan"), *e[1:]], w), "table 'a' has numbers that are not finite"),
        (lambda e, w: (e, w[:2]), "row_weights has 2 entries for 3 tables"),
        (lambda e, w: (e, [w[0][1:], *w[1:]]), r"row_weights of 'a' must be \(30,\), not \(29,\)"),
        (lambda e, w: (e, [*w[:2], -w[2]]), "row_weights of table 'd' must be finite and at least 0"),
    ],
)
def test_tables_and_weights_that_do_not_fit_are_refused(change: Callable[..., tuple[Any, Any]], message: str):
    tables, row_weights = change(targets(), counts())
    for function in (compress, adjoint):
        with pytest.raises(ValueError, match=message):
            function(RobeEmbeddingBagCollection(configs(), memory_size=40), tables, row_weights=row_weights)
