import pytest
import torch

from recsys.optim import optimizer_factory


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sgd", [1 - 0.1 * 2.0, 1 - 0.1 * 2.0 - 0.1 * -1.0]),
        ("adagrad", [1 - 0.1 * 2 / (2 + 1e-3), 1 - 0.1 * 2 / (2 + 1e-3) + 0.1 * 1 / (5**0.5 + 1e-3)]),
        # m = .1·2, v = .001·4, corrected 2 and 4; then m = .9·.2 − .1, v = .003996 + .001, corrected by .19, .001999
        ("adam", [1 - 0.1, 0.9 - 0.1 * (0.08 / 0.19) / (0.004996 / 0.001999) ** 0.5]),
    ],
)
def test_each_rule_is_its_formula(name, expected):
    weight = torch.ones(1, dtype=torch.float64, requires_grad=True)
    optimizer = optimizer_factory(name, 0.1, adagrad_eps=1e-3)([weight])
    for gradient, value in zip((2.0, -1.0), expected, strict=True):
        weight.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        assert weight.item() == pytest.approx(value, abs=1e-7)
