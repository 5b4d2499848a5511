"""Tables for the tests of TT-Rec, and how to read them."""

from typing import Any

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from baselines.tt_rec import EMPTY, TTRecEmbeddingBagCollection
from tests.pss.jagged import random_kjt, table

KEYS = ["d", "a", "b", "c", "e"]


def mixed_tables() -> list[EmbeddingBagConfig]:
    """Dimensions 16, 7, 5 and 3, a shared feature, a table of two features, sum and mean; at rank 3 all
    are trains but u and z."""
    return [
        table("t", 211, 16, ["a", "b"]),
        table("u", 3, 16, ["e"]),
        table("v", 97, 7, ["c"], PoolingType.MEAN),
        table("w", 101, 5, ["d"]),
        table("x", 50, 16, ["a"]),
        table("y", 89, 3, ["c"]),
        table("z", 3, 5, ["e"]),
    ]


def mixed_kjt(max_length: int, is_weighted: bool = False, seed: int = 0) -> KeyedJaggedTensor:
    """Ids up to 50; of feature e, whose tables have three rows, up to 3."""
    features = random_kjt(KEYS, 3, max_id=50, max_length=max_length, weighted=is_weighted, seed=seed)
    ids = features.values().clone()
    start = features.offset_per_key()[KEYS.index("e")]
    ids[start:] %= 3
    return KeyedJaggedTensor(KEYS, ids, features.weights_or_none(), lengths=features.lengths())


def read(module: nn.Module, ids: list[int], key: str = "a") -> Tensor:
    """The rows of these ids, one bag each: (len(ids), D)."""
    lengths = torch.ones(len(ids), dtype=torch.int64)
    return module(KeyedJaggedTensor([key], torch.tensor(ids), lengths=lengths)).values()


def single(**options: Any) -> TTRecEmbeddingBagCollection:
    """One train of 100 rows, of which by default two can be cached."""
    return TTRecEmbeddingBagCollection([table("a", 100, 8)], **{"rank": 2, "cache_share": 0.02, **options})


def cached_ids(module: TTRecEmbeddingBagCollection) -> set[int]:
    return {key for key in module.cached_keys.tolist() if key != EMPTY}
