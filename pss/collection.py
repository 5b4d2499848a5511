"""The part of a compressed embedding that does not depend on the method: KeyedJaggedTensor in, KeyedTensor out.

A method subclasses `ComputedEmbeddingBagCollection`, owns its parameters and says in `_rows` how the row of an id is
computed; selecting features, pooling, variable batches and state-dict checks are here. The result can stand wherever
TorchRec takes an `EmbeddingBagCollection`. Methods that share one array of parameters have `pss.shared_array` between.

It implements TorchRec's `EmbeddingBagCollectionInterface` and is deliberately no subclass of `EmbeddingBagCollection`.
What TorchRec does after `isinstance(module, EmbeddingBagCollection)` is build real tables out of the configs:
`fuse_embedding_optimizer` would replace a shared array by the full tables without a word, while it leaves another
module alone, to be trained by the dense optimizer like any other. Managed collision asks too, and asks modules that are
not `EmbeddingBagCollection` for `embedding_configs`, given below. `EmbeddingTowerCollection` alone refuses this module
(it hands all others weighted features as well). The planner and DistributedModelParallel go by the exact class and
replicate it with DDP either way.
"""

from abc import abstractmethod
from fractions import Fraction
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType, pooling_type_to_str
from torchrec.modules.embedding_modules import EmbeddingBagCollectionInterface, get_embedding_names_by_table
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor
from torchrec.sparse.tensor_dict import maybe_td_to_kjt

from pss.bags import has_one_id_per_bag, locate_bags, order_by_batch, select_bags

torch.fx.wrap("locate_bags")
torch.fx.wrap("order_by_batch")
torch.fx.wrap("select_bags")

_EXTRA_STATE = "_extra_state"  # torch.nn.Module's own name for the key of `get_extra_state`


class FeatureGroup(NamedTuple):
    """Features that are looked up together: those of all tables of one embedding_dim and pooling, in table order."""

    feature_names: list[str]
    tables: list[int]  # index of the table that serves each feature
    embedding_dim: int
    is_mean: bool


