"""Pruned tables: full tables while they train, of which the smallest values, or rows, are set to zero by and by.

Zhu and Gupta 2017, "To prune, or not to prune: exploring the efficacy of pruning for model compression",
arXiv:1710.01878, eq. 1. Of N units (values of all tables together, or rows) the share pruned after step t is

    s_t = s_f · (1 − (1 − (t − t_0) / (t_1 − t_0))³)      t_0 = start · steps, t_1 = end · steps

at t = t_0, t_0 + every_steps, ..., t_1: the units of the smallest |value|, or of the smallest norm, over all tables.
E_t[i][j] is the value trained, or zero where it is pruned. s_f is the smallest at which what must be kept fits the
budget: kept values at 4 bytes, and which units they are, as the smaller of a bitmap of 1 bit for each unit and a list
of indices of 4 bytes (8 beyond 2^32 units). A lookup from a bitmap needs counts of ones besides, which follow from it.

Departures. One threshold for all tables, where the paper prunes each layer to the same sparsity. Pruned units stay
pruned and have no gradient; in the paper they may come back if their value, which is kept, is above a later threshold.

Early stopping may end training before t_1, so eval mode always prunes to s_f there and then, and training goes on from
what it had: every evaluation is of the model at the promised size, `stored_bytes`. Early evaluations are worse for it.
Full tables, the optimizer's state for all of them and a byte for each unit are held while training: memory is saved
after it only.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from baselines.trained_tables import TrainedTablesEmbeddingBagCollection
from pss.method import CompressionRefused, EmbeddingMethod, EmbeddingRequest, MethodOptions


class Options(MethodOptions):
    """Options of pruning."""

    unit: Literal["values", "rows"] = "values"
    """values = prune single numbers, rows = prune whole rows; rows need less of an index."""
    start: float = Field(0.1, ge=0.0, le=1.0)
    """Fraction of the training steps after which pruning begins."""
    end: float = Field(0.5, ge=0.0, le=1.0)
    """Fraction of the training steps after which all is pruned that is to be; at least start."""
    every_steps: int = Field(100, ge=1)
    """Steps between two prunings."""

    @model_validator(mode="after")
    def _start_is_not_after_end(self) -> "Options":
        if self.start > self.end:
            raise ValueError(f"start = {self.start} is after end = {self.end}")
        return self


class PrunedEmbeddingBagCollection(TrainedTablesEmbeddingBagCollection):
    """A drop-in for TorchRec's `EmbeddingBagCollection`; see the module's docstring. `end_step` prunes.

    What is pruned so far is in persistent buffers `pruned_<dim>` (Σ num_embeddings, dim), for rows (Σ num_embeddings,),
    bool. Ranks prune alike since their tables are equal. At compression 1 nothing is pruned. Besides what the base
    class raises: ValueError for tables of several embedding_dims if rows are pruned, CompressionRefused where not even
    one unit is left.
    """

    OPTIONS = Options
    DEFAULT_COMPRESSION = 2.0
    options: Options

    def _lay_out(self, compression: float, id_counts: Sequence[np.ndarray] | None) -> None:
        super()._lay_out(compression, id_counts)
        self.parameter_budget(compression)  # checks it
        by_rows, dims = self.options.unit == "rows", {t.name: t.embedding_dim for t in self.embedding_bag_configs()}
        if by_rows and len(set(dims.values())) > 1:
            raise ValueError(f"unit = 'rows' needs tables of one embedding_dim, not {dims}")
        self.unit_size = max(dims.values(), default=1) if by_rows else 1
        self.units = self._full_parameters // self.unit_size
        self.kept_units = most_units(self.units, self.unit_size, int(4 * self._full_parameters / Fraction(compression)))
        if self.kept_units < min(1, self.units):
            reached = 4 * self._full_parameters / kept_bytes(self.units, 1, self.unit_size)
            raise CompressionRefused(f"pruned by {self.options.unit}", compression, reached)

    def _allocate(self, device: torch.device | None) -> None:
        super()._allocate(device)
        for dim in self.dims:
            shape = self.weight(dim).shape[: 1 if self.options.unit == "rows" else 2]
            self.register_buffer(f"pruned_{dim}", torch.zeros(shape, dtype=torch.bool, device=device))

    def stored_bytes(self) -> int:
        """Return the bytes of the values kept at the end, and of what says which they are."""
        return kept_bytes(self.units, self.kept_units, self.unit_size)

    def reset_parameters(self) -> None:
        """Draw the full tables' start, nothing pruned."""
        super().reset_parameters()
        for dim in self.dims:
            self.pruned(dim).fill_(False)

    def pruned(self, dim: int) -> Tensor:
        """Return which units of the stacked tables of that embedding_dim are pruned so far, bool."""
        return cast(Tensor, getattr(self, f"pruned_{dim}"))

    def target(self, step: int, total_steps: int) -> int:
        """Return the units to be pruned after that step, by the schedule."""
        first, last = self._span(total_steps)
        remaining = 1 - (step - first) / (last - first) if first <= step < last else float(step < first)
        return int((self.units - self.kept_units) * (1 - remaining**3))

    def _span(self, total_steps: int) -> tuple[int, int]:
        return round(self.options.start * total_steps), max(1, round(self.options.end * total_steps))

    @torch.no_grad()
    def end_step(self, step: int, total_steps: int) -> None:
        """Prune where the schedule says so; step counts from 1."""
        first, last = self._span(total_steps)
        if step == last or (first <= step < last and (step - first) % self.options.every_steps == 0):
            for dim, smallest in self._smallest(self.target(step, total_steps)).items():
                self.pruned(dim).logical_or_(smallest)
                self.weight(dim).masked_fill_(self._by_value(self.pruned(dim)), 0.0)

    def _smallest(self, count: int) -> dict[int, Tensor]:
        """Return by embedding_dim which are the `count` smallest units over all tables; more where units are equal."""
        if count == 0:
            return {dim: torch.zeros_like(self.pruned(dim)) for dim in self.dims}
        sizes = {}
        for dim in self.dims:
            weight = self.weight(dim).detach()
            size = weight.abs() if self.options.unit == "values" else torch.linalg.vector_norm(weight, dim=1)
            sizes[dim] = size.masked_fill_(self.pruned(dim), 0.0)
        threshold = torch.cat([size.reshape(-1) for size in sizes.values()]).kthvalue(count).values
        return {dim: size <= threshold for dim, size in sizes.items()}

    def _make_smaller(self) -> dict[int, Tensor]:
        return self._smallest(self.units - self.kept_units)

    def _by_value(self, units: Tensor) -> Tensor:
        """Return a mask of units as one that is broadcast to values."""
        return units if self.options.unit == "values" else units.unsqueeze(-1)

    def _rows(self, group: int, ids: Tensor, feature: Tensor) -> Tensor:
        dim, stacked = self._groups[group].embedding_dim, self._stacked(group, ids, feature)
        pruned = self.pruned(dim) if self.training else self.smaller(dim)
        return F.embedding(stacked, self.weight(dim)).masked_fill(self._by_value(pruned[stacked]), 0.0)

    def _identity(self) -> dict[str, int | str | bool]:
        return {"unit": self.options.unit, "kept_units": self.kept_units}


