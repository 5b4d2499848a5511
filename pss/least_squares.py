"""Fitting shared parameters to tables that exist: "compress a trained table".

Every method whose rows are linear in its `memory` m stands for tables E(m) = A m. The best it can do for given tables E
with row weights w (how often each id occurs, say) is the least-squares solution

    minimise  Σ_t Σ_i w_t[i] · ‖E_t[i] − E_t(m)[i]‖²        AᵀW A m = AᵀW E

found by conjugate gradients on these normal equations (Hestenes and Stiefel 1952) with the module's own lookup as A and
its gradient as Aᵀ, block by block in float64: beside the tables only a few arrays like m are held.

The PSS paper's M = S E, read back as Sᵀ S E (section 2.2), is AᵀE here (`adjoint`): unbiased for a signed S, but each
slot is a sum over all that share it, no average. Where every element of the tables reads one slot, as in ROBE and the
hashing trick, least squares is the mean over signed collisions, Σ ±E / count.

Preconditioner: the diagonal of H = AᵀW A where that can be had of A as a black box. Two random z tell whether H is
diagonal, one slot an element: then H z / z is H, and one iteration is exact. Otherwise the row sums H 1 if all are
positive, which is the diagonal up to a factor for sums of unsigned slots (9 iterations instead of 145 for a sum of
quotient and remainder with weights ~ 1 / rank^1.1); otherwise none. Measured and left: norms of H's rows from random
probes, whose noise took 2 to 4 times the iterations of none for a sparse sketch.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pss.collection import ComputedEmbeddingBagCollection

_LINEAR_ROWS = 1024  # of every table, on which linearity is tested
_LINEAR_TOLERANCE = 1e-4  # far below what a product of parameters or a rounded table shows, far above fp32 sums
_BLOCK_ELEMENTS = 1 << 20  # of the tables at a time, or as many as `memory` has: a gradient costs |M| a block


class Fit(NamedTuple):
    """How far `compress` came."""

    relative_error: float
    """√(Σ w·(E − E(memory))² / Σ w·E²) over all tables, of the memory as stored."""
    table_errors: list[float]
    """The same for every table."""
    iterations: int
    gradient_ratio: float
    """Norm of the gradient, in the preconditioner's measure, over that at memory = 0: at most `tolerance` if it
    converged."""


def compress(
    module: ComputedEmbeddingBagCollection,
    tables: Sequence[Tensor],
    *,
    row_weights: Sequence[Any] | None = None,
    tolerance: float = 1e-6,
    max_iterations: int = 200,
) -> Fit:
    """Set `module.memory` to the least-squares fit of its tables to those given; slots that no row reads to 0.

        module = JltEmbeddingBagCollection(configs, compression=100, seed=3)
        fit = compress(module, [trained.embedding_bags[c.name].weight for c in configs], row_weights=id_counts)
        assert fit.gradient_ratio <= 1e-6, fit

    tables: (num_embeddings, embedding_dim) floating, one for every config of the module, on any device.
    row_weights: a (num_embeddings,) array of numbers ≥ 0 for every table; None weighs all rows alike. A row of weight 0
    is not fitted at all.
    tolerance: stop where the gradient has fallen to that share of its start. max_iterations: stop at the latest then;
    each is one lookup of all rows and its gradient.

    Where several memories fit equally well, as in a sum of two tables, it is one of those.

    Raises ValueError naming the table for tables or weights that do not fit the module, and for a module whose rows are
    not linear in its memory.
    """
    lookup = _Lookup(module)
    targets = lookup.check_tables(tables)
    weights = lookup.check_weights(row_weights)
    lookup.check_linear()
    memory, iterations, ratio = _solve(lookup, targets, weights, tolerance, max_iterations)
    with torch.no_grad():
        module.get_parameter("memory").copy_(memory)
    errors = lookup.squared_errors(module.get_parameter("memory").detach().double(), targets, weights)
    norms = lookup.squared_errors(torch.zeros_like(memory), targets, weights)
    table_errors = [_relative(error, norm) for error, norm in zip(errors, norms, strict=True)]
    return Fit(_relative(sum(errors), sum(norms)), table_errors, iterations, ratio)


def adjoint(
    module: ComputedEmbeddingBagCollection, tables: Sequence[Tensor], row_weights: Sequence[Any] | None = None
) -> Tensor:
    """Return AᵀW E, (|M|,) fp32 like `memory`: every element of the tables added to the slots it reads, times their
    signs and coefficients. For a sketch it is the paper's M = S E, flattened. Arguments and errors as for
    `compress`; the module is not changed, nor is its linearity tested: of another one, the gradient at memory = 0."""
    lookup = _Lookup(module)
    targets, weights = lookup.check_tables(tables), lookup.check_weights(row_weights)
    return lookup.transposed(targets, weights).to(module.get_parameter("memory").dtype)


def _solve(
    lookup: "_Lookup", targets: Sequence[Tensor], weights: Sequence[Tensor], tolerance: float, max_iterations: int
) -> tuple[Tensor, int, float]:
    """Solve by preconditioned conjugate gradients -> (memory float64, iterations, share of the gradient that is
    left)."""
    inverse = _inverse_scale(lookup, weights)
    gradient = lookup.transposed(targets, weights)
    memory = torch.zeros_like(gradient)
    direction = inverse * gradient
    square = first = gradient @ direction
    iterations = 0
    while iterations < max_iterations and square > tolerance**2 * first:
        image = lookup.normal(direction, weights)
        step = square / (direction @ image)
        memory += step * direction
        gradient -= step * image
        before, square = square, gradient @ (inverse * gradient)
        direction = inverse * gradient + square / before * direction
        iterations += 1
    return memory, iterations, _relative(square.item(), first.item())


def _inverse_scale(lookup: "_Lookup", weights: Sequence[Tensor]) -> Tensor:
    """Return 1 / the preconditioner of the module's docstring, 0 for a slot that no row reads: (|M|,) float64."""
    one, two = (lookup.normal(probe, weights) / probe for probe in lookup.probes())
    scale = torch.ones_like(one)
    if torch.allclose(one, two, rtol=1e-6, atol=0):
        scale = one
    elif ((sums := lookup.normal(scale, weights)) > 0)[one != 0].all():
        scale = sums
    return torch.where(one != 0, 1 / scale, 0)


