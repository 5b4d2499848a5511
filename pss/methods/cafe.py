"""CAFE: ids that matter have rows of their own, all others share hashed rows, and who matters is learned on the way.

Zhang et al. (SIGMOD 2024, "CAFE: Towards Compact, Adaptive, and Fast Embedding for Large-scale Recommendation Models").
With key k of id i of table t, a HotSketch of w buckets, P private rows and S shared ones:

    k = h(t, i),  62 bits             k is looked for in bucket k mod w
    E_t[i] = private[r]               if k is in the sketch with private row r: it is hot
           = shared[⌊k / w⌋ mod S]    otherwise

In training every id adds its importance to the sketch: the norm of the gradient of its row, for every occurrence in a
batch. At `end_step` ids become hot, their private row starting as what they read until then, the shared row; or cold,
reading the shared row again. Scores decay, so that what was important once does not stay hot for ever.

Sizes: `hot_share` of the budget for private rows and the sketch, the rest for shared rows, as many whole ones as fit;
w = P, as in the authors' code. The sketch is stored state and counts: 16 bytes a slot (key 8, score 4, row 4), so a hot
id costs 4·d + 16·c bytes. The stored bytes miss the budget by less than a row and its slots.

Departures:

- One sketch and one set of private and of shared rows for all tables; a row is as long as the longest and a narrower
  table reads its beginning. The authors' code has shared rows of its own for every table, and stores small tables
  whole: here their ids are hot when they matter.
- Importance is the sum over occurrences of the norms of their gradients, scaled so that the mean over the occurrences
  of a table in a batch is 1, as in the authors' code (equal for any number of ranks with equal shares of the batch).
  The norm of an id's summed gradient would depend on how the batch is divided over ranks.
- HotSketch's own: a batch is added at once, and without `threshold` the P highest scores are hot. What decays is
  multiplied every `decay_every` steps, in the authors' code when the scores have grown by a multiple of the threshold.
- Keys are compared, not ids: two ids of one bucket with equal 62-bit hashes would be taken for one.
- Elements of an optimizer's state belong to rows: an id that becomes hot takes over the accumulator of the private row
  it gets. Shared rows keep theirs.
- The paper's multi-level hashing of medium ids is not here.

HotSketch (section 3.2 of the paper) finds the ids that matter most, in a table of fixed size: w buckets of c slots; a
slot holds a key, its score and the private row of an id that is hot. Key k belongs to bucket k mod w. Importance s of a
key is added as in SpaceSaving (Metwally et al. 2005), in every bucket on its own:

    the key has a slot            score += s
    otherwise, the least slot     key := k, score += s     (an empty slot has score 0)

so a score is never below the importance its key has had since it came in. The slot of a hot key is never given away,
as in the authors' code.

Only a key that is met again while it has its slot may become hot, also as there: a newcomer has the score of the key
before it, often a high one.

Departures, for whole batches in a fixed number of tensor operations: `add` takes every key once with all its
importance, and of the keys of a bucket that have no slot only the one of greatest importance enters; the others'
importance of that batch is lost. Without a `threshold` the hot keys are those with the highest scores, and a hot key
becomes cold when one with a higher score needs its row: the paper's fixed threshold must be found for every budget (10
to 500 in the authors' scripts) and leaves rows unused where it is too high.

Everything is exact or elementwise and ties go to the lowest index, so ranks that add the same keys in the same order
hold the same sketch, on any device.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from pss.hashing import build_hash, locate
from pss.method import EmbeddingMethod, EmbeddingRequest
from pss.shared_array import SharedArrayEmbeddingBagCollection, SharedArrayOptions, read_chunks

KEYS = 1 << 62
BYTES_PER_SLOT = 8 + 4 + 4  # key, score, row
_ONE = 1 << 20  # importance is summed as integers of this scale: exact, in whatever order


class Options(SharedArrayOptions):
    """Options of CAFE."""

    hot_share: float = Field(default=0.7, gt=0, lt=1)
    """Share of the budget for private rows and the sketch that finds them; the authors use .3 at 2× to .9 at 2000×."""
    slots_per_bucket: int = Field(default=4, ge=1)
    """c, the ids that a bucket of the sketch can tell apart."""
    importance: Literal["gradient", "frequency"] = "gradient"
    """gradient = norm of the gradient of the id's row, relative to the table's mean; frequency = 1 an occurrence."""
    threshold: float | None = Field(default=None, gt=0)
    """Score from which an id is hot while private rows are free, in occurrences of mean importance. Unset = the ids
    with the highest scores are hot, as many as there are private rows."""
    decay: float = Field(default=0.99, gt=0, le=1)
    """Scores are multiplied by this every decay_every steps."""
    decay_every: int = Field(default=1000, ge=1)
    """Steps between two decays."""
    update_every: int = Field(default=1, ge=1)
    """Steps between two updates of the sketch, each with all ids since the last: with 20 instead of 1, about a tenth
    as many ids lost their private row to another on a Zipf stream. A run that resumes from a checkpoint taken in
    between has forgotten the ids since the last update."""


class CafeEmbeddingBagCollection(SharedArrayEmbeddingBagCollection):
    """A drop-in for TorchRec's `EmbeddingBagCollection`: `memory` (|M|,) fp32 holds the private rows, then the shared
    ones; `sketch` says who reads which. Learns what matters from backward passes in training mode; call `end_step`
    after each of them.

    The compression reached is no lower than asked, except where one private and one shared row are all there is. Every
    number of the tables starts uniform in ± init_scale, being one of memory.
    """

    OPTIONS = Options
    options: Options

    def _lay_out(self, compression: float, id_counts: Sequence[np.ndarray] | None) -> None:
        self.row_size = max(self._embedding_dims, default=1)
        self.private_rows, self.shared_rows = self._divide(4 * self.parameter_budget(compression))
        self.memory_size = (self.private_rows + self.shared_rows) * self.row_size
        self.key_hash = build_hash("independent", self.seed)
        self._key_constants = [self.key_hash.constants(group.tables, 1) for group in self._groups]
        self._seen: list[Occurrences] = []

    def _allocate(self, device: torch.device | None) -> None:
        super()._allocate(device)
        self.sketch = HotSketch(self.private_rows, self.options.slots_per_bucket, self.private_rows, device)

    def _divide(self, budget_bytes: int) -> tuple[int, int]:
        """Return (private rows, shared rows) that fit, at least one of each."""
        shared_bytes = 4 * self.row_size
        private_bytes = shared_bytes + BYTES_PER_SLOT * self.options.slots_per_bucket
        asked, most = self.options.hot_share * budget_bytes, budget_bytes - shared_bytes
        private = int(min(asked, most) // private_bytes)
        private = max(1, private)
        return private, max(1, (budget_bytes - private * private_bytes) // shared_bytes)

    def reset_parameters(self) -> None:
        """Draw the start of the seed: every id reads its shared row; nothing on the meta device."""
        super().reset_parameters()
        self.sketch.reset()

    def _rows(self, group: int, ids: Tensor, feature: Tensor) -> Tensor:
        keys = locate(ids, feature, self._key_constants[group], KEYS).squeeze(-1)
        private = self.sketch.find(keys)
        row = torch.where(private >= 0, private, self._shared_row(keys))
        rows = read_chunks(self.memory, row * self.row_size, self._groups[group].embedding_dim, self.gradient)
        if self.training and rows.requires_grad:
            tables = torch.tensor(self._groups[group].tables, device=ids.device)[feature].expand_as(ids)
            rows.register_hook(lambda gradient: self._see(keys, tables, gradient))
        return rows

    def _shared_row(self, keys: Tensor) -> Tensor:
        """Return the row of memory that a key reads while it is not hot."""
        return self.private_rows + torch.div(keys, self.private_rows, rounding_mode="floor") % self.shared_rows

    def _see(self, keys: Tensor, tables: Tensor, gradient: Tensor) -> None:
        """Note the importance of ids. gradient (..., embedding_dim) of the rows of these keys (...)."""
        norms = torch.ones_like(keys, dtype=gradient.dtype)
        if self.options.importance == "gradient":
            norms = gradient.norm(dim=-1)
        self._seen.append(Occurrences(keys.flatten(), tables.flatten(), norms.flatten()))

    @torch.no_grad()
    def end_step(self, step: int, total_steps: int) -> None:
        """Add the ids of the last steps to the sketch and let ids become hot and cold. Collective."""
        options = self.options
        if step % options.update_every:
            return
        keys, importance = importance_of_all_ranks(self._seen, len(self.embedding_bag_configs()), self.memory.device)
        self._seen.clear()
        decays = step // options.decay_every - (step - options.update_every) // options.decay_every
        self.sketch.decay(options.decay**decays)
        met_again = self.sketch.add(keys, importance)
        keys, rows = self.sketch.migrate(met_again, options.threshold)
        memory = self.memory.view(-1, self.row_size)
        memory[rows] = memory[self._shared_row(keys)]

    def _identity(self) -> dict[str, int | str | bool]:
        return {
            "private_rows": self.private_rows,
            "shared_rows": self.shared_rows,
            "slots_per_bucket": self.options.slots_per_bucket,
            "seed": self.seed,
        }


class Occurrences(NamedTuple):
    """Ids that have had a gradient, with repeats: their keys int64, tables int64 and importance, all (V,)."""

    keys: Tensor
    tables: Tensor
    importance: Tensor


class HotSketch(nn.Module):
    """Buffers, all (buckets, slots_per_bucket) and part of the state dict: keys int64 ≥ 0, or -1 for an empty slot;
    scores float32 ≥ 0; rows int32, in [0, hot_rows) for a hot key, otherwise -1. No two slots have the same row."""

    keys: Tensor
    scores: Tensor
    rows: Tensor

    def __init__(self, buckets: int, slots_per_bucket: int, hot_rows: int, device: torch.device | None = None) -> None:
        super().__init__()
        shape = (buckets, slots_per_bucket)
        self.hot_rows = hot_rows
        self.register_buffer("keys", torch.full(shape, -1, dtype=torch.int64, device=device))
        self.register_buffer("scores", torch.zeros(shape, dtype=torch.float32, device=device))
        self.register_buffer("rows", torch.full(shape, -1, dtype=torch.int32, device=device))

    def reset(self) -> None:
        """Forget everything."""
        self.keys.fill_(-1)
        self.scores.zero_()
        self.rows.fill_(-1)

    def find(self, keys: Tensor) -> Tensor:
        """Return the private row of each key, -1 where it is not hot. keys (...) int64 ≥ 0 -> (...) int64."""
        bucket = keys % self.keys.size(0)
        rows = torch.where(self.keys[bucket] == keys.unsqueeze(-1), self.rows[bucket], -1)
        return rows.amax(-1).long()

    def add(self, keys: Tensor, importance: Tensor) -> Tensor:
        """Add importance.

        keys (U,) int64 ≥ 0, none twice; importance (U,) ≥ 0. Returns bool (buckets, slots_per_bucket): the slots of
        those of them that were here before and still are.
        """
        bucket, importance = keys % self.keys.size(0), importance.to(self.scores.dtype)
        slot = _first(self.keys[bucket] == keys.unsqueeze(-1))
        is_known = slot < self.keys.size(1)
        self.scores[bucket[is_known], slot[is_known]] += importance[is_known]
        met_again = torch.zeros_like(self.keys, dtype=torch.bool)
        met_again[bucket[is_known], slot[is_known]] = True
        met_again[self._insert(keys[~is_known], bucket[~is_known], importance[~is_known])] = False
        return met_again

    def _insert(self, keys: Tensor, bucket: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        """Give the least slot of every bucket to the most important of these keys, which have none. Returns buckets and
        slots given."""
        order = importance.argsort(descending=True, stable=True)
        order = order[bucket[order].argsort(stable=True)]
        is_first = torch.ones_like(order, dtype=torch.bool)
        is_first[1:] = bucket[order].diff() != 0
        best = order[is_first]
        keys, bucket, importance = keys[best], bucket[best], importance[best]
        scores = self.scores[bucket].masked_fill(self.rows[bucket] >= 0, float("inf"))
        least = scores.amin(-1, keepdim=True)
        slot = _first(scores == least)
        is_open = least.squeeze(-1) < float("inf")
        bucket, slot = bucket[is_open], slot[is_open]
        self.keys[bucket, slot] = keys[is_open]
        self.scores[bucket, slot] += importance[is_open]
        return bucket, slot

    def decay(self, factor: float) -> None:
        """Multiply all scores."""
        self.scores.mul_(factor)

    def migrate(self, may_rise: Tensor, threshold: float | None = None) -> tuple[Tensor, Tensor]:
        """Make hot keys of low score cold, then, highest score first, cold keys of high score hot while rows are free.

        may_rise: bool (buckets, slots_per_bucket), the slots whose keys may become hot. High is a score above 0 of at
        least `threshold`; None = the hot_rows-th highest of those and of the hot keys. Returns the keys that became hot
        and the rows they got, both (n,) int64.
        """
        keys, scores, rows = (buffer.view(-1) for buffer in (self.keys, self.scores, self.rows))
        scores = torch.where((rows >= 0) | may_rise.view(-1), scores, 0)
        least = torch.topk(scores, self.hot_rows).values[-1] if threshold is None else threshold
        is_high = (scores >= least) & (scores > 0)
        rows.masked_fill_(~is_high, -1)
        rising = (is_high & (rows < 0)).nonzero().squeeze(1)
        is_free = torch.ones(self.hot_rows, dtype=torch.bool, device=rows.device)
        is_free[rows[rows >= 0].long()] = False
        free = is_free.nonzero().squeeze(1)
        rising = rising[scores[rising].argsort(descending=True, stable=True)][: free.numel()]
        free = free[: rising.numel()]
        rows[rising] = free.int()
        return keys[rising], free


def _first(mask: Tensor) -> Tensor:
    """Return the index of the first True in the last dimension; its size where there is none. (..., n) -> (...)
    int64."""
    size = mask.size(-1)
    return torch.where(mask, torch.arange(size, device=mask.device), size).amin(-1)


def importance_of_all_ranks(seen: Sequence[Occurrences], tables: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return distinct keys (U,) int64 of all ranks' occurrences, ascending, and each one's importance (U,) float64:
    the sum over its occurrences, scaled to a mean of 1 over the occurrences of its table. Collective; equal on all
    ranks."""
    nothing = torch.zeros(0, dtype=torch.int64, device=device)
    seen = [Occurrences(nothing, nothing, nothing.float()), *seen]
    keys, table, importance = (torch.cat(parts) for parts in zip(*seen, strict=True))
    totals = importance.new_zeros((2, tables), dtype=torch.float64)
    totals[0].index_add_(0, table, torch.ones_like(importance, dtype=torch.float64))
    totals[1].index_add_(0, table, importance.double())
    if dist.is_initialized():
        dist.all_reduce(totals)
    scale = torch.where(totals[1] > 0, totals[0] / totals[1], 0)
    keys, amounts = _sum_by_key(keys, (importance * scale[table] * _ONE).round().long())
    if dist.is_initialized():
        keys, amounts = _sum_by_key(*_gather_ragged(keys, amounts))
    return keys, amounts.double() / _ONE


