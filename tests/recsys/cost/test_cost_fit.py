"""Steps made from known constants: the fit finds them again, bears noise and disturbed cells, and predicts what it has
not seen."""

import copy
import json
from statistics import median

import numpy as np
import pytest

from configs.load import ConfigError
from recsys.cost import cost_fit
from recsys.cost.cost_fit import FOLDS, CostFit, describe_errors, predict_held_out, ratio_errors
from recsys.cost.measured_steps import count_bytes, read_steps, worst_byte_error
from tests.recsys.cost.made_crossover import ARRAY, COMPUTING, FIXED, TRIPS, WIRE, made_document


def disturbed(document: dict, factor) -> dict:
    document = copy.deepcopy(document)
    for index, cell in enumerate(document["cells"]):
        for setup in cell["setups"]:
            scale = factor(index)
            setup["step_ms"] = {key: ms * scale for key, ms in setup["step_ms"].items()}
    return document


@pytest.fixture
def read(tmp_path):
    def read_document(document):
        path = tmp_path / "crossover.json"
        path.write_text(json.dumps(document))
        return read_steps(path)

    return read_document


def constants(fit: CostFit) -> dict[str, float]:
    return {constant.name: constant.value for constant in fit.constants()}


def expected() -> dict[str, float]:
    names = {kind: kind.replace("_", "-") for kind in FIXED}
    return {
        **{f"fixed, {names[kind]}": value for kind, value in FIXED.items()},
        **{f"computing, {names[kind]}": value for kind, value in COMPUTING.items()},
        "array": ARRAY,
        "trips": TRIPS,
        "wire": WIRE,
    }


def test_constants_put_in_come_out(read):
    steps = read(made_document())
    assert len(steps) == 3 * 3 + 5 * 3 * 5
    assert constants(CostFit(steps)) == pytest.approx(expected(), rel=1e-6)
    for fold in FOLDS:
        assert max(abs(p.error) for p in predict_held_out(steps, fold)) < 1e-6


def test_what_is_left_out_is_not_seen(read):
    """A network twice as slow as the others say is predicted as they say."""
    document = made_document()
    slow = [i for i, c in enumerate(document["cells"]) if c["network"] and c["network"]["rate_mbit"] == 100]
    found = predict_held_out(read(disturbed(document, lambda i: 2.0 if i in slow else 1.0)), "network")
    errors = {p.step.network: [] for p in found}
    for p in found:
        errors[p.step.network].append(p.error)
    assert errors["100 Mbit/s, 1000 µs"] == pytest.approx([-0.5] * 15, abs=0.1)
    assert set(errors) == {"loopback", "10000 Mbit/s, 50 µs", "1000 Mbit/s, 50 µs", "1000 Mbit/s, 1000 µs",
                           "100 Mbit/s, 1000 µs"}  # fmt: skip


def test_a_fold_is_fitted_without_what_it_predicts(read, monkeypatch):
    fitted = []

    class Recorded(CostFit):
        def __init__(self, steps):
            fitted.append({(step.network, step.global_batch_size) for step in steps})
            super().__init__(steps)

    monkeypatch.setattr(cost_fit, "CostFit", Recorded)
    steps = read(made_document())
    predict_held_out(steps, "network")
    assert [len(cells) for cells in fitted] == [15] * 5  # of 18 cells
    predict_held_out(steps, "batch size")
    assert [len(cells) for cells in fitted[5:]] == [12] * 3
    assert [{batch for _, batch in cells} for cells in fitted[5:]] == [{2048, 8192}, {512, 8192}, {512, 2048}]


def test_noise_stays_noise(read):
    random = np.random.default_rng(1)
    steps = read(disturbed(made_document(), lambda _: random.lognormal(0, 0.1)))
    for fold in FOLDS:
        errors = [abs(p.error) for p in predict_held_out(steps, fold)]
        assert median(errors) < 0.15
        assert np.percentile(errors, 90) < 0.35
    assert constants(CostFit(steps))["wire"] == pytest.approx(WIRE, rel=0.1)


def test_disturbed_cells_do_not_move_the_constants(read):
    """Two cells of eighteen took four times as long: what another job on the machine does."""
    found = constants(CostFit(read(disturbed(made_document(), lambda i: 4.0 if i in (2, 7) else 1.0))))
    assert found == pytest.approx(expected(), rel=0.1)


