"""The tables that a model looks up: one for each feature, and what is stored of them for first-order terms."""

from collections.abc import Sequence

from torchrec.modules.embedding_configs import EmbeddingBagConfig

_FIRST_ORDER_PREFIX = "linear_"


def build_tables(
    feature_names: Sequence[str], num_embeddings: Sequence[int], embedding_dim: int, *, first_order: bool = False
) -> list[EmbeddingBagConfig]:
    """Return one sum-pooled table per feature, named t_<feature>.

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
    """Return whether `build_tables` made it for a first-order term."""
    return table.name.startswith(_FIRST_ORDER_PREFIX)
