"""Johnson–Lindenstrauss sketch: a row is a signed combination of the k rows of one shared matrix M.

PSS paper (Desai and Shrivastava 2022, "The trade-offs of model size in large recommendation models", sections 2.1 and
2.2), with a random S of k × N, N the rows of all tables together, and M of k × d:

    forward(i) = (S e_i)ᵀ M        backward(i, Δ) = (S e_i) Δ

Column i of S has (expected) unit norm, so rows start with the spread of `memory`: std init_scale / √3. S is one of

    sparse      s non-zeros ±1/√s a column, one in each of s blocks of k/s rows, place and sign hashed (the block
                construction of Kane and Nelson 2014, "Sparser Johnson–Lindenstrauss transforms"); s = 1 is the signed
                hashing trick. Costs s·d an id.
    achlioptas  √(3/k) · {0 with 2/3, ±1 with 1/6 each} (Achlioptas 2003, "Database-friendly random projections"),
                made on the fly, one hashed word an entry. Costs k·d and k hashes an id: for a small k.
    gaussian    N(0, 1/k), dense. Also k·d an id, and 4·k·N bytes for S while it runs, more than the tables unless
                k < d: refused above `max_sketch_bytes`.

S follows from the seed and is not stored: what is stored, `stored_bytes` and the state dict, is M alone. For `gaussian`
the memory in use is larger than that by the S it holds, a buffer that is not part of the state.

Departures: the paper has one table; here all share one M, and S has an own column for every row of every table. M is
as wide as the widest table, and a narrower one reads its first columns, as if its rows ended in zeros that are not
read. The paper's Gaussian is not scaled; by 1/√k, SᵀS is the identity in expectation. Hashed entries are pairwise
independent, not O(log 1/δ)-wise (pss.hashing). k is a whole number of rows (of s rows for `sparse`): compression is
reached in steps of d (s·d) parameters.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.autograd.function import once_differentiable
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from pss.hashing import HashConstants, build_hash, locate, mix64
from pss.method import EmbeddingMethod, EmbeddingRequest
from pss.shared_array import SharedArrayEmbeddingBagCollection, SharedArrayOptions, read_chunks

_CPU_BLOCK_ENTRIES, _BLOCK_ENTRIES = 1 << 18, 1 << 24  # of S made at a time, unless that is less than 16 columns


class Options(SharedArrayOptions):
    """Options of the sketch."""

    sketch: Literal["sparse", "achlioptas", "gaussian"] = "sparse"
    """Distribution of S. sparse costs `nonzeros` row reads an id; achlioptas and gaussian cost as many as M has rows,
    always give a dense gradient, and gaussian keeps S in memory: for small tables only."""
    nonzeros: int = Field(default=4, ge=1)
    """s, the non-zeros in a column of a sparse S; 1 is the signed hashing trick. Ignored by the other sketches."""
    max_sketch_bytes: int = Field(default=1 << 28, ge=0)
    """Refuse a gaussian S of more bytes than this. Ignored by the other sketches."""

    @model_validator(mode="after")
    def _a_dense_sketch_has_a_dense_gradient(self) -> "Options":
        if self.sketch != "sparse" and self.gradient == "sparse":
            raise ValueError(
                f"gradient 'sparse' with sketch {self.sketch!r}: every id touches all of memory, use 'dense'"
            )
        return self


class JltArguments(Options):
    """Options of the class: those of the config, and the number of rows."""

    rows: int | None = Field(default=None, ge=1)
    """k; overrides compression. For a sparse sketch a multiple of nonzeros."""


class JltPlan(NamedTuple):
    """What the lookup of one group of features needs: see `jlt_rows`."""

    embedding_dim: int
    width: int  # columns of M
    rows: int  # k, rows of M
    sketch: str
    words: HashConstants  # sparse: of the place in each block of rows; achlioptas: of every entry
    signs: HashConstants  # sparse: of the sign in each block of rows
    starts: list[int]  # gaussian: the column of S of row 0 of each feature's table


class JltEmbeddingBagCollection(SharedArrayEmbeddingBagCollection):
    """A drop-in for TorchRec's `EmbeddingBagCollection` whose one parameter `memory` (k·d,) is M, row after row.

    k is the most that gives the compression asked for, and the least that the sketch can have (1, or `nonzeros`) where
    even that is too much. Ids are not validated, as in every hashing method; a `gaussian` S has no column for an id
    outside its table, which reads another table's or raises IndexError. Besides what the base class raises: ValueError
    for a gaussian S above max_sketch_bytes.
    """

    OPTIONS = JltArguments
    options: JltArguments
    columns: Tensor
    _plan: list[JltPlan]

    def _lay_out(self, compression: float, id_counts: Sequence[np.ndarray] | None) -> None:
        options = self.options
        self.nonzeros = options.nonzeros if options.sketch == "sparse" else 0
        step = max(1, self.nonzeros)
        self.width = max(self._embedding_dims, default=1)
        self.rows = max(1, self.parameter_budget(compression) // (self.width * step)) * step
        if options.rows is not None:
            self.rows = options.rows
        if self.rows % step > 0:
            raise ValueError(f"rows must be a positive multiple of {step}, not {options.rows}")
        self.memory_size = self.rows * self.width
        self.word_hash = build_hash("independent", self.seed)
        self.sign_hash = build_hash("independent", mix64(self.seed + 1))
        self._plan = [self._plan_group(group) for group in range(len(self._groups))]
        self._sketch_shape = self._shape_sketch()

    def _allocate(self, device: torch.device | None) -> None:
        super()._allocate(device)
        if self.options.sketch != "sparse":
            self.gradient = "dense"
        columns = torch.empty(self._sketch_shape, dtype=torch.float32, device=device)
        self.register_buffer("columns", columns, persistent=False)

    def _shape_sketch(self) -> tuple[int, int]:
        """Return (N, k) of a gaussian S, which is kept transposed; nothing of the others."""
        max_sketch_bytes = self.options.max_sketch_bytes
        if self.options.sketch != "gaussian":
            return 0, 0
        total = self._first_column(len(self._embedding_bag_configs))
        if (needed := 4 * self.rows * total) > max_sketch_bytes:
            raise ValueError(
                f"sketch 'gaussian' would need {needed:,} bytes for its {self.rows:,} x {total:,} numbers, more than "
                f"max_sketch_bytes = {max_sketch_bytes:,}: 'sparse' and 'achlioptas' need none"
            )
        return total, self.rows

    def _first_column(self, table: int) -> int:
        return sum(config.num_embeddings for config in self._embedding_bag_configs[:table])

    def _plan_group(self, group: int) -> JltPlan:
        tables, dim = self._groups[group].tables, self._groups[group].embedding_dim
        words = self.rows if self.options.sketch == "achlioptas" else self.nonzeros
        return JltPlan(
            embedding_dim=dim,
            width=self.width,
            rows=self.rows,
            sketch=self.options.sketch,
            words=self.word_hash.constants(tables, words),
            signs=self.sign_hash.constants(tables, self.nonzeros),
            starts=[self._first_column(table) for table in tables],
        )

    def reset_parameters(self) -> None:
        """Draw memory = U(-init_scale, init_scale) and the S that goes with it; nothing on the meta device."""
        super().reset_parameters()
        self._draw_columns()

    def _draw_columns(self) -> None:
        """Draw Box and Muller's normal numbers out of raw words, a stream that no release of NumPy or PyTorch
        changes."""
        if self.columns.numel() == 0 or self.columns.device.type == "meta":
            return
        source = np.random.PCG64(mix64(self.seed + 2))
        for part in self.columns.split(max(1, _CPU_BLOCK_ENTRIES // self.rows)):
            words = source.random_raw(part.numel())
            radius = np.sqrt(-2 / self.rows * np.log(((words >> 32) + 0.5) / 2**32))
            normal = radius * np.cos(2 * np.pi / 2**32 * (words & 0xFFFFFFFF))
            part.copy_(torch.from_numpy(normal).view_as(part))

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Check a state dict, and make S, which is not in the state, for a module that came off the meta device
        without it."""
        super().set_extra_state(state)
        self._draw_columns()

    def elements_per_row(self) -> int:
        """Return how many elements of `memory` one id of every feature reads together."""
        return super().elements_per_row() * (self.nonzeros or self.rows)

    def _rows(self, group: int, ids: Tensor, feature: Tensor) -> Tensor:
        return jlt_rows(self.memory, self.columns, ids, feature, self._plan[group], self.gradient)

    def _identity(self) -> dict[str, int | str | bool]:
        return {"rows": self.rows, "sketch": self.options.sketch, "nonzeros": self.nonzeros, "seed": self.seed}


