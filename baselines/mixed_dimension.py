"""Mixed dimension embeddings: rows of rarely used ids are shorter, and projected to the width the model expects.

Ginart, Naumov, Mudigere, Yang and Zou 2019, "Mixed Dimension Embeddings with Application to Memory-Efficient
Recommendation Systems", arXiv:1909.11810. Rows are divided into blocks. For row i of block b of a table t of width d,

    E_t[i] = R_b[i - first id of b] · P_b      R_b (n_b, d_b), P_b (d_b, d)        P_b = 1, not stored, where d_b = d
    d_b    = λ · p_b^α, an integer in [1, d]                                       the α-power rule

p_b is the popularity of the block's rows: its share of the accesses to its table / n_b, each table being accessed once
for a row of data. λ is the largest at which all R_b and P_b together are within the budget, found by bisection on the
rounded dimensions. What the blocks are (option `blocks`):

- "tables": every table is one block, p = 1 / n.
- "popularity": a table is cut, by id, into `popularity_blocks` blocks of about equal shares of its accesses: few rows,
  then many, as the datasets number ids by falling frequency. Every id counts for one access more than it had. Without
  counts id i is taken to be accessed in proportion to 1 / (1 + i).

Departures. A block whose R_b and P_b would be no smaller than its full rows has full rows. λ·p^α is rounded down, and
what that leaves of the budget goes, a dimension each, to the blocks that were rounded down most: what is then left is
less than one more dimension of any of them. With `round_to_power_of_two`, as in the authors' code, up to half of the
budget is left.

Start: R_b is the first d_b columns of the full tables' initial rows (`baselines.full`), P_b is uniform and scaled to a
mean square of exactly 1 / d_b. So E_t starts with the full tables' standard deviation, init_scale / √3 (the authors'
Xavier start depends on n_b), and at compression 1 it is the full tables to the bit.
"""

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from baselines.full import fill_initial_rows
from pss.collection import ComputedEmbeddingBagCollection
from pss.method import CompressionRefused, EmbeddingMethod, EmbeddingRequest, MethodOptions

_NO_ID = (1 << 63) - 1


class Options(MethodOptions):
    """Options of mixed dimension embeddings."""

    alpha: float = Field(0.3, ge=0.0, le=1.0)
    """α, the temperature of the power rule: 0 = one dimension for all blocks, 1 = about as many parameters for each."""
    blocks: Literal["tables", "popularity"] = "tables"
    """tables = one dimension for each table, popularity = tables are divided further, by how often their ids occur."""
    popularity_blocks: int = Field(4, ge=1)
    """Blocks of each table where blocks = "popularity"; a table of fewer rows has fewer."""
    round_to_power_of_two: bool = False
    """Round dimensions to the nearest power of two, as the authors' code does; leaves more of the budget unused."""

    @property
    def needs_id_counts(self) -> bool:
        """Return whether blocks are cut by how often ids occur."""
        return self.blocks == "popularity"


class Block(NamedTuple):
    """Ids [start, stop) of a table: `dim` columns are stored of their rows, `embedding_dim` are looked up."""

    table: int
    start: int
    stop: int
    popularity: float  # accesses to the block / accesses to the table / rows of the block
    embedding_dim: int
    dim: int = 1

    @property
    def rows_size(self) -> int:
        """Return the parameters of R_b."""
        return (self.stop - self.start) * self.dim

    @property
    def projection_size(self) -> int:
        """Return the parameters of P_b, 0 where it is not stored."""
        return self.dim * self.embedding_dim if self.dim < self.embedding_dim else 0

    def with_dim(self, dim: int) -> "Block":
        """Return the block with that many columns, at least 1, or full rows where these store no more."""
        short = self._replace(dim=min(max(dim, 1), self.embedding_dim))
        full = self._replace(dim=self.embedding_dim)
        return short if count_parameters([short]) < count_parameters([full]) else full


class MixedPlan(NamedTuple):
    """What the lookup of one group of features needs, see `mixed_rows`. Blocks are those of all tables of the group's
    embedding_dim, which lie together in the parameters."""

    embedding_dim: int
    first_block: list[int]  # of the table of each feature
    cuts: list[list[int]]  # for each feature where the further blocks of its table start, filled up with `_NO_ID`
    starts: list[int]  # first id of each block
    dims: list[int]
    row_offsets: list[int]  # of each block in `rows`
    projection_offset: int  # of the first block in `projections`
    projection_sizes: list[int]


