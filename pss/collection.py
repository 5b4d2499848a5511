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

import inspect
import textwrap
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType, pooling_type_to_str
from torchrec.modules.embedding_modules import (
    EmbeddingBagCollectionInterface,
    get_embedding_names_by_table,
    reorder_inverse_indices,
)
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor
from torchrec.sparse.tensor_dict import maybe_td_to_kjt

from pss.method import CompressionRefused, EmbeddingRequest, MethodOptions, parse_options

_EXTRA_STATE = "_extra_state"  # torch.nn.Module's own name for the key of `get_extra_state`


class FeatureGroup(NamedTuple):
    """Features that are looked up together: those of all tables of one embedding_dim and pooling, in table order."""

    feature_names: list[str]
    tables: list[int]  # index of the table that serves each feature
    embedding_dim: int
    is_mean: bool


class EmbeddingHooks:
    """What training asks of an embedding module, with the answers of one that needs nothing special.

    In capitals what contract tests must know of a module that differs from full tables.
    """

    SENDS_SPARSE_GRADIENT: ClassVar[bool] = False
    """With default options a small batch makes a sparse gradient: gradient clipping, and all optimizers but plain SGD
    and Adagrad, refuse it."""
    IS_SMALLER_AFTER_TRAINING: ClassVar[bool] = False
    """`stored_bytes` is of what is kept after training; the state dict, of what trains, is larger."""

    @property
    def lookup_kernel(self) -> str:
        """Return what looks up on this device, as the placement table names it."""
        return "dense"

    @property
    def fused_update(self) -> bool:
        """Return whether the module does its optimizer's step itself: then call `fuse_update` with that optimizer."""
        return False

    def fuse_update(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the backward pass do the optimizer's step. Raises ValueError where it cannot."""
        raise ValueError(f"{type(self).__name__} has no update in its backward pass")

    def choose_gradient(self, local_batch_size: int) -> Literal["dense", "sparse"]:
        """Return the form that gradients will have from now on, for batches of that many rows, one id a bag.

        Under DDP all ranks must send the same form, so it is decided once and not by each batch.
        """
        return "dense"

    def end_step(self, step: int, total_steps: int) -> None:
        """Change what changes while it trains: called after every optimizer step, which count from 1. Collective.

        Ranks must come out equal: decide on values they share.
        """

    def stored_bytes(self) -> int:
        """Return the bytes of all that must be kept to look up: parameters, persistent buffers, `stored_numbers`. A
        method that is smaller after training overrides this."""
        assert isinstance(self, nn.Module)
        return count_state_bytes(self) + 8 * self.stored_numbers()

    def stored_numbers(self) -> int:
        """Return how many numbers a lookup needs besides tensors. Constants of a hash, which follow from the seed, are
        not counted."""
        return 0

    def fit(self, tables: Sequence[Tensor], id_counts: Callable[[], Sequence[np.ndarray]] | None = None) -> float:
        """Make the module stand for these tables, trained elsewhere, as well as it can.

        tables: (num_embeddings, embedding_dim) for every config. id_counts: called for how often each id occurs,
        (num_embeddings,) for every table, by a method that weighs rows by it. Returns the relative error
        √(Σ w·(E − fit)² / Σ w·E²), w the weights where there are any. Raises ValueError where it cannot be fitted.
        """
        raise ValueError(f"{type(self).__name__} cannot be fitted to trained tables")


def count_state_bytes(module: nn.Module) -> int:
    """Return the bytes of a module's parameters and persistent buffers."""
    tensors = (value for value in module.state_dict().values() if isinstance(value, Tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class _ConstructorSignature:
    """The signature of a collection's constructor, its options spelled out: for `help` and other readers of it."""

    def __get__(self, instance: Any, owner: "type[ComputedEmbeddingBagCollection]") -> inspect.Signature:
        if instance is not None:  # of an instance it would be taken for that of its call
            raise AttributeError("__signature__")
        *named, _ = list(inspect.signature(owner.__init__).parameters.values())[1:]
        named = [p.replace(default=owner.DEFAULT_COMPRESSION) if p.name == "compression" else p for p in named]
        options = [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=option.get_default(), annotation=option.annotation
            )
            for name, option in owner.OPTIONS.model_fields.items()
        ]
        return inspect.Signature([*named, *options])


class ComputedEmbeddingBagCollection(EmbeddingBagCollectionInterface, EmbeddingHooks):
    """Pooled embeddings of several tables whose rows are computed: TorchRec's EmbeddingBagCollection contract.

    Where TorchRec leaves a choice:

    - MEAN pooling of a weighted bag is Σ w·row / number of ids, as in FBGEMM's table-batched kernels.
    - Ids are not validated here: a hash has a row for every int64. Check them where they are made.
    - Rows are computed and returned in fp32 whatever `data_type` says, and `init_fn` is ignored: both describe a table
      of one's own.
    - `tables=[]` constructs (the models of TorchRec want to refuse it themselves) and raises ValueError in forward.

    A method sets OPTIONS, the model of its keyword options, and says in `_lay_out` how large it is, in `_allocate` what
    tensors it has, in `_rows` what an id reads.

    Args:
        tables: one config per table; an empty `feature_names` is set to `[name]`. Tables may differ in embedding_dim.
        is_weighted: multiply each row by the id's weight.
        device: of parameters and buffers; None is torch's default device.
        compression: asked bytes of the full tables / `stored_bytes`, at least 1. The one reached (`compression`) is
            no lower, except where the least that the method can store is more; None = the method's default.
        seed: of initial values and hashes. The start does not depend on the global random state, nor changes it.
        init_scale: at least 0; the tables start with standard deviation init_scale / √3.
        id_counts: how often each id occurs in training, (num_embeddings,) for every table, for options that need it.
        options: the method's own.

    Raises TypeError for an unknown option; ValueError for a duplicate table name, an embedding_dim below 1, a pooling
    other than SUM and MEAN, and naming the argument for values out of range.
    """

    OPTIONS: ClassVar[type[MethodOptions]] = MethodOptions
    DEFAULT_COMPRESSION: ClassVar[float] = 1000.0
    STATE_VERSION: ClassVar[int] = 1
    __signature__ = _ConstructorSignature()
    __jit_unused_properties__: ClassVar[list[str]] = ["compression", "device", "lookup_kernel", "fused_update"]
    __jit_ignored_attributes__: ClassVar[list[str]] = ["options"]
    options: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Append what the options mean to the docstring, for `help`."""
        super().__init_subclass__(**kwargs)
        if "OPTIONS" in vars(cls):
            fields = cls.OPTIONS.model_fields.items()
            texts = [textwrap.fill(f"{name}: {field.description}", 110) for name, field in fields if field.description]
            cls.__doc__ = f"{inspect.cleandoc(cls.__doc__ or '')}\n\nOptions:\n" + textwrap.indent(
                "\n".join(texts), "    "
            )

    def __init__(
        self,
        tables: list[EmbeddingBagConfig],
        is_weighted: bool = False,
        device: torch.device | None = None,
        *,
        compression: float | None = None,
        seed: int = 0,
        init_scale: float = 0.01,
        id_counts: Sequence[np.ndarray] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        _check_tables(tables)
        if not init_scale >= 0:
            raise ValueError(f"init_scale must be at least 0, not {init_scale}")
        self.options = self._parse_options(options)
        self.seed, self.init_scale = seed, init_scale
        for config in tables:
            config.feature_names = config.feature_names or [config.name]
        self._embedding_bag_configs = tables
        self._is_weighted = is_weighted
        self._full_parameters = sum(config.num_embeddings * config.embedding_dim for config in tables)
        names_by_table = get_embedding_names_by_table(tables)
        self._embedding_names = [name for names in names_by_table for name in names]
        self._embedding_dims = [config.embedding_dim for config in tables for _ in config.feature_names]
        self._groups, self._columns = _group_features(tables)
        self._lay_out(self.DEFAULT_COMPRESSION if compression is None else compression, id_counts)
        self._allocate(device)
        self.reset_parameters()

    @classmethod
    def build(
        cls, method: str, tables: list[EmbeddingBagConfig], options: MethodOptions, request: EmbeddingRequest
    ) -> Self:
        """Return the module that is asked for. Memory is taken only once it is known to be within the budget.

        method: its name, for the error. Raises CompressionRefused where the least that the method can store on these
        tables is more than was asked.
        """
        module = cls(
            tables,
            request.is_weighted,
            torch.device("meta"),
            compression=request.compression,
            seed=request.seed,
            init_scale=request.init_scale,
            id_counts=request.id_counts,
            **dict(options),
        )
        if module.compression < request.compression:
            raise CompressionRefused(method, request.compression, module.compression)
        module._allocate(request.device)
        module.reset_parameters()
        return module

    @classmethod
    def _parse_options(cls, values: Mapping[str, Any]) -> MethodOptions:
        """Return `self.options`, from the constructor's keywords."""
        return parse_options(cls.OPTIONS, values)

    @abstractmethod
    def _lay_out(self, compression: float, id_counts: Sequence[np.ndarray] | None) -> None:
        """Find sizes and places from the tables and `self.options`, without a tensor."""

    @abstractmethod
    def _allocate(self, device: torch.device | None) -> None:
        """Register parameters and buffers on that device, uninitialised. Called again to move off the meta device."""

    @abstractmethod
    def _rows(self, group: int, ids: Tensor, feature: Tensor) -> Tensor:
        """Return the method's lookup: the row of every id, not yet weighted or pooled.

        ids (...) int64, feature int64 broadcastable to ids: position of the id's feature in `self._groups[group]`.
        Returns (..., embedding_dim) floating. Must be TorchScript and traceable by torch.fx (wrap what is not).
        """

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw the parameters anew; nothing on the meta device. DistributedModelParallel calls this for a module that
        directly owns a parameter on the meta device, once it is materialised."""

    @abstractmethod
    def _identity(self) -> dict[str, int | str | bool]:
        """Return what besides the tables decides which parameters an id reads; goes into the state dict."""

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
        """Return the pooled rows of one group, (B, features of the group · embedding_dim) fp32.

        A kernel that fuses lookup and pooling takes the place of this method.
        """
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
        """Return the tables' configs, the list given at construction."""
        return self._embedding_bag_configs

    def check_cell(self, table: int, row: int, col: int) -> EmbeddingBagConfig:
        """Return the config of the table.

        Raises IndexError where (row, col) is outside it: for oracles, whose lookup would return some other row's
        numbers there.
        """
        config = self._embedding_bag_configs[table]
        rows, cols = config.num_embeddings, config.embedding_dim
        if not (0 <= row < rows and 0 <= col < cols):
            raise IndexError(f"({row}, {col}) is outside {config.name}: {rows} x {cols}")
        return config

    def embedding_configs(self) -> list[EmbeddingBagConfig]:
        """Return the same under the name by which TorchRec's managed collision asks a module other than its own."""
        return self._embedding_bag_configs

    @property
    def compression(self) -> float:
        """Return the bytes of the full tables in fp32 / `stored_bytes`."""
        return 4 * self._full_parameters / self.stored_bytes()

    def parameter_budget(self, compression: float) -> int:
        """Return the most parameters that give at least that compression. Raises ValueError for one below 1 or not
        finite."""
        if not 1 <= compression < float("inf"):
            raise ValueError(f"compression must be at least 1 and finite, not {compression}")
        return int(self._full_parameters // Fraction(compression))

    def is_weighted(self) -> bool:
        """Return whether ids come with weights."""
        return self._is_weighted

    @property
    def device(self) -> torch.device:
        """Return where the parameters are."""
        return next(self.parameters()).device

    def get_extra_state(self) -> dict[str, Any]:
        """Return what a state dict must carry besides parameters for them to mean the same embeddings."""
        tables = [f"{t.name}: {t.num_embeddings} x {t.embedding_dim}" for t in self._embedding_bag_configs]
        return {"version": self.STATE_VERSION, "method": type(self).__name__, **self._identity(), "tables": tables}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Check a state dict: raise ValueError naming every difference between the saved hash and tables and these."""
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
    """Group features by embedding_dim and pooling; and every run of output columns as (its group, first column,
    width)."""
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
    """Join the groups' pooled outputs, each (B, columns of the group), as one (B, Σ embedding_dim) in table order."""
    if len(columns) == 1:
        return pooled[0]
    return torch.cat([pooled[group].narrow(1, start, width) for group, start, width in columns], dim=1)


@torch.fx.wrap
def select_bags(
    features: KeyedJaggedTensor, names: list[str], is_weighted: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[int]]:
    """Return the bags of the named features, one feature after the other.

    Returns ids (V,) int64; lengths (bags,) int64; weights (V,), empty if not weighted; the inverse indices of a
    variable batch (features, B) int64, empty if there are none; the number of bags of each feature.
    """
    inverse = reorder_inverse_indices(features.inverse_indices_or_none(), names)
    weights = torch.empty(0)
    if features.keys() == names:
        lengths = features.lengths()
        if is_weighted:
            weights = features.weights()
        bags_per_feature = [lengths.numel() // len(names)] * len(names)
        if features.variable_stride_per_key():
            bags_per_feature = features.stride_per_key()
        return features.values().long(), lengths.long(), weights, inverse, bags_per_feature
    by_name = features.to_dict()
    ids_of: list[Tensor] = []
    lengths_of: list[Tensor] = []
    weights_of: list[Tensor] = []
    for name in names:
        if name not in by_name:
            raise KeyError(f"feature {name} is not in the batch, which has {features.keys()}")
        ids_of.append(by_name[name].values())
        lengths_of.append(by_name[name].lengths())
        if is_weighted:
            weights_of.append(by_name[name].weights())
    if is_weighted:
        weights = torch.cat(weights_of)
    bags_per_feature = [part.numel() for part in lengths_of]
    return torch.cat(ids_of).long(), torch.cat(lengths_of).long(), weights, inverse, bags_per_feature


def has_one_id_per_bag(ids: Tensor, lengths: Tensor, inverse: Tensor, bags_per_feature: list[int]) -> bool:
    """Return whether every bag holds exactly one id and every feature has as many bags. Asked of plain CPU tensors
    only: elsewhere the answer would force a synchronisation or be baked into a graph, so it is False."""
    if torch.jit.is_scripting():  # pyright: ignore[reportPrivateImportUsage]
        return False
    else:  # not compiled by TorchScript
        if torch.compiler.is_compiling() or type(lengths) is not Tensor:
            return False
        if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
            return False
        if lengths.device.type != "cpu" or ids.numel() != lengths.numel() or inverse.numel() > 0:
            return False
        return have_equal_batches(bags_per_feature) and bool((lengths == 1).all())


@torch.fx.wrap
def locate_bags(lengths: Tensor, bags_per_feature: list[int], ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return for every id (V,) the index of its bag and the position of its feature, both (V,) int64."""
    bag = torch.repeat_interleave(lengths, output_size=ids.numel())
    if have_equal_batches(bags_per_feature):
        return bag, torch.div(bag, max(bags_per_feature[0], 1), rounding_mode="floor")
    bags = torch.tensor(bags_per_feature, dtype=torch.int64, device=lengths.device)
    return bag, torch.repeat_interleave(bags, output_size=lengths.numel())[bag]


def have_equal_batches(bags_per_feature: list[int]) -> bool:
    """Return whether all features have the same number of bags."""
    return bags_per_feature == [bags_per_feature[0]] * len(bags_per_feature)


@torch.fx.wrap
def order_by_batch(pooled: Tensor, bags_per_feature: list[int], inverse: Tensor) -> Tensor:
    """Reorder bags of one feature after the other (bags, D) -> (B, features · D), expanding a variable batch."""
    features, dim = len(bags_per_feature), pooled.size(1)
    if inverse.numel() > 0:
        starts = torch.tensor(bags_per_feature, dtype=torch.int64, device=inverse.device).cumsum(0)
        starts = starts - torch.tensor(bags_per_feature, dtype=torch.int64, device=inverse.device)
        bag = (inverse + starts.unsqueeze(1)).t().reshape(-1)
        return pooled.index_select(0, bag).view(inverse.size(1), features * dim)
    if not have_equal_batches(bags_per_feature):
        raise ValueError(f"batch sizes {bags_per_feature} differ between features: inverse_indices are needed")
    batch = bags_per_feature[0]
    return pooled.view(features, batch, dim).transpose(0, 1).reshape(batch, features * dim)
