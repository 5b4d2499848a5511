"""The Triton kernels against the plain reference. Kernels are interpreted or compiled from the moment they are defined,
so the interpreter has a process of its own: `test_in_triton_s_interpreter` runs this file there, on CPU tensors, with
TRITON_INTERPRET=1. Without it the same tests need a GPU, which they reach through the dispatcher."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchrec.modules.embedding_configs import PoolingType

from pss.hashing import build_hash, locate
from pss.kernels.plan import RobePlan, pack
from pss.methods.robe import RobeEmbeddingBagCollection, cell
from tests.pss.jagged import pooled_by_cell, random_kjt, table
from tests.pss.kernels.triton_batches import (
    CASES,
    DEVICE,
    INTERPRETED,
    KEYS,
    Batch,
    check,
    elements_read,
    expect,
    make_batch,
)

pytest.importorskip("triton", reason="Triton is there on Linux only, and with PyTorch for CUDA or the dev extra")

import triton
from triton.backends.compiler import GPUTarget

from pss.kernels import triton_lookup, triton_ordered_sum, triton_robe_bags

Ops = Any  # triton_robe_bags or torch.ops.pss: the same names


def runs_kernels(test: Callable[..., None]) -> Callable[..., None]:
    if INTERPRETED:
        return test
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")(test))


@pytest.fixture
def ops(monkeypatch: pytest.MonkeyPatch) -> Ops:
    """The operators. What they leave unwritten is NaN, and in the interpreter tiles are small, so programs are many."""
    empty = torch.empty

    def empty_of_nan(*shape: Any, **options: Any) -> Tensor:
        out = empty(*shape, **options)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", empty_of_nan)
    if INTERPRETED:
        monkeypatch.setattr(triton_lookup, "_TILE", 32)
        monkeypatch.setattr(triton_robe_bags, "_ADAGRAD_ELEMENTS", 64)
        return triton_robe_bags
    assert triton_robe_bags.register()
    return torch.ops.pss


@pytest.fixture(params=[False, True], ids=["", "deterministic"])
def is_deterministic(request: pytest.FixtureRequest):
    torch.use_deterministic_algorithms(request.param)
    yield request.param
    torch.use_deterministic_algorithms(False)


both_poolings = pytest.mark.parametrize(
    ("pooling", "weighted"), [(PoolingType.SUM, False), (PoolingType.MEAN, True)], ids=["sum", "weighted mean"]
)
all_cases = pytest.mark.parametrize("name", CASES)


@runs_kernels
@all_cases
@both_poolings
def test_lookup(ops: Ops, name: str, pooling: PoolingType, weighted: bool):
    batch = make_batch(name, pooling, weighted)
    plain, exact = expect(batch, batch.gradient())
    memory = batch.module.memory.detach()
    check(ops.robe_bags(memory, *batch.arguments, False), plain.out, exact.out, 2)


@runs_kernels
@all_cases
@both_poolings
def test_gradient_of_memory(ops: Ops, is_deterministic: bool, name: str, pooling: PoolingType, weighted: bool):
    batch = make_batch(name, pooling, weighted)
    gradient = batch.gradient()
    plain, exact = expect(batch, gradient)
    check(ops.robe_bags_backward(gradient, *batch.arguments), plain.memory, exact.memory, 3)


@runs_kernels
@all_cases
def test_sparse_gradient_has_each_element_read_once(ops: Ops, name: str):
    batch = make_batch(name, PoolingType.MEAN, weighted=True, memory_size=997)
    gradient = batch.gradient()
    plain, exact = expect(batch, gradient)
    slots, values = ops.robe_bags_backward_sparse(gradient, *batch.arguments)
    check(torch.zeros(997, device=DEVICE).index_add(0, slots, values), plain.memory, exact.memory, 3)
    assert torch.equal(slots, elements_read(batch))


@runs_kernels
@all_cases
def test_gradient_of_weights(ops: Ops, name: str):
    batch = make_batch(name, PoolingType.MEAN, weighted=True)
    gradient = batch.gradient()
    plain, exact = expect(batch, gradient)
    got = ops.robe_bags_weight_gradient(gradient, batch.module.memory.detach(), *batch.arguments)
    check(got, plain.weights, exact.weights, 3)


@runs_kernels
@pytest.mark.parametrize("name", ["short last chunk", "one chunk"])
def test_updates(ops: Ops, is_deterministic: bool, name: str):
    """SGD and Adagrad against torch.optim's in float32 and float64."""
    batch = make_batch(name, memory_size=997)
    gradient = batch.gradient()
    before = batch.module.memory.detach().clone()
    plain, exact = expect(batch, gradient)
    for rule in (torch.optim.SGD, torch.optim.Adagrad):
        stepped = []
        for sums in (plain.memory, exact.memory):
            parameter = torch.nn.Parameter(before.to(sums.dtype, copy=True))
            parameter.grad = sums
            optimizer = rule([parameter], lr=0.3)
            optimizer.step()
            stepped.append((parameter.detach(), optimizer.state[parameter].get("sum")))
        memory, squares = before.clone(), torch.zeros_like(before)
        if rule is torch.optim.SGD:
            ops.robe_bags_sgd_(memory, gradient, *batch.arguments, 0.3)
        else:
            ops.robe_bags_adagrad_(memory, squares, gradient, *batch.arguments, 0.3, 1e-10)
            check(squares, stepped[0][1], stepped[1][1], 3)
        check(memory, stepped[0][0], stepped[1][0], 3)


