"""The byte bound: what an operation must move between memory and processor, whatever computes it.

With V ids, U distinct rows among them, B samples, F features, and the parameters that a batch touches,

    full tables:    T = U·d                                      elements
    array M:        T = |M| · (1 − (1 − Z/|M|)^(U·d/Z))           elements, expected over the hash

    forward         8·V + 8·(F·B + 1) + 4·B·F·d + 4·T             ids, offsets, output written, parameters read
    backward        8·V + 8·(F·B + 1) + 4·B·F·d + the gradient    ids, offsets, gradient of the output read, and
      fused         2·4·T                                         parameters read and written
      dense         4 · all parameters                            the gradient written, zeros too
      sparse        4·T + 8 · indices                             values and indices, one for each element of M or row
    step            forward + fused backward + 2·4·state          whatever form the gradient takes: it need not be made
    state           Adagrad: T elements, row-wise Adagrad: U

Parameters with their state, or a dense gradient, that fit the last cache move nothing, as if they were still there from
the step before. Ids count as int64, parameters as float32. A time is these bytes over the bandwidth of a copy, which
counts what it reads and what it writes, measured in the same run.
"""

from dataclasses import dataclass
from typing import Literal

from recsys.bench.kernel_sizes import KernelSize

Operation = Literal["forward", "backward", "step"]
Storage = Literal["array", "tables"]
Gradient = Literal["fused", "dense", "sparse"]
State = Literal["none", "row", "element"]


@dataclass(frozen=True)
class Traffic:
    """Describe what besides the size decides the bytes of an operation.

    storage: where the parameters are. gradient: its form, "fused" where it is applied and never made. state: of the
    optimizer, none, one number a row, or one an element.
    """

    storage: Storage
    gradient: Gradient = "fused"
    state: State = "none"


def touched_elements(size: KernelSize, storage: Storage, distinct: float) -> float:
    """Return T, the parameters that a batch touches, in elements.

    distinct: U, the distinct rows of a batch. For an array it is the expectation over the hash.
    """
    if storage == "tables":
        return distinct * size.embedding_dim
    block = min(size.block_size, size.embedding_dim)
    chunks = distinct * size.embedding_dim / block
    return size.memory_size * (1 - (1 - block / size.memory_size) ** chunks)


def bytes_moved(
    size: KernelSize, operation: Operation, traffic: Traffic, *, num_ids: float, distinct: float, cache_bytes: int
) -> float:
    """Return the least bytes that one operation moves between memory and processor.

    num_ids: V, of a batch. distinct: U, distinct rows among them. cache_bytes: of the last cache, 0 for none.
    """
    index = 8 * num_ids + 8 * (size.features * size.batch_size + 1)
    stored = size.memory_size if traffic.storage == "array" else size.full_bytes // 4
    touched = touched_elements(size, traffic.storage, distinct)
    state_stored = {"none": 0, "row": stored // size.embedding_dim, "element": stored}[traffic.state]
    state = {"none": 0.0, "row": distinct, "element": touched}[traffic.state]
    is_cached = 4 * (stored + state_stored) <= cache_bytes
    forward = index + size.output_bytes + (0 if is_cached else 4 * touched)
    if operation == "forward":
        return forward
    update = 0 if is_cached else 2 * 4 * (touched + state)
    read = index + size.output_bytes
    if operation == "step":
        return forward + read + update
    indices = touched if traffic.storage == "array" else distinct
    gradient_bytes = {
        "fused": update,
        "dense": 0 if 4 * stored <= cache_bytes else 4 * stored,
        "sparse": 4 * touched + 8 * indices,
    }
    return read + gradient_bytes[traffic.gradient]
