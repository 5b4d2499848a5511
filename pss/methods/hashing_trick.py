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
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from configs.request import EmbeddingRequest
from pss.chunks import read_chunks
from pss.hashing import HashConstants, HashFamilyName, build_hash, locate, mix64
from pss.shared_array import SharedArrayEmbeddingBagCollection, SharedArrayOptions
from pss.table_sizes import divide_rows

placement: Literal["replicate", "shard"] = "replicate"

ROWS = ("single", "proportional", "sqrt", "equal")


class Options(SharedArrayOptions):
    """Keys of [embedding.hashing_trick]."""

    rows: Literal["single", "proportional", "sqrt", "equal"] = Field("single")
    """single = all tables hash into the same rows; otherwise rows of its own for every table: proportional to its
    num_embeddings, to their square root (sqrt), or up to one cap for all (equal), as is common in practice."""
    hash_family: HashFamilyName = "independent"
    """independent = a 64-bit mixer; affine = ((a·id + c·table + e) mod P) mod rows; authors: see pss.hashing."""
    signed: bool = False
    """Multiply every row by a hashed sign of its id (Weinberger et al. 2009)."""


class HashingTrickGroup(NamedTuple):
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

    Args:
        tables, is_weighted: as for `EmbeddingBagCollection`; see the base classes for the choices it leaves.
        device: of `memory`; None is torch's default device.
        compression: asked parameters of the full tables / |M|, at least 1. The one obtained (`compression`) is no
            lower, except where one row (of every table, unless rows = "single") is all there is.
        rows: "single", "proportional", "sqrt" or "equal": see the module's docstring.
        hash_family: "independent", "affine" or "authors", see pss.hashing.
        signed: multiply each row by a hashed sign of its id.
        gradient: "dense", "sparse" or "auto", see pss.shared_array.
        seed: of the hash and of the initial memory.
        init_scale: at least 0; every number of the tables starts uniform in ± init_scale, being one of memory or its
            negative.

    Raises ValueError naming the argument for values out of these ranges, and for more rows than the hash can reach.
    """

    _plan: list[HashingTrickGroup]

    def __init__(
        self,
        tables: list[EmbeddingBagConfig],
        is_weighted: bool = False,
        device: torch.device | None = None,
        *,
        compression: float = 1000.0,
        rows: str = "single",
        hash_family: str = "independent",
        signed: bool = False,
        gradient: str = "auto",
        seed: int = 0,
        init_scale: float = 0.01,
    ) -> None:
        super().__init__(tables, is_weighted, gradient=gradient, seed=seed, init_scale=init_scale)
        if rows not in ROWS:
            raise ValueError(f"rows {rows!r} is unknown: known are {list(ROWS)}")
        self.rows, self.signed = rows, signed
        sizes = [table.num_embeddings for table in tables]
        self.location_hash = build_hash(hash_family, seed, sizes)
        self.sign_hash = build_hash(hash_family, mix64(seed + 1), sizes)
        memory_size = self._place_tables(self.parameter_budget(compression))
        self.location_hash.check_slots(max(self.table_rows, default=1))
        self._plan = [self._group_plan(group) for group in range(len(self._groups))]
        self._allocate(memory_size, device)

    def _place_tables(self, budget: int) -> int:
        """Set every table's rows, row size and first element. Returns |M|."""
        tables = self.embedding_bag_configs()
        sizes, dims = [table.num_embeddings for table in tables], [table.embedding_dim for table in tables]
        if self.rows == "single":
            row_size = max(dims, default=1)
            shared = max(1, budget // row_size)
            self.table_rows, self.row_sizes = [shared] * len(tables), [row_size] * len(tables)
            self.starts, self.is_whole = [0] * len(tables), [False] * len(tables)
            return shared * row_size
        weight_of = {"proportional": float, "sqrt": math.sqrt, "equal": lambda size: 1.0}[self.rows]
        weights = [weight_of(size) for size in sizes]
        self.table_rows, self.row_sizes = divide_rows(weights, [1] * len(tables), sizes, dims, budget), dims
        ends = [0]
        for rows, dim in zip(self.table_rows, dims, strict=True):
            ends.append(ends[-1] + rows * dim)
        self.starts = ends[:-1]
        self.is_whole = [rows == size for rows, size in zip(self.table_rows, sizes, strict=True)]
        return ends[-1]

    def _group_plan(self, group: int) -> HashingTrickGroup:
        tables, dim = self._groups[group].tables, self._groups[group].embedding_dim
        return HashingTrickGroup(
            embedding_dim=dim,
            row_size=self.row_sizes[tables[0]],
            rows=[self.table_rows[table] for table in tables],
            starts=[self.starts[table] for table in tables],
            is_whole=[self.is_whole[table] for table in tables],
            slots=self.location_hash.max_slots,
            location=self.location_hash.constants(tables, 1),
            signs=[self.sign_hash.constants(tables, 1)] if self.signed else [],
        )

    def _rows(self, group: int, ids: Tensor, feature: Tensor) -> Tensor:
        return hashing_trick_rows(self.memory, ids, feature, self._plan[group], self.gradient)

    def _options(self) -> dict[str, int | str | bool]:
        return {
            "memory_size": self.memory_size,
            "rows": self.rows,
            "table_rows": " ".join(map(str, self.table_rows)),
            "hash_family": self.location_hash.name,
            "signed": self.signed,
            "seed": self.seed,
        }


@torch.fx.wrap
def hashing_trick_rows(
    memory: Tensor, ids: Tensor, feature: Tensor, plan: HashingTrickGroup, gradient: str = "dense"
) -> Tensor:
    """The rows E_t[id] of the module's docstring: plain PyTorch, the reference for any kernel.

    memory (|M|,) floating; ids (...) int64; feature int64, broadcastable to ids: position of the id's feature in the
    group; gradient: see pss.chunks. Returns (..., embedding_dim) of memory's dtype. Every int64 id has a row: ids are
    not validated, and a table stored whole takes them modulo its rows.
    """
    rows = torch.tensor(plan.rows, dtype=torch.int64, device=ids.device)[feature]
    starts = torch.tensor(plan.starts, dtype=torch.int64, device=ids.device)[feature]
    is_whole = torch.tensor(plan.is_whole, dtype=torch.bool, device=ids.device)[feature]
    hashed = locate(ids, feature, plan.location, plan.slots).squeeze(-1)
    row = torch.where(is_whole, ids, hashed).remainder(rows)
    found = read_chunks(memory, starts + row * plan.row_size, plan.embedding_dim, gradient)
    for constants in plan.signs:
        found = found * (1 - 2 * locate(ids, feature, constants, 2))
    return found


def build(
    tables: list[EmbeddingBagConfig], options: Options, request: EmbeddingRequest
) -> HashingTrickEmbeddingBagCollection:
    """Raises ValueError where one row, or one of every table, is more than the budget."""
    module = HashingTrickEmbeddingBagCollection(
        tables,
        **request.arguments(),
        **options.model_dump(),
    )
    request.check_reached("hashing_trick", module.compression)
    return module


def cell(module: HashingTrickEmbeddingBagCollection, table: int, row: int, col: int) -> float:
    """E_t[row][col] by the formula above, in plain Python integers: the oracle of the lookup.

    Raises IndexError outside the table, where the lookup itself would return some other row's numbers.
    """
    module.check_cell(table, row, col)
    place, location = row, module.location_hash.location
    if not module.is_whole[table]:
        place = location(table, row, 0, module.location_hash.max_slots) % module.table_rows[table]
    sign = 1 - 2 * module.sign_hash.location(table, row, 0, 2) if module.signed else 1
    return sign * module.memory[module.starts[table] + place * module.row_sizes[table] + col].item()
