"""Frequency-aware ROBE: the most frequent ids have rows of their own, the tail shares the rest of the same budget.

    E_t[row] = P[place of (t, row)]   for the K ids seen most often in training, over all tables together
    E_t[row] = ROBE-Z of pss.methods.robe     for all others, in what K rows leave of M

Not in the papers, which let sharing find the important ids by itself (PSS paper, section 2): CAFE (pss.methods.cafe)
looks for them while it trains, this method is told by the counts of the training rows. K follows from `private_share`.
"""

from pydantic import Field
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from pss.method import EmbeddingMethod, EmbeddingRequest
from pss.methods.robe import Options as RobeOptions
from pss.methods.robe import RobeEmbeddingBagCollection, cell


class Options(RobeOptions):
    """Options of ROBE, and the share of private rows."""

    private_share: float = Field(default=0.5, gt=0, lt=1)
    """Share of M for the rows of the ids seen most often."""

    @property
    def needs_id_counts(self) -> bool:
        """Return True: they say whose rows are private."""
        return True


def build(tables: list[EmbeddingBagConfig], options: Options, request: EmbeddingRequest) -> RobeEmbeddingBagCollection:
    """Return the module that is asked for.

    Raises CompressionRefused where a block is more than the budget, ValueError for counts that are unknown or do not
    fall.
    """
    return RobeEmbeddingBagCollection.build("frequency_robe", tables, options, request)


METHOD = EmbeddingMethod(Options=Options, build=build, cell=cell)  # private rows are a part of ROBE's module: pss.tiers
