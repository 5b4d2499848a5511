"""Quotient-remainder embeddings: a row is composed of one row from each of k small tables.

Shi, Mudigere, Naumov and Yang 2019, "Compositional embeddings using complementary partitions for memory-efficient
recommendation systems" (arXiv:1909.02107), generalised quotient-remainder partitions: the digits of id i in mixed
radix say which row of each of the k = `partitions` small tables M_1 … M_k, of m_1 … m_k rows, belongs to it:

    q_1 = i,   r_p = q_p mod m_p,   q_{p+1} = q_p // m_p   for p < k,   r_k = q_k

    mult      E[i] = M_1[r_1] ∘ … ∘ M_k[r_k]     (element by element)
    add       E[i] = M_1[r_1] + … + M_k[r_k]
    concat    E[i] = [M_1[r_1], …, M_k[r_k]]
    chunked   E[i] = [M_1[h_1(i)], …, M_k[h_k(i)]]

`chunked` is equation (1) of the PSS paper (Desai and Shrivastava 2022), its form of this method: an own hash h_p for
each of l = k pieces instead of digits. In concat and chunked the pieces together are d wide (published code makes them
2d): d // k each, the first d mod k of them one more. With m_1 · … · m_k ≥ n every id has a combination of its own.

Budget: table t gets R_t rows of d parameters, which make R_t rows over all m_p for mult and add, and R_t rows of every
piece for concat and chunked. Let c_t be the least R_t that gives every id a combination of its own, about k · n^(1/k)
(mult, add) or n^(1/k) (concat); n where that is less, and for chunked. Between the bounds below all tables get the same
number of rows, a common cap (`divide_rows`): small tables are whole before large ones grow.

    Σ c_t · d_t is within the budget: c_t ≤ R_t ≤ n_t. m_1 takes all that the others leave, which are as small as they
        can be: datasets number ids by falling frequency, and the m_1 most frequent have a row of M_1 to themselves.
        Where concat affords m_1 = n, r_1 = i, the other pieces grow instead, r_p = i mod m_p.
    It is not: R_t ≤ c_t, and at least one row in each m_p. Where R_t < c_t the m_p are equal, give or take one, and the
        last quotient, more than m_k, is hashed: r_k = h(t, q_k) mod m_k.
    R_t = n_t: the table is stored whole, E[i] = M_1[i].

What is stored misses the budget by less than a row of d, concat by up to one more for every table where k > 2 or k does
not divide d.

Start: uniform, within bounds that give every number of the tables standard deviation σ = init_scale / √3: ± √3 ·
σ^(1/k) for mult, ± init_scale / √k for add, ± init_scale otherwise. (The authors' code draws from [√(1/n), 1].)

Departures: the authors ask for a number of collisions, n / m, not for a budget, keep tables below a threshold whole and
hash no quotients; their larger table is that of the quotients. Default is their "mult", which was the best measured
(MovieLens, d = 16, test AUC: 10× mult .788, concat .780, chunked .779, add .768; 100× mult .719, concat .709).
"""

import math
import operator
from collections.abc import Sequence
from itertools import accumulate
from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from pss.hashing import HashConstants, HashFamilyName, build_hash, locate
from pss.method import EmbeddingMethod, EmbeddingRequest
from pss.methods.hashing_trick import divide_rows
from pss.shared_array import SharedArrayEmbeddingBagCollection, SharedArrayOptions, read_chunks

PIECES = ("concat", "chunked")
"""Ways to combine in which a row of every partition is a piece of the row, not as long as it."""


class Options(SharedArrayOptions):
    """Options of quotient-remainder embeddings."""

    combine: Literal["mult", "add", "concat", "chunked"] = Field("mult")
    """What is made of the rows of the small tables: their product, sum or concatenation; chunked = concatenation with
    an own hash for every piece (PSS paper, equation 1) instead of quotients and remainders."""
    partitions: int = Field(2, ge=2)
    """k, the number of small tables for every table; concat and chunked need embedding_dim ≥ partitions."""
    hash_family: HashFamilyName = "independent"
    """Of chunked and of hashed quotients; affine and authors correlate the pieces of chunked (pss.hashing)."""


class Partitions(NamedTuple):
    """How one table is stored; lists are by partition p."""

    rows: list[int]  # m_p
    starts: list[int]  # where M_p begins in memory
    strides: list[int]  # m_1 · … · m_{p-1}: q_p = i // stride
    is_hashed: list[bool]  # r_p = h_p(i // last stride) mod m_p instead of q_p mod m_p
    is_stored: list[bool]  # otherwise the table is stored whole and M_p stands for a factor 1, a summand 0


