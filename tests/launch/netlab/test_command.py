"""The sweep: what it measures when asked how, what it refuses, going on where it stopped, and nothing left behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.cli import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_MISTAKE
from launch.netlab import emulated_network
from launch.netlab import trials as module
from launch.netlab.command import main
from launch.netlab.crossover_run import build_sweep, choose_links
from launch.netlab.emulated_network import describe_obstacle
from launch.netlab.trials import LOOPBACK, Sweep, build_trials, load_trial, measure_trial, save_trial
from recsys.cost.crossover import Link

ROOT = Path(__file__).parents[3]
SMALL = ["--network", "500:100", "--batch", "64", "--compression", "100", "--rounds", "2", "--steps", "2"]
TINY = [*SMALL, "data.synthetic.scale=0.001", "data.synthetic.train_rows=2000", "data.synthetic.validation_rows=100"]
TINY += ["data.synthetic.test_rows=100"]
obstacle = describe_obstacle()
needs_network = pytest.mark.skipif(obstacle is not None, reason=obstacle or "")

# Instead of launch.runners.measure_steps: as long a step as the setup has characters, without PyTorch.
STAND_IN = """
import json, os, sys, time
plan, output = sys.argv[1:]
setups = json.load(open(plan))["setups"]
with open(os.environ["LOG"], "a") as log:
    variables = ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME")
    print(*(os.environ[name] for name in variables), len(setups), file=log)
if "FAIL_IN_EMULATED" in os.environ and os.environ["GLOO_SOCKET_IFNAME"] == "link0":
    sys.exit("no more memory")
if os.environ.get("HANG") == os.environ["GLOO_SOCKET_IFNAME"]:
    print(os.getpid(), file=open(os.environ["LOG"] + os.environ["RANK"], "w"), flush=True)
    time.sleep(60)
if os.environ["RANK"] == "0":
    step = lambda ms: {"median": ms, "p25": ms * 0.9, "p75": ms * 1.1, "n": 4}
    sizes = {"num_tables": 26, "embedding_dim": 8, "embedding_parameters": 1000, "dense_parameters": 100}
    sizes |= {"placement": "replicate", "sharding": None, "world_size": 2, "global_batch_size": 64}
    found = [setup | sizes | {"step_ms": step(len(setup["label"]))} for setup in setups]
    json.dump({"version": 1, "environment": {}, "setups": found}, open(output, "w"))
