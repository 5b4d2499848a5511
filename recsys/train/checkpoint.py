"""Checkpoints on torch.distributed.checkpoint: model, optimizer, position in the data.

    checkpoints/step_<n>/   the shards of all ranks, state.json (what the trainer needs), identity.json
    checkpoints/best/       the same at the best evaluation so far, if asked for

A checkpoint is written beside its final name and renamed when every rank is done, so a directory of these names is
whole. It can be read at another world size or sharding: tensors are stored globally. `identity` names all that must
agree for the continuation to mean anything; where it does not, loading stops with the differences.
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
BEST = "best"


class Checkpoints:
    """The checkpoints of one run; every method but `newest` is collective."""

    def __init__(self, directory: Path, identity: Mapping[str, Any], keep_last: int, ranks: Ranks) -> None:
        self.directory = directory
        self.identity = json.loads(json.dumps(identity))
        self.keep_last = keep_last
        self.ranks = ranks

    def newest(self) -> Path | None:
        steps = self._steps()
        return steps[max(steps)] if steps else None

    def save(self, name: str, model: nn.Module, optimizer: CombinedOptimizer, state: Mapping[str, Any]) -> None:
        """name: step_<n> or best. state: JSON-able values of the trainer, the same on all ranks."""
        final, temporary = self.directory / name, self.directory / f".{name}"
        on_first_rank(lambda: _make_empty(temporary))
        save(self._tensors(model, optimizer), checkpoint_id=temporary)
        on_first_rank(lambda: self._finish(temporary, final, state))

    def load(self, path: Path, model: nn.Module, optimizer: CombinedOptimizer) -> dict[str, Any]:
        """Fills model and optimizer in place and returns the trainer's state.

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