def test_ratios_bear_what_slows_a_whole_cell(read):
    random = np.random.default_rng(3)
    factors = random.lognormal(0, 0.6, size=18)
    found = predict_held_out(read(disturbed(made_document(), lambda i: factors[i])), "network")
    assert median(map(abs, ratio_errors(found))) < 0.5 * median(abs(p.error) for p in found)


def test_constants_are_never_negative(read):
    random = np.random.default_rng(2)
    fit = CostFit(read(disturbed(made_document(), lambda _: random.uniform(0.2, 5))))
    assert min(fit.values) >= 0
    assert all(constant.meaning and constant.unit for constant in fit.constants())


def test_bytes_by_formula_are_compared_with_counted_ones(read):
    steps = read(made_document())
    assert worst_byte_error(steps) == pytest.approx(1e-5, rel=0.01)
    document = made_document()
    document["cells"][4]["setups"][0]["bytes_per_step"]["all_to_all"] *= 2
    assert (worst_byte_error(read(document)) or 0) > 0.3
    assert worst_byte_error([s for s in steps if s.ranks == 1]) is None


def test_bytes_by_hand():
    """As the profile counted them on two ranks at batch 2,048, 26 tables of 16 columns; splits of 48 bytes aside."""
    sharded = {"world_size": 2, "placement": "shard", "sharding": "table_wise", "num_tables": 26, "embedding_dim": 16,
               "dense_parameters": 27_601, "embedding_parameters": 54_000, "global_batch_size": 2048}  # fmt: skip
    assert count_bytes(sharded) == {"all_to_all": 3_833_904 - 48, "all_reduce": 110_404}
    assert count_bytes(sharded | {"sharding": "row_wise"}) == {
        "all_to_all": 639_024 - 48,
        "all_reduce": 3_518_276,
        "all_gather": 1_703_936,
    }
    assert count_bytes(sharded | {"placement": "replicate"}) == {"all_reduce": 110_404 + 4 * 54_000}
    assert count_bytes(sharded | {"world_size": 1}) == {}


def test_a_rate_far_from_what_was_asked_is_taken_as_found(read):
    document = made_document()
    for cell in document["cells"]:
        if cell["network"] and cell["network"]["rate_mbit"] == 10_000:
            cell["network"]["measured_rate_mbit"] = 4000
    rates = {step.network: step.rate for step in read(document)}
    assert rates["10000 Mbit/s, 50 µs"] == pytest.approx(4000 * 1e6 / 8 / 1e3)
    assert rates["1000 Mbit/s, 50 µs"] == pytest.approx(1000 * 1e6 / 8 / 1e3)


def test_too_little_is_said(read):
    steps = read(made_document())
    with pytest.raises(ValueError, match="table_wise: measured at one batch size only"):
        CostFit([step for step in steps if step.kind != "table_wise" or step.global_batch_size == 512])
    fit = CostFit([step for step in steps if step.kind != "single"])
    with pytest.raises(ValueError, match="single was not among"):
        fit.predict_ms(next(step for step in steps if step.kind == "single"))
    one = [step for step in steps if step.network in ("", "loopback")]
    assert predict_held_out(one, "network") == []
    assert "nothing could be left out" in describe_errors([])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not valid JSON"),
        ("[]", "has no list 'cells'"),
        ('{"cells": [{"network": null}]}', "a cell has no 'setups'"),
        ('{"cells": [{"network": null, "setups": [{"label": "x"}]}]}', "a cell has no 'step_ms'"),
    ],
)
def test_a_file_that_is_none_of_netlabs_is_named(tmp_path, text, said):
    path = tmp_path / "c.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said) as error:
        read_steps(path)
    assert str(path) in str(error.value)


def test_a_missing_file_and_a_step_of_no_time_are_named(tmp_path, read):
    with pytest.raises(ConfigError, match="No such file"):
        read_steps(tmp_path / "none.json")
    document = made_document()
    document["cells"][3]["setups"][1]["step_ms"] = {"median": 0.0, "p25": 0.0, "p75": 1.0, "n": 3}
    with pytest.raises(ConfigError, match="row_wise 1: a step of 0 ms"):
        read(document)
