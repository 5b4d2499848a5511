"""ROBE: every table reads its rows, in blocks of Z consecutive elements, out of one array M of shared parameters.

PSS paper (Desai and Shrivastava 2022, "The trade-offs of model size in large recommendation models", section 2.3),
ROBE-Z:

    E_t[i][j·Z : (j+1)·Z] = M[h(t, i, j) : h(t, i, j) + Z]

h takes table t, row i and chunk j to [0, |M| - Z + 1), so a block never wraps around the end of M, as in the authors'
code; `circular` blocks start anywhere in [0, |M|) and go on at the beginning. For column `col` of row `row` of a table
of dimension d:

    Z ≤ d:  i = row, j = col // Z, offset = col % Z; the last chunk of a row is shorter where Z does not divide d
    Z > d:  blocks of the flattened table, as in the ROBE paper (Desai, Chou and Shrivastava 2022, "Random Offset Block
            Embedding Array"): flat = row·d + col, i = flat // Z, j = 0, offset = flat % Z
    E_t[row][col] = g · M[h(t, i, j) + offset], with g = ±1 if `signed`, else 1

Departures: t enters the hash itself, where the authors' code adds the rows of the tables before it to `row`, unless
`hash_family` = "authors" asks for their address map to the letter (which also keeps i = row, j = 0 where Z > d); h is
an own hash for every chunk unless `hash_family` asks for the paper's, which correlates chunks (pss.hashing); the sign g
is drawn per block, from a second hash g(t, i, j) of the same family: one independent sign per hashed unit is what makes
the inner products of colliding units unbiased (Weinberger et al. 2009, "Feature Hashing", section 2). With `tiers` h
takes frequent and rare ids to different parts of M, and private rows have no h at all (pss.tiers); there too i = row
and j = 0 where Z > d, since a block of several rows could not be in the parts of all of them.
"""

from collections.abc import Sequence

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from pss.hashing import HashConstants, HashFamilyName, build_hash, locate, mix64
from pss.kernels.collection import KernelEmbeddingBagCollection, KernelOptions
from pss.kernels.plan import RobePlan
from pss.method import EmbeddingMethod, EmbeddingRequest, MethodOptions
from pss.shared_array import read_chunks
from pss.tiers import NO_PRIVATE_ROWS, Tiers, check_counts, check_tiers, solve_private_rows, solve_tiers


class Options(KernelOptions):
    """Options of ROBE."""

    block_size: int = Field(8, ge=1)
    """Z, the consecutive elements of M that a block reads: 1 is HashedNet; longer blocks are faster up to about 16,
    and at Z = embedding_dim quality drops at high compression."""
    hash_family: HashFamilyName = "independent"
    """independent = an own hash for every table and chunk; affine = the ROBE paper's, whose chunks are correlated;
    authors = the same, tables told apart as in the authors' code."""
    signed: bool = False
    """Multiply every block by a hashed sign; measured to change nothing but noise."""
    circular: bool = False
    """Let a block that reaches the end of M go on at its beginning."""
    tiers: tuple[tuple[int, float], ...] = ()
    """[[count, share], ...], counts falling: ids seen in training fewer than `count` times share only the last `share`
    of M among themselves. Needs ids numbered by falling frequency, and a pass over the training rows to count them."""

    @property
    def needs_id_counts(self) -> bool:
        """Return whether ids are divided by how often they occur."""
        return bool(self.tiers)

    @field_validator("tiers")
    @classmethod
    def _tiers_are_possible(cls, tiers: tuple[tuple[int, float], ...]) -> tuple[tuple[int, float], ...]:
        check_tiers(tiers)
        return tiers


class MemorySize(MethodOptions):
    """An option of classes, not of config files."""

    memory_size: int | None = Field(default=None, ge=1)
    """|M|; overrides compression. At least block_size."""


class RobeArguments(Options, MemorySize):
    """Options of the class: those of the config, and what other methods make of ROBE."""

    flattened: bool | None = None
    """Blocks of the flattened table instead of chunks of a row; None = where Z > d, see the formula."""
    private_share: float = Field(default=0.0, ge=0, lt=1)
    """Share of M for private rows of the ids seen most often, see pss.tiers."""

    @model_validator(mode="after")
    def _parts_of_the_array_have_whole_rows(self) -> "RobeArguments":
        if self.is_divided and (self.circular or self.flattened):
            raise ValueError("tiers and private rows need circular = False and rows that are not flattened")
        if self.memory_size is not None and self.memory_size < self.block_size:
            raise ValueError(f"memory_size must be at least block_size = {self.block_size}, not {self.memory_size}")
        return self

    @property
    def is_divided(self) -> bool:
        """Return whether frequent and rare ids read different parts of M."""
        return len(self.tiers) > 0 or self.private_share > 0


