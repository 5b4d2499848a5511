"""Full tables while they train that are read in a smaller form afterwards: what rounding and pruning have in common."""

import os
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from baselines.full import fill_initial_rows
from pss.collection import ComputedEmbeddingBagCollection


class TrainedTablesEmbeddingBagCollection(ComputedEmbeddingBagCollection):
    """Full tables while they train, of which eval mode reads a smaller form, made from them when it is first read.

    Tables of one embedding_dim are stacked, in their order, in one parameter `weight_<dim>` (Σ num_embeddings, dim)
    fp32, with a dense gradient. They start as `baselines.full`, to the bit. The smaller form is not in the state dict:
    it is made anew after every `train()`, `eval()`, loading or moving. An id outside its table reads another row.
    torch.fx traces it, TorchScript does not compile it.

    A subclass says in `_make_smaller` what the smaller form is.
    """

    IS_SMALLER_AFTER_TRAINING = True
    _smaller: dict[int, Tensor] | None = None

    def _lay_out(self, compression: float, id_counts: Sequence[np.ndarray] | None) -> None:
        self.first_rows: list[int] = []  # of each table in its stack
        self._stacked_rows: dict[int, int] = {}  # by embedding_dim
        for table in self.embedding_bag_configs():
            self.first_rows.append(self._stacked_rows.get(table.embedding_dim, 0))
            self._stacked_rows[table.embedding_dim] = self.first_rows[-1] + table.num_embeddings
        self.dims = list(self._stacked_rows)

    def _allocate(self, device: torch.device | None) -> None:
        """Register the stacked tables. Raises ValueError for tables that cannot be in this machine's memory."""
        needed, memory = 4 * self._full_parameters, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if torch.empty(0, device=device).device.type == "cpu" and needed > memory:
            raise ValueError(
                f"the full tables that are trained before compression take {needed / 2**30:.0f} GiB, "
                f"this machine has {memory / 2**30:.0f} GiB"
            )
        for dim, count in self._stacked_rows.items():
            self.register_parameter(f"weight_{dim}", nn.Parameter(torch.empty(count, dim, device=device)))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the rows that `baselines.full` starts with; nothing on the meta device."""
        self._smaller = None
        for index, table in enumerate(self.embedding_bag_configs()):
            weight = self.weight(table.embedding_dim).narrow(0, self.first_rows[index], table.num_embeddings)
            if weight.device.type != "meta":
                fill_initial_rows(weight, table=index, seed=self.seed, init_scale=self.init_scale)

    def weight(self, dim: int) -> Tensor:
        """Return the stacked tables of that embedding_dim, (Σ num_embeddings, dim)."""
        return cast(Tensor, getattr(self, f"weight_{dim}"))

    def smaller(self, dim: int) -> Tensor:
        """Return what eval mode reads for the tables of that embedding_dim."""
        if self._smaller is None:
            with torch.inference_mode(False), torch.no_grad():
                self._smaller = self._make_smaller()
        return self._smaller[dim]

    @abstractmethod
    def _make_smaller(self) -> dict[int, Tensor]:
        """Return by embedding_dim one row for each row of `weight`."""

    def _stacked(self, group: int, ids: Tensor, feature: Tensor) -> Tensor:
        """Return the rows of `weight` that ids read, of ids' shape."""
        return ids + pick([self.first_rows[table] for table in self._groups[group].tables], feature)

    @torch.no_grad()
    def fit(self, tables: Sequence[Tensor], id_counts: Callable[[], Sequence[np.ndarray]] | None = None) -> float:
        """Copy the tables. The relative error returned is that of what eval mode reads of them, over all rows alike.

        Raises ValueError where number or shapes of the tables differ."""
        configs = self.embedding_bag_configs()
        expected, shapes = [(c.num_embeddings, c.embedding_dim) for c in configs], [tuple(t.shape) for t in tables]
        if shapes != expected:
            raise ValueError(f"tables of shapes {shapes} are not {expected}")
        for config, first, table in zip(configs, self.first_rows, tables, strict=True):
            self.weight(config.embedding_dim).narrow(0, first, config.num_embeddings).copy_(table)
        mode = self.training
        self.eval()
        lost = norm = 0.0
        for index, (config, table) in enumerate(zip(configs, tables, strict=True)):
            group = next(g for g, features in enumerate(self._groups) if index in features.tables)
            feature = torch.tensor([self._groups[group].tables.index(index)], device=table.device)
            for ids in torch.arange(config.num_embeddings, device=table.device).split(1 << 16):
                rows = self._rows(group, ids, feature)
                lost += float((rows - table[ids]).double().square().sum())
                norm += float(table[ids].double().square().sum())
        self.train(mode)
        return (lost / norm) ** 0.5 if norm else 0.0

    def train(self, mode: bool = True) -> Any:
        self._smaller = None
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._smaller = None
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._smaller = None
        super()._load_from_state_dict(*args, **kwargs)


@torch.fx.wrap
def pick(numbers: list[int], index: Tensor) -> Tensor:
    """Return numbers[index], of index' shape and device."""
    return torch.tensor(numbers, device=index.device)[index]
