"""The sparse features as models take them: of each a vector, and where the model has first-order terms a number.

    e_f = pooled rows of feature f's table (B, D);   u_f = pooled rows of its first-order table (B, 1)

Both kinds of table are in one collection (`recsys.embedding.embeddings.build_tables`), so one method stores both, the
budget of a compression counts both, and both have the embeddings' optimizer: u is no part of the dense parameters. The
weights of numbers in a first-order term are: they are few.
"""

import torch
from torch import nn
from torchrec.modules.embedding_modules import EmbeddingBagCollectionInterface, get_embedding_names_by_table
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys.embedding.embeddings import is_first_order


class SparseFeatures(nn.Module):
    """KeyedJaggedTensor of B bags of F features -> e (B, F, D), u (B, F) float32; u is (B, 0) without first_order.

    Columns are found by their names: a sharded collection returns its tables in an order of its own. Of a first-order
    table that is stored wider (`baselines.sharded`) the first column counts.
    Raises ValueError where the collection has first-order tables and the model none, or the other way round.
    """

    def __init__(self, embedding: EmbeddingBagCollectionInterface, *, first_order: bool) -> None:
        super().__init__()
        self.embedding_bag_collection = embedding
        tables = embedding.embedding_bag_configs()
        self._vectors: list[str] = []
        self._numbers: list[str] = []
        for table, names in zip(tables, get_embedding_names_by_table(tables), strict=True):
            (self._numbers if is_first_order(table) else self._vectors).extend(names)
        self.num_features = len(self._vectors)
        if len(self._numbers) != (self.num_features if first_order else 0):
            raise ValueError(
                f"{self.num_features} features and {len(self._numbers)} first-order tables, but the model reads "
                f"{self.num_features if first_order else 'none'}: build_tables(..., first_order={first_order})"
            )

    def forward(self, features: KeyedJaggedTensor) -> tuple[torch.Tensor, torch.Tensor]:
        columns = self.embedding_bag_collection(features).to_dict()
        vectors = torch.stack([columns[name] for name in self._vectors], dim=1)
        if not self._numbers:
            return vectors, vectors.new_empty(len(vectors), 0)
        return vectors, torch.cat([columns[name][:, :1] for name in self._numbers], dim=1)


class FirstOrder(nn.Module):
    """⟨w, x⟩ over all features: Σ_f u_f + Σ_s w_s x_s, x (B, S) the dense features; no bias: the deep part has one."""

    def __init__(self, num_dense: int, device: torch.device) -> None:
        super().__init__()
        self.dense = nn.Linear(num_dense, 1, bias=False, device=device) if num_dense else None

    def forward(self, dense_features: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """(B, S), (B, F) -> (B, 1)."""
        total = numbers.sum(1, keepdim=True)
        return total if self.dense is None else total + self.dense(dense_features)