class RobeEmbeddingBagCollection(KernelEmbeddingBagCollection):
    """A drop-in for TorchRec's `EmbeddingBagCollection` whose tables share the one parameter `memory` (|M|,) fp32.

        RobeEmbeddingBagCollection(tables, compression=1000, block_size=8)

    |M| = max(⌊full parameters / compression⌋, block_size), so the compression reached is no lower than asked, except
    where one block is all there is. id_counts, falling from row 1 on, are needed for tiers and private rows.

    Besides what the base class raises: ValueError for more slots than the hash can reach, and for flattened tables of
    2^63 elements or more where Z < d.
    """

    OPTIONS = RobeArguments
    options: RobeArguments
    _plan: list[RobePlan]  # again: TorchScript reads the annotations of one class alone

    def _lay_out(self, compression: float, id_counts: Sequence[np.ndarray] | None) -> None:
        options, tables = self.options, self.embedding_bag_configs()
        block_size, memory_size = options.block_size, options.memory_size
        self._stored_bounds = len(tables) * (len(options.tiers) + 2 * (options.private_share > 0))
        if memory_size is None:
            memory_size = max(self.parameter_budget(compression) - 2 * self._stored_bounds, block_size)
        self.memory_size = memory_size
        self.private, self.tiers = NO_PRIVATE_ROWS, Tiers([0], [memory_size], [])
        if options.is_divided:
            id_counts = check_counts(tables, id_counts)
            self.private = solve_private_rows(tables, id_counts, int(options.private_share * memory_size))
            self.tiers = solve_tiers(options.tiers, id_counts, self.private.size, memory_size, block_size)
        self.slots = [size if options.circular else size - block_size + 1 for size in self.tiers.sizes]
        rows = [table.num_embeddings for table in tables]
        self.location_hash = build_hash(options.hash_family, self.seed, rows)
        self.sign_hash = build_hash(options.hash_family, mix64(self.seed + 1), rows)
        self.location_hash.check_slots(max(self.slots))
        self._plan = [self._plan_group(group) for group in range(len(self._groups))]

    def is_flattened(self, embedding_dim: int) -> bool:
        """Return whether tables of that dimension are read in blocks of the flattened table."""
        options = self.options
        if options.flattened is None:
            is_divided = self.private.size > 0 or len(self.tiers.bounds) > 0
            return options.block_size > embedding_dim and options.hash_family != "authors" and not is_divided
        return options.flattened

    def _plan_group(self, group: int) -> RobePlan:
        tables, dim = self._groups[group].tables, self._groups[group].embedding_dim
        is_flattened = self.is_flattened(dim)
        if is_flattened:
            _check_flattened([self.embedding_bag_configs()[table] for table in tables], self.options.block_size)
        chunks = 1 if is_flattened else -(-dim // self.options.block_size)
        return RobePlan(
            embedding_dim=dim,
            block_size=self.options.block_size,
            memory_size=self.memory_size,
            starts=self.tiers.starts,
            slots=self.slots,
            bounds=[[bounds[table] for table in tables] for bounds in self.tiers.bounds],
            private_bounds=[self.private.bounds[table] for table in tables] if self.private.size else [],
            private_starts=[self.private.starts[table] for table in tables] if self.private.size else [],
            is_mean=self._groups[group].is_mean,
            is_flattened=is_flattened,
            is_circular=self.options.circular,
            location=self.location_hash.constants(tables, chunks),
            signs=[self.sign_hash.constants(tables, chunks)] if self.options.signed else [],
        )

    def _rows(self, group: int, ids: Tensor, feature: Tensor) -> Tensor:
        return robe_rows(self.memory, ids, feature, self._plan[group], self.gradient)

    def _identity(self) -> dict[str, int | str | bool]:
        return {
            "memory_size": self.memory_size,
            "block_size": self.options.block_size,
            "hash_family": self.options.hash_family,
            "signed": self.options.signed,
            "circular": self.options.circular,
            "flattened": str(self.options.flattened),
            "tiers": str(self.tiers),
            "private": str(self.private),
            "seed": self.seed,
        }

    def stored_numbers(self) -> int:
        """Return the number of first rows of tiers and private rows."""
        return self._stored_bounds


def _check_flattened(tables: Sequence[EmbeddingBagConfig], block_size: int) -> None:
    for table in tables:
        if block_size < table.embedding_dim and table.num_embeddings * table.embedding_dim >= 1 << 63:
            size = f"{table.num_embeddings} x {table.embedding_dim}"
            raise ValueError(f"flattened: table {table.name!r} ({size}) has 2^63 elements or more")


@torch.fx.wrap
def robe_rows(memory: Tensor, ids: Tensor, feature: Tensor, plan: RobePlan, gradient: str = "dense") -> Tensor:
    """Return the rows E_t[id] of the module's docstring: plain PyTorch, the reference for any kernel.

    memory (|M|,) floating; ids (...) int64; feature int64, broadcastable to ids: position of the id's feature in the
    group; gradient: see pss.shared_array. Returns (..., embedding_dim) of memory's dtype. Every int64 id has a row: ids
    are not validated.
    """
    if plan.is_flattened:
        return _flattened_rows(memory, ids, feature, plan, gradient)
    locations = locate(ids, feature, plan.location, plan.slots[0])
    if len(plan.starts) > 1 or len(plan.private_starts) > 0:
        locations = _divided(locations, ids, feature, plan)
    if plan.is_circular:
        addresses = locations.unsqueeze(-1) + torch.arange(plan.block_size, device=ids.device)
        chunks = read_chunks(memory, addresses.remainder_(plan.memory_size), 1, gradient).squeeze(-1)
    else:
        chunks = read_chunks(memory, locations, plan.block_size, gradient)
    for constants in plan.signs:
        chunks = chunks * _signs(ids, feature, constants).unsqueeze(-1)
    rows = chunks.flatten(-2)
    return rows if rows.size(-1) == plan.embedding_dim else rows.narrow(-1, 0, plan.embedding_dim)


def _divided(locations: Tensor, ids: Tensor, feature: Tensor, plan: RobePlan) -> Tensor:
    """Move locations (..., chunks) in the first tier, as if it began at 0 -> in the part of M where each id belongs."""
    locations = locations + plan.starts[0]
    for tier in range(1, len(plan.starts)):
        first = torch.tensor(plan.bounds[tier - 1], dtype=torch.int64, device=ids.device)[feature]
        there = locate(ids, feature, plan.location, plan.slots[tier]) + plan.starts[tier]
        locations = torch.where((ids >= first).unsqueeze(-1), there, locations)
    if len(plan.private_starts) > 0:
        bound = torch.tensor(plan.private_bounds, dtype=torch.int64, device=ids.device)[feature]
        start = torch.tensor(plan.private_starts, dtype=torch.int64, device=ids.device)[feature]
        chunks = torch.arange(locations.size(-1), device=ids.device) * plan.block_size
        is_private = ((ids >= 1) & (ids < bound)).unsqueeze(-1)
        own = (start + ids * plan.embedding_dim).unsqueeze(-1) + chunks
        locations = torch.where(is_private, own, locations)
    return locations


def _flattened_rows(memory: Tensor, ids: Tensor, feature: Tensor, plan: RobePlan, gradient: str) -> Tensor:
    """Read as `robe_rows` where blocks are those of the flattened table: a row lies in up to ⌈(d - 1) / Z⌉ + 1 of them.

    row·d may exceed 63 bits; with row = a·Z + b it starts in block a·d + (b·d) // Z, at offset (b·d) % Z.
    """
    dim, size = plan.embedding_dim, plan.block_size
    a = torch.div(ids, size, rounding_mode="floor")
    start = (ids - a * size) * dim
    blocks = (a * dim + torch.div(start, size, rounding_mode="floor")).unsqueeze(-1)
    blocks = blocks + torch.arange((dim + size - 2) // size + 1, device=ids.device)
    feature = feature.unsqueeze(-1)
    position = (start % size).unsqueeze(-1) + torch.arange(dim, device=ids.device)  # from the first block's start
    block = torch.div(position, size, rounding_mode="floor")
    locations = locate(blocks, feature, plan.location, plan.slots[0]).squeeze(-1)
    addresses = locations.gather(-1, block) + position % size
    if plan.is_circular:
        addresses = addresses % plan.memory_size
    elements = read_chunks(memory, addresses, 1, gradient).squeeze(-1)
    for constants in plan.signs:
        elements = elements * _signs(blocks, feature, constants).squeeze(-1).gather(-1, block)
    return elements


def _signs(blocks: Tensor, feature: Tensor, constants: HashConstants) -> Tensor:
    """Return ±1 int64 (..., chunks) for blocks (...)."""
    return 1 - 2 * locate(blocks, feature, constants, 2)


def build(tables: list[EmbeddingBagConfig], options: Options, request: EmbeddingRequest) -> RobeEmbeddingBagCollection:
    """Return the module that is asked for. Raises CompressionRefused where one block is more than the budget."""
    return RobeEmbeddingBagCollection.build("robe", tables, options, request)


def cell(module: RobeEmbeddingBagCollection, table: int, row: int, col: int) -> float:
    """Return E_t[row][col] by the formula above, in plain Python integers: the oracle of the lookup.

    Raises IndexError outside the table, where the lookup itself would return some other row's numbers.
    """
    config = module.check_cell(table, row, col)
    if module.is_flattened(config.embedding_dim):
        (block, offset), chunk = divmod(row * config.embedding_dim + col, module.options.block_size), 0
    else:
        block, (chunk, offset) = row, divmod(col, module.options.block_size)
    if 1 <= row < (module.private.bounds[table] if module.private.size else 0):
        address = module.private.starts[table] + row * config.embedding_dim + col
    else:
        tier = sum(row >= bounds[table] for bounds in module.tiers.bounds)
        location = module.location_hash.location(table, block, chunk, module.slots[tier])
        address = module.tiers.starts[tier] + location + offset
    sign = 1 - 2 * module.sign_hash.location(table, block, chunk, 2) if module.options.signed else 1
    return sign * module.memory[address % module.memory_size].item()


METHOD = EmbeddingMethod(Options=Options, build=build, cell=cell)