def _sum_by_key(keys: Tensor, amounts: Tensor) -> tuple[Tensor, Tensor]:
    """Return distinct keys, ascending, and the sum of each one's amounts; all (n,) int64."""
    distinct, place = torch.unique(keys, return_inverse=True)
    return distinct, torch.zeros_like(distinct).index_add_(0, place, amounts)


def _gather_ragged(*columns: Tensor) -> Tensor:
    """Return the columns (n,) int64 of every rank, one rank after the other -> (columns, Σ n). Collective."""
    count = torch.tensor([columns[0].numel()], device=columns[0].device)
    counts = [torch.empty_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, count)
    padded = count.new_zeros(len(columns), int(torch.cat(counts).max()))
    padded[:, : columns[0].numel()] = torch.stack(columns)
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:, : int(n)] for part, n in zip(parts, counts, strict=True)], dim=1)


def build(tables: list[EmbeddingBagConfig], options: Options, request: EmbeddingRequest) -> CafeEmbeddingBagCollection:
    """Return the module that is asked for. Raises CompressionRefused where a private row with its slots and a shared
    one are more than the budget."""
    return CafeEmbeddingBagCollection.build("cafe", tables, options, request)


def cell(module: CafeEmbeddingBagCollection, table: int, row: int, col: int) -> float:
    """Return E_t[row][col] by the formula above, in plain Python integers: the oracle of the lookup.

    Raises IndexError outside the table, where the lookup itself would return some other row's numbers.
    """
    module.check_cell(table, row, col)
    key = module.key_hash.location(table, row, 0, KEYS)
    rest, bucket = divmod(key, module.private_rows)
    place = module.private_rows + rest % module.shared_rows
    for slot_key, private in zip(module.sketch.keys[bucket].tolist(), module.sketch.rows[bucket].tolist(), strict=True):
        if slot_key == key and private >= 0:
            place = private
    return module.memory[place * module.row_size + col].item()


METHOD = EmbeddingMethod(Options=Options, build=build, cell=cell)
