"""Frequency-aware ROBE: the most frequent ids have rows of their own, the tail shares the rest of the same budget.

    E_t[row] = P[place of (t, row)]   for the K ids seen most often in training, over all tables together
    E_t[row] = ROBE-Z of pss.methods.robe     for all others, in what K rows leave of M

Not in the papers, which let sharing find the important ids by itself (PSS paper, section 2): CAFE (pss.methods.cafe)
looks for them while it trains, this method is told by the counts of the training rows. K follows from `private_share`.
"""

from typing import Literal

from pydantic import Field
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from configs.request import EmbeddingRequest
from pss.methods.robe import Options as RobeOptions
from pss.methods.robe import RobeEmbeddingBagCollection
from pss.methods.robe import cell as cell  # private rows are a part of the module: see pss.tiers

placement: Literal["replicate", "shard"] = "replicate"


class Options(RobeOptions):
    """Keys of [embedding.frequency_robe]: those of [embedding.robe], and the share of private rows."""

    private_share: float = Field(default=0.5, gt=0, lt=1)
    """Share of M for the rows of the ids seen most often."""

    @property
    def needs_id_counts(self) -> bool:
        return True


def build(tables: list[EmbeddingBagConfig], options: Options, request: EmbeddingRequest) -> RobeEmbeddingBagCollection:
    """Raises ValueError where a block is more than the budget, or the counts are unknown or do not fall."""
    module = RobeEmbeddingBagCollection(
        tables,
        **request.arguments(),
        **options.model_dump(),
        id_counts=request.id_counts,
    )
    request.check_reached("frequency_robe", module.compression)
    return module
