"""The events of a profile as PyTorch writes them, and the collectives among them."""

import gzip
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

ENQUEUES = ("c10d::", "_c10d_functional::")
"""Operators that start a collective; who waits for it has no operator of its own."""
WAITS = re.compile(r"_(Req|Wait)(Backward)?$")
"""TorchRec's autograd functions around a collective: they start it, or wait for it."""
_ITEM_BYTES = {
    "float": 4, "double": 8, "long int": 8, "int": 4, "short int": 2, "c10::Half": 2, "c10::BFloat16": 2, "bool": 1,
    "signed char": 1, "unsigned char": 1, "Float": 4, "Double": 8, "Long": 8, "Int": 4, "Half": 2, "BFloat16": 2,
    "Bool": 1, "Byte": 1, "Char": 1,
}  # fmt: skip


class Span(NamedTuple):
    start: float
    end: float
    name: str
    thread: int
    category: str
    arguments: Mapping[str, Any]

    @property
    def sequence(self) -> int | None:
        """Number of the autograd node: of the one made next by a forward operator, of its own by a backward one."""
        return self.arguments.get("Sequence number")


class Collective(NamedTuple):
    """kind: as the backend calls it, all_to_all, all_reduce ... group: its process group where the profile names it.
    start and end: µs. bytes: what this rank puts in, its own share included."""

    kind: str
    group: str
    start: float
    end: float
    bytes: int


def load_spans(path: Path) -> list[Span]:
    """Every span, those that begin first and enclose others first."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt") as file:
        trace = json.load(file)
    base = trace.get("baseTimeNanoseconds", 0) / 1e3
    spans = [
        Span(base + e["ts"], base + e["ts"] + e["dur"], e["name"], e["tid"], e["cat"], e.get("args", {}))
        for e in trace["traceEvents"]
        if e.get("ph") == "X" and "cat" in e
    ]
    return sorted(spans, key=lambda span: (span.start, -span.end))


def gloo_collective(span: Span) -> Collective:
    dims, types = span.arguments.get("Input Dims") or [[]], span.arguments.get("Input type") or [""]
    return Collective(span.name.removeprefix("gloo:"), "", span.start, span.end, _count_bytes(dims[0], types[0]))


def _count_bytes(dims: Any, item_type: str) -> int:
    if dims and isinstance(dims[0], list):
        return sum(_count_bytes(inner, item_type) for inner in dims)
    return math.prod(dims) * _ITEM_BYTES.get(item_type, 0)


def is_nccl(kernel: Span) -> bool:
    return kernel.name.startswith("nccl")


def nccl_collective(span: Span) -> Collective:
    """The kernel carries the collective's name, group and size (PyTorch from 2.4 on)."""
    arguments = span.arguments
    kind = str(arguments.get("Collective name") or span.name).removeprefix("_").replace("allreduce", "all_reduce")
    kind = kind.replace("all_to_allv", "all_to_all").replace("alltoall", "all_to_all").replace("_base", "")
    size = int(arguments.get("In msg nelems") or 0) * _ITEM_BYTES.get(str(arguments.get("dtype")), 0)
    return Collective(kind, str(arguments.get("Process Group Name") or ""), span.start, span.end, size)