@runs_kernels
def test_adagrad_leaves_alone_what_has_no_gradient(ops: Ops):
    batch = make_batch("two chunks", batch=3, memory_size=997)
    memory, squares = (torch.full((997,), float("nan"), device=DEVICE) for _ in range(2))
    memory[elements_read(batch)], squares[elements_read(batch)] = 1.0, 0.0
    ops.robe_bags_adagrad_(memory, squares, batch.gradient(), *batch.arguments, 0.3, 0.0)
    assert torch.equal(memory.isfinite().nonzero().flatten(), elements_read(batch))
    assert torch.equal(squares.isfinite().nonzero().flatten(), elements_read(batch))


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("name", ["two chunks", "flattened", "affine", "private rows"])
def test_either_integer_type_and_one_id_a_bag(ops: Ops, name: str, dtype: torch.dtype):
    batch = make_batch(name, dtype=dtype, max_length=0, batch=7)
    gradient = batch.gradient()
    plain, exact = expect(batch, gradient)
    memory = batch.module.memory.detach()
    check(ops.robe_bags(memory, *batch.arguments, False), plain.out, exact.out, 2)
    check(ops.robe_bags_backward(gradient, *batch.arguments), plain.memory, exact.memory, 3)


@runs_kernels
def test_lookup_equals_cell(ops: Ops):
    tables = [table("t", 9, 7, ["a", "b"]), table("u", 9, 7, ["a"])]
    module = RobeEmbeddingBagCollection(tables, memory_size=41, block_size=3, signed=True, kernel="plain")
    features = random_kjt(KEYS, 3, max_id=9)
    arguments = Batch(module, features.to(DEVICE)).arguments
    out = ops.robe_bags(module.memory.detach().to(DEVICE), *arguments, False)
    torch.testing.assert_close(out.double().cpu(), pooled_by_cell(module, cell, features))


@runs_kernels
@pytest.mark.parametrize("batch_size", [0, 3])
def test_no_ids(ops: Ops, is_deterministic: bool, batch_size: int):
    full = make_batch("short last chunk", weighted=True)
    offsets = torch.zeros(3 * batch_size + 1, dtype=torch.int64, device=DEVICE)
    nothing = torch.zeros(0, device=DEVICE)
    arguments = (nothing.long(), offsets, nothing, batch_size, *full.arguments[4:])
    gradient, memory = torch.ones(batch_size, 21, device=DEVICE), torch.ones(127, device=DEVICE)
    assert torch.equal(ops.robe_bags(memory, *arguments, False), torch.zeros_like(gradient))
    assert torch.equal(ops.robe_bags_backward(gradient, *arguments), torch.zeros_like(memory))
    assert [part.numel() for part in ops.robe_bags_backward_sparse(gradient, *arguments)] == [0, 0]
    assert ops.robe_bags_weight_gradient(gradient, memory, *arguments).shape == (0,)
    ops.robe_bags_sgd_(memory, gradient, *arguments, 0.1)
    ops.robe_bags_adagrad_(memory, torch.zeros_like(memory), gradient, *arguments, 0.1, 0.0)
    assert torch.equal(memory, torch.ones_like(memory))


