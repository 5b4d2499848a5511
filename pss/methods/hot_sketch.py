"""HotSketch: which ids matter most, in a table of fixed size (Zhang et al. 2024, "CAFE: Towards Compact, Adaptive, and
Fast Embedding for Large-scale Recommendation Models", section 3.2).

w buckets of c slots; a slot holds a key, its score and the private row of an id that is hot. Key k belongs to bucket
k mod w. Importance s of a key is added as in SpaceSaving (Metwally et al. 2005), in every bucket on its own:

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
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

BYTES_PER_SLOT = 8 + 4 + 4  # key, score, row
_ONE = 1 << 20  # importance is summed as integers of this scale: exact, in whatever order


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
        """The private row of each key, -1 where it is not hot. keys (...) int64 ≥ 0 -> (...) int64."""
        bucket = keys % self.keys.size(0)
        rows = torch.where(self.keys[bucket] == keys.unsqueeze(-1), self.rows[bucket], -1)
        return rows.amax(-1).long()

    def add(self, keys: Tensor, importance: Tensor) -> Tensor:
        """keys (U,) int64 ≥ 0, none twice; importance (U,) ≥ 0. Returns bool (buckets, slots_per_bucket): the
        slots of those of them that were here before and still are."""
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
    """Index of the first True in the last dimension; its size where there is none. (..., n) -> (...) int64."""
    size = mask.size(-1)
    return torch.where(mask, torch.arange(size, device=mask.device), size).amin(-1)


def importance_of_all_ranks(seen: Sequence[Occurrences], tables: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Distinct keys (U,) int64 of all ranks' occurrences, ascending, and each one's importance (U,) float64: the sum
    over its occurrences, scaled to a mean of 1 over the occurrences of its table. Collective; equal on all ranks."""
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
    """Distinct keys, ascending, and the sum of each one's amounts; all (n,) int64."""
    distinct, place = torch.unique(keys, return_inverse=True)
    return distinct, torch.zeros_like(distinct).index_add_(0, place, amounts)


def _gather_ragged(*columns: Tensor) -> Tensor:
    """The columns (n,) int64 of every rank, one rank after the other -> (columns, Σ n). Collective."""
    count = torch.tensor([columns[0].numel()], device=columns[0].device)
    counts = [torch.empty_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, count)
    padded = count.new_zeros(len(columns), int(torch.cat(counts).max()))
    padded[:, : columns[0].numel()] = torch.stack(columns)
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:, : int(n)] for part, n in zip(parts, counts, strict=True)], dim=1)
