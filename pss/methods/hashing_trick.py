"""The hashing trick: ids that hash alike share a whole row.

PSS paper (Desai and Shrivastava 2022, "The trade-offs of model size in large recommendation models", section 2.3,
"Hashing Trick": 𝓜_h(M_h, i)[:] = M_h[h(i), :]); Weinberger et al. 2009, "Feature Hashing for Large Scale Multitask
Learning". For row i of table t, with k_t rows of memory to read from:

    E_t[i][col] = g · M_t[h_t(i)][col],   h_t(i) = h(t, i, 0) mod k_t
    g = ±1 from a second hash of (t, i) if `signed`, else 1

`rows` says how the budget becomes rows:

    single        one M for all tables: M_t = M, k_t = k. With mixed dimensions a row is as long as the longest and a
                  narrower table reads the beginning of it.
    proportional  an own M_t for every table, k_t ∝ n_t
    sqrt          k_t ∝ √n_t
    equal         k_t = min(n_t, cap), the same cap for all

For the last three 1 ≤ k_t ≤ n_t, and what full tables leave goes to the others in the same proportion (`divide_rows`).
A table with k_t = n_t is stored whole: no hash, h_t(i) = i.

The default is "single", the strongest of them where it was measured (MovieLens, 10×: test AUC .769 against .711, .760
for proportional and sqrt; 100×: .708 against .625, .646): rare ids of all tables share all rows, and no table's rows
are read less than another's. The stored parameters miss the budget by less than one row.

Departures: the paper does not say how several tables share the budget, nor has it the sign; h is a function of (t, i)
of `pss.hashing`, so that tables that share M are told apart.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from pss.hashing import HashConstants, HashFamilyName, build_hash, locate, mix64
from pss.method import EmbeddingMethod, EmbeddingRequest
from pss.shared_array import SharedArrayEmbeddingBagCollection, SharedArrayOptions, read_chunks


class Options(SharedArrayOptions):
    """Options of the hashing trick."""

    rows: Literal["single", "proportional", "sqrt", "equal"] = Field("single")
    """single = all tables hash into the same rows; otherwise rows of its own for every table: proportional to its
    num_embeddings, to their square root (sqrt), or up to one cap for all (equal), as is common in practice."""
    hash_family: HashFamilyName = "independent"
    """independent = a 64-bit mixer; affine = ((a·id + c·table + e) mod P) mod rows; authors: see pss.hashing."""
    signed: bool = False
    """Multiply every row by a hashed sign of its id (Weinberger et al. 2009)."""


class HashingTrickPlan(NamedTuple):
    """What the lookup of one group of features needs: see `hashing_trick_rows`."""

    embedding_dim: int
    row_size: int  # elements of memory from one row to the next
    rows: list[int]  # of the table that serves each feature
    starts: list[int]  # where that table's rows begin in memory
    is_whole: list[bool]  # an own row for every id
    slots: int  # of the hash, before it is taken modulo rows
    location: HashConstants
    signs: list[HashConstants]  # one, or none if not signed


class HashingTrickEmbeddingBagCollection(SharedArrayEmbeddingBagCollection):
    """A drop-in for TorchRec's `EmbeddingBagCollection` whose ids share rows of the one parameter `memory` (|M|,) fp32.

    The compression reached is no lower than asked, except where one row (of every table, unless rows = "single") is all
    there is. Every number of the tables starts uniform in ± init_scale, being one of memory or its negative. Besides
    what the base class raises: ValueError for more rows than the hash can reach.
    """

    OPTIONS = Options
    options: Options
    _plan: list[HashingTrickPlan]

    def _lay_out(self, compression: float, id_counts: Sequence[np.ndarray] | None) -> None:
        sizes = [table.num_embeddings for table in self.embedding_bag_configs()]
        self.location_hash = build_hash(self.options.hash_family, self.seed, sizes)
        self.sign_hash = build_hash(self.options.hash_family, mix64(self.seed + 1), sizes)
        self.memory_size = self._place_tables(self.parameter_budget(compression))
        self.location_hash.check_slots(max(self.table_rows, default=1))
        self._plan = [self._plan_group(group) for group in range(len(self._groups))]

    def _place_tables(self, budget: int) -> int:
        """Set every table's rows, row size and first element. Returns |M|."""
        tables = self.embedding_bag_configs()
        sizes, dims = [table.num_embeddings for table in tables], [table.embedding_dim for table in tables]
        if self.options.rows == "single":
            row_size = max(dims, default=1)
            shared = max(1, budget // row_size)
            self.table_rows, self.row_sizes = [shared] * len(tables), [row_size] * len(tables)
            self.starts, self.is_whole = [0] * len(tables), [False] * len(tables)
            return shared * row_size
        weight_of = {"proportional": float, "sqrt": math.sqrt, "equal": lambda size: 1.0}[self.options.rows]
        weights = [weight_of(size) for size in sizes]
        self.table_rows, self.row_sizes = divide_rows(weights, [1] * len(tables), sizes, dims, budget), dims
        ends = [0]
        for rows, dim in zip(self.table_rows, dims, strict=True):
            ends.append(ends[-1] + rows * dim)
        self.starts = ends[:-1]
        self.is_whole = [rows == size for rows, size in zip(self.table_rows, sizes, strict=True)]
        return ends[-1]

    def _plan_group(self, group: int) -> HashingTrickPlan:
        tables, dim = self._groups[group].tables, self._groups[group].embedding_dim
        return HashingTrickPlan(
            embedding_dim=dim,
            row_size=self.row_sizes[tables[0]],
            rows=[self.table_rows[table] for table in tables],
            starts=[self.starts[table] for table in tables],
            is_whole=[self.is_whole[table] for table in tables],
            slots=self.location_hash.max_slots,
            location=self.location_hash.constants(tables, 1),
            signs=[self.sign_hash.constants(tables, 1)] if self.options.signed else [],
        )

    def _rows(self, group: int, ids: Tensor, feature: Tensor) -> Tensor:
        return hashing_trick_rows(self.memory, ids, feature, self._plan[group], self.gradient)

    def _identity(self) -> dict[str, int | str | bool]:
        return {
            "memory_size": self.memory_size,
            "rows": self.options.rows,
            "table_rows": " ".join(map(str, self.table_rows)),
            "hash_family": self.options.hash_family,
            "signed": self.options.signed,
            "seed": self.seed,
        }


@torch.fx.wrap
def hashing_trick_rows(
    memory: Tensor, ids: Tensor, feature: Tensor, plan: HashingTrickPlan, gradient: str = "dense"
) -> Tensor:
    """Return the rows E_t[id] of the module's docstring: plain PyTorch, the reference for any kernel.

    memory (|M|,) floating; ids (...) int64; feature int64, broadcastable to ids: position of the id's feature in the
    group; gradient: see pss.shared_array. Returns (..., embedding_dim) of memory's dtype. Every int64 id has a row: ids
    are not validated, and a table stored whole takes them modulo its rows.
    """
    rows = torch.tensor(plan.rows, dtype=torch.int64, device=ids.device)[feature]
    starts = torch.tensor(plan.starts, dtype=torch.int64, device=ids.device)[feature]
    is_whole = torch.tensor(plan.is_whole, dtype=torch.bool, device=ids.device)[feature]
    hashed = locate(ids, feature, plan.location, plan.slots).squeeze(-1)
    row = torch.where(is_whole, ids, hashed).remainder(rows)
    row_values = read_chunks(memory, starts + row * plan.row_size, plan.embedding_dim, gradient)
    for constants in plan.signs:
        row_values = row_values * (1 - 2 * locate(ids, feature, constants, 2))
    return row_values


def divide_rows(
    weights: Sequence[float], least: Sequence[int], most: Sequence[int], row_sizes: Sequence[int], budget: int
) -> list[int]:
    """Return how many rows of row_sizes[t] parameters each table t gets out of a budget of parameters.

    rows[t] = ⌊c · weights[t]⌋, at least least[t] and at most most[t], for the greatest c with Σ rows · row_sizes ≤
    budget; what is left goes, a row each, to the greatest remainders of c · weights. So what stays unused is less than
    one row, unless every table has its most. Where `least` is more than the budget, the result is `least`.
    """
    tables = range(len(weights))

    def rows_at(level: float) -> list[int]:
        return [min(max(int(level * weights[t]), least[t]), most[t]) for t in tables]

    def left_of(rows: list[int]) -> int:
        return budget - sum(rows[t] * row_sizes[t] for t in tables)

    low, high = 0.0, 2 * max((most[t] / weights[t] for t in tables), default=0.0)
    if left_of(list(most)) >= 0:
        return list(most)
    if left_of(list(least)) < 0:
        return list(least)
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if left_of(rows_at(middle)) >= 0 else (low, middle)
    rows = rows_at(low)
    left = left_of(rows)
    for t in sorted(tables, key=lambda t: (-(low * weights[t] % 1), -most[t])):
        if row_sizes[t] <= left and rows[t] == int(low * weights[t]) < most[t]:
            rows[t] += 1
            left -= row_sizes[t]
    return rows


def build(
    tables: list[EmbeddingBagConfig], options: Options, request: EmbeddingRequest
) -> HashingTrickEmbeddingBagCollection:
    """Return the module that is asked for. Raises CompressionRefused where one row, or one of every table, is more than
    the budget."""
    return HashingTrickEmbeddingBagCollection.build("hashing_trick", tables, options, request)


def cell(module: HashingTrickEmbeddingBagCollection, table: int, row: int, col: int) -> float:
    """Return E_t[row][col] by the formula above, in plain Python integers: the oracle of the lookup.

    Raises IndexError outside the table, where the lookup itself would return some other row's numbers.
    """
    module.check_cell(table, row, col)
    place, location = row, module.location_hash.location
    if not module.is_whole[table]:
        place = location(table, row, 0, module.location_hash.max_slots) % module.table_rows[table]
    sign = 1 - 2 * module.sign_hash.location(table, row, 0, 2) if module.options.signed else 1
    return sign * module.memory[module.starts[table] + place * module.row_sizes[table] + col].item()


METHOD = EmbeddingMethod(Options=Options, build=build, cell=cell)
