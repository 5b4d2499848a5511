"""CCE, clustered compositional embeddings: a hashed sketch of the tables whose rows are clustered while it trains.

Tsang and Ahle (NeurIPS 2023, "Clustering the Sketch: Dynamic Compression for Embedding Tables"). The d columns of table
t are c chunks of d / c; each has a codebook T of k rows, a helper table T' of k' rows, and every id a pointer a:

    E_t[i][chunk j] = T_tj[a_tj(i)] + T'_tj[h(t, i, j)]

a is a hash at first. At certain steps of the training (`cluster_at`) every chunk of every table is clustered:

    centroids := k-means of E_t[·][chunk j];  a_tj(i) := the nearest to E_t[i][chunk j];  T := centroids;  T' := 0

and h becomes another random hash, so that T' next tells apart other ids of a cluster.

All that must be stored counts: codebooks, helper tables and n·c pointers, which the paper leaves out of its parameters,
of 1, 2 or 4 bytes for k up to 2^8, 2^16 and beyond. A pointer is one byte at least, so no table reaches 4·d / c (64× at
d = 16, c = 1). They take their space from the start, when they are still a hash. k, k' and c are the same for all
tables (a table's c the largest divisor of its d that is no more): the largest k = k' that fits, then the largest k' for
it. A table that takes less as it is, is stored whole. Unused stays less than a row of every helper table, Σ 4·d bytes
in all. `chunks` unset is the most of 4, 3, 2, 1 with which the pointers take half of the budget at most.

Departures:

- Codebook and helper table start uniform in ± init_scale / √2, so that their sum has the spread of init_scale / √3;
  a table that is whole in ± init_scale.
- T' starts from zeros after a clustering, as in the paper; the authors' code fills in the means of the residuals.
- k-means is Lloyd's iterations from k-means++ seeds (Arthur and Vassilvitskii 2007), in float64, so that what the
  points decide is not decided by rounding. It takes up to `sample_per_cluster` · k ids drawn evenly (with repeats where
  there are more ids); codebook rows that need no centroid are zero. It runs on rank 0, which sends the others the
  result.
- The optimizer's state stays with the elements: after a clustering, Adagrad's accumulators are those of other rows.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from pss.hashing import HashConstants, build_hash, locate, mix64
from pss.method import EmbeddingMethod, EmbeddingRequest
from pss.shared_array import SharedArrayEmbeddingBagCollection, SharedArrayOptions, read_chunks

POINTER_DTYPES = {1 << 8: torch.uint8, 1 << 16: torch.int16, 1 << 31: torch.int32}
"""By the most clusters that they can tell apart; an int16 is read as unsigned."""
_COUNTER_BYTES = 8  # of clusterings, where there is something to cluster
_NEXT_HASH = -0x61C8864680B583EB  # added to ids once for every clustering; 2^64 / golden ratio
_BLOCK_IDS = 1 << 18
_BLOCK_DISTANCES = 1 << 22  # 32 MiB


class Options(SharedArrayOptions):
    """Options of CCE."""

    chunks: int | None = Field(default=None, ge=1)
    """c, parts of a row that are clustered apart, each for a pointer an id. Unset = the most of 4 to 1 with which the
    pointers take at most half of the budget."""
    cluster_at: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (0.25, 0.5, 0.75)
    """When to cluster, as shares of the steps of the training. A run that stops early may have missed some: then choose
    them for the epochs it takes."""
    sample_per_cluster: int = Field(default=256, ge=1)
    """Ids that k-means takes for every cluster at most."""
    iterations: int = Field(default=25, ge=1)
    """Of k-means at most."""


class CcePlan(NamedTuple):
    """What the lookup of one group of features needs: see `cce_rows`. Lists have an entry for every feature."""

    embedding_dim: int
    chunks: int
    clusters: int
    helper_rows: int
    starts: list[int]
    rows: list[int]
    is_whole: list[bool]
    pointer_starts: list[int]
    helper: HashConstants


class CceEmbeddingBagCollection(SharedArrayEmbeddingBagCollection):
    """A drop-in for TorchRec's `EmbeddingBagCollection`. The one parameter `memory` (|M|,) fp32 holds codebooks, helper
    tables and whole tables as `TablePlace` describes. Buffers, which the state dict has too: `pointers`, and
    `clusterings` () int64, how often all was clustered. Call `end_step` after every step of the training, or `cluster`.

    The compression reached is no lower than asked, except where 2 clusters and helper rows a table are all there is.
    """

    OPTIONS = Options
    DEFAULT_COMPRESSION = 4.0
    options: Options
    _plan: list[CcePlan]
    pointers: Tensor
    clusterings: Tensor

    def _lay_out(self, compression: float, id_counts: Sequence[np.ndarray] | None) -> None:
        budget_bytes = 4 * self.parameter_budget(compression)
        self.layout = solve_layout(self.embedding_bag_configs(), self.options.chunks, budget_bytes)
        self.memory_size = self.layout.memory_size
        self.helper_hash = build_hash("independent", self.seed)
        self.pointer_hash = build_hash("independent", mix64(self.seed + 1))
        self._plan = [self._plan_tables(group.tables) for group in self._groups]

    def _allocate(self, device: torch.device | None) -> None:
        super()._allocate(device)
        pointers = torch.empty(self.layout.pointers, dtype=self.layout.pointer_dtype, device=device)
        self.register_buffer("pointers", pointers)
        clusterings = torch.zeros((), dtype=torch.int64, device=device)
        self.register_buffer("clusterings", clusterings, persistent=self.layout.pointers > 0)

    def _plan_tables(self, tables: list[int]) -> CcePlan:
        """Return the plan of features that these tables of one embedding_dim serve."""
        places = [self.layout.places[table] for table in tables]
        return CcePlan(
            embedding_dim=self.embedding_bag_configs()[tables[0]].embedding_dim,
            chunks=places[0].chunks,
            clusters=self.layout.clusters,
            helper_rows=self.layout.helper_rows,
            starts=[place.start for place in places],
            rows=[place.rows for place in places],
            is_whole=[place.is_whole for place in places],
            pointer_starts=[place.pointer_start for place in places],
            helper=self.helper_hash.constants(tables, places[0].chunks),
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the start of the seed, with hashed pointers; nothing on the meta device."""
        super().reset_parameters()
        if self.memory.device.type == "meta":
            return
        self.clusterings.zero_()
        for table in self._clustered_tables():
            codebooks, helpers, pointers = self._parts(table)
            codebooks /= math.sqrt(2)
            helpers /= math.sqrt(2)
            constants = self.pointer_hash.constants([table], pointers.size(1))
            for ids in torch.arange(len(pointers)).split(_BLOCK_IDS):
                hashed = locate(ids, torch.zeros_like(ids), constants, self.layout.clusters)
                pointers[ids[0] : ids[-1] + 1] = hashed.to(pointers)

    def _clustered_tables(self) -> list[int]:
        return [table for table, place in enumerate(self.layout.places) if not place.is_whole]

    def _parts(self, table: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return views of a table's codebooks (c, k, d/c), helper tables (c, k', d/c) and pointers (n, c)."""
        config, place, layout = self.embedding_bag_configs()[table], self.layout.places[table], self.layout
        sizes = [config.embedding_dim * rows for rows in (layout.clusters, layout.helper_rows)]
        parts = self.memory.detach()[place.start : place.start + sum(sizes)].split(sizes)
        codebooks, helpers = (part.view(place.chunks, -1, config.embedding_dim // place.chunks) for part in parts)
        pointers = self.pointers.narrow(0, place.pointer_start, config.num_embeddings * place.chunks)
        return codebooks, helpers, pointers.view(-1, place.chunks)

    def _rows(self, group: int, ids: Tensor, feature: Tensor) -> Tensor:
        return cce_rows(self.memory, self.pointers, self.clusterings, ids, feature, self._plan[group], self.gradient)

    def end_step(self, step: int, total_steps: int) -> None:
        """Cluster if it is time to. Collective."""
        if step in {max(1, round(share * total_steps)) for share in self.options.cluster_at}:
            self.cluster()

    @torch.no_grad()
    def cluster(self) -> None:
        """Cluster all tables that are not whole. Collective."""
        if not self._clustered_tables():
            return
        if not dist.is_initialized() or dist.get_rank() == 0:
            for table in self._clustered_tables():
                self._cluster_table(table)
        if dist.is_initialized():
            dist.broadcast(self.memory.detach(), 0)
            dist.broadcast(self.pointers.view(torch.uint8), 0)
        self.clusterings += 1

    def _cluster_table(self, table: int) -> None:
        codebooks, helpers, pointers = self._parts(table)
        options, clusters, device = self.options, self.layout.clusters, self.memory.device
        generator = torch.Generator().manual_seed(mix64(mix64(self.seed + int(self.clusterings)) + table) >> 1)
        sample = torch.arange(len(pointers))
        if len(sample) > options.sample_per_cluster * clusters:
            sample = torch.randint(len(sample), (options.sample_per_cluster * clusters,), generator=generator)
        chunks = self._chunks(table, sample.to(device)).unbind(1)
        centroids = [find_centroids(points, clusters, options.iterations, generator) for points in chunks]
        for ids in torch.arange(len(pointers), device=device).split(_BLOCK_IDS):
            chunks = zip(self._chunks(table, ids).unbind(1), centroids, strict=True)
            pointers[ids] = torch.stack([find_nearest(*each) for each in chunks], dim=1).to(pointers.dtype)
        codebooks.zero_()
        helpers.zero_()
        for codebook, centroid in zip(codebooks, centroids, strict=True):
            codebook[: len(centroid)] = centroid

    def _chunks(self, table: int, ids: Tensor) -> Tensor:
        """Return the rows of these ids (b,) of a table that is not whole, in chunks (b, c, d/c)."""
        plan = self._plan_tables([table])
        rows = cce_rows(self.memory, self.pointers, self.clusterings, ids, torch.zeros_like(ids), plan)
        return rows.view(len(ids), plan.chunks, -1)

    def elements_per_row(self) -> int:
        """Return how many elements of `memory` one id of every feature reads together."""
        return sum((1 if is_whole else 2) * plan.embedding_dim for plan in self._plan for is_whole in plan.is_whole)

    def _identity(self) -> dict[str, int | str | bool]:
        layout = self.layout
        sizes: dict[str, int | str | bool] = {"chunks": layout.chunks, "clusters": layout.clusters}
        return sizes | {"helper_rows": layout.helper_rows, "seed": self.seed}


@torch.fx.wrap
def cce_rows(
    memory: Tensor,
    pointers: Tensor,
    clusterings: Tensor,
    ids: Tensor,
    feature: Tensor,
    plan: CcePlan,
    gradient: str = "dense",
) -> Tensor:
    """Return the rows E_t[id] of the module's docstring: plain PyTorch, the reference for any kernel.

    memory (|M|,) floating; pointers and clusterings as in `CceEmbeddingBagCollection`; ids (...) int64, each in its
    table; feature int64, broadcastable to ids: position of the id's feature in the group; gradient: see
    pss.shared_array. Returns (..., embedding_dim) of memory's dtype.
    """
    chunks, device = plan.chunks, ids.device
    width = plan.embedding_dim // chunks
    starts = torch.tensor(plan.starts, dtype=torch.int64, device=device)[feature].unsqueeze(-1)
    rows = torch.tensor(plan.rows, dtype=torch.int64, device=device)[feature].unsqueeze(-1)
    is_whole = torch.tensor(plan.is_whole, dtype=torch.bool, device=device)[feature].unsqueeze(-1)
    chunk = torch.arange(chunks, device=device)
    row = ids.unsqueeze(-1)
    if all(plan.is_whole):
        return read_chunks(memory, starts + (chunk * rows + row) * width, width, gradient).flatten(-2)
    places = torch.tensor(plan.pointer_starts, dtype=torch.int64, device=device)[feature].unsqueeze(-1)
    pointed = pointers[torch.where(is_whole, 0, places + row * chunks + chunk)].long()
    if pointers.dtype == torch.int16:
        pointed = pointed & 65535
    row = torch.where(is_whole, row, pointed)
    hashed = locate(ids + clusterings * -0x61C8864680B583EB, feature, plan.helper, plan.helper_rows)
    helpers = starts + (chunks * plan.clusters + chunk * plan.helper_rows + hashed) * width
    locations = torch.cat([starts + (chunk * rows + row) * width, torch.where(is_whole, 0, helpers)], dim=-1)
    chunks_read = read_chunks(memory, locations, width, gradient)
    helped = chunks_read.narrow(-2, chunks, chunks) * ~is_whole.unsqueeze(-1)
    return (chunks_read.narrow(-2, 0, chunks) + helped).flatten(-2)


class TablePlace(NamedTuple):
    """Where a table is. In memory from `start`: its codebooks, chunks · rows rows of d / chunks elements, then its
    helper tables likewise. In the pointers from `pointer_start`: chunks of them for every id. A table that is whole is
    a codebook with a row for every id, without helper tables and pointers."""

    start: int
    chunks: int
    rows: int
    is_whole: bool
    pointer_start: int


@dataclass(frozen=True)
class CceLayout:
    """memory_size: elements of all tables; pointers: of all tables."""

    chunks: int
    clusters: int
    helper_rows: int
    places: list[TablePlace]
    memory_size: int
    pointers: int

    @property
    def pointer_dtype(self) -> torch.dtype:
        """Return the smallest type that tells the clusters apart."""
        return next(dtype for most, dtype in POINTER_DTYPES.items() if self.clusters <= most)

    @property
    def pointer_bytes(self) -> int:
        """Return the bytes of all pointers."""
        return self.pointers * self.pointer_dtype.itemsize

    @property
    def stored_bytes(self) -> int:
        """Return the bytes of parameters, pointers and the counter."""
        return 4 * self.memory_size + self.pointer_bytes + (_COUNTER_BYTES if self.pointers else 0)


def lay_out(tables: Sequence[EmbeddingBagConfig], chunks: int, clusters: int, helper_rows: int) -> CceLayout:
    """Lay out every table in the form that takes less: whole, or with `clusters` and `helper_rows` rows."""
    places, memory_size, pointers = [], 0, 0
    pointer_bytes = CceLayout(chunks, clusters, helper_rows, [], 0, 0).pointer_dtype.itemsize
    for table in tables:
        dim, ids = table.embedding_dim, table.num_embeddings
        own_chunks = max(c for c in range(1, min(chunks, dim) + 1) if dim % c == 0)
        is_whole = 4 * dim * ids <= 4 * dim * (clusters + helper_rows) + pointer_bytes * own_chunks * ids
        places.append(TablePlace(memory_size, own_chunks, ids if is_whole else clusters, is_whole, pointers))
        memory_size += dim * (ids if is_whole else clusters + helper_rows)
        pointers += 0 if is_whole else own_chunks * ids
    return CceLayout(chunks, clusters, helper_rows, places, memory_size, pointers)


def solve_layout(tables: Sequence[EmbeddingBagConfig], chunks: int | None, budget_bytes: int) -> CceLayout:
    """Return the layout that the module's docstring describes; where none fits, the least there is: 2 clusters and 2
    helper rows.

    chunks: asked, at least 1; None = the most of 4 to 1 whose pointers take at most half of the budget, or 1.
    """
    asked = [(chunks, budget_bytes)] if chunks else [*((c, budget_bytes // 2) for c in (4, 3, 2, 1)), (1, budget_bytes)]
    most = max([2, *(table.num_embeddings for table in tables)])
    for count, most_pointer_bytes in asked:
        low = 2
        widths = []
        for high in POINTER_DTYPES:
            if low <= most:
                widths.append((low, min(high, most)))
            low = high + 1
        for low, high in reversed(widths):  # the widest pointers first
            clusters = _most(low, high, lambda k, c=count: lay_out(tables, c, k, k).stored_bytes <= budget_bytes)
            if clusters is None or lay_out(tables, count, clusters, clusters).pointer_bytes > most_pointer_bytes:
                continue
            rows = _most(
                clusters, most, lambda h, c=count, k=clusters: lay_out(tables, c, k, h).stored_bytes <= budget_bytes
            )
            assert rows is not None
            return lay_out(tables, count, clusters, rows)
    return lay_out(tables, chunks or 1, 2, 2)


def _most(low: int, high: int, fits: Callable[[int], bool]) -> int | None:
    """Return the greatest number in [low, high] that fits, if any; what fits is fitted by all smaller ones."""
    if not fits(low):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def find_centroids(points: Tensor, clusters: int, iterations: int, generator: torch.Generator) -> Tensor:
    """Find clusters: points (n, width) floating, n ≥ 1 -> centroids (m, width) float64 on the same device, none twice
    at the start.

    m = clusters, or the number of distinct points where that is less. A cluster that loses all its points keeps its
    centroid. Stops early when no point changes its cluster. generator: of the CPU, draws the seeds.
    """
    points = points.double()
    centroids = _draw_seeds(points, clusters, generator)
    assigned = torch.full((len(points),), -1, device=points.device)
    for _ in range(iterations):
        before, assigned = assigned, find_nearest(points, centroids)
        if torch.equal(before, assigned):
            break
        sums = torch.zeros_like(centroids).index_add_(0, assigned, points)
        counts = torch.bincount(assigned, minlength=len(centroids)).unsqueeze(1)
        centroids = torch.where(counts > 0, sums / counts.clamp(min=1), centroids)
    return centroids


def find_nearest(points: Tensor, centroids: Tensor) -> Tensor:
    """Return the index of the centroid nearest to each point: (n, width), (m, width) -> (n,) int64."""
    centroids = centroids.double()
    half_squares = centroids.square().sum(1) / 2  # |p - c|² / 2 without |p|² / 2, the same for all c
    blocks = points.split(max(1, _BLOCK_DISTANCES // len(centroids)))
    return torch.cat([torch.addmm(half_squares, block.double(), centroids.t(), alpha=-1).argmin(1) for block in blocks])


def _draw_seeds(points: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """Draw distinct points, each drawn with probability ∝ its squared distance to the nearest of those before it."""
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    distances = (points - points[chosen[0]]).square().sum(1)
    while len(chosen) < clusters and bool(distances.any()):
        ends = distances.cumsum(0)
        drawn = torch.rand(1, dtype=torch.float64, generator=generator).to(points.device) * ends[-1]
        chosen.append(int(torch.searchsorted(ends, drawn, right=True).clamp(max=len(points) - 1)))
        distances = torch.minimum(distances, (points - points[chosen[-1]]).square().sum(1))
    return points[chosen]


def build(tables: list[EmbeddingBagConfig], options: Options, request: EmbeddingRequest) -> CceEmbeddingBagCollection:
    """Return the module that is asked for. Raises CompressionRefused where pointers of one chunk and two clusters are
    more than the budget."""
    return CceEmbeddingBagCollection.build("cce", tables, options, request)


def cell(module: CceEmbeddingBagCollection, table: int, row: int, col: int) -> float:
    """Return E_t[row][col] by the formula above, in plain Python integers: the oracle of the lookup.

    Raises IndexError outside the table.
    """
    config = module.check_cell(table, row, col)
    layout, place, memory = module.layout, module.layout.places[table], module.memory
    width = config.embedding_dim // place.chunks
    chunk, offset = divmod(col, width)
    if place.is_whole:
        return memory[place.start + (chunk * config.num_embeddings + row) * width + offset].item()
    pointer = int(module.pointers[place.pointer_start + row * place.chunks + chunk])
    if module.pointers.dtype == torch.int16:
        pointer %= 1 << 16
    block = row + int(module.clusterings) * _NEXT_HASH
    helper = module.helper_hash.location(table, block, chunk, layout.helper_rows)
    codebook_row = chunk * layout.clusters + pointer
    helper_row = place.chunks * layout.clusters + chunk * layout.helper_rows + helper
    return sum(memory[place.start + each * width + offset].item() for each in (codebook_row, helper_row))


METHOD = EmbeddingMethod(Options=Options, build=build, cell=cell, stores_every_row=True)