@torch.fx.wrap
def jlt_rows(
    memory: Tensor, columns: Tensor, ids: Tensor, feature: Tensor, plan: JltPlan, gradient: str = "dense"
) -> Tensor:
    """Return the rows (S e_i)ᵀ M of the module's docstring: plain PyTorch, the reference for any kernel.

    memory (k·width,) floating; columns (N, k): Sᵀ if gaussian, else unused; ids (...) int64; feature int64,
    broadcastable to ids: position of the id's feature in the group; gradient: see pss.shared_array. Returns
    (..., embedding_dim) of memory's dtype.

    A sparse S reads s aligned rows of M. Of a dense one the columns of some ids are made at a time, in forward and
    again in backward; TorchScript, torch.compile and torch.export get one product with those of all ids, (..., k).
    """
    if plan.sketch == "sparse":
        nonzeros = len(plan.words.chunk_keys)
        block_rows = plan.rows // nonzeros
        places = locate(ids, feature, plan.words, block_rows)
        locations = (places + block_rows * torch.arange(nonzeros, device=ids.device)) * plan.width
        signs = 1 - 2 * locate(ids, feature, plan.signs, 2)
        chunks = read_chunks(memory, locations, plan.embedding_dim, gradient)
        return (chunks * signs.unsqueeze(-1)).sum(-2) * nonzeros**-0.5
    if torch.jit.is_scripting():  # pyright: ignore[reportPrivateImportUsage]
        return _product(memory, columns, ids, feature, plan)
    else:  # not compiled by TorchScript, which has no autograd functions
        if torch.compiler.is_compiling():
            return _product(memory, columns, ids, feature, plan)
        return _ReadSketch.apply(memory, columns, ids, feature, plan)


