"""Checkpoints on torch.distributed.checkpoint: model, optimizer, position in the data.

    checkpoints/step_<n>/   the shards of all ranks, state.json (what the trainer needs), identity.json
    checkpoints/best        the same at the best evaluation so far, if asked for: a link to best_1/ or best_2/

A checkpoint is written beside its final name and renamed when every rank is done, so a directory of these names is
whole. `best` is replaced by turning its link to the other directory, in one step: whenever a run is killed, there is a
whole one. A checkpoint can be read at another world size or sharding: tensors are stored globally. Its identity names
all that must agree for the continuation to mean anything; where it does not, loading stops with the differences.
"""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torchrec.optim.keyed import CombinedOptimizer

from configs.load import flatten
from recsys.runs.ranks import Ranks, on_first_rank
from recsys.train.parallelism import unwrapped

_NAME = re.compile(r"step_(\d+)")
BEST, _SLOTS = "best", ("best_1", "best_2")


class Checkpoints:
    """The checkpoints of one run. Every method but `newest` is collective."""

    def __init__(self, directory: Path, identity: Mapping[str, Any], keep_last: int, ranks: Ranks) -> None:
        self.directory = directory
        self.identity = json.loads(json.dumps(identity))
        self.keep_last = keep_last
        self.ranks = ranks

    def newest(self) -> Path | None:
        """Return the checkpoint to continue from; None where there is none."""
        steps = self._steps()
        return steps[max(steps)] if steps else None

    def save(self, step: int, model: nn.Module, optimizer: CombinedOptimizer, state: Mapping[str, Any]) -> None:
        """Write step_<n>, and drop all but the newest `keep_last`. Collective.

        state: JSON-able values of the trainer, the same on all ranks.
        """
        self._write(f"step_{step}", model, optimizer, state)
        on_first_rank(self._drop_old)

    def save_best(self, model: nn.Module, optimizer: CombinedOptimizer, state: Mapping[str, Any]) -> None:
        """Replace the checkpoint of the best evaluation; see `save`. Collective."""
        slot = on_first_rank(self._free_slot)
        self._write(slot, model, optimizer, state)
        on_first_rank(lambda: self._turn_best_to(slot))

    def _write(self, name: str, model: nn.Module, optimizer: CombinedOptimizer, state: Mapping[str, Any]) -> None:
        final, temporary = self.directory / name, self.directory / f".{name}"
        on_first_rank(lambda: _make_empty(temporary))
        save(self._tensors(model, optimizer), checkpoint_id=temporary)
        on_first_rank(lambda: self._finish(temporary, final, state))

    def load(self, path: Path, model: nn.Module, optimizer: CombinedOptimizer) -> dict[str, Any]:
        """Fill model and optimizer in place and return the trainer's state. Collective.

        Raises ValueError naming every difference when the checkpoint is of another model, method, hash or data.
        """
        state = on_first_rank(lambda: self._read_state(path))
        tensors = self._tensors(model, optimizer)
        load(tensors, checkpoint_id=path)
        unwrapped(model).load_state_dict(tensors["model"])
        optimizer.load_state_dict(tensors["optimizer"])
        return state

    def _tensors(self, model: nn.Module, optimizer: CombinedOptimizer) -> dict[str, Any]:
        return {"model": unwrapped(model).state_dict(), "optimizer": optimizer.state_dict()}

    def _read_state(self, path: Path) -> dict[str, Any]:
        saved, wanted = flatten(json.loads((path / "identity.json").read_text())), flatten(self.identity)
        differences = [
            f"  {key}: the checkpoint has {saved.get(key)!r}, this run {wanted.get(key)!r}"
            for key in sorted(saved.keys() | wanted.keys())
            if saved.get(key) != wanted.get(key)
        ]
        if differences:
            raise ValueError("\n".join([f"{path} cannot be continued by this run:", *differences]))
        return json.loads((path / "state.json").read_text())

    def _finish(self, temporary: Path, final: Path, state: Mapping[str, Any]) -> None:
        (temporary / "state.json").write_text(json.dumps(state))
        (temporary / "identity.json").write_text(json.dumps(self.identity, indent=2))
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)

    def _free_slot(self) -> str:
        """The directory that `best` does not stand for; earlier versions made `best` itself a directory."""
        best = self.directory / BEST
        if best.is_dir() and not best.is_symlink():
            best.rename(self.directory / _SLOTS[0])
            best.symlink_to(_SLOTS[0])
        return _SLOTS[1] if best.is_symlink() and best.readlink().name == _SLOTS[0] else _SLOTS[0]

    def _turn_best_to(self, slot: str) -> None:
        link = self.directory / f".{BEST}"
        link.unlink(missing_ok=True)
        link.symlink_to(slot)  # relative: a run directory may be moved
        link.replace(self.directory / BEST)
        for other in _SLOTS:
            if other != slot:
                shutil.rmtree(self.directory / other, ignore_errors=True)

    def _drop_old(self) -> None:
        steps = self._steps()
        for old in sorted(steps)[: -self.keep_last]:
            shutil.rmtree(steps[old])

    def _steps(self) -> dict[int, Path]:
        if not self.directory.is_dir():
            return {}
        return {int(m[1]): path for path in self.directory.iterdir() if (m := _NAME.fullmatch(path.name))}


def _make_empty(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