@runs_kernels
def test_locations_in_an_array_of_2_31_elements(ops: Ops):
    """Without the array: the list of what is read is the same code."""
    ids, family = torch.tensor([-1, 5, 1 << 40], device=DEVICE), build_hash("independent", 4)
    slots = (1 << 31) - 3
    group = RobePlan(4, 4, 1 << 31, [0], [slots], [], [], [], False, False, False, family.constants([0], 1), [])
    lookup = triton_lookup.Lookup(ids, torch.tensor([0, 1, 3], device=DEVICE), None, 2, [0], pack(group))
    entries = triton_ordered_sum.sort_entries(lookup)
    expected = locate(ids, torch.tensor(0, device=DEVICE), group.location, slots).flatten()
    assert expected.max() > 1 << 30
    assert torch.equal(entries.locations, expected.sort().values)


@runs_kernels
def test_arguments_that_do_not_fit_are_refused(ops: Ops):
    batch = make_batch("two chunks")
    ids, offsets, _, size, positions, plan = batch.arguments
    memory, gradient = batch.module.memory.detach(), batch.gradient()
    with pytest.raises(ValueError, match=r"features \[3, 1, 2\] are not all in a batch"):
        ops.robe_bags(memory, ids, offsets, None, size, [3, 1, 2], plan, False)
    with pytest.raises(ValueError, match="the plan is for 3 features, not 1"):
        ops.robe_bags(memory, ids, offsets, None, size, [0], plan, False)
    with pytest.raises(ValueError, match="2 weights for"):
        ops.robe_bags(memory, ids, offsets, torch.ones(2, device=DEVICE), size, positions, plan, False)
    with pytest.raises(ValueError, match=r"int32 or int64, not torch\.float32"):
        ops.robe_bags(memory, ids.float(), offsets, None, size, positions, plan, False)
    with pytest.raises(ValueError, match="memory must be float32 of 127 elements"):
        ops.robe_bags(memory[1:], *batch.arguments, False)
    with pytest.raises(ValueError, match="gradient must be of shape"):
        ops.robe_bags_backward(gradient[:, 1:], *batch.arguments)
    with pytest.raises(ValueError, match="contiguous to be updated in place"):
        ops.robe_bags_sgd_(torch.zeros(254, device=DEVICE)[::2], gradient, *batch.arguments, 0.1)


@runs_kernels
def test_deterministic_gradients_repeat_to_the_bit(ops: Ops):
    """Many bags of few ids: every element is a sum of many, whose order shows in the last bits."""
    batch = make_batch("short last chunk", batch=50 if INTERPRETED else 100_003, memory_size=61)
    gradient = batch.gradient()
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (ops.robe_bags_backward(gradient, *batch.arguments) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    slots, values = ops.robe_bags_backward_sparse(gradient, *batch.arguments)
    assert torch.equal(first, second)
    torch.testing.assert_close(first[slots], values)


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
@pytest.mark.slow
def test_in_triton_s_interpreter():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout


class Target:
    """A GPU that is not here, as far as the compiler asks for it."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability  # a device of its own for each, for what was compiled is kept by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


@pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted in this process")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the tests on the GPU compile them")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", ["one chunk", "both"])
def test_kernels_compile(name: str, capability: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """What the interpreter lets pass, the compiler may not: types, layouts, a pass that fails."""
    compiled = set()

    def compile_only(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        assert "ptx" in kernel.warmup(*arguments, grid=(programs,), **constants).asm
        compiled.add(kernel.fn.__name__)

    for module in (triton_lookup, triton_ordered_sum, triton_robe_bags):
        monkeypatch.setattr(module, "launch", compile_only)
    monkeypatch.setattr(triton.runtime.driver, "_active", Target(capability))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    batch = make_batch(name, PoolingType.MEAN, weighted=True)
    memory, gradient, ops = batch.module.memory.detach(), batch.gradient(), triton_robe_bags
    ops.robe_bags(memory, *batch.arguments, False)
    ops.robe_bags_weight_gradient(gradient, memory, *batch.arguments)
    ops.robe_bags_adagrad_(memory, memory.clone(), gradient, *batch.arguments, 0.1, 0.0)
    ops.robe_bags_backward_sparse(gradient, *batch.arguments)
    kernels = {"pool_bags", "dot_rows", "add_gradient", "step_adagrad", "_list_entries", "_sum_entries"}
    assert compiled == kernels
