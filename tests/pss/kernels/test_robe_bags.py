"""pss::robe_bags on the CPU: forward and every gradient, against plain PyTorch in float64.

The rule for errors: at most twice that of plain PyTorch in float32 (gradients three times), both against float64.
"""

import copy
import threading
from collections.abc import Iterator
from enum import IntEnum
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torchrec.modules.embedding_configs import PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from pss.kernels import plan, robe_bags
from pss.kernels.plan import Array, Number, pack, unpack
from pss.methods.robe import RobeEmbeddingBagCollection
from tests.pss.jagged import random_kjt, table
from tests.pss.kernels.lookups import LOOKUPS, build, in_float64, random_ids

pytestmark = pytest.mark.skipif(not robe_bags.is_available("cpu"), reason="no C++ compiler: there are no CPU kernels")

FLOOR = 1e-6


@pytest.fixture
def nan_in_new_memory() -> Iterator[None]:
    """An element that a kernel leaves unwritten is NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def run(module: RobeEmbeddingBagCollection, features: KeyedJaggedTensor, gradient: Tensor) -> list[Tensor | None]:
    """Output, gradient of memory, gradient of the weights."""
    weights = features.weights_or_none()
    if weights is not None:
        weights = weights.detach().requires_grad_()
        features = KeyedJaggedTensor(features.keys(), features.values(), weights, offsets=features.offsets())
    module.memory.grad = None
    output = module(features).values()
    output.backward(gradient)
    assert module.memory.grad is not None
    return [output.detach(), module.memory.grad, None if weights is None else weights.grad]


def assert_as_exact(kernel: list[Tensor | None], plain: list[Tensor | None], exact: list[Tensor | None]) -> None:
    for ours, theirs, truth, factor in zip(kernel, plain, exact, (2, 3, 3), strict=True):
        if truth is None:
            assert ours is None
            continue
        assert ours is not None
        assert theirs is not None
        ours, theirs = ours.to_dense().double(), theirs.to_dense().double()
        assert ours.shape == truth.shape
        scale = truth.abs().max() if truth.numel() else 1.0
        allowed = factor * (theirs - truth).abs().max() + FLOOR * scale if truth.numel() else 0.0
        assert not truth.numel() or (ours - truth).abs().max() <= allowed


@pytest.mark.parametrize("name", LOOKUPS)
@pytest.mark.parametrize(
    ("max_length", "weighted", "pooling", "ids_dtype"),
    [
        (0, False, PoolingType.SUM, torch.int64),
        (0, True, PoolingType.MEAN, torch.int32),
        (4, False, PoolingType.MEAN, torch.int64),
        (4, True, PoolingType.SUM, torch.int32),
        (9, True, PoolingType.MEAN, torch.int64),
    ],
)
@pytest.mark.usefixtures("nan_in_new_memory")
def test_errors_are_those_of_plain_pytorch(
    name: str, max_length: int, weighted: bool, pooling: PoolingType, ids_dtype: torch.dtype, threads: int
):
    kernel, plain = (build(name, weighted, pooling, kernel=kind) for kind in ("auto", "plain"))
    assert kernel._has_kernel(0)
    assert not plain._has_kernel(0)
    features = random_ids(max_length, 13, seed=1, weighted=weighted, ids_dtype=ids_dtype)
    gradient = torch.randn(13, sum(kernel._embedding_dims), generator=torch.Generator().manual_seed(2))
    exact = list(in_float64(kernel, features, gradient))
    for form in ("dense", "sparse"):
        kernel.gradient = plain.gradient = form
        assert_as_exact(run(kernel, features, gradient), run(plain, features, gradient), exact)


@pytest.mark.parametrize("name", LOOKUPS)
def test_sparse_gradient_is_plain_pytorchs(name: str, threads: int):
    """Sorted slots, once each, those of ids without influence included; plain PyTorch also sends zeros for what a last,
    shorter chunk leaves of its block."""
    features = random_ids(3, 8, seed=5, weighted=True, ids_dtype=torch.int64)
    features.weights()[::3] = 0.0
    gradients = []
    for kind in ("auto", "plain"):
        module = build(name, True, kernel=kind, gradient="sparse")
        (gradient,) = torch.autograd.grad(module(features).values().sum(), module.memory)
        assert gradient.is_coalesced()
        gradients.append(gradient)
    ours, theirs = gradients
    torch.testing.assert_close(ours.to_dense(), theirs.to_dense(), rtol=1e-5, atol=1e-5)
    (own,), (all_slots,) = ours.indices(), theirs.indices()
    assert (own.diff() > 0).all()
    if module.embedding_bag_configs()[0].embedding_dim % module.options.block_size == 0:
        assert torch.equal(own, all_slots)
    assert torch.isin(own, all_slots).all()


@settings(max_examples=60, deadline=None)
@given(
    dim=st.integers(1, 40),
    block_size=st.integers(1, 40),
    extra=st.integers(0, 3000),
    batch=st.integers(1, 9),  # TorchRec itself cannot take an empty batch apart
    max_length=st.integers(0, 5),
    flags=st.tuples(*[st.booleans()] * 5),
    family=st.sampled_from(["independent", "affine", "authors"]),
    threads=st.integers(1, 5),
    seed=st.integers(0, 2**32),
)
def test_any_lookup(
    dim: int, block_size: int, extra: int, batch: int, max_length: int, flags: tuple[bool, ...], family: str,
    threads: int, seed: int,
):  # fmt: skip
    signed, weighted, is_mean, flattened, is_sparse = flags
    pooling = PoolingType.MEAN if is_mean else PoolingType.SUM
    tables = [table("a", 40, dim, ["a", "b"], pooling), table("c", 7, dim, ["c", "a"], pooling)]
    kernel, plain = (
        RobeEmbeddingBagCollection(
            copy.deepcopy(tables), weighted, memory_size=block_size + extra, block_size=block_size, signed=signed,
            hash_family=family, flattened=flattened or None, seed=seed, init_scale=1.0, kernel=kind,
            gradient="sparse" if is_sparse else "dense",
        )
        for kind in ("auto", "plain")
    )  # fmt: skip
    features = random_kjt(["b", "a", "c"], batch, max_length=max_length, weighted=weighted, seed=seed)
    gradient = torch.randn(batch, 4 * dim, generator=torch.Generator().manual_seed(seed))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = [run(module, features, gradient) for module in (kernel, plain)]
    finally:
        torch.set_num_threads(before)
    for ours, theirs in zip(*found, strict=True):
        if ours is not None and theirs is not None:
            torch.testing.assert_close(ours.to_dense(), theirs.to_dense(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("memory_size", [5_000, 600_000, (4 << 20) + 17])  # in L2, in L3, and in neither
@pytest.mark.parametrize(("dim", "block_size"), [(64, 4), (64, 8), (40, 8), (64, 16), (64, 32), (60, 12)])
@pytest.mark.parametrize("max_length", [0, 2])
def test_large_batches(memory_size: int, dim: int, block_size: int, max_length: int, threads: int):
    """Outputs of 16 MiB and more, which are written past the caches, from M wherever it is."""
    rows = 3400 if max_length == 0 else 300
    tables = [table(name, 10**6, dim) for name in "abcdefghijklmnopqrstuvwxyzABCDEFGH"]
    kernel, plain = (
        RobeEmbeddingBagCollection(
            tables, memory_size=memory_size, block_size=block_size, init_scale=1.0, gradient="dense", kernel=kind
        )
        for kind in ("auto", "plain")
    )
    features = random_kjt([t.name for t in tables], rows, max_id=10**6, max_length=max_length)
    gradient = torch.randn(rows, len(tables) * dim)
    (out, summed, _), (expected, exact, _) = (run(module, features, gradient) for module in (kernel, plain))
    torch.testing.assert_close(out, expected, rtol=0, atol=0 if max_length == 0 else 1e-5)
    torch.testing.assert_close(summed, exact, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("size", [300, 70_000])  # a copy for every thread, and buckets
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_two_threads_repeat_to_the_bit(size: int, kind: str, threads: int):
    module = RobeEmbeddingBagCollection(
        [table("a", 10**6, 64)], memory_size=size, block_size=16, gradient=kind, init_scale=1.0
    )
    features = random_kjt(["a"], 700, max_id=10**6, max_length=3)
    gradient = torch.randn(700, 64)
    first = run(module, features, gradient)[1]
    assert first is not None
    for _ in range(5):
        again = run(module, features, gradient)[1]
        assert again is not None
        assert torch.equal(first.to_dense(), again.to_dense())


def test_buckets_sum_in_the_order_of_the_batch_whatever_the_threads():
    module = RobeEmbeddingBagCollection(
        [table("a", 10**6, 64)], memory_size=60_000, block_size=16, init_scale=1.0, gradient="sparse"
    )
    features, gradient, found = random_kjt(["a"], 500, max_id=10**6, max_length=3), torch.randn(500, 64), []
    before = torch.get_num_threads()
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        found.append(run(module, features, gradient)[1])
    torch.set_num_threads(before)
    assert all(torch.equal(found[0].to_dense(), other.to_dense()) for other in found)


def batch_of(module: RobeEmbeddingBagCollection, features: KeyedJaggedTensor) -> tuple:
    places = [features.keys().index(name) for name in module._groups[0].feature_names]
    return (
        features.values(), features.offsets(), features.weights_or_none(), features.stride(), places,
        module._packed[0],
    )  # fmt: skip


@pytest.mark.parametrize("name", ["Z = 8", "flattened, Z > d", "tiers and private rows"])
@pytest.mark.parametrize("weighted", [False, True])
def test_operators_keep_pytorchs_rules(name: str, weighted: bool):
    module = build(name, weighted)
    features = random_ids(3, 4, seed=1, weighted=weighted, ids_dtype=torch.int64)
    batch, memory = batch_of(module, features), module.memory.detach()
    out = torch.ops.pss.robe_bags(memory, *batch, False)
    gradient = torch.randn_like(out)
    ops = torch.ops.pss
    torch.library.opcheck(ops.robe_bags, (memory.clone().requires_grad_(), *batch, False))
    torch.library.opcheck(ops.robe_bags_backward, (gradient, *batch))
    torch.library.opcheck(ops.robe_bags_backward_sparse, (gradient, *batch))
    torch.library.opcheck(ops.robe_bags_weight_gradient, (gradient, memory, *batch))
    torch.library.opcheck(ops.robe_bags_sgd_, (memory.clone(), gradient, *batch, 0.1))
    torch.library.opcheck(ops.robe_bags_adagrad_, (memory.clone(), memory.abs(), gradient, *batch, 0.1, 1e-8))


def test_gradients_are_differentiable_again():
    """The lookup is linear in memory: its gradient's gradient is the lookup."""
    module = build("odd Z", gradient="dense")
    features = random_ids(3, 4, seed=1, weighted=False, ids_dtype=torch.int64)
    out = module(features).values()
    cotangent = torch.randn_like(out, requires_grad=True)
    (gradient,) = torch.autograd.grad(out, module.memory, cotangent, create_graph=True)
    direction = torch.randn_like(gradient)
    (second,) = torch.autograd.grad(gradient, cotangent, direction)
    with torch.no_grad():
        module.memory.copy_(direction)
        torch.testing.assert_close(second, module(features).values())