class MixedDimensionEmbeddingBagCollection(ComputedEmbeddingBagCollection):
    """A drop-in for TorchRec's `EmbeddingBagCollection` with two parameters: `rows`, all R_b one after the other, and
    `projections`, all P_b (None where there is none). Gradients are dense.

    An id outside its table reads another row or fails. On CUDA a lookup waits once for the device: blocks are
    multiplied one by one, so their numbers of ids must be known. What is built is no larger than asked for; besides
    what the base class raises, CompressionRefused where one column is too much. Without id_counts see the module's
    docstring.
    """

    OPTIONS = Options
    DEFAULT_COMPRESSION = 1.0
    options: Options
    _plan: list[MixedPlan]

    def _lay_out(self, compression: float, id_counts: Sequence[np.ndarray] | None) -> None:
        options = self.options
        blocks_per_table = options.popularity_blocks if options.blocks == "popularity" else 1
        divided = divide_rows(self.embedding_bag_configs(), blocks_per_table, id_counts)
        budget = self.parameter_budget(compression)
        self.blocks = solve_dims(divided, options.alpha, budget, options.round_to_power_of_two)
        if (smallest := count_parameters(self.blocks)) > budget:
            raise CompressionRefused("mixed_dimension", compression, self._full_parameters / smallest)
        self._row_offsets = [0, *accumulate(block.rows_size for block in self.blocks)]
        self._projection_offsets = [0, *accumulate(block.projection_size for block in self.blocks)]
        self._plan = [self._plan_group(group) for group in range(len(self._groups))]

    def _allocate(self, device: torch.device | None) -> None:
        self.rows = nn.Parameter(torch.empty(self._row_offsets[-1], device=device))
        size = self._projection_offsets[-1]
        self.projections = nn.Parameter(torch.empty(size, device=device)) if size else None

    def _plan_group(self, group: int) -> MixedPlan:
        """Return what a lookup needs; blocks are sorted by embedding_dim, table and first id."""
        dim, tables = self._groups[group].embedding_dim, self._groups[group].tables
        low = next(i for i, block in enumerate(self.blocks) if block.embedding_dim == dim)
        blocks = [block for block in self.blocks if block.embedding_dim == dim]
        starts = [[block.start for block in blocks if block.table == table] for table in tables]
        width = max(map(len, starts))
        return MixedPlan(
            embedding_dim=dim,
            first_block=[next(i for i, block in enumerate(blocks) if block.table == table) for table in tables],
            cuts=[(starts_of_one + [_NO_ID] * width)[1:width] for starts_of_one in starts],
            starts=[block.start for block in blocks],
            dims=[block.dim for block in blocks],
            row_offsets=self._row_offsets[low : low + len(blocks)],
            projection_offset=self._projection_offsets[low],
            projection_sizes=[block.projection_size for block in blocks],
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the start of the module's docstring, the same for the same seed; nothing on the meta device."""
        if self.rows.device.type == "meta":
            return
        state = np.random.SeedSequence((self.seed, 0, 0, 1)).generate_state(1, np.uint64)[0]
        generator = torch.Generator("cpu").manual_seed(int(state >> np.uint64(1)))
        for block, row_offset, offset in zip(self.blocks, self._row_offsets, self._projection_offsets, strict=False):
            fill_initial_rows(
                self.rows.narrow(0, row_offset, block.rows_size).view(-1, block.dim), table=block.table, seed=self.seed,
                init_scale=self.init_scale, row_offset=block.start, embedding_dim=block.embedding_dim,
            )  # fmt: skip
            if self.projections is not None and block.projection_size:
                drawn = torch.rand(block.projection_size, generator=generator, device="cpu").mul_(2).sub_(1)
                drawn /= math.sqrt(block.dim * float(drawn.square().mean()))
                self.projections.narrow(0, offset, block.projection_size).copy_(drawn)

    def _rows(self, group: int, ids: Tensor, feature: Tensor) -> Tensor:
        return mixed_rows(self.rows, self.projections, ids, feature, self._plan[group])

    def _identity(self) -> dict[str, int | str | bool]:
        names = [table.name for table in self.embedding_bag_configs()]
        return {"blocks": ", ".join(f"{names[b.table]}[{b.start}:{b.stop}] x {b.dim}" for b in self.blocks)}


def count_parameters(blocks: Sequence[Block]) -> int:
    """Return the parameters of all these blocks."""
    return sum(block.rows_size + block.projection_size for block in blocks)


def divide_rows(
    tables: Sequence[EmbeddingBagConfig], blocks_per_table: int, id_counts: Sequence[np.ndarray] | None
) -> list[Block]:
    """Return blocks of about equal shares of their table's accesses, of one column each; sorted by embedding_dim,
    table and first id. Raises ValueError for less than one block, or counts that are not those of the tables."""
    if blocks_per_table < 1:
        raise ValueError(f"popularity_blocks must be at least 1, not {blocks_per_table}")
    shares = np.arange(1, blocks_per_table) / blocks_per_table
    blocks = []
    for index, table in sorted(enumerate(tables), key=lambda item: item[1].embedding_dim):
        n = table.num_embeddings
        if id_counts is None:
            inner = [round((n + 1) ** share) - 1 for share in shares]
            cuts = sorted({0, *(cut for cut in inner if 0 < cut < n), n})
            accesses = [math.log((stop + 1) / (start + 1)) for start, stop in pairwise(cuts)]
        else:
            if len(id_counts[index]) != n:
                raise ValueError(f"id_counts of table {table.name!r} has {len(id_counts[index])} ids, not {n}")
            total = np.cumsum(id_counts[index] + 1)
            inner = 1 + np.searchsorted(total, shares * total[-1])
            cuts = sorted({0, *(cut for cut in inner.tolist() if cut < n), n})
            accesses = np.diff([0, *total[np.array(cuts[1:]) - 1]]).tolist()
        for (start, stop), count in zip(pairwise(cuts), accesses, strict=True):
            popularity = count / sum(accesses) / (stop - start)
            blocks.append(Block(index, start, stop, popularity, table.embedding_dim))
    return blocks


def solve_dims(blocks: Sequence[Block], alpha: float, budget: int, round_to_power_of_two: bool = False) -> list[Block]:
    """Return the blocks with the dimensions of the α-power rule for that many parameters: see the module's docstring.

    Where no dimensions are within the budget, the smallest there are."""
    powers = [block.popularity**alpha for block in blocks]

    def blocks_at(scale: float) -> list[Block]:
        dims = [scale * power for power in powers]
        if round_to_power_of_two:
            dims = [2 ** round(math.log2(max(dim, 1))) for dim in dims]
        return [block.with_dim(int(dim)) for block, dim in zip(blocks, dims, strict=True)]

    high = max((2 * b.embedding_dim / power for b, power in zip(blocks, powers, strict=True)), default=0.0)
    if count_parameters(blocks_at(high)) <= budget:
        return blocks_at(high)
    low = 0.0
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if count_parameters(blocks_at(middle)) <= budget else (low, middle)
    solved = blocks_at(low)
    if round_to_power_of_two:
        return solved
    left = budget - count_parameters(solved)
    remainders = [low * power - block.dim for power, block in zip(powers, solved, strict=True)]
    for i in sorted(range(len(blocks)), key=lambda i: -remainders[i]):
        longer = solved[i].with_dim(solved[i].dim + 1)
        more = count_parameters([longer]) - count_parameters([solved[i]])
        if remainders[i] >= 0 and more <= left:
            solved[i], left = longer, left - more
    return solved


@torch.fx.wrap
def mixed_rows(rows: Tensor, projections: Tensor | None, ids: Tensor, feature: Tensor, plan: MixedPlan) -> Tensor:
    """Return E_t[id] of the module's docstring, (..., embedding_dim) of rows' dtype.

    rows (Σ n_b·d_b,), projections (Σ d_b·d,) floating; ids (...) int64; feature int64, broadcastable to ids: position
    of the id's feature in the group. Ids are sorted by block: each block is one matrix product.
    """
    device, feature = ids.device, feature.expand(ids.shape)
    later = ids.unsqueeze(-1) >= torch.tensor(plan.cuts, dtype=torch.int64, device=device)[feature]
    block = (torch.tensor(plan.first_block, device=device)[feature] + later.sum(-1)).reshape(-1)
    order = block.argsort()
    counts: list[int] = torch.bincount(block, minlength=len(plan.dims)).tolist()
    sizes = [count * dim for count, dim in zip(counts, plan.dims)]  # noqa: B905 (TorchScript has no `strict`)
    block = block[order]
    dims = torch.tensor(plan.dims, device=device)[block]
    starts = torch.tensor(plan.row_offsets, device=device)[block]
    starts = starts + dims * (ids.reshape(-1)[order] - torch.tensor(plan.starts, device=device)[block])
    # The elements of all rows one after the other: those of a block are a matrix.
    addresses = torch.repeat_interleave(starts - (dims.cumsum(0) - dims), dims, output_size=sum(sizes))
    elements = rows.index_select(0, addresses + torch.arange(sum(sizes), device=device))
    blocks = [part.view(-1, dim) for part, dim in zip(elements.split(sizes), plan.dims)]  # noqa: B905
    if projections is not None:
        own = projections.narrow(0, plan.projection_offset, sum(plan.projection_sizes)).split(plan.projection_sizes)
        for i in range(len(blocks)):
            if plan.projection_sizes[i] > 0:
                blocks[i] = blocks[i] @ own[i].view(-1, plan.embedding_dim)
    return torch.cat(blocks)[order.argsort()].unflatten(0, ids.shape)


def build(
    tables: list[EmbeddingBagConfig], options: Options, request: EmbeddingRequest
) -> MixedDimensionEmbeddingBagCollection:
    """Return the module that is asked for. Raises CompressionRefused where one column of every row is more than the
    budget."""
    return MixedDimensionEmbeddingBagCollection.build("mixed_dimension", tables, options, request)


def cell(module: MixedDimensionEmbeddingBagCollection, table: int, row: int, col: int) -> float:
    """Return Σ_k R_b[row - first id][k] · P_b[k][col], in plain Python. Raises IndexError outside the table."""
    config = module.check_cell(table, row, col)
    first = projection = 0
    for block in module.blocks:
        if block.table == table and block.start <= row < block.stop:
            break
        first += block.rows_size
        projection += block.projection_size
    else:
        raise AssertionError
    first += (row - block.start) * block.dim
    if block.dim == config.embedding_dim:
        return module.rows[first + col].item()
    assert module.projections is not None
    values, weights = (
        module.rows[first : first + block.dim],
        module.projections[projection + col :: config.embedding_dim],
    )
    return math.fsum(value * weight for value, weight in zip(values.tolist(), weights.tolist(), strict=False))


METHOD = EmbeddingMethod(Options=Options, build=build, cell=cell, stores_every_row=True)
