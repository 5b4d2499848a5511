"""Tracing, scripting, compiling, exporting, copying and moving: what TorchRec's module survives, ROBE survives."""

import io
from typing import Any

import pytest
import torch
from torchrec.fx import symbolic_trace
from torchrec.models.dlrm import DLRM
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from pss.methods.robe import RobeEmbeddingBagCollection, cell
from tests.pss.captures import CAPTURES
from tests.pss.jagged import pooled_by_cell, random_kjt, table

KEYS = ["c", "a", "b"]
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "short blocks, signed": {"memory_size": 100, "block_size": 3, "signed": True},
    "circular": {"memory_size": 20, "circular": True},
    "flattened, circular, signed": {"memory_size": 20, "flattened": True, "circular": True, "signed": True},
    "long blocks, signed, affine": {"memory_size": 100, "block_size": 16, "signed": True, "hash_family": "affine"},
}


def build(is_weighted: bool = False, **options: Any) -> RobeEmbeddingBagCollection:
    """Two groups of features, one of them out of the batch's order."""
    return RobeEmbeddingBagCollection(
        [table("a", 10, 8), table("b", 10, 3), table("t", 10, 8, ["c"])], is_weighted, **options
    )


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("is_weighted", [False, True])
def test_captured_module_gives_the_same(capture: str, options: str, is_weighted: bool):
    torch._dynamo.reset()
    module = build(is_weighted, **OPTIONS[options])
    captured = CAPTURES[capture](module, random_kjt(KEYS, 4, weighted=True, seed=1))
    features = random_kjt(KEYS, 4, weighted=True, seed=1)
    expected, got = module(features), captured(features)
    assert got.keys() == expected.keys()
    torch.testing.assert_close(got.values(), expected.values())


@pytest.mark.parametrize("capture", ["fx", "script", "script of fx", "compile"])
def test_captured_module_trains_the_same(capture: str):
    torch._dynamo.reset()
    module = build(True, memory_size=100, signed=True)
    features = random_kjt(KEYS, 4, weighted=True)
    module(features).values().square().sum().backward()
    expected, module.memory.grad = module.memory.grad, None
    CAPTURES[capture](module, features)(features).values().square().sum().backward()
    torch.testing.assert_close(module.memory.grad, expected)


@pytest.mark.parametrize("capture", ["fx", "script", "script of fx", "compile"])
def test_a_graph_of_one_id_per_bag_serves_other_bags(capture: str):
    torch._dynamo.reset()
    module = build(memory_size=100)
    captured = CAPTURES[capture](module, random_kjt(KEYS, 4, weighted=True, seed=1))
    for max_length in (0, 4, 0):
        features = random_kjt(KEYS, 4, max_length=max_length, seed=max_length)
        torch.testing.assert_close(captured(features).values(), module(features).values())


@pytest.mark.parametrize("strict", [True, False])
def test_exported_program_takes_any_number_of_ids(strict: bool):
    module, example = build(memory_size=100), random_kjt(KEYS, 4)
    shapes = torch.export.ShapesCollection()
    shapes[example.values()] = (torch.export.Dim("ids"),)
    dynamic = shapes.dynamic_shapes(module, (example,))
    exported = torch.export.export(module, (example,), dynamic_shapes=dynamic, strict=strict).module()
    for max_length in (0, 2, 9):
        features = random_kjt(KEYS, 4, max_length=max_length, seed=max_length)
        torch.testing.assert_close(exported(features).values(), module(features).values())


@pytest.mark.slow
def test_compiled_code_multiplies_modulo_2_to_the_64():
    """Inductor's C++ must wrap around as eager does, where the standard leaves signed overflow undefined."""
    torch._dynamo.reset()
    module = RobeEmbeddingBagCollection([table("a", 2**63 - 1, 16)], memory_size=1000, signed=True)
    generator = torch.Generator().manual_seed(0)
    ids = torch.cat([torch.randint(0, 2**63 - 1, (62,), generator=generator), torch.tensor([0, 2**63 - 2])])
    features = KeyedJaggedTensor(["a"], ids, lengths=torch.ones(64, dtype=torch.int64))
    compiled = torch.compile(module, fullgraph=True)
    assert torch.equal(compiled(features).values().double(), pooled_by_cell(module, cell, features))


def test_script_can_be_saved():
    module, file = build(memory_size=100), io.BytesIO()
    scripted = torch.jit.script(module)  # pyright: ignore[reportPrivateImportUsage]
    torch.jit.save(scripted, file)  # pyright: ignore[reportPrivateImportUsage]
    file.seek(0)
    loaded = torch.jit.load(file)  # pyright: ignore[reportPrivateImportUsage]
    assert torch.equal(loaded.memory, module.memory)


def test_traced_dlrm_scripts():
    tables = [table("a", 100, 8), table("b", 100, 8)]
    robe: Any = RobeEmbeddingBagCollection(tables)
    model = DLRM(robe, 4, dense_arch_layer_sizes=[8], over_arch_layer_sizes=[5, 1])
    dense, features = torch.rand(3, 4), random_kjt(["a", "b"], 3)
    scripted = torch.jit.script(symbolic_trace(model))  # pyright: ignore[reportPrivateImportUsage]
    torch.testing.assert_close(scripted(dense, features), model(dense, features))


def test_meta_device_in_both_ways():
    given = build(device=torch.device("meta"))
    with torch.device("meta"):
        in_context = build()
    for module in (given, in_context):
        assert module.device == torch.device("meta")
        features = random_kjt(KEYS, 4).to(torch.device("meta"))
        assert module(features).values().device == torch.device("meta")
        assert module(features).values().shape == (4, 19)
    assert build().device == torch.device("cpu")


def test_materialised_from_meta_is_the_module_built_in_place():
    module = build(memory_size=100, seed=3, device=torch.device("meta")).to_empty(device="cpu")
    module.reset_parameters()
    features = random_kjt(KEYS, 4)
    assert torch.equal(module(features).values(), build(memory_size=100, seed=3)(features).values())


def test_reduced_precision_still_returns_fp32():
    module = build(memory_size=100).to(torch.bfloat16)
    for max_length in (4, 0):
        values = module(random_kjt(KEYS, 4, max_length=max_length)).values()
        assert values.dtype == torch.float32
