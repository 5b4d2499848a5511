"""The embedding methods: THE registry, and the embedding that a config asks for.

Adding a method: its file in `pss/methods/` or `baselines/` (see `pss.method`), and a line here.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollectionInterface

from baselines import full, mixed_dimension, pruned, quantized, sharded, tt_rec
from configs.schema import EmbeddingSection
from pss.method import EmbeddingMethod, EmbeddingRequest, MethodOptions
from pss.methods import cafe, cce, frequency_robe, hashed_net, hashing_trick, jlt, quotient_remainder, robe
from recsys.embedding import partly_full

METHODS: dict[str, EmbeddingMethod] = {
    "cafe": cafe.METHOD,
    "cce": cce.METHOD,
    "frequency_robe": frequency_robe.METHOD,
    "full": full.METHOD,
    "hashed_net": hashed_net.METHOD,
    "hashing_trick": hashing_trick.METHOD,
    "jlt": jlt.METHOD,
    "mixed_dimension": mixed_dimension.METHOD,
    "pruned": pruned.METHOD,
    "quantized": quantized.METHOD,
    "quotient_remainder": quotient_remainder.METHOD,
    "robe": robe.METHOD,
    "sharded": sharded.METHOD,
    "tt_rec": tt_rec.METHOD,
}


def build_embedding(
    section: EmbeddingSection,
    tables: list[EmbeddingBagConfig],
    *,
    seed: int,
    device: torch.device,
    id_counts: Callable[[], Sequence[np.ndarray]] | None = None,
) -> EmbeddingBagCollectionInterface:
    """Return what the section asks for: a module over these tables on that device.

    id_counts: see `EmbeddingRequest`; called where the method's options say `needs_id_counts`. Raises ValueError where
    the method cannot hold these tables at the asked compression, or keep some of them whole.
    """
    method = METHODS[section.method]
    options: Any = section.options
    assert isinstance(options, MethodOptions)
    request = EmbeddingRequest(
        compression=section.compression,
        init_scale=section.init_scale,
        seed=seed,
        device=device,
        id_counts=id_counts() if id_counts is not None and options.needs_id_counts else None,
    )
    if not section.whole_tables_below:
        return method.build(tables, options, request)
    if method.placement != "replicate":
        raise ValueError(
            f"embedding.whole_tables_below = {section.whole_tables_below}: {section.method} shards its tables, "
            "which are all whole: leave it at 0"
        )
    return partly_full.build(
        section.method,
        lambda rest, rest_request: method.build(rest, options, rest_request),
        tables,
        request,
        section.whole_tables_below,
    )
