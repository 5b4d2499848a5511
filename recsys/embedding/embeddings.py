"""The embedding methods, and what each of them offers: THE registry.

A method is a module with `Options` (its keys in [embedding.<method>]), `placement` ("replicate": a copy on every rank,
under DDP; "shard": divided over the ranks by TorchRec), `build` (a drop-in for TorchRec's `EmbeddingBagCollection`)
and `cell` (the paper's formula for one number of the table it stands for: the oracle of the contract test).
Adding one: its file in `pss/` or `baselines/`, and a line in METHODS.

What its Options may have besides: `needs_id_counts`, true for a request that says how often ids occur. What its file
may have: `fit(module, tables)`, see `recsys.train.fit`. And what its module may have, for those that change while they
train or are smaller afterwards:

- `end_step(step, total_steps)`: called after every optimizer step, on every rank; step counts from 1. Collective. Ranks
  must come out equal: decide on values they share.
- `stored_bytes()`: bytes of what is kept to look up, where that is not parameters and persistent buffers.
- `settle_gradient(batch_size)` and `gradient`: see `pss.shared_array`.
- `fused_update` and `fuse_update(optimizer)`: true for a module that is to do its optimizer's step itself, on one rank.
- `lookup_kernel`: what looks up here, for the table that tells where parameters are.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollectionInterface

from baselines import full, mixed_dimension, pruned, quantized, sharded, tt_rec
from configs.request import EmbeddingRequest
from configs.schema import EmbeddingSection, Section
from pss.methods import cafe, cce, frequency_robe, hashed_net, hashing_trick, jlt, quotient_remainder, robe
from recsys.embedding import partly_full


class EmbeddingMethod(Protocol):
    @property
    def Options(self) -> type[Section]: ...

    @property
    def placement(self) -> str: ...

    def build(
        self, tables: list[EmbeddingBagConfig], options: Any, request: EmbeddingRequest
    ) -> EmbeddingBagCollectionInterface:
        """KeyedJaggedTensor of the tables' features -> KeyedTensor (B, ΣD) of pooled embeddings.

        Raises ValueError where the method cannot stand for these tables within the asked budget."""
        ...

    def cell(self, module: Any, table: int, row: int, col: int) -> float: ...


METHODS: dict[str, EmbeddingMethod] = {
    "cafe": cafe,
    "cce": cce,
    "frequency_robe": frequency_robe,
    "full": full,
    "hashed_net": hashed_net,
    "hashing_trick": hashing_trick,
    "jlt": jlt,
    "mixed_dimension": mixed_dimension,
    "pruned": pruned,
    "quantized": quantized,
    "quotient_remainder": quotient_remainder,
    "robe": robe,
    "sharded": sharded,
    "tt_rec": tt_rec,
}


_FIRST_ORDER_PREFIX = "linear_"


def build_tables(
    feature_names: Sequence[str], num_embeddings: Sequence[int], embedding_dim: int, *, first_order: bool = False
) -> list[EmbeddingBagConfig]:
    """One sum-pooled table per feature, named t_<feature>.

    first_order: after all of them one more per feature, over the same ids, with a single column, named
    linear_<feature>. A method stores both kinds, and the budget of a compression is over both.
    """
    kinds = [("t_", embedding_dim), *([(_FIRST_ORDER_PREFIX, 1)] if first_order else [])]
    return [
        EmbeddingBagConfig(name=f"{prefix}{name}", embedding_dim=dim, num_embeddings=rows, feature_names=[name])
        for prefix, dim in kinds
        for name, rows in zip(feature_names, num_embeddings, strict=True)
    ]


def is_first_order(table: EmbeddingBagConfig) -> bool:
    """Whether `build_tables` made it for a first-order term."""
    return table.name.startswith(_FIRST_ORDER_PREFIX)


def build_embedding(
    section: EmbeddingSection,
    tables: list[EmbeddingBagConfig],
    *,
    seed: int,
    device: torch.device,
    id_counts: Callable[[], Sequence[np.ndarray]] | None = None,
) -> EmbeddingBagCollectionInterface:
    """id_counts: see `EmbeddingRequest`; called where the method's options say `needs_id_counts`.

    Raises ValueError where the method cannot hold these tables at the asked compression, or keep some of them whole.
    """
    method = METHODS[section.method]
    asks_for_counts = getattr(section.options, "needs_id_counts", False)
    request = EmbeddingRequest(
        compression=section.compression,
        init_scale=section.init_scale,
        seed=seed,
        device=device,
        id_counts=id_counts() if id_counts is not None and asks_for_counts else None,
    )
    if not section.whole_tables_below:
        return method.build(tables, section.options, request)
    if method.placement != "replicate":
        raise ValueError(
            f"embedding.whole_tables_below = {section.whole_tables_below}: {section.method} shards its tables, "
            "which are all whole: leave it at 0"
        )
    return partly_full.build(
        section.method,
        lambda rest, rest_request: method.build(rest, section.options, rest_request),
        tables,
        request,
        section.whole_tables_below,
    )
