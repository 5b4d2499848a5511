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
- k-means is `pss.methods.kmeans`, of up to `sample_per_cluster` · k ids drawn evenly (with repeats where there are more
ids);
  codebook rows that need no centroid are zero. It runs on rank 0, which sends the others the result.
- The optimizer's state stays with the elements: after a clustering, Adagrad's accumulators are those of other rows.
"""

import math
from typing import Annotated, Literal, NamedTuple

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from configs.request import EmbeddingRequest
from pss.chunks import read_chunks
from pss.hashing import HashConstants, build_hash, locate, mix64
from pss.methods.cce_layout import solve_layout
from pss.methods.kmeans import find_centroids, find_nearest
from pss.shared_array import SharedArrayEmbeddingBagCollection, SharedArrayOptions

placement: Literal["replicate", "shard"] = "replicate"

_NEXT_HASH = -0x61C8864680B583EB  # added to ids once for every clustering; 2^64 / golden ratio
_BLOCK_IDS = 1 << 18


class Options(SharedArrayOptions):
    """Keys of [embedding.cce]."""

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


class CceGroup(NamedTuple):
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
    tables and whole tables as `pss.methods.cce_layout` places them. Buffers, which the state dict has too: `pointers`,
    and `clusterings` () int64, how often all was clustered. Call `end_step` after every step of the training, or
    `cluster`.

    Args:
        tables, is_weighted: as for `EmbeddingBagCollection`; see the base classes for the choices it leaves.
        device: of the parameter and the buffers; None is torch's default device.
        compression: asked bytes of the full tables / `stored_bytes`, at least 1. The one obtained (`compression`) is no
            lower, except where 2 clusters and helper rows a table are all there is.
        chunks, cluster_at, sample_per_cluster, iterations: see `Options`.
        gradient: "dense", "sparse" or "auto", see pss.shared_array.
        seed: of the hashes, of the initial memory and of k-means.
        init_scale: at least 0; see the module's docstring.

    Raises ValueError naming the argument for values out of these ranges.
    """

    _plan: list[CceGroup]
    pointers: Tensor
    clusterings: Tensor

    def __init__(
        self,
        tables: list[EmbeddingBagConfig],
        is_weighted: bool = False,
        device: torch.device | None = None,
        *,
        compression: float = 4.0,
        chunks: int | None = None,
        cluster_at: tuple[float, ...] = (0.25, 0.5, 0.75),
        sample_per_cluster: int = 256,
        iterations: int = 25,
        gradient: str = "auto",
        seed: int = 0,
        init_scale: float = 0.01,
    ) -> None:
        super().__init__(tables, is_weighted, gradient=gradient, seed=seed, init_scale=init_scale)
        self.clustering = Options(
            chunks=chunks, cluster_at=cluster_at, sample_per_cluster=sample_per_cluster, iterations=iterations
        )
        self.layout = solve_layout(tables, chunks, 4 * self.parameter_budget(compression))
        self.helper_hash = build_hash("independent", seed)
        self.pointer_hash = build_hash("independent", mix64(seed + 1))
        self._plan = [self._group_plan(group.tables) for group in self._groups]
        pointers = torch.empty(self.layout.pointers, dtype=self.layout.pointer_dtype, device=device)
        self.register_buffer("pointers", pointers)
        clusterings = torch.zeros((), dtype=torch.int64, device=device)
        self.register_buffer("clusterings", clusterings, persistent=self.layout.pointers > 0)
        self._allocate(self.layout.memory_size, device)

    def _group_plan(self, tables: list[int]) -> CceGroup:
        """The plan of features that these tables of one embedding_dim serve."""
        places = [self.layout.places[table] for table in tables]
        return CceGroup(
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
        """The start of the seed, hashed pointers; nothing on the meta device."""
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
        """Views of a table's codebooks (c, k, d/c), helper tables (c, k', d/c) and pointers (n, c)."""
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
        if step in {max(1, round(share * total_steps)) for share in self.clustering.cluster_at}:
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
        options, clusters, device = self.clustering, self.layout.clusters, self.memory.device
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
        for codebook, found in zip(codebooks, centroids, strict=True):
            codebook[: len(found)] = found

    def _chunks(self, table: int, ids: Tensor) -> Tensor:
        """The rows of these ids (b,) of a table that is not whole, in chunks (b, c, d/c)."""
        plan = self._group_plan([table])
        rows = cce_rows(self.memory, self.pointers, self.clusterings, ids, torch.zeros_like(ids), plan)
        return rows.view(len(ids), plan.chunks, -1)

    def elements_per_row(self) -> int:
        return sum((1 if is_whole else 2) * plan.embedding_dim for plan in self._plan for is_whole in plan.is_whole)

    def _options(self) -> dict[str, int | str | bool]:
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
    plan: CceGroup,
    gradient: str = "dense",
) -> Tensor:
    """The rows E_t[id] of the module's docstring: plain PyTorch, the reference for any kernel.

    memory (|M|,) floating; pointers and clusterings as in `CceEmbeddingBagCollection`; ids (...) int64, each in its
    table; feature int64, broadcastable to ids: position of the id's feature in the group; gradient: see pss.chunks.
    Returns (..., embedding_dim) of memory's dtype.
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
    found = read_chunks(memory, locations, width, gradient)
    helped = found.narrow(-2, chunks, chunks) * ~is_whole.unsqueeze(-1)
    return (found.narrow(-2, 0, chunks) + helped).flatten(-2)


def build(tables: list[EmbeddingBagConfig], options: Options, request: EmbeddingRequest) -> CceEmbeddingBagCollection:
    """Raises ValueError where pointers of one chunk and two clusters are more than the budget."""
    module = CceEmbeddingBagCollection(
        tables,
        **request.arguments() | {"device": torch.device("meta")},  # pointers may be many more than there is room for
        **options.model_dump(),
    )
    request.check_reached("cce", module.compression)
    module.to_empty(device=request.device)
    module.reset_parameters()
    return module


def cell(module: CceEmbeddingBagCollection, table: int, row: int, col: int) -> float:
    """E_t[row][col] by the formula above, in plain Python integers: the oracle of the lookup.

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
