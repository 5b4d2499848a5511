"""The report of proofs: a claim can fail. What needs no quiet machine is proven in test_window.py as well."""

import json

import pytest

from launch.netlab import validation
from launch.netlab.validation import print_proofs
from launch.validate_timing import main
from recsys.bench.timing_proofs import Proof, prove_delay, prove_rate


def test_a_proof_holds_within_its_tolerance():
    assert Proof("x", 10.0, 10.9, "ms", 1.0).holds
    assert not Proof("x", 10.0, 11.1, "ms", 1.0).holds
    assert not Proof("x", 10.0, 8.9, "ms", 1.0).holds


def test_what_the_network_has_to_take():
    rate = prove_rate({1_000_000: 10.0, 3_000_000: 26.2}, rate_mbit=1000.0)
    assert rate.expected == pytest.approx(16.0), "2 MB are 16 Mbit"
    assert rate.holds
    delay = prove_delay({1000.0: 2.3, 6000.0: 12.4}, 64, trips=2)
    assert (delay.expected, delay.measured) == (pytest.approx(10.0), pytest.approx(10.1))


def test_the_table_says_what_does_not_hold(capsys, monkeypatch):
    proofs = [Proof("(d) bytes", 1000, 1000, "B", 0), Proof("(a) parts", 10.0, 12.0, "ms", 0.1)]
    print_proofs(proofs)
    said = capsys.readouterr().out
    assert "1,000 B" in said
    assert "does not hold" in said
    assert "1 of 2 hold" in said
    monkeypatch.setattr(validation, "prove", lambda steps: proofs)
    with pytest.raises(SystemExit) as ended:
        main(["--json"])
    assert ended.value.code == 1
    assert [p["holds"] for p in json.loads(capsys.readouterr().out)] == [True, False]
