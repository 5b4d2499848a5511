"""The ways to trace, script, compile, export and copy a module: what TorchRec's own survives, a method survives."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torchrec.fx import symbolic_trace
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor


def export(strict: bool) -> Callable[[nn.Module, KeyedJaggedTensor], Any]:
    return lambda module, features: torch.export.export(module, (features,), strict=strict).module()


CAPTURES: dict[str, Callable[[nn.Module, KeyedJaggedTensor], Any]] = {  # (module, a batch to export it by)
    "fx": lambda module, _: symbolic_trace(module),
    "script": lambda module, _: torch.jit.script(module),  # pyright: ignore[reportPrivateImportUsage]
    "script of fx": lambda module, _: torch.jit.script(symbolic_trace(module)),  # pyright: ignore[reportPrivateImportUsage]
    "compile": lambda module, _: torch.compile(module, fullgraph=True, backend="aot_eager"),
    "export, strict": export(strict=True),
    "export, non-strict": export(strict=False),
    "deepcopy": lambda module, _: copy.deepcopy(module),
    "pickle": lambda module, _: pickle.loads(pickle.dumps(module)),
}
COPIES = ("deepcopy", "pickle")
"""Of these the captured module has parameters of its own."""