def test_graphs_hold_the_operator():
    module = build("Z = 16", gradient="dense")
    features = random_ids(0, 4, seed=1, weighted=False, ids_dtype=torch.int64)
    expected = module(features).values()

    def lookup(ids: Tensor) -> Tensor:
        return module(KeyedJaggedTensor(features.keys(), ids, lengths=features.lengths())).values()

    traced = make_fx(lookup)(features.values())
    assert torch.ops.pss.robe_bags.default in {node.target for node in traced.graph.nodes}
    assert torch.equal(traced(features.values()), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(features).values().dtype == torch.float32
    with torch.inference_mode():
        assert torch.equal(module(features).values(), expected)
    fake = torch.empty(module.memory_size, device="meta")
    batch = [value.to("meta") if isinstance(value, Tensor) else value for value in batch_of(module, features)]
    assert torch.ops.pss.robe_bags(fake, *batch, False).shape == expected.shape


def test_memory_may_start_anywhere_and_batches_be_empty():
    module = build("Z = 16")
    with torch.no_grad():
        storage = torch.empty(module.memory_size + 1)
        storage[1:] = module.memory
        shifted = storage[1:]
    features = random_ids(0, 5, seed=1, weighted=False, ids_dtype=torch.int64)
    batch = batch_of(module, features)
    expected = torch.ops.pss.robe_bags(module.memory, *batch, False)
    assert torch.equal(torch.ops.pss.robe_bags(shifted, *batch, False), expected)
    for max_length in (0, 3):
        empty = random_ids(max_length, 0, seed=1, weighted=False, ids_dtype=torch.int64)
        out, gradient, _ = run(module, empty, torch.empty(0, 5 * 64))
        assert out is not None
        assert out.shape == (0, 5 * 64)
        assert gradient is not None
        assert not gradient.to_dense().any()


def test_a_batch_that_lies_about_itself_is_refused():
    module = build("Z = 8")
    ids, offsets, _, batch_size, places, packed = batch_of(
        module, random_ids(0, 4, seed=1, weighted=False, ids_dtype=torch.int64)
    )

    def look_up(ids=ids, offsets=offsets, weights=None, places=places, packed=packed, memory=module.memory) -> None:
        torch.ops.pss.robe_bags(memory, ids, offsets, weights, batch_size, places, packed, False)

    look_up()
    for wrong, what in (
        ({"offsets": offsets + 1}, "offsets are not those of the ids"),
        ({"places": [9, *places[1:]]}, "feature 9 is not in the batch"),
        ({"places": places[1:]}, "the plan is for 5 features"),
        ({"weights": torch.ones(3)}, "one weight for every id"),
        ({"ids": ids.float()}, "ids must be int32 or int64"),
        ({"packed": [*packed, 0]}, "the packed plan has"),
        ({"memory": module.memory[1:]}, "memory has 1008 elements, not 1009"),
        ({"memory": module.memory.double()}, "memory must be float32"),
    ):
        with pytest.raises(RuntimeError, match=what):
            look_up(**wrong)


def test_modules_run_side_by_side():
    """There is no scratch that two lookups in one process could share."""
    modules = [build("Z = 16", gradient="dense"), build("odd Z", gradient="dense")]
    features = [random_ids(4, 50, seed=k, weighted=False, ids_dtype=torch.int64) for k in range(2)]
    gradients = [torch.randn(50, sum(module._embedding_dims)) for module in modules]
    alone = [run(*parts) for parts in zip(modules, features, gradients, strict=True)]
    failures = []

    def repeat(k: int) -> None:
        for _ in range(30):
            found = run(modules[k], features[k], gradients[k])
            if not all(a is b or torch.equal(a, b) for a, b in zip(found, alone[k], strict=True)):  # type: ignore[arg-type]
                failures.append(k)

    workers = [threading.Thread(target=repeat, args=(k,)) for k in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


@pytest.mark.parametrize("name", LOOKUPS)
def test_packed_plans_are_read_back(name: str):
    group = build(name)._plan[0]
    read = unpack(pack(group))
    family = {"authors": "affine"}.get(group.location.family, group.location.family)  # they differ in their keys only
    signs = [constants._replace(family=family) for constants in group.signs]
    assert read == group._replace(location=group.location._replace(family=family), signs=signs)


def test_a_plan_whose_fields_have_moved_is_refused(monkeypatch: pytest.MonkeyPatch):
    """The bug that the one definition guards against, planted: two numbers change places after the kernel was built."""
    module = build("Z = 8")
    ids, offsets, weights, batch_size, positions, packed = batch_of(
        module, random_ids(3, 4, seed=1, weighted=False, ids_dtype=torch.int64)
    )
    places = Number.__members__ | {"FEATURES": Number.CHUNKS, "CHUNKS": Number.FEATURES}
    moved = IntEnum("Number", {name: int(place) for name, place in places.items()})
    with monkeypatch.context() as patch:
        patch.setattr(plan, "Number", moved)
        patch.setattr(plan, "LAYOUT", plan.identify_layout(moved, Array))
        repacked = pack(module._plan[0])
        assert [repacked[moved[name]] for name in list(places)[1:]] == [packed[n] for n in list(Number)[1:]]
    with pytest.raises(RuntimeError, match="another layout"):
        torch.ops.pss.robe_bags(module.memory, ids, offsets, weights, batch_size, positions, repacked, False)
    with pytest.raises(ValueError, match="another layout"):
        unpack(repacked)


def test_features_are_found_without_searching_the_batch_for_each():
    """Comparisons of names a step grow with the features, not with their square."""

    class Name(str):
        compared: ClassVar[int] = 0
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            Name.compared += 1
            return str.__eq__(self, other)

    names = [f"f{k}" for k in range(300)]
    module = RobeEmbeddingBagCollection([table(name, 9, 4) for name in names], memory_size=40, block_size=4)
    module._groups[0].feature_names[:] = map(Name, reversed(names))
    keys = [Name(name) for name in names]
    features = KeyedJaggedTensor(keys, torch.zeros(300, dtype=torch.int64), lengths=torch.ones(300, dtype=torch.int64))
    Name.compared = 0
    module._pooled(0, features)
    assert Name.compared <= 10 * len(names)