class QuotientRemainderPlan(NamedTuple):
    """What the lookup of one group of features needs: see `quotient_remainder_rows`."""

    combine: str
    widths: list[int]  # of a row of each partition
    stored: list[Partitions]  # of the table that serves each feature
    is_hashing: bool  # whether any of them does
    slots: int  # of the hash, before it is taken modulo rows
    location: HashConstants  # chunk = partition


class QuotientRemainderEmbeddingBagCollection(SharedArrayEmbeddingBagCollection):
    """A drop-in for TorchRec's `EmbeddingBagCollection`; the small tables of all lie one after the other in the one
    parameter `memory` (|M|,) fp32.

    The compression reached is no lower than asked, except where one row in each partition of every table is all there
    is. Besides what the base class raises: ValueError for more rows than the hash can reach, and for concat and chunked
    naming a table whose embedding_dim is below partitions.
    """

    OPTIONS = Options
    options: Options
    _plan: list[QuotientRemainderPlan]

    def _lay_out(self, compression: float, id_counts: Sequence[np.ndarray] | None) -> None:
        tables, options = self.embedding_bag_configs(), self.options
        for table in tables if options.combine in PIECES else []:
            if table.embedding_dim < options.partitions:
                size = f"table {table.name!r} has embedding_dim {table.embedding_dim}"
                raise ValueError(
                    f"{size}, too few for the {options.partitions} partitions of combine = {options.combine!r}"
                )
        self.location_hash = build_hash(options.hash_family, self.seed, [table.num_embeddings for table in tables])
        self.memory_size = self._place_tables(self.parameter_budget(compression))
        self._plan = [self._plan_group(group) for group in range(len(self._groups))]

    def _place_tables(self, budget: int) -> int:
        """Set `stored`, how each table is. Returns |M|."""
        tables, k = self.embedding_bag_configs(), self.options.partitions
        sizes, dims = [table.num_embeddings for table in tables], [table.embedding_dim for table in tables]
        widths = [row_widths(self.options.combine, k, dim) for dim in dims]
        enough = [
            count_enough_rows(self.options.combine, of_table, size)
            for size, of_table in zip(sizes, widths, strict=True)
        ]
        if sum(rows * dim for rows, dim in zip(enough, dims, strict=True)) <= budget:
            least, most = enough, sizes
        else:
            least, most = [min(size, 1 if self.options.combine in PIECES else k) for size in sizes], enough
        self.stored, end = [], 0
        table_rows = divide_rows([1.0] * len(tables), least, most, dims, budget)
        for size, rows, of_table in zip(sizes, table_rows, widths, strict=True):
            partitions, end = place_partitions(self.options.combine, of_table, size, rows, end)
            self.stored.append(partitions)
        hashed = [max(partitions.rows) for partitions in self.stored if partitions.is_hashed[-1]]
        self.location_hash.check_slots(max(hashed, default=1))
        return end

    def _plan_group(self, group: int) -> QuotientRemainderPlan:
        _, tables, dim, _ = self._groups[group]
        return QuotientRemainderPlan(
            combine=self.options.combine,
            widths=row_widths(self.options.combine, self.options.partitions, dim),
            stored=[self.stored[table] for table in tables],
            is_hashing=any(self.stored[table].is_hashed[-1] for table in tables),
            slots=self.location_hash.max_slots,
            location=self.location_hash.constants(tables, self.options.partitions),
        )

    def reset_parameters(self) -> None:
        """Draw memory anew, the same for the same seed, the tables' standard deviation init_scale / √3.

        Nothing on the meta device.
        """
        super().reset_parameters()
        if self.options.combine in PIECES or self.init_scale == 0 or self.memory.device.type == "meta":
            return
        target = self.init_scale / 3**0.5
        std = (
            target ** (1 / self.options.partitions)
            if self.options.combine == "mult"
            else target / self.options.partitions**0.5
        )
        for config, partitions in zip(self.embedding_bag_configs(), self.stored, strict=True):
            if all(partitions.is_stored):  # not a table stored whole, which has the right spread already
                end = partitions.starts[-1] + partitions.rows[-1] * config.embedding_dim
                with torch.no_grad():
                    self.memory[partitions.starts[0] : end].mul_(std / target)

    def elements_per_row(self) -> int:
        """Return how many elements of `memory` one id of every feature reads together."""
        return super().elements_per_row() * (1 if self.options.combine in PIECES else self.options.partitions)

    def _rows(self, group: int, ids: Tensor, feature: Tensor) -> Tensor:
        return quotient_remainder_rows(self.memory, ids, feature, self._plan[group], self.gradient)

    def _identity(self) -> dict[str, int | str | bool]:
        return {
            "memory_size": self.memory_size,
            "combine": self.options.combine,
            "partitions": self.options.partitions,
            "table_rows": " ".join("x".join(map(str, partitions.rows)) for partitions in self.stored),
            "hash_family": self.options.hash_family,
            "seed": self.seed,
        }


