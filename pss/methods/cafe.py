"""CAFE: ids that matter have rows of their own, all others share hashed rows, and who matters is learned on the way.

Zhang et al. (SIGMOD 2024, "CAFE: Towards Compact, Adaptive, and Fast Embedding for Large-scale Recommendation Models").
With key k of id i of table t, a HotSketch (`pss.methods.hot_sketch`) of w buckets, P private rows and S shared ones:

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
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from configs.request import EmbeddingRequest
from pss.chunks import read_chunks
from pss.hashing import build_hash, locate
from pss.methods.hot_sketch import BYTES_PER_SLOT, HotSketch, Occurrences, importance_of_all_ranks
from pss.shared_array import SharedArrayEmbeddingBagCollection, SharedArrayOptions

placement: Literal["replicate", "shard"] = "replicate"

KEYS = 1 << 62


class Options(SharedArrayOptions):
    """Keys of [embedding.cafe]."""

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

    Args:
        tables, is_weighted: as for `EmbeddingBagCollection`; see the base classes for the choices it leaves.
        device: of `memory` and `sketch`; None is torch's default device.
        compression: asked bytes of the full tables / `stored_bytes`, at least 1. The one obtained (`compression`) is no
            lower, except where one private and one shared row are all there is.
        hot_share, slots_per_bucket, importance, threshold, decay, decay_every, update_every: see `Options`.
        gradient: "dense", "sparse" or "auto", see pss.shared_array.
        seed: of the hash and of the initial memory.
        init_scale: at least 0; every number of the tables starts uniform in ± init_scale, being one of memory.

    Raises ValueError naming the argument for values out of these ranges.
    """

    def __init__(
        self,
        tables: list[EmbeddingBagConfig],
        is_weighted: bool = False,
        device: torch.device | None = None,
        *,
        compression: float = 1000.0,
        hot_share: float = 0.7,
        slots_per_bucket: int = 4,
        importance: Literal["gradient", "frequency"] = "gradient",
        threshold: float | None = None,
        decay: float = 0.99,
        decay_every: int = 1000,
        update_every: int = 1,
        gradient: str = "auto",
        seed: int = 0,
        init_scale: float = 0.01,
    ) -> None:
        super().__init__(tables, is_weighted, gradient=gradient, seed=seed, init_scale=init_scale)
        self.learning = Options(
            hot_share=hot_share,
            slots_per_bucket=slots_per_bucket,
            importance=importance,
            threshold=threshold,
            decay=decay,
            decay_every=decay_every,
            update_every=update_every,
        )
        self.row_size = max(self._embedding_dims, default=1)
        self.private_rows, self.shared_rows = self._divide(4 * self.parameter_budget(compression))
        self.key_hash = build_hash("independent", seed)
        self._key_constants = [self.key_hash.constants(group.tables, 1) for group in self._groups]
        self._seen: list[Occurrences] = []
        self.sketch = HotSketch(self.private_rows, slots_per_bucket, self.private_rows, device)
        self._allocate((self.private_rows + self.shared_rows) * self.row_size, device)

    def _divide(self, budget_bytes: int) -> tuple[int, int]:
        """(private rows, shared rows) that fit, at least one of each."""
        shared_bytes = 4 * self.row_size
        private_bytes = shared_bytes + BYTES_PER_SLOT * self.learning.slots_per_bucket
        asked, most = self.learning.hot_share * budget_bytes, budget_bytes - shared_bytes
        private = int(min(asked, most) // private_bytes)
        private = max(1, private)
        return private, max(1, (budget_bytes - private * private_bytes) // shared_bytes)

    def reset_parameters(self) -> None:
        """The start of the seed: every id reads its shared row; nothing on the meta device."""
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
        """Row of memory that a key reads while it is not hot."""
        return self.private_rows + torch.div(keys, self.private_rows, rounding_mode="floor") % self.shared_rows

    def _see(self, keys: Tensor, tables: Tensor, gradient: Tensor) -> None:
        """gradient (..., embedding_dim) of the rows of these keys (...)."""
        norms = torch.ones_like(keys, dtype=gradient.dtype)
        if self.learning.importance == "gradient":
            norms = gradient.norm(dim=-1)
        self._seen.append(Occurrences(keys.flatten(), tables.flatten(), norms.flatten()))

    @torch.no_grad()
    def end_step(self, step: int, total_steps: int) -> None:
        """Add the ids of the last steps to the sketch and let ids become hot and cold. Collective."""
        options = self.learning
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

    def _options(self) -> dict[str, int | str | bool]:
        return {
            "private_rows": self.private_rows,
            "shared_rows": self.shared_rows,
            "slots_per_bucket": self.learning.slots_per_bucket,
            "seed": self.seed,
        }


def build(tables: list[EmbeddingBagConfig], options: Options, request: EmbeddingRequest) -> CafeEmbeddingBagCollection:
    """Raises ValueError where a private row with its slots and a shared one are more than the budget."""
    module = CafeEmbeddingBagCollection(
        tables,
        **request.arguments(),
        **options.model_dump(),
    )
    request.check_reached("cafe", module.compression)
    return module


def cell(module: CafeEmbeddingBagCollection, table: int, row: int, col: int) -> float:
    """E_t[row][col] by the formula above, in plain Python integers: the oracle of the lookup.

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
