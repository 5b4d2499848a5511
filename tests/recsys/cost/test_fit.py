"""Steps made from known constants: the fit finds them again, bears noise and disturbed trials, and predicts what it has
not seen."""

import copy
import json
from statistics import median

import numpy as np
import pytest

from configs.load import ConfigError
from recsys.cost import fit as module
from recsys.cost.crossover import Arm
from recsys.cost.fit import (
    FOLDS,
    CostFit,
    count_bytes,
    describe_errors,
    predict_held_out,
    ratio_errors,
    read_steps,
    worst_byte_error,
)
from tests.recsys.cost.fake_crossover import ARRAY, COMPUTING, FIXED, TRIPS, WIRE, make_arm, make_document


def disturbed(document: dict, factor) -> dict:
    document = copy.deepcopy(document)
    for index, trial in enumerate(document["cells"]):
        for setup in trial["setups"]:
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
    steps = read(make_document())
    assert len(steps) == 3 * 3 + 5 * 3 * 5
    assert constants(CostFit(steps)) == pytest.approx(expected(), rel=1e-6)
    for fold in FOLDS:
        assert max(abs(p.error) for p in predict_held_out(steps, fold)) < 1e-6


def test_what_is_left_out_is_not_seen(read):
    """A network twice as slow as the others say is predicted as they say."""
    document = make_document()
    slow = [i for i, t in enumerate(document["cells"]) if t["network"] and t["network"]["rate_mbit"] == 100]
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

    monkeypatch.setattr(module, "CostFit", Recorded)
    steps = read(make_document())
    predict_held_out(steps, "network")
    assert [len(trials) for trials in fitted] == [15] * 5  # of 18
    predict_held_out(steps, "batch size")
    assert [len(trials) for trials in fitted[5:]] == [12] * 3
    assert [{batch for _, batch in trials} for trials in fitted[5:]] == [{2048, 8192}, {512, 8192}, {512, 2048}]


def test_noise_stays_noise(read):
    random = np.random.default_rng(1)
    steps = read(disturbed(make_document(), lambda _: random.lognormal(0, 0.1)))
    for fold in FOLDS:
        errors = [abs(p.error) for p in predict_held_out(steps, fold)]
        assert median(errors) < 0.15
        assert np.percentile(errors, 90) < 0.35
    assert constants(CostFit(steps))["wire"] == pytest.approx(WIRE, rel=0.1)


def test_disturbed_trials_do_not_move_the_constants(read):
    """Two trials of eighteen took four times as long: what another job on the machine does."""
    found = constants(CostFit(read(disturbed(make_document(), lambda i: 4.0 if i in (2, 7) else 1.0))))
    assert found == pytest.approx(expected(), rel=0.1)


def test_ratios_bear_what_slows_a_whole_trial(read):
    random = np.random.default_rng(3)
    factors = random.lognormal(0, 0.6, size=18)
    found = predict_held_out(read(disturbed(make_document(), lambda i: factors[i])), "network")
    assert median(map(abs, ratio_errors(found))) < 0.5 * median(abs(p.error) for p in found)


def test_constants_are_never_negative(read):
    random = np.random.default_rng(2)
    fit = CostFit(read(disturbed(make_document(), lambda _: random.uniform(0.2, 5))))
    assert min(fit.values) >= 0
    assert all(constant.meaning and constant.unit for constant in fit.constants())


def test_bytes_by_formula_are_compared_with_counted_ones(read):
    steps = read(make_document())
    assert worst_byte_error(steps) == pytest.approx(1e-5, rel=0.01)
    document = make_document()
    document["cells"][4]["setups"][0]["bytes_per_step"]["all_to_all"] *= 2
    assert (worst_byte_error(read(document)) or 0) > 0.3
    assert worst_byte_error([s for s in steps if s.ranks == 1]) is None


def test_bytes_by_hand():
    """As the profile counted them on two ranks at batch 2,048, 26 tables of 16 columns; splits of 48 bytes aside."""
    arm = make_arm("table_wise", 1, 2048, 1000, 50) | {"embedding_parameters": 54_000}

    def count(**changes):
        return count_bytes(Arm(**arm | changes))

    assert count() == {"all_to_all": 3_833_904 - 48, "all_reduce": 110_404}
    assert count(sharding="row_wise") == {
        "all_to_all": 639_024 - 48,
        "all_reduce": 3_518_276,
        "all_gather": 1_703_936,
    }
    assert count(placement="replicate") == {"all_reduce": 110_404 + 4 * 54_000}
    assert count(world_size=1) == {}


def test_a_rate_far_from_what_was_asked_is_taken_as_found(read):
    document = make_document()
    for cell in document["cells"]:
        if cell["network"] and cell["network"]["rate_mbit"] == 10_000:
            cell["network"]["measured_rate_mbit"] = 4000
    rates = {step.network: step.rate for step in read(document)}
    assert rates["10000 Mbit/s, 50 µs"] == pytest.approx(4000 * 1e6 / 8 / 1e3)
    assert rates["1000 Mbit/s, 50 µs"] == pytest.approx(1000 * 1e6 / 8 / 1e3)


def test_too_little_is_said(read):
    steps = read(make_document())
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
        ("[]", "not a crossover.json of netlab: top: Input should be a valid dictionary"),
        ('{"cells": [{"network": null, "global_batch_size": 8}]}', "cells.0.setups: Field required"),
        ('{"cells": [{"network": null, "global_batch_size": 8, "setups": [{"label": "x"}]}]}', "cells.0.setups.0.side"),
    ],
)
def test_a_file_that_is_none_of_netlabs_is_named(tmp_path, text, said):
    path = tmp_path / "c.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said) as error:
        read_steps(path)
    assert str(path) in str(error.value)


def test_what_cannot_be_read_is_named(tmp_path, read):
    with pytest.raises(ConfigError, match="No such file"):
        read_steps(tmp_path / "none.json")
    document = make_document()
    document["cells"][3]["setups"][1]["step_ms"]["median"] = 0.0
    with pytest.raises(ConfigError, match=r"cells.3.setups.1.step_ms.median: Input should be greater than 0"):
        read(document)
    document = make_document()
    document["cells"][3]["setups"][1]["collectives_per_step"]["broadcast"] = 1
    with pytest.raises(ConfigError, match=r"unknown collectives \['broadcast'\]; known: all_to_all"):
        read(document)