@torch.fx.wrap
def quotient_remainder_rows(
    memory: Tensor, ids: Tensor, feature: Tensor, plan: QuotientRemainderPlan, gradient: str = "dense"
) -> Tensor:
    """Return the rows E_t[id] of the module's docstring: plain PyTorch, the reference for any kernel.

    memory (|M|,) floating; ids (...) int64; feature int64, broadcastable to ids: position of the id's feature in the
    group; gradient: see pss.shared_array. Returns (..., embedding_dim) of memory's dtype. Every int64 id has a row: ids
    are not validated.
    """
    rows = torch.tensor([of.rows for of in plan.stored], dtype=torch.int64, device=ids.device)[feature]  # (..., k)
    starts = torch.tensor([of.starts for of in plan.stored], dtype=torch.int64, device=ids.device)[feature]
    strides = torch.tensor([of.strides for of in plan.stored], dtype=torch.int64, device=ids.device)[feature]
    is_hashed = torch.tensor([of.is_hashed for of in plan.stored], dtype=torch.bool, device=ids.device)[feature]
    is_stored = torch.tensor([of.is_stored for of in plan.stored], dtype=torch.bool, device=ids.device)[feature]
    quotients = torch.div(ids.unsqueeze(-1), strides, rounding_mode="floor")
    if plan.is_hashing:
        hashed = locate(quotients.select(-1, -1), feature, plan.location, plan.slots)
        quotients = torch.where(is_hashed, hashed, quotients)
    locations = starts + quotients.remainder(rows) * torch.tensor(plan.widths, dtype=torch.int64, device=ids.device)
    if plan.combine == "concat" or plan.combine == "chunked":
        return _read_pieces(memory, locations, plan.widths, gradient)
    parts = read_chunks(memory, locations, plan.widths[0], gradient)
    parts = torch.where(is_stored.unsqueeze(-1), parts, 0.0 if plan.combine == "add" else 1.0)
    if plan.combine == "add":
        return parts.sum(-2)
    row = parts.select(-2, 0)
    for p in range(1, len(plan.widths)):
        row = row * parts.select(-2, p)
    return row


def _read_pieces(memory: Tensor, locations: Tensor, widths: list[int], gradient: str) -> Tensor:
    """Read pieces of widths[p] elements, of two widths at most, at locations (..., p), side by side: (..., Σ
    widths)."""
    longer = widths.count(widths[0])
    pieces = read_chunks(memory, locations.narrow(-1, 0, longer), widths[0], gradient).flatten(-2)
    if longer == len(widths):
        return pieces
    shorter = read_chunks(memory, locations.narrow(-1, longer, len(widths) - longer), widths[-1], gradient)
    return torch.cat([pieces, shorter.flatten(-2)], dim=-1)