def kept_bytes(units: int, kept: int, unit_size: int) -> int:
    """Return the bytes of `kept` units of so many fp32 values out of `units`, and of which they are."""
    if kept == units:
        return 4 * units * unit_size
    return 4 * kept * unit_size + min(_bitmap_bytes(units), _index_bytes(units) * kept)


def most_units(units: int, unit_size: int, budget_bytes: int) -> int:
    """Return the most units that can be kept in so many bytes: see `kept_bytes`; 0 or less if none can."""
    if kept_bytes(units, units, unit_size) <= budget_bytes:
        return units
    with_bitmap = (budget_bytes - _bitmap_bytes(units)) // (4 * unit_size)
    with_indices = budget_bytes // (4 * unit_size + _index_bytes(units))
    return min(max(with_bitmap, with_indices), units - 1)


def _bitmap_bytes(units: int) -> int:
    return -(-units // 8)


def _index_bytes(units: int) -> int:
    return 4 if units <= 1 << 32 else 8


def build(
    tables: list[EmbeddingBagConfig], options: Options, request: EmbeddingRequest
) -> PrunedEmbeddingBagCollection:
    """Return the module that is asked for. Raises CompressionRefused where not even one unit and its index are within
    the budget."""
    return PrunedEmbeddingBagCollection.build("pruned", tables, options, request)


def cell(module: PrunedEmbeddingBagCollection, table: int, row: int, col: int) -> float:
    """Return the value trained, or zero if the module's mode has pruned it. Raises IndexError outside the table."""
    config = module.check_cell(table, row, col)
    dim, row = config.embedding_dim, module.first_rows[table] + row
    pruned = (module.pruned(dim) if module.training else module.smaller(dim))[row]
    is_pruned = pruned.item() if module.options.unit == "rows" else pruned[col].item()
    return 0.0 if is_pruned else module.weight(dim)[row, col].item()


METHOD = EmbeddingMethod(Options=Options, build=build, cell=cell, stores_every_row=True)
