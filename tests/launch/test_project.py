"""The command: what it prints and writes, and what it refuses before anything is placed."""

import json

import pytest

from launch.cli import EXIT_INTERRUPTED, EXIT_MISTAKE
from launch.project import main as command
from recsys.cost import projection, table_placement
from recsys.cost.machines import MACHINES, MODELS
from recsys.cost.projection import build_scenario
from tests.recsys.cost.fake_crossover import make_document

FEW = ["--model", "criteo_tb", "--gpus", "8,16", "--network-gbit", "200", "--compression", "1000"]


@pytest.fixture(autouse=True)
def _no_planner(monkeypatch):
    monkeypatch.setattr(table_placement, "MAX_PLANNED", 0)


def main(arguments):
    assert command(arguments, standalone_mode=False) is None


def test_from_published_figures_alone(tmp_path, capsys):
    main([*FEW, "--output", str(tmp_path)])
    out = capsys.readouterr().out
    assert "No measurements were given" in out
    assert "Constants fitted" not in out
    for words in ("Published steps, and the model's", "projected steps", "ROBE 1,000×, one GPU", "assumed.fixed_ms",
                  "kWh", "who is the faster", "none of these steps has been run"):  # fmt: skip
        assert words in out
    assert max(map(len, out.split("Assumptions:")[0].splitlines())) <= 160
    document = json.loads((tmp_path / "projection.json").read_text())
    main([*FEW, "--output", str(tmp_path / "copy"), "--json"])
    assert json.loads(capsys.readouterr().out) == document
    assert document["price_per_gpu_hour"] == 4.1
    assert "<html" in (tmp_path / "projection.html").read_text()


def test_with_measurements_the_fit_and_its_errors_are_shown(tmp_path, capsys):
    path = tmp_path / "crossover.json"
    path.write_text(json.dumps(make_document()))
    main([str(path), *FEW, "--output", str(tmp_path / "out")])
    out = capsys.readouterr().out
    assert "Constants fitted to 84 measured and emulated steps" in out
    assert "left out by network: median 0.0%" in out
    assert "left out by batch size: median 0.0%" in out
    assert "fixed, table-wise" in out
    assert "do not enter the projection" in out
    document = json.loads((tmp_path / "out" / "projection.json").read_text())
    assert {p["origin"] for p in document["validation"]["predictions"]} == {"measured", "emulated"}
    page = (tmp_path / "out" / "projection.html").read_text()
    assert "Steps on this machine, predicted and measured" in page


def test_overrides_and_options_reach_the_scenario():
    options = ["--machine", "h100", "--gpus", "64,8", "--batch", "4096,2048", "--optimizer", "adagrad"]
    asked = command.make_context("project", options).params
    for name in ("items", "as_json", "output"):
        del asked[name]
    overrides = ["machine.memory_gb=141", "assumed.h100_price=2.5", "model.ids_per_bag=20"]
    scenario = build_scenario(**asked, overrides=overrides)
    assert (scenario.cost_model.machine.memory_gb, scenario.price, scenario.cost_model.optimizer) == (
        141,
        2.5,
        "adagrad",
    )
    assert (scenario.gpus, scenario.batch_sizes) == ([8, 64], [2048, 4096])
    assert [model.ids_per_bag for model in scenario.models] == [20, 20, 20]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--machine", "v100"], "--machine v100: unknown; known: a100, h100"),
        (["--model", "criteo_tb,2tb"], "--model 2tb: unknown; known: criteo_tb, 1tb, 50tb"),
        (["--gpus", "8,x"], "'--gpus': 'x' is not a valid integer range"),
        (["--gpus", "12"], "--gpus 12: does not fill nodes of 8 GPUs"),
        (["--gpus", "1"], "'--gpus': 1 is not in the range x>=2"),
        (["--network-gbit", "0"], "'--network-gbit': 0.0 is not in the range x>=0.001"),
        (["--compression", "0.5"], "'--compression': 0.5 is not in the range x>=1.001"),
        (["--compression", "nan"], "'--compression': nan: a finite number is expected"),
        (["--batch", "4"], "--batch 4: fewer rows than the 8 GPUs of --gpus"),
        (["--optimizer", "adam"], "--optimizer adam: unknown; known: sgd, adagrad"),
        (["assumed.fixed=1"], "assumed.fixed = 1: unknown key (did you mean fixed_ms?); known: a100_price"),
        (["assumed.fixed_ms=x"], "assumed.fixed_ms = 'x': input should be a valid number"),
        (["machines.memory_gb=1"], "machines.memory_gb=1: neither a crossover.json nor a key of machine"),
        (["none.json"], "none.json: No such file or directory"),
        (["a.json", "b.json"], "b.json: one crossover.json at a time"),
    ],
)
def test_mistakes_end_before_anything_is_written(arguments, said, capsys, tmp_path):
    with pytest.raises(SystemExit) as ended:
        command([*arguments, "--output", str(tmp_path / "out")])
    assert ended.value.code == EXIT_MISTAKE
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_interruption_leaves_nothing_behind(monkeypatch, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(projection, "check_published", interrupt)
    with pytest.raises(SystemExit) as ended:
        command([*FEW, "--output", str(tmp_path / "out")])
    assert ended.value.code == EXIT_INTERRUPTED
    assert not (tmp_path / "out").exists()


def test_help_names_every_machine_and_model(capsys):
    with pytest.raises(SystemExit):
        command(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert f"Machine: {' or '.join(MACHINES)}." in out
    *others, last = MODELS
    assert f"Models, of {', '.join(others)} and {last} (default: all)." in out
