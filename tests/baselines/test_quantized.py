import io
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torchrec.fx import symbolic_trace
from torchrec.modules.embedding_configs import PoolingType

from baselines import full, quantized
from baselines.quantized import QuantizedEmbeddingBagCollection, cell, row_bytes
from pss.method import CompressionRefused, EmbeddingRequest
from tests.pss.jagged import materialise, pooled_by_cell, random_kjt, table

BITS = [16, 8, 4, 2]
KEYS = ["d", "a", "b", "c"]


def mixed_tables():
    """Dimensions that fill FBGEMM's units and not; a shared table and feature, sum and mean."""
    return [
        table("t", 10, 16, ["a", "b"]),
        table("u", 9, 5, ["c"], PoolingType.MEAN),
        table("v", 12, 16, ["c"], PoolingType.MEAN),
        table("w", 10, 1, ["d"]),
        table("x", 11, 16, ["a"]),
    ]


def trained(tables, **options):
    """A module whose rows have different ranges and centres."""
    module = QuantizedEmbeddingBagCollection(tables, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in module.parameters():
            weight.normal_(generator=generator)
            weight *= torch.logspace(-2, 1, len(weight)).unsqueeze(1)
            weight += torch.linspace(-1, 1, len(weight)).unsqueeze(1)
    return module


def quantized_by_numpy(rows, bits):
    """rows (n, d) float32 -> what they are after quantisation, (n, d) float64, and the scale of each, (n, 1)."""
    if bits == 16:
        return rows.astype(np.float16).astype(np.float64), np.abs(rows).max(1, keepdims=True) * 2.0**-10
    constant = np.float32 if bits == 8 else np.float16
    bias = rows.min(1, keepdims=True).astype(constant).astype(np.float64)
    scale = ((rows.max(1, keepdims=True) - bias) / (2**bits - 1)).astype(constant).astype(np.float64)
    codes = np.rint((rows - bias) / np.where(scale == 0, 1, scale)).clip(0, 2**bits - 1)
    return codes * scale + bias, scale


@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("mode", ["train", "eval", "during"])
def test_lookup_equals_cell(bits, mode, is_weighted):
    when = "during" if mode == "during" else "after"
    module = trained(mixed_tables(), is_weighted=is_weighted, bits=bits, when=when).train(mode != "eval")
    for max_length in (4, 0):
        features = random_kjt(KEYS, 3, max_id=9, max_length=max_length, weighted=is_weighted)
        pooled = module(features)
        assert pooled.keys() == ["a@t", "b", "c@u", "c@v", "d", "a@x"]
        torch.testing.assert_close(
            pooled.values().double(), pooled_by_cell(module, cell, features), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("dim", [3, 8, 16, 33])
@pytest.mark.parametrize("bits", BITS)
def test_cells_are_the_nearest_codes(bits, dim):
    """Against numpy: quantised values, and the bound on their error, half a scale and the rounding of its ends."""
    module = trained([table("a", 40, dim)], bits=bits)
    rows = next(module.parameters()).detach().numpy()
    before = materialise(module, cell, 0)
    assert np.array_equal(before, rows)
    found = materialise(module.eval(), cell, 0).numpy()
    expected, scale = quantized_by_numpy(rows, bits)
    away = np.abs(found - expected)
    assert (away > 1e-5 * (1 + np.abs(expected))).mean() < 0.01  # ties may go either way
    assert (away <= 1.001 * scale + 1e-5).all()
    slack = 0 if bits in (8, 16) else 2.0**-11 * (np.abs(rows).max(1, keepdims=True) + 2**bits * scale) + 1e-6
    assert (np.abs(found - rows) <= scale / 2 * 1.001 + 1e-5 + slack).all()


@pytest.mark.parametrize("bits", BITS)
def test_constant_rows_and_zeros_survive(bits):
    module = QuantizedEmbeddingBagCollection([table("a", 3, 8)], bits=bits)
    with torch.no_grad():
        module.weight(8).copy_(torch.tensor([0.0, 0.25, -3.0]).unsqueeze(1).expand(3, 8))
    assert torch.equal(materialise(module.eval(), cell, 0), module.weight(8))


@pytest.mark.parametrize("dim", [3, 4, 5, 8, 16, 30])
@pytest.mark.parametrize("bits", BITS)
def test_stored_bytes_are_those_of_the_packed_rows(bits, dim):
    tables = [table("a", 30, dim), table("b", 20, dim + 1)]
    module = QuantizedEmbeddingBagCollection(tables, bits=bits).eval()
    codes = -(-dim * bits // 8)
    assert 0 <= row_bytes(dim, bits) - codes - {16: 0, 8: 8, 4: 4, 2: 4}[bits] <= 3  # up to a unit of filling
    packed = [module.smaller(dim), module.smaller(dim + 1)]
    assert all(part.dtype == torch.uint8 for part in packed)
    assert module.stored_bytes() == sum(len(part.numpy().tobytes()) for part in packed)
    file = io.BytesIO()
    torch.save(packed, file)
    assert module.stored_bytes() <= len(file.getvalue()) < module.stored_bytes() + 3000
    assert module.compression == 4 * (30 * dim + 20 * (dim + 1)) / module.stored_bytes()


def test_auto_is_the_most_bits_that_reach_the_compression():
    tables = [table("a", 100, 16)]  # 64 bytes a row against 32, 16 + 8, 8 + 4 and 4 + 4
    for compression, bits in ((1, 16), (2, 16), (2.01, 8), (2.66, 8), (2.67, 4), (5.33, 4), (5.34, 2), (8, 2)):
        module = QuantizedEmbeddingBagCollection(tables, compression=compression)
        assert module.bits == bits
        assert module.compression >= compression
    assert QuantizedEmbeddingBagCollection(tables, compression=8 / 3 - 1e-15).bits == 8
    assert QuantizedEmbeddingBagCollection(tables, compression=8 / 3 + 1e-15).bits == 4
    assert QuantizedEmbeddingBagCollection([table("a", 100, 2)], compression=2.0).bits == 16  # no less with fewer
    for options, asked, nearest in (({}, 8.01, 8.0), ({"bits": 8}, 4.0, 2.666)):
        with pytest.raises(CompressionRefused) as refused:
            QuantizedEmbeddingBagCollection(tables, compression=asked, **options)
        assert refused.value.nearest == nearest
        assert QuantizedEmbeddingBagCollection(tables, compression=nearest, **options).compression >= nearest


@pytest.mark.parametrize("when", ["after", "during"])
def test_training_starts_from_the_full_tables(when):
    tables = [table("a", 100, 8), table("b", 30, 5), table("c", 70, 8)]
    request = EmbeddingRequest(compression=2.0, init_scale=0.5, seed=4)
    module = quantized.build(tables, quantized.Options(when=when), request)
    oracle = full.build(tables, full.Options(), EmbeddingRequest(init_scale=0.5, seed=4))
    for index, weight in enumerate(oracle.parameters()):
        first, config = module.first_rows[index], tables[index]
        assert torch.equal(module.weight(config.embedding_dim)[first : first + config.num_embeddings], weight)
    if when == "after":
        features = random_kjt(["a", "b", "c"], 5, max_length=0)
        assert torch.equal(module(features).values(), oracle(features).values())


@pytest.mark.parametrize("bits", BITS)
def test_during_training_the_gradient_passes_the_rounding(bits):
    features = random_kjt(KEYS, 6, max_id=9)
    scale = torch.randn(6, 70, generator=torch.Generator().manual_seed(1))
    gradients, outputs = [], []
    for when in ("after", "during"):
        module = trained(mixed_tables(), bits=bits, when=when)
        outputs.append(module(features).values())
        (outputs[-1] * scale).sum().backward()
        gradients.append([parameter.grad for parameter in module.parameters()])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
    evaluated = trained(mixed_tables(), bits=bits).eval()(features).values()
    assert torch.equal(outputs[1], evaluated)
    assert not torch.equal(outputs[0], evaluated)
    assert not evaluated.requires_grad


def test_small_steps_add_up_during_training():
    """Each is far below half a scale: it must be kept in the row that trains."""
    module = QuantizedEmbeddingBagCollection([table("a", 1, 8)], bits=2, when="during", init_scale=0.0)
    with torch.no_grad():
        module.weight(8).copy_(torch.linspace(0, 3, 8))  # a scale of 1
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    features = random_kjt(["a"], 1, max_id=1, max_length=0)
    before = module(features).values().detach()
    for _ in range(60):
        optimizer.zero_grad()
        module(features).values()[0, 3].neg().backward()
        optimizer.step()
    assert (module(features).values() - before)[0].tolist() == [0, 0, 0, 1, 0, 0, 0, 0]


def test_eval_sees_what_was_trained_loaded_or_moved_since():
    module, other = trained(mixed_tables(), bits=4).eval(), QuantizedEmbeddingBagCollection(mixed_tables(), bits=4)
    features = random_kjt(KEYS, 3, max_id=9)
    first = module(features).values()
    with torch.no_grad():
        next(module.train().parameters()).neg_()
    assert not torch.equal(module.eval()(features).values(), first)
    assert (other.eval()(features).values() - first).abs().max() > 0.1
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(features).values(), module(features).values())
    module.reset_parameters()
    assert module(features).values().abs().max() < 0.1
    before = module._smaller
    assert before is not None
    assert module.to("cpu")._smaller is None


def test_the_state_is_what_trains():
    module = QuantizedEmbeddingBagCollection(mixed_tables(), bits=8).eval()
    module(random_kjt(KEYS, 3, max_id=9))
    state = module.state_dict()
    assert list(state) == ["weight_16", "weight_5", "weight_1", "_extra_state"]
    with pytest.raises(ValueError, match="bits is 4 here and 8 in the state dict"):
        QuantizedEmbeddingBagCollection(mixed_tables(), bits=4).load_state_dict(state)
    with pytest.raises(ValueError, match="when is 'during' here and 'after' in the state dict"):
        QuantizedEmbeddingBagCollection(mixed_tables(), bits=8, when="during").load_state_dict(state)


@pytest.mark.parametrize("when", ["after", "during"])
@pytest.mark.parametrize("bits", BITS)
def test_traces(bits, when):
    module = trained(mixed_tables(), bits=bits, when=when)
    features = random_kjt(KEYS, 3, max_id=9)
    for mode in (True, False):
        expected = module.train(mode)(features).values()
        assert torch.equal(symbolic_trace(module)(features).values(), expected)


def test_made_real_from_the_meta_device():
    module = QuantizedEmbeddingBagCollection(mixed_tables(), device=torch.device("meta"), seed=3)
    module.to_empty(device="cpu").reset_parameters()
    expected = QuantizedEmbeddingBagCollection(mixed_tables(), seed=3)
    assert all(map(torch.equal, module.parameters(), expected.parameters()))


def test_tables_larger_than_the_machine_are_refused():
    with pytest.raises(ValueError, match="that are trained before compression take 32768 GiB, this machine has"):
        QuantizedEmbeddingBagCollection([table("a", 2**40, 8)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 3}, "bits 3 is unknown: known are 16, 8, 4, 2 or 'auto'"),
        ({"when": "never"}, "when 'never' is unknown"),
        (
            {"bits": 8, "tables": [table("a", 10, 2)]},
            "bits = 8: with scale and bias the rows .* are larger than in fp32",
        ),
        ({"compression": 0.5}, "compression must be at least 1 and finite, not 0.5"),
        ({"init_scale": -1.0}, "init_scale must be at least 0, not -1.0"),
    ],
)
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        QuantizedEmbeddingBagCollection(**({"tables": [table("a", 10, 4)]} | arguments))


def test_options_are_checked():
    bad_values: list[dict[str, Any]] = [{"bits": 3}, {"bits": "8"}, {"when": "never"}, {"scale": 1}]
    for bad in bad_values:
        with pytest.raises(ValidationError):
            quantized.Options(**bad)
    for bits in BITS:
        assert quantized.Options(bits=bits).bits == bits
