"""What a sketch does to a table, measured: the empirical ε at confidence 1 - δ, beside what `bounds` promises.

For a table E (n, d) and M = S E (k, d):

    macro     ‖MᵀM - EᵀE‖ / σ_max(E)²                             the least ε of Definition 2, relative to σ_max(E)²
    subspace  ‖UᵀSᵀSU - I‖, U a basis of E's columns              the same relative to ‖Ex‖‖Ey‖; at least macro
    micro     max over ρ(i) > ρ of ‖(Se_i)ᵀM - E[i]‖ / ‖E[i]‖     the least ε of Definition 3

All norms of matrices are spectral, so these are suprema over all x and y, not samples. A module that is linear in its
parameters without being an S (ROBE, Z = 8) has micro only: M = Aᵀ vec(E) with A the lookup, rows A M; k = |M|/d.

The empirical ε at confidence 1 - δ is an order statistic over N independent seeds, the ⌈(1 - δ)(N + 1)⌉-th smallest
error: a further seed stays below it with probability at least 1 - δ, whatever the distribution.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from pss.methods.robe import RobeEmbeddingBagCollection
from pss.theory.bounds import BOUNDS, check_range, importance
from pss.theory.sketches import EXPLICIT, Columns

MODULES = {"robe": True, "robe-unsigned": False}  # name -> signed
SKETCHES = (*EXPLICIT, *MODULES)
_BLOCK_COLUMNS = 4096
_ROBE_BLOCK = 8


@dataclass(frozen=True)
class Errors:
    """Of one drawn sketch, or at one confidence. nan: not defined for this sketch or table."""

    macro: float
    subspace: float
    micro: float


@dataclass(frozen=True)
class Promise:
    """The least ε that holds for this sketch at this k (inf: none), and by which bound."""

    eps: float
    bound: str


@dataclass(frozen=True)
class Point:
    """One sketch at one size. parameters: |M|. measured: at confidence 1 - δ."""

    sketch: str
    rows: int
    parameters: int
    compression: float
    measured: Errors
    macro: Promise
    micro: Promise


class Reference:
    """A table (n, d) in float64 and what every measurement of it needs. rho: the importance above which rows count."""

    def __init__(self, table: np.ndarray, rho: float) -> None:
        check_range(rho=rho)
        self.table = table.astype(np.float64)
        self.rho = rho
        self.importance = importance(self.table)
        self.important = np.flatnonzero(self.importance > rho)
        self.gram = self.table.T @ self.table
        _, singular, right = np.linalg.svd(np.linalg.qr(self.table, mode="r"))
        kept = singular > singular[0] * max(table.shape) * np.finfo(np.float64).eps
        self.sigma = float(singular[0])
        self.whitener = right[kept].T / singular[kept]  # (d, rank): E · whitener is a basis of E's columns

    @property
    def dim(self) -> int:
        return self.table.shape[1]

    def micro_error(self, recovered: np.ndarray) -> float:
        """Return the micro error. recovered: the important rows as they are read back, in order."""
        if not len(self.important):
            return math.nan
        rows = self.table[self.important]
        return float((np.linalg.norm(recovered - rows, axis=1) / np.linalg.norm(rows, axis=1)).max())


def measure(reference: Reference, sketch: str, size: int, seed: int, nonzeros: int = 8) -> Errors:
    """Return the errors of one S of k = size rows. ValueError: unknown sketch, or a size it cannot have."""
    if sketch in MODULES:
        return measure_module(reference, _build_robe(reference, size, seed, signed=MODULES[sketch]))
    if sketch not in EXPLICIT:
        raise ValueError(f"sketch {sketch!r} is unknown: known are {list(SKETCHES)}")
    blocks = _Blocks(EXPLICIT[sketch], size, len(reference.table), seed, nonzeros)
    compressed = np.zeros((size, reference.dim))
    for start, stop, columns in blocks.draw():
        compressed += columns @ reference.table[start:stop]
    whitened = compressed @ reference.whitener
    return Errors(
        macro=_spectral_norm(compressed.T @ compressed - reference.gram) / reference.sigma**2,
        subspace=_spectral_norm(whitened.T @ whitened - np.eye(whitened.shape[1])),
        micro=reference.micro_error(blocks.recover(compressed, reference.important)),
    )


def measure_module(reference: Reference, module: Any) -> Errors:
    """Return the micro error of a module of one table, linear in its parameters, which this overwrites by Aᵀ vec(E)."""
    table = torch.from_numpy(reference.table).float()
    (feature,) = module.embedding_bag_configs()[0].feature_names
    ids, lengths = torch.arange(len(table)), torch.ones(len(table), dtype=torch.int64)
    features = KeyedJaggedTensor([feature], ids, lengths=lengths)
    parameters = list(module.parameters())
    adjoint = torch.autograd.grad((module(features).values() * table).sum(), parameters)
    with torch.no_grad():
        for parameter, value in zip(parameters, adjoint, strict=True):
            parameter.copy_(value)
        recovered = module(features).values().double().numpy()
    return Errors(math.nan, math.nan, reference.micro_error(recovered[reference.important]))


def confident(errors: Sequence[float], delta: float) -> float:
    """Return the ⌈(1 - δ)(N + 1)⌉-th smallest of N errors. Raises ValueError where N < 1/δ - 1, too few for one."""
    rank = math.ceil(round((1 - delta) * (len(errors) + 1), 9))
    if rank > len(errors):
        least = math.ceil(round(1 / delta - 1, 9))
        raise ValueError(f"seeds must be at least {least} for delta {delta:g}, not {len(errors)}")
    return float(np.sort(errors)[rank - 1])  # nan, where there is any


def sweep(
    reference: Reference,
    sketches: Sequence[str],
    sizes: Sequence[int],
    *,
    seeds: int,
    delta: float,
    nonzeros: int = 8,
    advance: Callable[[], None] = lambda: None,
) -> list[Point]:
    """Measure every sketch at every k of `sizes` over seeds 0 to seeds - 1; advance is called after each measurement.

    Raises ValueError before anything is measured: for too few seeds, a size above n, which would not compress, and a
    size the sketch cannot have.
    """
    check_range(delta=delta)
    confident([0.0] * seeds, delta)
    for size in sizes:
        if not 1 <= size <= len(reference.table):
            limit = f"1 and the table's {len(reference.table)} rows: more would not compress it"
            raise ValueError(f"sizes must be between {limit}, not {size}")
    for sketch in EXPLICIT.keys() & set(sketches):
        for size in sizes:
            EXPLICIT[sketch](size, 0, np.random.default_rng(0), nonzeros)  # raises now, not after an hour
    points = []
    for sketch in sketches:
        for size in sizes:
            errors = []
            for seed in range(seeds):
                errors.append(measure(reference, sketch, size, seed, nonzeros))
                advance()
            macro, subspace, micro = (confident(values, delta) for values in zip(*map(astuple, errors), strict=True))
            points.append(_point(reference, sketch, size, Errors(macro, subspace, micro), delta))
    return points


def find_slope(rows: Sequence[int], errors: Sequence[float]) -> float:
    """Return the least-squares slope of log ε against log k; nan with fewer than two positive errors."""
    usable = [(math.log(k), math.log(e)) for k, e in zip(rows, errors, strict=True) if 0 < e < math.inf]
    if len({x for x, _ in usable}) < 2:
        return math.nan
    x, y = np.array(usable).T
    return float(np.polyfit(x, y, 1)[0])


def _point(reference: Reference, sketch: str, size: int, measured: Errors, delta: float) -> Point:
    dim, important = reference.dim, len(reference.important)
    of_all = [bound for bound in BOUNDS if sketch in bound.sketches]
    of_micro = [bound for bound in BOUNDS if sketch in bound.sketches | bound.micro_only and important]
    macro = [Promise(bound.macro_eps(dim, size, delta), bound.name) for bound in of_all]
    micro = [Promise(b.micro_eps(dim, size, delta, reference.rho, important), b.name) for b in of_micro]
    parameters = robe_size(size, dim) if sketch in MODULES else size * dim
    return Point(
        sketch=sketch,
        rows=size,
        parameters=parameters,
        compression=reference.table.size / parameters,
        measured=measured,
        macro=min(macro, key=lambda promise: promise.eps, default=Promise(math.inf, "")),
        micro=min(micro, key=lambda promise: promise.eps, default=Promise(math.inf, "")),
    )


@dataclass(frozen=True)
class _Blocks:
    """S in blocks of columns, drawn again whenever needed: it is larger than the table."""

    columns: Callable[[int, int, np.random.Generator, int], Columns]
    size: int
    num_embeddings: int
    seed: int
    nonzeros: int

    def draw(self, wanted: np.ndarray | None = None) -> Iterator[tuple[int, int, Columns]]:
        """Yield (first column, one past the last, S[:, first:last]); with `wanted` only blocks with any of those
        columns."""
        for start in range(0, self.num_embeddings, _BLOCK_COLUMNS):
            stop = min(start + _BLOCK_COLUMNS, self.num_embeddings)
            if wanted is not None and not ((start <= wanted) & (wanted < stop)).any():
                continue
            rng = np.random.default_rng((self.seed, start))
            yield start, stop, self.columns(self.size, stop - start, rng, self.nonzeros)

    def recover(self, compressed: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return (S e_i)ᵀ M for i in rows, ascending: (rows, d)."""
        parts = [
            columns[:, rows[(start <= rows) & (rows < stop)] - start].T @ compressed
            for start, stop, columns in self.draw(rows)
        ]
        return np.concatenate(parts) if parts else compressed[:0]


def robe_size(rows: int, dim: int) -> int:
    """Return |M| of a ROBE array whose blocks can start at as many places as M = S E of k = rows has numbers."""
    return rows * dim + min(_ROBE_BLOCK, dim) - 1


def _build_robe(reference: Reference, size: int, seed: int, signed: bool) -> RobeEmbeddingBagCollection:
    n, dim = reference.table.shape
    config = EmbeddingBagConfig(name="table", num_embeddings=n, embedding_dim=dim, feature_names=["table"])
    return RobeEmbeddingBagCollection(
        [config],
        memory_size=robe_size(size, dim),
        block_size=min(_ROBE_BLOCK, dim),
        signed=signed,
        gradient="dense",
        seed=seed,
    )


def _spectral_norm(matrix: np.ndarray) -> float:
    return float(np.linalg.norm(matrix, 2))