def sketch_entries(columns: Tensor, ids: Tensor, feature: Tensor, plan: JltPlan) -> Tensor:
    """Return the ids' columns of a gaussian or achlioptas S, (..., k) floating: the coefficients of the rows of M."""
    if plan.sketch == "gaussian":
        return columns[ids + torch.tensor(plan.starts, dtype=torch.int64, device=ids.device)[feature]]
    place = locate(ids, feature, plan.words, 6)
    return ((place == 0).float() - (place == 1).float()) * math.sqrt(3 / plan.rows)


def _product(memory: Tensor, columns: Tensor, ids: Tensor, feature: Tensor, plan: JltPlan) -> Tensor:
    entries = sketch_entries(columns, ids, feature, plan).to(memory.dtype)
    return entries @ memory.view(plan.rows, plan.width)[:, : plan.embedding_dim]


class _ReadSketch(torch.autograd.Function):
    """(memory, columns, ids, feature, plan) -> rows (..., embedding_dim), linear in memory."""

    @staticmethod
    def forward(memory: Tensor, columns: Tensor, ids: Tensor, feature: Tensor, plan: JltPlan) -> Tensor:
        rows = memory.new_empty(ids.numel(), plan.embedding_dim)
        for block, ids_of, feature_of in _blocks(ids, feature, plan.rows):
            rows[block] = _product(memory, columns, ids_of, feature_of, plan)
        return rows.view(*ids.shape, plan.embedding_dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor, JltPlan], output: Tensor) -> None:
        _, columns, ids, feature, ctx.plan = inputs
        ctx.save_for_backward(columns, ids, feature)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (columns, ids, feature), plan = ctx.saved_tensors, ctx.plan
        grad_rows = grad_outputs[0].reshape(-1, plan.embedding_dim)
        grad_matrix = grad_rows.new_zeros(plan.rows, plan.width)
        for block, ids_of, feature_of in _blocks(ids, feature, plan.rows):
            entries = sketch_entries(columns, ids_of, feature_of, plan).to(grad_rows.dtype)
            grad_matrix[:, : plan.embedding_dim].addmm_(entries.t(), grad_rows[block])
        return grad_matrix.view(-1), None, None, None, None


def _blocks(ids: Tensor, feature: Tensor, entries_per_id: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield (their places, ids, features) of as many ids, flattened, as S is made for at a time."""
    step = max(16, (_CPU_BLOCK_ENTRIES if ids.device.type == "cpu" else _BLOCK_ENTRIES) // entries_per_id)
    feature = feature.expand(ids.shape).reshape(-1)
    for first in range(0, ids.numel(), step):
        block = slice(first, first + step)
        yield block, ids.reshape(-1)[block], feature[block]


def build(tables: list[EmbeddingBagConfig], options: Options, request: EmbeddingRequest) -> JltEmbeddingBagCollection:
    """Return the module that is asked for.

    Raises CompressionRefused where the fewest rows of M are more than the budget, ValueError for a gaussian S that is
    too large.
    """
    least = options.nonzeros if options.sketch == "sparse" else 1
    return JltEmbeddingBagCollection.build(f"jlt with {least} rows", tables, options, request)


def cell(module: JltEmbeddingBagCollection, table: int, row: int, col: int) -> float:
    """Return E_t[row][col] = Σ_r S[r, i] · M[r][col] in plain Python numbers: the oracle of the lookup.

    Raises IndexError outside the table, where the lookup itself would return some other row's numbers.
    """
    module.check_cell(table, row, col)
    entries = sketch_column(module, table, row)
    return math.fsum(entry * module.memory[r * module.width + col].item() for r, entry in entries.items())


def sketch_column(module: JltEmbeddingBagCollection, table: int, row: int) -> dict[int, float]:
    """Return {row of S: its entry} of the non-zeros in the column of that row of the table, in plain Python numbers."""
    k, s = module.rows, module.nonzeros
    if module.options.sketch == "gaussian":
        start = sum(config.num_embeddings for config in module.embedding_bag_configs()[:table])
        return dict(enumerate(module.columns[start + row].tolist()))
    if module.options.sketch == "achlioptas":
        places = {r: module.word_hash.location(table, row, r, 6) for r in range(k)}
        return {r: (1 - 2 * place) * (3 / k) ** 0.5 for r, place in places.items() if place < 2}
    places = [j * (k // s) + module.word_hash.location(table, row, j, k // s) for j in range(s)]
    signs = [1 - 2 * module.sign_hash.location(table, row, j, 2) for j in range(s)]
    return {place: sign / s**0.5 for place, sign in zip(places, signs, strict=True)}


METHOD = EmbeddingMethod(Options=Options, build=build, cell=cell)
