"""Small tables stored whole beside a method that compresses the others: `embedding.whole_tables_below`.

A table of few rows has little to give: compressed, it costs quality and frees next to nothing. The promise of
`compression` is over all tables, so the whole ones take their parameters out of the method's budget:

    budget of the others = ⌊full parameters of all tables / compression⌋ − parameters of the whole tables
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction

import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import (
    EmbeddingBagCollection,
    EmbeddingBagCollectionInterface,
    get_embedding_names_by_table,
)
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from baselines.full import fill_initial_rows
from pss.collection import EmbeddingHooks
from pss.method import CompressionRefused, EmbeddingRequest
from recsys.embedding.hooks import hooks_of
from recsys.embedding.sizes import count_full_parameters, stored_bytes

BuildMethod = Callable[[list[EmbeddingBagConfig], EmbeddingRequest], EmbeddingBagCollectionInterface]


class PartlyFullEmbeddingBagCollection(EmbeddingBagCollectionInterface, EmbeddingHooks):
    """A drop-in for TorchRec's `EmbeddingBagCollection` over tables of which `whole` holds some and `rest` the others.

    Both take the same KeyedJaggedTensor and ignore the features of the other. State dict: theirs, under their names.

    tables: all of them, in the order of the output. whole: of the tables that are stored whole, in that order.
    rest: of all others, in that order; it stores its parameters once and on its own terms.
    """

    def __init__(
        self,
        tables: list[EmbeddingBagConfig],
        whole: EmbeddingBagCollection,
        rest: EmbeddingBagCollectionInterface,
    ) -> None:
        super().__init__()
        self.whole, self.rest = whole, rest
        self._tables = tables
        self._embedding_names = [name for names in get_embedding_names_by_table(tables) for name in names]
        self._embedding_dims = [table.embedding_dim for table in tables for _ in table.feature_names]
        stored_whole = {table.name for table in whole.embedding_bag_configs()}
        self._is_whole = [table.name in stored_whole for table in tables for _ in table.feature_names]

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Look up B bags of every feature -> KeyedTensor (B, Σ embedding_dim) float32, keys in the order of all
        tables."""
        whole, rest = _split_columns(self.whole(features)), _split_columns(self.rest(features))
        columns = [next(whole) if is_whole else next(rest) for is_whole in self._is_whole]
        return KeyedTensor(self._embedding_names, self._embedding_dims, torch.cat(columns, dim=1))

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """Return the configs of all tables."""
        return self._tables

    def is_weighted(self) -> bool:
        """Return whether ids come with weights."""
        return self.whole.is_weighted()

    @property
    def device(self) -> torch.device:
        """Return where the parameters are."""
        return self.whole.device

    @property
    def compression(self) -> float:
        """Return the bytes of the full tables in fp32 / `stored_bytes`."""
        return 4 * count_full_parameters(self._tables) / self.stored_bytes()

    @property
    def lookup_kernel(self) -> str:
        """Return what looks up in the tables that are not whole."""
        return hooks_of(self.rest).lookup_kernel

    def stored_bytes(self) -> int:
        """Return the bytes of the whole tables and of what the method keeps for the others."""
        return stored_bytes(self.whole) + stored_bytes(self.rest)


def build(
    name: str,
    build_method: BuildMethod,
    tables: list[EmbeddingBagConfig],
    request: EmbeddingRequest,
    whole_tables_below: int,
) -> EmbeddingBagCollectionInterface:
    """Store tables of fewer than `whole_tables_below` rows whole, the others by the method `name`.

    The whole tables start from the rows that they have among full tables (`baselines.full`). The method sees the other
    tables only and numbers them from 0. Where no table is small, what it builds is returned as it is.

    Raises CompressionRefused where whole tables, or with them the method, need more than `request.compression` leaves,
    and what the method raises.
    """
    small = [i for i, table in enumerate(tables) if table.num_embeddings < whole_tables_below]
    if not small:
        return build_method(tables, request)
    others = [i for i in range(len(tables)) if i not in small]
    asked = f"{name} with tables below {whole_tables_below} rows whole"
    if not others:
        if request.compression > 1:
            raise CompressionRefused(f"{asked}, which all are,", request.compression, 1.0)
        return _build_whole(tables, small, request)
    rest = _build_rest(asked, build_method, tables, others, request)
    return PartlyFullEmbeddingBagCollection(tables, _build_whole(tables, small, request), rest)


def _build_rest(
    asked: str,
    build_method: BuildMethod,
    tables: list[EmbeddingBagConfig],
    others: list[int],
    request: EmbeddingRequest,
) -> EmbeddingBagCollectionInterface:
    """Build the method on the tables at `others` with the parameters that the whole ones leave."""
    rest, all_parameters = [tables[i] for i in others], count_full_parameters(tables)
    rest_parameters = count_full_parameters(rest)
    whole_parameters = all_parameters - rest_parameters
    left = int(all_parameters // Fraction(request.compression)) - whole_parameters

    def build_within(budget: int) -> EmbeddingBagCollectionInterface:
        counts = request.id_counts and [request.id_counts[i] for i in others]
        compression = _compression_to(budget, rest_parameters)
        return build_method(rest, replace(request, compression=compression, id_counts=counts))

    try:
        built = build_within(max(left, 1))
        if left >= 1:
            return built
        least = stored_bytes(built) / 4
    except CompressionRefused as refused:
        least = rest_parameters / refused.nearest
    raise CompressionRefused(asked, request.compression, all_parameters / (whole_parameters + least))


def _compression_to(budget: int, parameters: int) -> float:
    """Return the compression of which ⌊parameters / compression⌋ is the budget: their ratio, rounded down to a
    float."""
    compression = parameters / budget
    return compression if Fraction(compression) <= Fraction(parameters, budget) else math.nextafter(compression, 0)


def _build_whole(
    tables: list[EmbeddingBagConfig], places: list[int], request: EmbeddingRequest
) -> EmbeddingBagCollection:
    """Build full tables of those at `places`, starting as they do among all `tables`."""
    module = EmbeddingBagCollection([tables[i] for i in places], is_weighted=request.is_weighted, device=request.device)
    with torch.no_grad():
        for place in places:
            weight = module.embedding_bags[tables[place].name].weight
            assert isinstance(weight, torch.Tensor)
            fill_initial_rows(weight, table=place, seed=request.seed, init_scale=request.init_scale)
    return module


def _split_columns(pooled: KeyedTensor) -> Iterator[torch.Tensor]:
    """Yield (B, embedding_dim) of every key, one after the other."""
    return iter(pooled.values().split(pooled.length_per_key(), dim=1))
