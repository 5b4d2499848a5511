"""Plans of measurements, and what comes of one."""

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from configs.load import ConfigError
from launch.runners.measure_steps import load_plan

ROOT = Path(__file__).parents[3]
SMALL = ["data.synthetic.train_rows=2000", "data.synthetic.scale=0.001", "training.global_batch_size=200"]


def setup(name, *overrides):
    return {"label": name, "config": str(ROOT / "configs" / f"{name}.toml"), "overrides": [*SMALL, *overrides]}


def write(path, **plan):
    path.write_text(json.dumps(plan))
    return path


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"setups": []}, "setups"),
        ({"setups": [setup("demo/robe")], "rounds": 0}, "rounds"),
        ({"setups": [setup("demo/robe")], "mood": 1}, "mood"),
        ({"setups": [setup("demo/robe", "embedding.compresion=3")]}, "did you mean compression"),
        ({"setups": [setup("demo/robe"), setup("demo/robe_single")]}, r"world_size \[1, 2\]"),
        ({"setups": [{"label": "a"}]}, r"setups\.0\.config"),
    ],
)
def test_a_mistake_in_a_plan_is_named(tmp_path, plan, message):
    with pytest.raises(ConfigError, match=message):
        load_plan(write(tmp_path / "plan.json", **plan))


def test_a_plan_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.json: No such file"):
        load_plan(tmp_path / "none.json")


@pytest.mark.dist
@pytest.mark.slow
def test_two_setups_are_measured_in_turns(tmp_path):
    setups = [setup("demo/sharded", "parallelism.sharding=row_wise"), setup("demo/robe")]
    plan = write(tmp_path / "p.json", setups=setups, rounds=2, steps=3, warm_up=1, profile_steps=2)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "launch.runners.measure_steps"]
    done = subprocess.run(
        [*command, str(plan), str(tmp_path / "out.json")], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "out.json").read_text())
    sharded, robe = found["setups"]
    assert (sharded["label"], sharded["sharding"], sharded["world_size"]) == ("demo/sharded", "row_wise", 2)
    assert (robe["placement"], robe["sharding"], robe["global_batch_size"]) == ("replicate", None, 200)
    for measured in (sharded, robe):
        assert measured["step_ms"]["n"] == 6
        assert 0 < measured["step_ms"]["p25"] <= measured["step_ms"]["median"] <= measured["step_ms"]["p75"]
        parts = measured["parts"]
        total = parts["compute_ms"] + parts["exposed_comm_ms"] + parts["other_ms"]
        assert total == pytest.approx(measured["profiled_step_ms"])
        assert sum(measured["phases_ms"].values()) == pytest.approx(measured["profiled_step_ms"])
    parameters = robe["embedding_parameters"] + robe["dense_parameters"]
    assert robe["bytes_per_step"] == {"all_reduce": 4 * parameters}
    assert robe["collectives_per_step"] == {"all_reduce": 1}
    assert sharded["bytes_per_step"]["all_to_all"] > 0


@pytest.mark.dist
@pytest.mark.slow
def test_who_asked_for_steps_and_is_ended_leaves_no_rank_behind():
    setups = json.dumps([setup("demo/robe")])
    program = (
        "import json, signal; from launch.runners.step_jobs import measure\n"
        "signal.signal(signal.SIGTERM, signal.default_int_handler)\n"
        f"measure(json.loads({setups!r}), mode='train', rounds=1, steps=10**6, warm_up=1, profile_steps=0)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        family = wait_for_ranks(psutil.Process(process.pid))
        process.terminate()
        process.wait(timeout=60)
        _, alive = psutil.wait_procs(family, timeout=30)
    finally:
        process.kill()
    assert alive == []


def wait_for_ranks(asking):
    """torchrun and its two ranks, once these have begun to work."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        family = asking.children(recursive=True)
        if sum("launch.runners.measure_steps" in " ".join(p.cmdline()) and p.cpu_times().user > 5 for p in family) >= 2:
            return family
        time.sleep(0.2)
    raise TimeoutError("the ranks have not begun")