class ComputedEmbeddingBagCollection(EmbeddingBagCollectionInterface):
    """Pooled embeddings of several tables whose rows are computed: TorchRec's EmbeddingBagCollection contract.

    Where TorchRec leaves a choice:

    - MEAN pooling of a weighted bag is Σ w·row / number of ids, as in FBGEMM's table-batched kernels.
    - Ids are not validated here: a hash has a row for every int64. Check them where they are made.
    - Rows are computed and returned in fp32 whatever `data_type` says, and `init_fn` is ignored: both describe a table
      of one's own.
    - `tables=[]` constructs (the models of TorchRec want to refuse it themselves) and raises ValueError in forward.

    Args:
        tables: one config per table; an empty `feature_names` is set to `[name]`.
        is_weighted: multiply each row by the id's weight.

    Raises ValueError for a duplicate table name, an embedding_dim below 1, or a pooling other than SUM and MEAN.
    """

    STATE_VERSION: ClassVar[int] = 1
    __jit_unused_properties__: ClassVar[list[str]] = ["compression", "device"]

    def __init__(self, tables: list[EmbeddingBagConfig], is_weighted: bool = False) -> None:
        super().__init__()
        _check_tables(tables)
        for config in tables:
            config.feature_names = config.feature_names or [config.name]
        self._embedding_bag_configs = tables
        self._is_weighted = is_weighted
        self._full_parameters = sum(config.num_embeddings * config.embedding_dim for config in tables)
        names_by_table = get_embedding_names_by_table(tables)
        self._embedding_names = [name for names in names_by_table for name in names]
        self._embedding_dims = [config.embedding_dim for config in tables for _ in config.feature_names]
        self._groups, self._columns = _group_features(tables)

    @abstractmethod
    def _rows(self, group: int, ids: Tensor, feature: Tensor) -> Tensor:
        """The method's lookup: the row of every id, not yet weighted or pooled.

        ids (...) int64, feature int64 broadcastable to ids: position of the id's feature in `self._groups[group]`.
        Returns (..., embedding_dim) floating. Must be TorchScript and traceable by torch.fx (wrap what is not).
        """

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw the parameters anew; nothing on the meta device. DistributedModelParallel calls this for a module that
        directly owns a parameter on the meta device, once it is materialised."""

    @abstractmethod
    def _options(self) -> dict[str, int | str | bool]:
        """What besides the tables decides which parameters an id reads; goes into the state dict."""

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Look up and pool.

        features: KeyedJaggedTensor (or TensorDict of jagged tensors) of B bags per feature, ids and lengths of int32
        or int64; other features than ours are ignored. Returns a KeyedTensor of fp32 (B, Σ embedding_dim), keys in
        table order, zeros for an empty bag. With variable batch sizes B is that of its `inverse_indices`.

        Raises KeyError for a missing feature, ValueError without tables or for batch sizes that differ between features
        without inverse indices.
        """
        if len(self._groups) == 0:
            raise ValueError("an embedding bag collection without tables has no output")
        features = maybe_td_to_kjt(features, None)
        pooled = [self._pooled(group, features) for group in range(len(self._groups))]
        return KeyedTensor(
            keys=self._embedding_names, length_per_key=self._embedding_dims, values=_join_columns(pooled, self._columns)
        )

    def _pooled(self, group: int, features: KeyedJaggedTensor) -> Tensor:
        """The pooled rows of one group, (B, features of the group · embedding_dim) fp32. A kernel that fuses lookup
        and pooling takes the place of this method."""
        return self._pooled_rows(group, features)

    def _pooled_rows(self, group: int, features: KeyedJaggedTensor) -> Tensor:
        names, _, dim, is_mean = self._groups[group]
        ids, lengths, weights, inverse, bags_per_feature = select_bags(features, names, self._is_weighted)
        if has_one_id_per_bag(
            ids, lengths, inverse, bags_per_feature
        ):  # nothing to pool: look up in the order of the output
            shape = (len(names), lengths.numel() // len(names))
            feature = torch.arange(len(names), device=ids.device)
            rows = self._rows(group, ids.reshape(shape).t().contiguous(), feature).float()
            if self._is_weighted:
                rows = rows * weights.to(rows.dtype).reshape(shape).t().unsqueeze(-1)
            return rows.reshape(shape[1], len(names) * dim)
        bag, feature = locate_bags(lengths, bags_per_feature, ids)
        rows = self._rows(group, ids, feature).float()
        if self._is_weighted:
            rows = rows * weights.to(rows.dtype).unsqueeze(-1)
        pooled = rows.new_zeros(lengths.numel(), dim).index_add(0, bag, rows)
        if is_mean:
            pooled = pooled / lengths.clamp(min=1).unsqueeze(-1)
        return order_by_batch(pooled, bags_per_feature, inverse)

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """The tables' configs, the list given at construction."""
        return self._embedding_bag_configs

    def check_cell(self, table: int, row: int, col: int) -> EmbeddingBagConfig:
        """The config of the table. Raises IndexError where (row, col) is outside it: for oracles, whose lookup would
        return some other row's numbers there."""
        config = self._embedding_bag_configs[table]
        rows, cols = config.num_embeddings, config.embedding_dim
        if not (0 <= row < rows and 0 <= col < cols):
            raise IndexError(f"({row}, {col}) is outside {config.name}: {rows} x {cols}")
        return config

    def embedding_configs(self) -> list[EmbeddingBagConfig]:
        """The same under the name by which TorchRec's managed collision asks a module other than its own."""
        return self._embedding_bag_configs

    @property
    def compression(self) -> float:
        """Bytes of the full tables in fp32 / `stored_bytes`."""
        return 4 * self._full_parameters / self.stored_bytes()

    def stored_bytes(self) -> int:
        """Bytes of all that must be kept to look up: parameters and persistent buffers. Constants of a hash, Python
        integers that follow from the seed, are not counted. A method that is smaller after training overrides this."""
        state = (*self.parameters(), *self._persistent_buffers())
        return sum(tensor.numel() * tensor.element_size() for tensor in state)

    def _persistent_buffers(self) -> list[Tensor]:
        names = self.state_dict().keys()
        return [buffer for name, buffer in self.named_buffers() if name in names]

    def parameter_budget(self, compression: float) -> int:
        """The most parameters that give at least that compression. Raises ValueError for one below 1 or not finite."""
        if not 1 <= compression < float("inf"):
            raise ValueError(f"compression must be at least 1 and finite, not {compression}")
        return int(self._full_parameters // Fraction(compression))

    def is_weighted(self) -> bool:
        """Whether ids come with weights."""
        return self._is_weighted

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def get_extra_state(self) -> dict[str, Any]:
        """What a state dict must carry besides parameters for them to mean the same embeddings."""
        tables = [f"{t.name}: {t.num_embeddings} x {t.embedding_dim}" for t in self._embedding_bag_configs]
        return {"version": self.STATE_VERSION, "method": type(self).__name__, **self._options(), "tables": tables}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Raises ValueError naming every difference between the saved hash and tables and these."""
        own = self.get_extra_state()
        differences = [
            f"{key} is {own.get(key)!r} here and {state.get(key)!r} in the state dict"
            for key in {**own, **state}
            if own.get(key) != state.get(key)
        ]
        if differences:
            raise ValueError("the state dict's parameters mean other embeddings: " + "; ".join(differences))

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Check before anything is copied. Raises, since DistributedModelParallel drops what is put in error_msgs."""
        saved = state_dict.get(prefix + _EXTRA_STATE)
        if saved is not None:
            self.set_extra_state(saved)
        elif any(prefix + name in state_dict for name, _ in self.named_parameters()):
            raise ValueError(f"{prefix + _EXTRA_STATE} is not in the state dict: nothing says what its parameters mean")
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def _check_tables(tables: list[EmbeddingBagConfig]) -> None:
    names = set()
    for config in tables:
        if config.name in names:
            raise ValueError(f"Duplicate table name {config.name}")
        if config.embedding_dim < 1:
            raise ValueError(f"embedding_dim of table {config.name!r} must be at least 1, not {config.embedding_dim}")
        pooling_type_to_str(config.pooling)  # ValueError for a pooling other than SUM and MEAN
        names.add(config.name)


def _group_features(tables: list[EmbeddingBagConfig]) -> tuple[list[FeatureGroup], list[tuple[int, int, int]]]:
    """Features by embedding_dim and pooling; and every run of output columns as (its group, first column, width)."""
    groups: dict[tuple[int, bool], FeatureGroup] = {}
    columns: list[tuple[int, int, int]] = []
    for table, config in enumerate(tables):
        key = (config.embedding_dim, config.pooling == PoolingType.MEAN)
        features = groups.setdefault(key, FeatureGroup([], [], *key))
        group, start = list(groups).index(key), len(features.tables) * config.embedding_dim
        width = len(config.feature_names) * config.embedding_dim
        if columns and columns[-1][0] == group:
            _, start, width_before = columns.pop()
            width += width_before
        columns.append((group, start, width))
        features.feature_names.extend(config.feature_names)
        features.tables.extend([table] * len(config.feature_names))
    return list(groups.values()), columns


@torch.fx.wrap
def _join_columns(pooled: list[Tensor], columns: list[tuple[int, int, int]]) -> Tensor:
    """The groups' pooled outputs, each (B, columns of the group), as one (B, Σ embedding_dim) in table order."""
    if len(columns) == 1:
        return pooled[0]
    return torch.cat([pooled[group].narrow(1, start, width) for group, start, width in columns], dim=1)