"""


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """The lines that ranks of the stand-in have left so far."""
    script, log = tmp_path / "stand_in.py", tmp_path / "log"
    script.write_text(STAND_IN)
    log.touch()
    monkeypatch.setattr(module, "ENTRY", (sys.executable, str(script)))
    monkeypatch.setenv("LOG", str(log))
    monkeypatch.chdir(ROOT)
    return lambda: log.read_text().splitlines()


def link(rate_mbit, delay_us):
    return Link(rate_mbit=rate_mbit, delay_us=delay_us)


def sweep(*arguments):
    asked = main.make_context("netlab", list(arguments)).params
    del asked["as_json"], asked["output"]
    links = choose_links(*(asked.pop(name) for name in ("rates_mbit", "delays_us", "pairs")))
    return build_sweep(links=links, **asked)


def run(*arguments):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return ended.value.code


def test_networks_are_pairs_or_every_rate_with_every_delay():
    assert sweep().links == [link(10_000, 50), link(1000, 50), link(1000, 1000), link(100, 1000)]
    assert sweep("--rate-mbit", "100,1000", "--delay-us", "50").links == [link(100, 50), link(1000, 50)]
    assert len(sweep("--delay-us", "0,50").links) == 3 * 2
    assert sweep("--network", "25:20000,1000:0").links == [link(25, 20_000), link(1000, 0)]


def test_every_setup_is_asked_for_what_is_compared(monkeypatch):
    monkeypatch.chdir(ROOT)
    trials = build_trials(sweep("--batch", "64,128", "--hosts", "4", "--sharding", "row_wise", "model.embedding_dim=8"))
    assert [trial.link for trial in trials[::2]] == [LOOPBACK, *sweep().links]
    assert [trial.global_batch_size for trial in trials[:4]] == [64, 128] * 2
    trial = trials[1]
    assert (trial.hosts, trial.threads) == (4, 1)
    assert [setup.side for setup in trial.arms] == ["sharded"] + ["data_parallel"] * 3
    assert [setup.side for setup in trial.alone] == ["single"] * 3
    configs = [module.load_config(s.config, s.overrides, module.CHOICES) for s in trial.arms]
    assert {config.parallelism.world_size for config in configs} == {4}
    assert {config.training.global_batch_size for config in configs} == {128}
    assert {config.model.embedding_dim for config in configs} == {8}
    assert configs[0].parallelism.sharding == "row_wise"
    assert [config.embedding.compression for config in configs[1:]] == [100, 1000, 10_000]
    single = module.load_config(trial.alone[0].config, trial.alone[0].overrides, module.CHOICES)
    assert (single.parallelism.world_size, single.parallelism.threads_per_rank) == (1, 4)
    assert len({trial.file_name for trial in trials}) == len(trials)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rate-mbit", "0"], "'--rate-mbit': 0.0 is not in the range 0.1<=x<=100000"),
        (["--delay-us", "50,fast"], "'--delay-us': 'fast' is not a valid float"),
        (["--network", "1000"], "'--network': 1000: must look like RATE:DELAY"),
        (["--network", "1000:-1"], "'--network': -1.0 is not in the range 0<=x"),
        (["--network", "1000:50", "--delay-us", "50"], "--network: pairs take the place"),
        (["--batch", "0.5"], "'--batch': '0.5' is not a valid integer"),
        (["--batch", "63"], "training.global_batch_size = 63 is not a multiple"),
        (["--compression", "0.1"], "'--compression': 0.1 is not in the range 1<=x"),
        (["--sharding", "rowwise"], "--sharding rowwise: unknown; known: planner, table_wise"),
        (["--hosts", "1"], "'--hosts': 1 is not in the range x>=2"),
        (["--rounds", "0"], "'--rounds': 0 is not in the range x>=1"),
        (["--config-family", "configs/none"], "configs/none/robe.toml: cannot be read"),
        (["embedding.compression=7"], "embedding.compression=7: the sweep sets this itself, use --compression"),
        (["model.embeding_dim=8"], "did you mean embedding_dim?"),
    ],
)
def test_mistakes_end_before_anything_runs(arguments, said, capsys, monkeypatch, tmp_path, stand_in):
    monkeypatch.setattr(emulated_network, "describe_obstacle", lambda: None)
    assert run(*arguments, "--output", str(tmp_path / "out")) == EXIT_MISTAKE
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_machine_that_cannot_is_told_why(capsys, monkeypatch, tmp_path, stand_in):
    monkeypatch.setattr(emulated_network, "describe_obstacle", lambda: "emulated networks need root")
    assert run("--output", str(tmp_path / "out")) == EXIT_MISTAKE
    assert capsys.readouterr().err == "error: emulated networks need root\n"


def test_a_trial_is_taken_as_it_is_only_with_the_same_settings(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)

    def trial(**changes):
        settings = {"links": [], "batch_sizes": [64], "compressions": [100], "shardings": ["table_wise"]}
        return build_trials(Sweep(**settings | changes))[0]

    save_trial(trial(), {"version": module.VERSION, "fingerprint": trial().fingerprint}, tmp_path)
    assert load_trial(trial(), tmp_path)
    assert load_trial(trial(rounds=3), tmp_path) is None
    assert load_trial(trial(compressions=[101]), tmp_path) is None
    assert load_trial(trial(overrides=["model.embedding_dim=8"]), tmp_path) is None
    shutil.copytree(ROOT / "configs/demo", tmp_path / "demo")
    own = trial(family=str(tmp_path / "demo"))
    save_trial(own, {"version": module.VERSION, "fingerprint": own.fingerprint}, tmp_path)
    base = tmp_path / "demo/base.toml"
    base.write_text(base.read_text().replace("[64]", "[32]"))
    assert load_trial(trial(family=str(tmp_path / "demo")), tmp_path) is None
    (tmp_path / trial().file_name).write_text("{")
    assert load_trial(trial(), tmp_path) is None


@needs_network
def test_a_sweep_goes_on_where_it_stopped(capsys, monkeypatch, tmp_path, stand_in):
    arguments = [*SMALL, "--output", str(tmp_path / "out")]
    monkeypatch.setenv("FAIL_IN_EMULATED", "yes")
    assert run(*arguments) == EXIT_FAILED
    said = capsys.readouterr().err
    assert "ended with status 1\n  no more memory" in said
    assert json.loads((tmp_path / "out/crossover.json").read_text())["status"] == "1 of 2 trials"

    monkeypatch.delenv("FAIL_IN_EMULATED")
    before = len(stand_in())
    assert run(*arguments) == 0
    out, err = capsys.readouterr()
    assert "1 of 2 trials are there already" in err
    assert sorted(stand_in()[before:]) == ["0 1 2 lo 1", "0 2 1 link0 3", "1 2 1 link0 3"]
    assert sorted(stand_in()[:3]) == ["0 1 2 lo 1", "0 2 1 lo 3", "1 2 1 lo 3"]
    found = json.loads((tmp_path / "out/crossover.json").read_text())
    assert found["status"] == "finished"
    assert [cell["network"] is None for cell in found["cells"]] == [True, False] * 2
    assert found["cells"][2]["beside"] == {"rate_mbit": 500, "delay_us": 100}
    plain, emulated = (cell["network"] for cell in found["cells"][1::2])
    assert (plain["emulated"], plain["rate_mbit"], plain["delay_us"]) == (False, None, None)
    assert (emulated["emulated"], emulated["rate_mbit"], emulated["delay_us"]) == (True, 500, 100)
    assert 400 < emulated["measured_rate_mbit"] < 500
    assert 200 < emulated["measured_round_trip_us"] < 1000
    assert [(s["side"], s["asked_compression"]) for s in found["cells"][3]["setups"]] == [
        ("sharded", 1),
        ("sharded", 1),
        ("data_parallel", 100),
    ]
    assert "8.00 1.00× ★" in out
    assert "500 Mbit/s, 100 µs (emulated), ROBE data-parallel: 100× slower, 3.00×" in out
    assert "EMULATED" in (tmp_path / "out/crossover.html").read_text()

    assert run(*arguments, "--json") == 0
    printed = capsys.readouterr()
    assert "2 of 2 trials are there already" in printed.err
    assert json.loads(printed.out) == json.loads((tmp_path / "out/crossover.json").read_text())
    assert len(stand_in()) == before + 3


SCRIPT = """
import sys
from launch.netlab import command, trials
trials.ENTRY = (sys.executable, sys.argv[1])
command.main(sys.argv[2:])
"""


@needs_network
@pytest.mark.parametrize("ended_by", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_sweep_keeps_what_it_has_and_leaves_nothing(ended_by, tmp_path, stand_in):
    log = Path(os.environ["LOG"])
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "stand_in.py"), *SMALL, "--output", str(tmp_path / "out")]
    with subprocess.Popen(command, env=os.environ | {"HANG": "link0"}, stderr=subprocess.PIPE, text=True) as lab:
        ranks = [log.with_name(f"log{rank}") for rank in range(2)]
        end = time.monotonic() + 60
        while not all(path.exists() and path.read_text().endswith("\n") for path in ranks):
            assert lab.poll() is None
            assert time.monotonic() < end
            time.sleep(0.05)
        lab.send_signal(ended_by)
        said = lab.communicate(timeout=30)[1]
    assert lab.returncode == EXIT_INTERRUPTED
    assert "interrupted: the same command goes on from here" in said
    assert not any(Path("/proc", path.read_text().strip()).exists() for path in ranks)
    assert not list(Path("/run/netns").glob(f"pss-{lab.pid}-*"))
    assert json.loads((tmp_path / "out/crossover.json").read_text())["status"] == "1 of 2 trials"


@needs_network
@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.skipif("PSS_BENCH_LONG" not in os.environ, reason="half a minute or more: set PSS_BENCH_LONG=1")
def test_real_steps_go_over_the_emulated_links(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    trial = build_trials(sweep(*TINY, f"data.cache_dir={tmp_path}/cache"))[1]
    alone, together = measure_trial(trial)["cells"]
    assert [setup["world_size"] for setup in alone["setups"]] == [1]
    assert [setup["placement"] for setup in together["setups"]] == ["shard", "shard", "replicate"]
    assert [setup["world_size"] for setup in together["setups"]] == [2, 2, 2]
    assert all(setup["bytes_per_step"]["all_reduce"] > 0 for setup in together["setups"])
    assert together["setups"][0]["bytes_per_step"]["all_to_all"] > 0
    assert all(setup["parts"]["exposed_comm_ms"] > 0.2 for setup in together["setups"])
    assert together["network"]["dropped_packets"] == 0
    assert 0 < together["network"]["relay_cores"] < 1