def _relative(error: float, norm: float) -> float:
    return 0.0 if error == 0 else (error / norm) ** 0.5 if norm > 0 else float("inf")


class _Lookup(nn.Module):
    """The module's lookup of whole tables as a linear operator A on arrays like its `memory`, float64 if it can be."""

    def __init__(self, module: ComputedEmbeddingBagCollection) -> None:
        super().__init__()
        self.module, self.configs = module, module.embedding_bag_configs()
        memory = module.get_parameter("memory")
        self.device, self.memory_size = memory.device, memory.numel()
        self.places: list[tuple[int, int]] = []  # of every table: a group and a feature in it that it serves
        for table in range(len(self.configs)):
            group = next(g for g, features in enumerate(module._groups) if table in features.tables)
            self.places.append((group, module._groups[group].tables.index(table)))

    def forward(self, table: int, ids: Tensor) -> Tensor:
        group, feature = self.places[table]
        return self.module._rows(group, ids, torch.full((1,), feature, device=self.device))

    def rows(self, memory: Tensor, table: int, ids: Tensor) -> Tensor:
        """Read rows (V, embedding_dim) of a table that has `memory` for its parameters."""
        return functional_call(self, {"module.memory": memory}, (table, ids)).to(memory.dtype)

    def zeros(self) -> Tensor:
        """Return zeros like `memory`, float64."""
        return torch.zeros(self.memory_size, dtype=torch.float64, device=self.device)

    def probes(self) -> Tensor:
        """Return two random arrays like `memory`: (2, |M|) float64, always the same."""
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(2, self.memory_size, dtype=torch.float64, generator=generator)
        return drawn.to(self.device)

    def blocks(self) -> Iterator[tuple[int, slice, Tensor]]:
        """Yield (table, rows, their ids) of all rows."""
        for table, config in enumerate(self.configs):
            count = max(1, max(_BLOCK_ELEMENTS, self.memory_size) // config.embedding_dim)
            for first in range(0, config.num_embeddings, count):
                rows = slice(first, min(first + count, config.num_embeddings))
                yield table, rows, torch.arange(rows.start, rows.stop, device=self.device)

    def pull_back(self, memory: Tensor, cotangent: Callable[[int, slice, Tensor], Tensor]) -> Tensor:
        """Return Aᵀ of cotangent(table, rows, A memory) over all blocks: (|M|,) float64."""
        memory, total = memory.detach().requires_grad_(), self.zeros()
        for table, rows, ids in self.blocks():
            with torch.enable_grad():
                rows_read = self.rows(memory, table, ids)
            total += torch.autograd.grad(rows_read, memory, cotangent(table, rows, rows_read.detach()))[0]
        return total

    def normal(self, memory: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """Return AᵀW A memory."""
        return self.pull_back(memory, lambda table, at, rows: self._on_device(weights[table][at, None]) * rows)

    def transposed(self, targets: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
        """Return AᵀW E."""

        def weighted(table: int, rows: slice, rows_read: Tensor) -> Tensor:
            return self._on_device(weights[table][rows, None]) * self._on_device(targets[table][rows])

        return self.pull_back(self.zeros(), weighted)

    @torch.no_grad()
    def squared_errors(self, memory: Tensor, targets: Sequence[Tensor], weights: Sequence[Tensor]) -> list[float]:
        """Return Σ w·(E − A memory)² of every table."""
        errors = [0.0] * len(self.configs)
        for table, rows, ids in self.blocks():
            difference = self.rows(memory, table, ids) - self._on_device(targets[table][rows])
            errors[table] += (self._on_device(weights[table][rows]) @ difference.square().sum(1)).item()
        return errors

    def _on_device(self, part: Tensor) -> Tensor:
        return part.detach().to(self.device, torch.float64)

    def check_tables(self, tables: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the tables. Raises ValueError for shapes that are not those of the configs, and numbers not finite."""
        _check_shapes("tables", tables, self.configs, lambda c: (c.num_embeddings, c.embedding_dim))
        for config, table in zip(self.configs, tables, strict=True):
            if not table.isfinite().all():
                raise ValueError(f"table {config.name!r} has numbers that are not finite")
        return tables

    def check_weights(self, row_weights: Sequence[Any] | None) -> Sequence[Tensor]:
        """Return a weight for every row, 1 without row_weights. Raises ValueError for what are no weights."""
        if row_weights is None:
            return [torch.ones((), dtype=torch.float64).expand(c.num_embeddings) for c in self.configs]
        weights = [torch.as_tensor(weight) for weight in row_weights]
        _check_shapes("row_weights", weights, self.configs, lambda c: (c.num_embeddings,))
        for config, weight in zip(self.configs, weights, strict=True):
            if not (weight.isfinite().all() and (weight >= 0).all()):
                raise ValueError(f"row_weights of table {config.name!r} must be finite and at least 0")
        return weights

    @torch.no_grad()
    def check_linear(self) -> None:
        """Check A(a + b) = A a + A b for random a and b, on some rows of every table."""
        a, b = self.probes()
        generator = torch.Generator().manual_seed(0)
        for table, config in enumerate(self.configs):
            ids = torch.randint(config.num_embeddings, (_LINEAR_ROWS,), generator=generator).to(self.device)
            of_a, of_b, of_both = (self.rows(memory, table, ids) for memory in (a, b, a + b))
            if (of_both - of_a - of_b).abs().max() > _LINEAR_TOLERANCE * (of_a.abs().max() + of_b.abs().max()):
                name = type(self.module).__name__
                raise ValueError(
                    f"table {config.name!r} of {name} is not linear in its memory: there is no fit to find"
                )


def _check_shapes(
    what: str, tensors: Sequence[Tensor], configs: Sequence[Any], shape_of: Callable[[Any], tuple]
) -> None:
    if len(tensors) != len(configs):
        raise ValueError(f"{what} has {len(tensors)} entries for {len(configs)} tables")
    for config, tensor in zip(configs, tensors, strict=True):
        if tuple(tensor.shape) != shape_of(config):
            raise ValueError(f"{what} of {config.name!r} must be {shape_of(config)}, not {tuple(tensor.shape)}")
