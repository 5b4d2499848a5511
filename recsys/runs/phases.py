"""The parts of a training step by name, and how they are marked in a profile.

Forward: the model's own modules, as its file names them (`PHASES`), the embedding module, and of a sharded one its
input and output distribution, which TorchRec marks in part. Backward: an operator belongs to the phase of the forward
operator whose gradient it computes (`recsys.profile.trace`), so nothing needs a mark. Marks are made by hooks that
exist within the profiled window only: outside of it a step has none of this in its way.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import wraps

from torch import nn
from torch.profiler import record_function

MARK = "phase:"
STEP, DATA_LOADING = "step", "data_loading"
INPUT_DISTRIBUTION, EMBEDDING_LOOKUP, OUTPUT_DISTRIBUTION = (
    "input_distribution",
    "embedding_lookup",
    "output_distribution",
)
GRADIENT_ALL_REDUCE, OPTIMIZER, OTHER = "gradient_all_reduce", "optimizer", "other"

FORWARD = (INPUT_DISTRIBUTION, "bottom_mlp", EMBEDDING_LOOKUP, OUTPUT_DISTRIBUTION, "interaction", "top_mlp")
"""The phases of a forward pass that reports have a place for; a model may have more of its own."""

TORCHREC_MARKS: Mapping[str, str] = {
    "## KJTListSplitsAwaitable wait() ##": INPUT_DISTRIBUTION,
    "## KJTListAwaitable wait() ##": INPUT_DISTRIBUTION,
    "[lookup]": EMBEDDING_LOOKUP,
    "[output_dist]": OUTPUT_DISTRIBUTION,
    "## EmbeddingBagCollectionAwaitable wait() ##": OUTPUT_DISTRIBUTION,
}
"""Beginnings of the names of TorchRec's own marks (1.8) -> phase; its other marks lie within these."""


def mark(phase: str) -> record_function:
    """`with mark("bottom_mlp"):` what runs inside belongs to the phase, unless an inner mark says otherwise."""
    return record_function(MARK + phase)


def phase_of_mark(name: str) -> str | None:
    """The phase that an annotation of the profile stands for; None for any other annotation."""
    if name.startswith(MARK):
        return name.removeprefix(MARK)
    if name.startswith(("Optimizer.step", "Optimizer.zero_grad")):
        return OPTIMIZER
    return next((phase for start, phase in TORCHREC_MARKS.items() if name.startswith(start)), None)


@contextlib.contextmanager
def marked(model: nn.Module, phases: Mapping[str, str]) -> Iterator[None]:
    """While open, the forward passes of submodules are marked. phases: name of a submodule (its end) -> phase."""
    from torchrec.distributed.types import ShardedModule  # takes two seconds, which readers of summaries need not spend

    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            for suffix, phase in phases.items():
                if name == suffix or name.endswith(f".{suffix}"):
                    stack.enter_context(_marked_forward(module, phase))
            if isinstance(module, ShardedModule):
                stack.enter_context(_marked_method(module, "input_dist", INPUT_DISTRIBUTION))
        yield


@contextlib.contextmanager
def _marked_forward(module: nn.Module, phase: str) -> Iterator[None]:
    open_marks: list[record_function] = []

    def enter(_module: nn.Module, _arguments: object) -> None:
        open_marks.append(mark(phase))
        open_marks[-1].__enter__()

    def leave(_module: nn.Module, _arguments: object, _output: object) -> None:
        open_marks.pop().__exit__(None, None, None)

    handles = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _marked_method(module: nn.Module, name: str, phase: str) -> Iterator[None]:
    method: Callable[..., object] = getattr(module, name)

    @wraps(method)
    def marked_method(*arguments: object, **keywords: object) -> object:
        with mark(phase):
            return method(*arguments, **keywords)

    setattr(module, name, marked_method)
    try:
        yield
    finally:
        delattr(module, name)
