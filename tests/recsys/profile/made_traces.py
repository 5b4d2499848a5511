"""Profiles made by hand, in the form PyTorch writes them, whose every part is known."""

import json
from itertools import count

MAIN, WORKER, DEVICE = 1, 2, 7
_correlations = count(1)


def event(name, start, end, thread=MAIN, category="cpu_op", **arguments):
    """start and end in µs."""
    return {
        "ph": "X", "name": name, "ts": start, "dur": end - start, "tid": thread, "pid": 1, "cat": category,
        "args": {key.replace("_", " "): value for key, value in arguments.items()},
    }  # fmt: skip


def annotation(name, start, end, thread=MAIN):
    return event(name, start, end, thread, "user_annotation")


def operator(name, start, end, sequence=None):
    return event(name, start, end, **({} if sequence is None else {"Sequence_number": sequence}))


def node(name, start, end, sequence=None):
    return operator(f"autograd::engine::evaluate_function: {name}", start, end, sequence)


def gloo(kind, start, end, dims=(1,), item="float"):
    return event(f"gloo:{kind}", start, end, WORKER, "user_annotation", Input_Dims=[list(dims)], Input_type=[item])


def launch(name, start, end, launched_at, **arguments):
    """A kernel on the device, and the call on the host that launched it."""
    correlation = next(_correlations)
    kernel = event(name, start, end, DEVICE, "kernel")
    kernel["args"] = {"correlation": correlation, **arguments}
    call = event("cudaLaunchKernel", launched_at, launched_at + 1, MAIN, "cuda_runtime")
    call["args"] = {"correlation": correlation}
    return [call, kernel]


def write(path, *events):
    path.write_text(json.dumps({"baseTimeNanoseconds": 0, "traceEvents": [{"ph": "M", "name": "x"}, *events]}))
    return path
