"""TT-Rec: every large table is a tensor train, of which a lookup multiplies K slices; frequent rows may be cached.

Yin, Acun, Wu and Liu 2021, "TT-Rec: Tensor Train Compression for Deep Learning Recommendation Models" (MLSys); digits
i_k of the row and j_k of the column as in `baselines.tt_cores`:

    E_t[i][j] = G_1[i_1, :, j_1, :] · G_2[i_2, :, j_2, :] ··· G_K[i_K, :, j_K, :]

K = 3 or 4 cores. One rank for all tables, or, to come nearer to the budget, one more for the first inner ranks: sizes
go in steps of about 2 / ((K - 1) · rank). A table whose train and cache are no smaller than itself is stored whole.
Lookups multiply gathered slices, in batches over all ids: forward and backward hold V · r_{k-1} · d_k · r_k numbers for
V ids and never a table.

Start: core entries from the paper's sampled Gaussian (N(0, 1) without |x| < 2 in the authors' code, so that products do
not pile up at zero), then one factor per table that makes the root mean square of the materialised table
init_scale / √3, that of full tables. The authors' code leaves the ranks out and starts 55 to 441 times off.

LFU cache, after the authors' code (FBTT-Embedding): the rows read most often are kept uncompressed, `cache_share` of
the rows of each train. Reads are counted while training; after a warm-up, and every `cache_refresh_steps` from then on,
the most frequent rows move in with the values their train has, so that no output jumps. A cached row learns in the
cache alone; an evicted one loses what it learned there. Departures: rows that stay keep what they learned (the code
reads the whole cache anew from the trains); counts are exact and never forgotten, an int32 for each row of a train,
where the code has a hash table; on a tie a cached row stays, then the smaller id wins. Optimizers do not know of it:
Adagrad's sums of a place pass to its next row. Counts are training state, in the state dict but not in `stored_bytes`;
a cached row costs 4 d bytes and 16 for its key and place.

TorchScript, torch.compile and torch.export get a lookup without data-dependent shapes, which multiplies slices for
whole and cached rows too and drops the products. Only eager training counts reads.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from baselines.tt_cores import (
    TableLayout,
    TrainGroup,
    choose_ranks,
    decompose,
    digits,
    draw_train,
    group_parts,
    lay_out,
    row_keys,
    stored_places,
    train_rows,
)
from pss.collection import ComputedEmbeddingBagCollection
from pss.method import EmbeddingMethod, EmbeddingRequest, MethodOptions

EMPTY = 2**63 - 1  # key of a place in the cache that holds no row
FILL_ROWS = 4096  # rows computed at a time when a cache is filled


class Options(MethodOptions):
    """Options of TT-Rec."""

    cores: Literal[3, 4] = 3
    """K, the cores of a tensor train."""
    rank: int | None = Field(default=None, ge=1)
    """All inner ranks; left out, the largest that the compression allows."""
    cache_share: float = Field(default=0.0, ge=0.0, le=1.0)
    """Share of the rows of each tensor train that is cached uncompressed; 0 = no cache."""
    cache_warmup: float = Field(default=0.1, ge=0.0, le=1.0)
    """Share of the training steps after which the cache is filled."""
    cache_refresh_steps: int = Field(default=1000, ge=0)
    """Steps between refreshes of a filled cache; 0 = it keeps the rows it was filled with."""


class TTRecEmbeddingBagCollection(ComputedEmbeddingBagCollection):
    """A drop-in for TorchRec's `EmbeddingBagCollection` whose large tables are tensor trains.

    The one parameter `memory` (fp32) holds for each group of features first the cores, core k of all its trains as
    (Σ n_k, r_{k-1}, d_k, r_k), then the rows of whole tables and caches, (rows, d). Its gradient is dense. A cached row
    is found by its key in `cached_keys`, sorted, and stored where `cached_places` says.

    Ranks are the largest that give the compression asked for, or 1; an option `rank` overrides it.

    Besides what the base class raises: ValueError for a seed below 0.
    """

    OPTIONS = Options
    DEFAULT_COMPRESSION = 100.0
    options: Options
    _plan: list[TrainGroup]
    cached_keys: Tensor
    cached_places: Tensor
    read_counts: Tensor

    def _lay_out(self, compression: float, id_counts: Sequence[np.ndarray] | None) -> None:
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, not {self.seed}")
        tables, options = self.embedding_bag_configs(), self.options
        sizes = [(table.num_embeddings, table.embedding_dim) for table in tables]
        budget, cache_share = self.parameter_budget(compression), options.cache_share
        self.ranks = choose_ranks(sizes, budget, options.cores, cache_share)
        if options.rank:
            self.ranks = [1, *[options.rank] * (options.cores - 1), 1]
        self._plan, self._layouts = [], {}
        self._memory_size = self._train_rows = 0
        for number, group in enumerate(self._groups):
            features = [(index, tables[index].num_embeddings) for index in group.tables]
            plan = lay_out(
                features, group.embedding_dim, self.ranks, cache_share, group=number, start=self._memory_size,
                first_key=self._train_rows,
            )  # fmt: skip
            self._plan.append(plan)
            self._layouts |= dict(zip(group.tables, plan.tables, strict=True))
            self._memory_size += sum(plan.sizes)
            self._train_rows = sum(table.num_embeddings for table in self._layouts.values() if table.first_key >= 0)
        self.cached_rows = sum(table.cached_rows for table in self._layouts.values())
        self._reads: list[Tensor] = []  # keys read since the last step
        self._is_counting = self.cached_rows > 0

    def _allocate(self, device: torch.device | None) -> None:
        self.memory = nn.Parameter(torch.empty(self._memory_size, dtype=torch.float32, device=device))
        self.register_buffer("cached_keys", torch.empty(self.cached_rows, dtype=torch.int64, device=device))
        self.register_buffer("cached_places", torch.empty_like(self.cached_keys))
        counted = self._train_rows if self.cached_rows else 0
        self.register_buffer("read_counts", torch.empty(counted, dtype=torch.int32, device=device))

    def table_parts(self, table: int) -> tuple[list[Tensor], Tensor]:
        """Return views of `memory`.

        The cores (n_k, r_{k-1}, d_k, r_k) of a table's train and the rows (rows, d) of its cache; of a whole table no
        cores and all its rows.
        """
        layout = self._layouts[table]
        cores, stored = group_parts(self.memory, self._plan[layout.group])
        if layout.first_row >= 0:
            return [], stored[layout.first_row :][: layout.num_embeddings]
        own = [core[first:][:n] for core, first, n in zip(cores, layout.first_slices, layout.rows, strict=True)]
        return own, stored[layout.first_cached :][: layout.cached_rows]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw trains and whole tables, the same for the same seed, and empties the cache; nothing on the meta
        device."""
        if self.memory.device.type == "meta":
            return
        self.memory.zero_()
        for index in self._layouts:
            seed = np.random.SeedSequence((self.seed, index)).generate_state(1, np.uint64)[0]
            generator = torch.Generator("cpu").manual_seed(int(seed >> np.uint64(1)))
            cores, rows = self.table_parts(index)
            if cores:
                drawn = draw_train([core.shape for core in cores], self.init_scale / math.sqrt(3), generator)
                for core, values in zip(cores, drawn, strict=True):
                    core.copy_(values)
            else:
                drawn = torch.rand(rows.shape, device="cpu", generator=generator)
                rows.copy_((drawn * 2 - 1) * self.init_scale)
        self.empty_cache()

    def empty_cache(self) -> None:
        """Forget cached rows and counts."""
        self.cached_keys.fill_(EMPTY)
        self.cached_places.zero_()
        self.read_counts.zero_()

    def _rows(self, group: int, ids: Tensor, feature: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # pyright: ignore[reportPrivateImportUsage]
            self._note_reads(group, ids, feature)
        return tt_rec_rows(self.memory, ids, feature, self._plan[group], self.cached_keys, self.cached_places)

    @torch.jit.unused
    def _note_reads(self, group: int, ids: Tensor, feature: Tensor) -> None:
        is_eager = isinstance(ids, Tensor) and not torch.compiler.is_compiling()  # torch.fx traces with no Tensor
        if self.training and self._is_counting and is_eager:
            self._reads.append(row_keys(ids, feature, self._plan[group]).reshape(-1))

    @torch.no_grad()
    def end_step(self, step: int, total_steps: int) -> None:
        """Count what all ranks read since the last call, and fills the cache when it is time. Collective: counts, and
        with them the cached rows, are equal on all ranks."""
        if not self._is_counting:
            return
        keys = _gather_keys(torch.cat(self._reads) if self._reads else self.cached_keys[:0])
        self._reads.clear()
        self.read_counts.index_add_(0, keys, torch.ones_like(keys, dtype=torch.int32))
        filled = max(1, math.ceil(self.options.cache_warmup * total_steps))
        refresh = self.options.cache_refresh_steps
        if step == filled or (refresh and step > filled and (step - filled) % refresh == 0):
            self._refill()
        self._is_counting = refresh > 0 or step < filled

    def _refill(self) -> None:
        parts = [self._refill_table(table) for table in self._layouts.values() if table.cached_rows]
        sorted_keys, order = torch.cat([keys for keys, _ in parts]).sort()
        self.cached_keys.copy_(sorted_keys)
        self.cached_places.copy_(torch.cat([places for _, places in parts])[order])

    def _refill_table(self, table: TableLayout) -> tuple[Tensor, Tensor]:
        """Fill the table's cache; returns its keys and places, (cached_rows,) each."""
        counts = self.read_counts[table.first_key :][: table.num_embeddings]
        mine = (self.cached_keys >= table.first_key) & (self.cached_keys < table.first_key + table.num_embeddings)
        keys, places = self.cached_keys[mine], self.cached_places[mine]
        read = counts.nonzero().squeeze(1)
        merit = 2 * counts[read].long() + torch.isin(read + table.first_key, keys)
        wanted = table.first_key + read[merit.argsort(descending=True, stable=True)[: table.cached_rows]]
        stays, new = torch.isin(keys, wanted), wanted[~torch.isin(wanted, keys)]
        free = torch.arange(table.first_cached, table.first_cached + table.cached_rows, device=keys.device)
        free = free[~torch.isin(free, places[stays])]
        plan = self._plan[table.group]
        cores, stored = group_parts(self.memory, plan)
        for place, ids in zip(free[: len(new)].split(FILL_ROWS), (new - table.first_key).split(FILL_ROWS), strict=True):
            stored[place] = train_rows(cores, ids, torch.full_like(ids, table.feature), plan)
        none = keys.new_full((len(free) - len(new),), EMPTY)
        return torch.cat([keys[stays], new, none]), torch.cat([places[stays], free])

    @torch.no_grad()
    def fit(self, tables: Sequence[Tensor], id_counts: Callable[[], Sequence[np.ndarray]] | None = None) -> float:
        """Fit trains by TT-SVD at the module's ranks, copy whole tables, empty the cache. All rows weigh alike.

        Raises ValueError where number or shapes of the tables differ."""
        expected = [(config.num_embeddings, config.embedding_dim) for config in self.embedding_bag_configs()]
        if [tuple(table.shape) for table in tables] != expected:
            raise ValueError(f"tables of shapes {[tuple(table.shape) for table in tables]} are not {expected}")
        squared_error = 0.0
        for index, table in enumerate(tables):
            cores, rows = self.table_parts(index)
            if not cores:
                rows.copy_(table)
                continue
            shapes = [core.shape for core in cores]
            fitted, cut = decompose(table, [s[0] for s in shapes], [s[2] for s in shapes], self.ranks)
            squared_error += cut
            for core, values in zip(cores, fitted, strict=True):
                core.copy_(values)
        self.empty_cache()
        squared_norm = sum(float(table.double().square().sum()) for table in tables)
        return math.sqrt(squared_error / squared_norm) if squared_norm else 0.0

    def stored_bytes(self) -> int:
        """Return the bytes of cores, whole tables, and cached rows with their keys and places; without the counts of
        reads."""
        return super().stored_bytes() - self.read_counts.numel() * self.read_counts.element_size()

    def _identity(self) -> dict[str, int | str | bool]:
        ranks = ",".join(str(rank) for rank in self.ranks)
        return {"cores": self.options.cores, "ranks": ranks, "cached_rows": self.cached_rows}


@torch.fx.wrap
def tt_rec_rows(
    memory: Tensor, ids: Tensor, feature: Tensor, plan: TrainGroup, cached_keys: Tensor, cached_places: Tensor
) -> Tensor:
    """Return the rows E_t[id] of the module's docstring: plain PyTorch.

    memory fp32; ids (...) int64; feature int64, broadcastable to ids: position of the id's feature in the group;
    cached_keys (C,) rising, cached_places (C,) int64. Returns (..., embedding_dim). Ids are not validated.
    """
    cores, stored = group_parts(memory, plan)
    flat_ids, flat_feature = ids.reshape(-1), feature.expand_as(ids).reshape(-1)
    if stored.size(0) == 0:
        rows = train_rows(cores, flat_ids, flat_feature, plan)
    else:
        place = stored_places(flat_ids, flat_feature, plan, cached_keys, cached_places)
        rows = stored.index_select(0, place.clamp(min=0))
        if cores[0].size(0) > 0:
            rows = fill_in_computed(rows, place < 0, cores, flat_ids, flat_feature, plan)
    return rows.unflatten(0, ids.shape)


def fill_in_computed(
    rows: Tensor, is_computed: Tensor, cores: list[Tensor], ids: Tensor, feature: Tensor, plan: TrainGroup
) -> Tensor:
    """Return rows (V, d) with those where is_computed (V,) replaced. Only plain CPU tensors are asked how many those
    are: elsewhere the answer would force a synchronisation or be baked into a graph, so all are computed."""
    if not torch.jit.is_scripting():  # noqa: SIM102  # pyright: ignore[reportPrivateImportUsage]
        if ids.device.type == "cpu" and not torch.compiler.is_compiling():
            computed = is_computed.nonzero().squeeze(1)
            return rows.index_copy(0, computed, train_rows(cores, ids[computed], feature[computed], plan))
    return torch.where(is_computed.unsqueeze(1), train_rows(cores, ids, feature, plan), rows)


def _gather_keys(keys: Tensor) -> Tensor:
    """Return the keys (V,) ≥ 0 of all ranks, one rank after the other; V may differ between ranks. Collective."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        sizes = [torch.zeros(1, dtype=torch.int64, device=keys.device) for _ in range(dist.get_world_size())]
        dist.all_gather(sizes, torch.tensor([keys.numel()], device=keys.device))
        padded = keys.new_full((max(int(size) for size in sizes),), -1)
        padded[: keys.numel()] = keys
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        keys = torch.cat(parts)
    return keys[keys >= 0]


def build(tables: list[EmbeddingBagConfig], options: Options, request: EmbeddingRequest) -> TTRecEmbeddingBagCollection:
    """Return the module that is asked for. Raises CompressionRefused where trains of the asked rank, or of rank 1, and
    their caches are more than the budget."""
    return TTRecEmbeddingBagCollection.build("tt_rec", tables, options, request)


def cell(module: TTRecEmbeddingBagCollection, table: int, row: int, col: int) -> float:
    """Return E_t[row][col] by the formula above in plain Python, or what is stored of it: the oracle of the lookup.

    Raises IndexError outside the table, where the lookup itself would return some other row's numbers or fail.
    """
    module.check_cell(table, row, col)
    layout = module._layouts[table]
    plan, memory = module._plan[layout.group], module.memory.detach()
    place, keys = layout.first_row + row, module.cached_keys.tolist()
    if layout.first_row < 0:
        key = layout.first_key + row
        place = module.cached_places[keys.index(key)].item() if key in keys else -1
    if place >= 0:
        return memory[plan.start + sum(plan.sizes[:-1]) + place * plan.embedding_dim + col].item()
    i, j = digits(row, layout.rows), digits(col, [dim for _, _, dim, _ in plan.shapes])
    product, start = [1.0], plan.start
    for k, (_, left, dim, right) in enumerate(plan.shapes):
        lines = []  # of the matrix G_k[i_k, :, j_k, :]
        for a in range(left):
            first = start + (((layout.first_slices[k] + i[k]) * left + a) * dim + j[k]) * right
            lines.append(memory[first : first + right].tolist())
        product = [sum(x * line[b] for x, line in zip(product, lines, strict=True)) for b in range(right)]
        start += plan.sizes[k]
    return product[0]


METHOD = EmbeddingMethod(Options=Options, build=build, cell=cell)
