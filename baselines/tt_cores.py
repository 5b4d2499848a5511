"""The arithmetic of tensor trains: factors, sizes, layout, lookup, the start of a train, TT-SVD.

A train stands for a table of n ≤ ∏ n_k rows and d = ∏ d_k columns (Oseledets 2011, "Tensor-train decomposition", in the
matrix form of the TT-Rec paper):

    E[i][j] = G_1[i_1, :, j_1, :] · G_2[i_2, :, j_2, :] ··· G_K[i_K, :, j_K, :]

with i = (i_1 … i_K) in the mixed radix (n_1 … n_K) and j in (d_1 … d_K), first digit most significant. Core G_k is
(n_k, r_{k-1}, d_k, r_k), r_0 = r_K = 1. Lists below: rows = n_k, dims = d_k (K entries), ranks = r_k (K + 1 entries).
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

THRESHOLD = 2.0
"""Entries of a core are drawn from N(0, 1) without its middle, |x| < 2: the value of the authors' code."""

_TAIL = 0.5 * math.erfc(THRESHOLD / math.sqrt(2))  # P(x ≤ -THRESHOLD) of N(0, 1)


def factor_rows(num_embeddings: int, cores: int) -> list[int]:
    """Return near-equal n_k with ∏ n_k ≥ num_embeddings: each the root, rounded up, of what is left to cover."""
    factors, left = [], num_embeddings
    for parts in range(cores, 0, -1):
        factor = max(1, round(left ** (1 / parts)) - 1)
        while factor**parts < left:
            factor += 1
        factors.append(factor)
        left = -(-left // factor)
    return _large_ends(factors)


def factor_dim(embedding_dim: int, cores: int) -> list[int]:
    """Return the d_k with ∏ d_k = embedding_dim that are nearest to each other; for a prime d, 1, 1."""
    return _large_ends(min(_factorisations(embedding_dim, cores, 1), key=sum))


def _factorisations(value: int, parts: int, at_least: int) -> Iterator[list[int]]:
    """Yield all rising lists of `parts` factors of value."""
    if parts == 1:
        yield [value]
        return
    factor = at_least
    while factor**parts <= value:
        if value % factor == 0:
            for rest in _factorisations(value // factor, parts - 1, factor):
                yield [factor, *rest]
        factor += 1


def _large_ends(factors: list[int]) -> list[int]:
    """Return the factors, the two largest first and last: the outer cores grow with the rank, the inner ones with
    its square."""
    first, last, *inner = sorted(factors, reverse=True)
    return [first, *inner, last]


def digits(number: int, radices: Sequence[int]) -> list[int]:
    """Return the digits of a number in the mixed radix, most significant first."""
    reversed_digits = []
    for radix in reversed(radices):
        number, digit = divmod(number, radix)
        reversed_digits.append(digit)
    return reversed_digits[::-1]


class TableForm(NamedTuple):
    """How a table is stored, and at what price."""

    parameters: int  # of 4 bytes each; key and place of a cached row count as four
    rows: list[int]  # n_k of its train; empty if it is stored whole
    cached_rows: int


def choose_form(num_embeddings: int, embedding_dim: int, ranks: Sequence[int], cache_share: float) -> TableForm:
    """Return the cheaper form: a train and a cache of that share of the rows, or, where that is no smaller, the
    whole table."""
    rows, dims = factor_rows(num_embeddings, len(ranks) - 1), factor_dim(embedding_dim, len(ranks) - 1)
    cached = int(cache_share * num_embeddings)
    parameters = sum(n * left * d * right for n, left, d, right in zip(rows, ranks, dims, ranks[1:], strict=False))
    parameters += cached * (embedding_dim + 4)
    whole = num_embeddings * embedding_dim
    return TableForm(parameters, rows, cached) if parameters < whole else TableForm(whole, [], 0)


def choose_ranks(sizes: Sequence[tuple[int, int]], budget: int, cores: int, cache_share: float) -> list[int]:
    """Return r_0 … r_K, the largest with which tables of these (num_embeddings, embedding_dim) take no more than
    `budget` parameters; all 1 where none do. On the way up from 1 one inner rank at a time grows: 1,1; 2,1; 2,2;
    3,2; …"""
    inner = cores - 1

    def ranks_at(level: int) -> list[int]:
        return [1, *(1 + (level + inner - 1 - k) // inner for k in range(inner)), 1]

    def stored(level: int) -> int:
        return sum(choose_form(n, d, ranks_at(level), cache_share).parameters for n, d in sizes)

    all_whole = inner * (1 + math.isqrt(max((n * d for n, d in sizes), default=0)))
    return ranks_at(max(0, bisect_right(range(all_whole + 1), budget, key=stored) - 1))


class TableLayout(NamedTuple):
    """Where a table is. The rows of all trains have keys, in one numbering."""

    num_embeddings: int
    group: int
    feature: int  # position in the group of the first feature that it serves
    rows: list[int]  # n_k; all 1 if it is stored whole
    first_slices: list[int]  # in each core of the group; all 0 if it is stored whole
    first_row: int  # of the whole table among the group's stored rows; -1 if it is a train
    first_key: int  # of the train; -1 if it is stored whole
    first_cached: int  # of the train's cache among the group's stored rows
    cached_rows: int


class TrainGroup(NamedTuple):
    """What the lookup of one group of features needs, in plain numbers."""

    embedding_dim: int
    start: int  # in memory
    sizes: list[int]  # elements of cores 1 … K and of the stored rows, one after the other
    shapes: list[list[int]]  # of the cores: Σ n_k, r_{k-1}, d_k, r_k
    tables: list[TableLayout]  # of each feature


def lay_out(
    features: Sequence[tuple[int, int]], embedding_dim: int, ranks: list[int], cache_share: float,
    *, group: int, start: int, first_key: int,
) -> TrainGroup:  # fmt: skip
    """Lay out the group-th group, of features served by tables of this (index, num_embeddings), from `start` of
    memory on."""
    cores = len(ranks) - 1
    slices, stored, tables = [0] * cores, 0, {}
    for feature, (index, rows) in enumerate(features):
        if index in tables:
            continue
        form = choose_form(rows, embedding_dim, ranks, cache_share)
        if form.rows:
            cached = form.cached_rows
            tables[index] = TableLayout(rows, group, feature, form.rows, slices, -1, first_key, stored, cached)
            slices = [first + n for first, n in zip(slices, form.rows, strict=True)]
            stored, first_key = stored + cached, first_key + rows
        else:
            tables[index] = TableLayout(rows, group, feature, [1] * cores, [0] * cores, stored, -1, 0, 0)
            stored += rows
    dims = factor_dim(embedding_dim, cores)
    shapes = [[slices[k], ranks[k], dims[k], ranks[k + 1]] for k in range(cores)]
    sizes = [*(math.prod(shape) for shape in shapes), stored * embedding_dim]
    return TrainGroup(embedding_dim, start, sizes, shapes, [tables[index] for index, _ in features])


def group_parts(memory: Tensor, plan: TrainGroup) -> tuple[list[Tensor], Tensor]:
    """Return the group's cores (Σ n_k, r_{k-1}, d_k, r_k) and stored rows (rows, d), views of memory."""
    parts = list(memory.narrow(0, plan.start, sum(plan.sizes)).split(plan.sizes))
    cores = [parts[k].view(shape) for k, shape in enumerate(plan.shapes)]
    return cores, parts[-1].view(-1, plan.embedding_dim)


def row_keys(ids: Tensor, feature: Tensor, plan: TrainGroup) -> Tensor:
    """Return the key of every id, feature broadcastable to ids; -1 for rows of whole tables."""
    first = torch.tensor([table.first_key for table in plan.tables], device=ids.device)[feature]
    return torch.where(first < 0, first, first + ids)


def stored_places(ids: Tensor, feature: Tensor, plan: TrainGroup, cached_keys: Tensor, cached_places: Tensor) -> Tensor:
    """Return of every id (V,) its place among the group's stored rows, -1 where it has none."""
    first = torch.tensor([table.first_row for table in plan.tables], device=ids.device)[feature]
    place = torch.where(first < 0, first, first + ids)
    if cached_keys.size(0) > 0:
        keys = row_keys(ids, feature, plan)
        nearest = torch.searchsorted(cached_keys, keys).clamp(max=cached_keys.size(0) - 1)
        place = torch.where(cached_keys[nearest] == keys, cached_places[nearest], place)
    return place


def train_rows(cores: list[Tensor], ids: Tensor, feature: Tensor, plan: TrainGroup) -> Tensor:
    """Compute rows: ids (V,) int64 and the position of their features (V,) -> (V, d) of the cores' dtype. What comes
    out for ids of whole tables means nothing. On a CPU a row that several ids read is multiplied once; elsewhere the
    question how many rows there are would force a synchronisation."""
    if not torch.jit.is_scripting():  # noqa: SIM102  # pyright: ignore[reportPrivateImportUsage]
        if not torch.compiler.is_compiling() and ids.device.type == "cpu":
            features = len(plan.tables)
            keys, place = torch.unique(ids * features + feature, return_inverse=True)
            distinct = torch.div(keys, features, rounding_mode="floor")
            return _multiply_rows(cores, distinct, keys - distinct * features, plan).index_select(0, place)
    return _multiply_rows(cores, ids, feature, plan)


def _multiply_rows(cores: list[Tensor], ids: Tensor, feature: Tensor, plan: TrainGroup) -> Tensor:
    slices: list[Tensor] = []
    for k in range(len(cores) - 1, -1, -1):
        radix = torch.tensor([table.rows[k] for table in plan.tables], device=ids.device)[feature]
        first = torch.tensor([table.first_slices[k] for table in plan.tables], device=ids.device)[feature]
        rest = torch.div(ids, radix, rounding_mode="floor")
        slices.append(first + ids - rest * radix)
        ids = rest
    slices.reverse()
    if not torch.jit.is_scripting():  # noqa: SIM102  # pyright: ignore[reportPrivateImportUsage]
        if not torch.compiler.is_compiling():
            return _MultiplySlices.apply(torch.stack(slices), *cores)
    return multiply([core.index_select(0, index) for core, index in zip(cores, slices)])  # noqa: B905


def multiply(slices: list[Tensor]) -> Tensor:
    """Multiply slices: (V, r_{k-1}, d_k, r_k), k = 1 … K -> (V, ∏ d_k): K - 1 batched products."""
    product, columns = slices[0], 1
    for k in range(1, len(slices)):
        columns *= slices[k - 1].size(2)
        product = torch.bmm(product.view(slices[k].size(0), columns, slices[k].size(1)), slices[k].flatten(2))
    return product.flatten(1)


class _MultiplySlices(torch.autograd.Function):
    """(slices (K, V), cores …) -> (V, ∏ d_k): core k gathered at slices[k], and multiplied. In blocks of ids whose
    gathered slices stay in cache, multiplied again in the backward, as in the authors' code: on one CPU thread forward
    and backward took 0.5 to 0.6 of the time of plain autograd at ranks of 32 and 64, as much at 8 (V = 16,384), and
    need no V · r_{k-1} · d_k · r_k numbers."""

    @staticmethod
    def forward(slices: Tensor, *cores: Tensor) -> Tensor:
        blocks = slices.split(_block_size(cores), dim=1)
        return torch.cat([multiply(_gather(cores, block)) for block in blocks])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        slices, *cores = ctx.saved_tensors
        grads = [torch.zeros_like(core) for core in cores]
        size = _block_size(cores)
        for block, grad in zip(slices.split(size, dim=1), grad_outputs[0].split(size), strict=True):
            gathered = [part.requires_grad_() for part in _gather(cores, block)]
            with torch.enable_grad():
                product = multiply(gathered)
            parts = torch.autograd.grad(product, gathered, grad)
            for total, index, part in zip(grads, block, parts, strict=True):
                total.index_add_(0, index, part)
        return None, *grads


def _gather(cores: Sequence[Tensor], slices: Tensor) -> list[Tensor]:
    return [core.index_select(0, index) for core, index in zip(cores, slices, strict=True)]


def _block_size(cores: Sequence[Tensor]) -> int:
    """Return how many ids have slices so that those slices of the largest core are 4 MiB on a CPU, 256 MiB
    elsewhere."""
    elements = 1 << (20 if cores[0].device.type == "cpu" else 26)
    return max(1, elements // max(core[0].numel() for core in cores))


def draw_train(shapes: Sequence[Sequence[int]], std: float, generator: torch.Generator) -> list[Tensor]:
    """Draw cores of these shapes in fp64 whose whole table of ∏ n_k rows has root mean square `std`.

    Entries are sampled from N(0, 1) without |x| < THRESHOLD. The table's variance is expected to be ∏ r_k · v^K, with
    v = 5.75 the variance of that law; instead of the expectation the drawn table's own is divided out, in equal parts
    from all cores.
    """
    cores = []
    for shape in shapes:
        uniform = torch.rand(tuple(shape), dtype=torch.float64, device="cpu", generator=generator) * 2 - 1
        cores.append(-uniform.sign() * torch.special.ndtri(_TAIL * uniform.abs().clamp(min=1e-12)))
    elements = math.prod(n * d for n, _, d, _ in shapes)
    return [core * (std * math.sqrt(elements) / table_norm(cores)) ** (1 / len(cores)) for core in cores]


def table_norm(cores: Sequence[Tensor]) -> float:
    """Return the Frobenius norm of a train's table, without the table: one Gram matrix (r_k, r_k) after the other."""
    gram = cores[0].new_ones(1, 1)
    for core in cores:
        gram = torch.einsum("nbdc,nbde->ce", torch.einsum("ab,nadc->nbdc", gram, core), core)
    return math.sqrt(gram.item())


def decompose(
    table: Tensor, rows: Sequence[int], dims: Sequence[int], ranks: Sequence[int]
) -> tuple[list[Tensor], float]:
    """Decompose a table by TT-SVD (Oseledets 2011, algorithm 1) of a table (n, d): cores of exactly these ranks in
    fp64, and their squared Frobenius error, the sum of squares of all singular values cut off: at most K - 1 times that
    of the best train.

    Rows n … ∏ n_k, which no id reads, are taken as zeros; what ranks exceed the table's is filled with zeros. Needs a
    few times the table in fp64.
    """
    padded = torch.zeros(math.prod(rows), math.prod(dims), dtype=torch.float64, device=table.device)
    padded[: table.shape[0]] = table
    pairs = [axis for k in range(len(rows)) for axis in (k, len(rows) + k)]
    rest = padded.view(*rows, *dims).permute(pairs)  # (n_1, d_1, n_2, d_2, …)
    cores, kept, cut = [], 1, 0.0
    for k, (n, d) in enumerate(zip(rows, dims, strict=True)):
        matrix = rest.reshape(kept * n * d, -1)
        if k < len(rows) - 1:
            left, values, right = torch.linalg.svd(matrix, full_matrices=False)
            width = min(ranks[k + 1], len(values))
            cut += float(values[width:].square().sum())
            matrix, rest = left[:, :width], values[:width, None] * right[:width]
        core = padded.new_zeros(n, ranks[k], d, ranks[k + 1])
        core[:, :kept, :, : matrix.shape[1]] = matrix.reshape(kept, n, d, -1).permute(1, 0, 2, 3)
        kept = matrix.shape[1]
        cores.append(core)
    return cores, cut