def split_evenly(total: int, parts: int) -> list[int]:
    """Return integers that sum to total, the largest first, the smallest at most one less."""
    return [total // parts + (part < total % parts) for part in range(parts)]


def row_widths(combine: str, partitions: int, embedding_dim: int) -> list[int]:
    """Return the elements of one row of each partition."""
    return split_evenly(embedding_dim, partitions) if combine in PIECES else [embedding_dim] * partitions


def smallest_radices(partitions: int, num_embeddings: int) -> list[int]:
    """Return the integers with the smallest sum, the largest first, whose product is num_embeddings or more."""
    low, high = partitions - 1, partitions - 1 + num_embeddings  # sums: too small, large enough
    while high - low > 1:
        middle = (low + high) // 2
        is_enough = math.prod(split_evenly(middle, partitions)) >= num_embeddings
        low, high = (low, middle) if is_enough else (middle, high)
    return split_evenly(high, partitions)


def largest_first(widths: list[int], num_embeddings: int, budget: int) -> list[int]:
    """Return radices with a product of num_embeddings or more, the first as large as a budget of parameters allows."""

    def radices(first: int) -> list[int]:
        return [first, *smallest_radices(len(widths) - 1, -(-num_embeddings // first))]

    low, high = smallest_radices(len(widths), num_embeddings)[0], num_embeddings
    while high - low > 1:
        middle = (low + high) // 2
        is_within = count_parameters(radices(middle), widths) <= budget
        low, high = (middle, high) if is_within else (low, middle)
    return radices(low)


def count_parameters(rows: list[int], widths: list[int]) -> int:
    """Return the parameters of tables of that many rows and these widths."""
    return sum(m * width for m, width in zip(rows, widths, strict=True))


def count_enough_rows(combine: str, widths: list[int], num_embeddings: int) -> int:
    """Return c_t, the fewest rows of d with which every id has a combination of its own, or is stored by itself."""
    if combine == "chunked":
        return num_embeddings
    row_size = sum(widths) if combine in PIECES else widths[0]
    parameters = count_parameters(smallest_radices(len(widths), num_embeddings), widths)
    return min(num_embeddings, -(-parameters // row_size))


def place_partitions(
    combine: str, widths: list[int], num_embeddings: int, table_rows: int, start: int
) -> tuple[Partitions, int]:
    """Return how a table is stored in R_t = table_rows rows of d, at most num_embeddings, from `start` on; where it
    ends."""
    k, is_whole = len(widths), table_rows == num_embeddings
    strides, is_hashed, is_stored = [1] * k, [False] * k, [True] * k
    if combine == "chunked":
        rows, is_hashed = [table_rows] * k, [not is_whole] * k
    elif combine in PIECES and (left := table_rows * sum(widths) - num_embeddings * widths[0]) >= sum(widths[1:]):
        rows = [num_embeddings] + [left // sum(widths[1:])] * (k - 1)
    elif is_whole:
        rows, is_stored = [num_embeddings] + [1] * (k - 1), [True] + [False] * (k - 1)
    else:
        rows = [table_rows] * k if combine in PIECES else split_evenly(table_rows, k)
        is_hashed[-1] = math.prod(rows) < num_embeddings
        if not is_hashed[-1]:
            rows = largest_first(widths, num_embeddings, count_parameters(rows, widths))
        strides = [min(stride, num_embeddings) for stride in accumulate([1, *rows[:-1]], operator.mul)]
    sizes = [m * width if stored else 0 for m, width, stored in zip(rows, widths, is_stored, strict=True)]
    *starts, end = accumulate(sizes, initial=start)
    starts = [at if stored else start for at, stored in zip(starts, is_stored, strict=True)]
    return Partitions(rows, starts, strides, is_hashed, is_stored), end


def build(
    tables: list[EmbeddingBagConfig], options: Options, request: EmbeddingRequest
) -> QuotientRemainderEmbeddingBagCollection:
    """Return the module that is asked for.

    Raises CompressionRefused where a row in each partition of every table is more than the budget, ValueError where a
    table has fewer dimensions than pieces.
    """
    return QuotientRemainderEmbeddingBagCollection.build("quotient_remainder", tables, options, request)


def cell(module: QuotientRemainderEmbeddingBagCollection, table: int, row: int, col: int) -> float:
    """Return E_t[row][col] by the formula above, in plain Python integers: the oracle of the lookup.

    Raises IndexError outside the table, where the lookup itself would return some other row's numbers.
    """
    config, stored = module.check_cell(table, row, col), module.stored[table]
    digits = _digits(module, table, row)
    if module.options.combine in ("mult", "add"):
        places = [
            start + digit * config.embedding_dim + col for start, digit in zip(stored.starts, digits, strict=True)
        ]
        values = [module.memory[at].item() for at, is_stored in zip(places, stored.is_stored, strict=True) if is_stored]
        return math.prod(values) if module.options.combine == "mult" else sum(values)
    short, longer = divmod(
        config.embedding_dim, module.options.partitions
    )  # the first `longer` pieces have short + 1 columns
    piece, offset = divmod(col, short + 1)
    if piece >= longer:
        piece, offset = divmod(col - longer, short)
    width = short + (piece < longer)
    return module.memory[stored.starts[piece] + digits[piece] * width + offset].item()


def _digits(module: QuotientRemainderEmbeddingBagCollection, table: int, row: int) -> list[int]:
    """Return r_1 … r_k of a row."""
    rows, num_embeddings = module.stored[table].rows, module.embedding_bag_configs()[table].num_embeddings
    location, slots = module.location_hash.location, module.location_hash.max_slots
    if rows[0] == num_embeddings:
        return [row % m for m in rows]
    if module.options.combine == "chunked":
        return [location(table, row, piece, slots) % m for piece, m in enumerate(rows)]
    digits, quotient = [], row
    for m in rows[:-1]:
        quotient, digit = divmod(quotient, m)
        digits.append(digit)
    if math.prod(rows) < num_embeddings:
        quotient = location(table, quotient, len(digits), slots) % rows[-1]
    return [*digits, quotient]


METHOD = EmbeddingMethod(Options=Options, build=build, cell=cell)
