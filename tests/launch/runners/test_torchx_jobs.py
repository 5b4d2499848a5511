"""Runs as torchx jobs: of several ranks on this machine, and what becomes of jobs of a scheduler that is faked."""

import re
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
from torchx.specs import AppState, AppStatus

from launch.runners import torchx_jobs
from launch.runners.local import Jobs, LocalRunner, count_jobs
from launch.runners.torchx_jobs import HANDLE, TorchxRunner
from launch.runners.trial import Trial, find_log, run_trials
from recsys.runs.run_directory import RunDir
from tests.launch.interruption import interrupt
from tests.launch.test_sweep import SMALL
from tests.recsys.report.fake_runs import write_run

ROOT = Path(__file__).parents[3]


def trial(root, name, config="demo/robe", *overrides):
    return Trial(
        str(ROOT / f"configs/{config}.toml"), (*SMALL, "training.epochs=1", f"run.dir={root}", *overrides), name
    )


@pytest.mark.dist
@pytest.mark.slow
def test_runs_of_one_rank_and_of_two_in_one_sweep(tmp_path):
    one = trial(tmp_path, "one", "demo/robe_single", "parallelism.threads_per_rank=1")
    two = trial(tmp_path, "two")
    diverges = trial(tmp_path, "diverges", "demo/robe", "optimizer.embedding_learning_rate=1e30")
    trials = [diverges, one, two]
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with LocalRunner(Jobs(1, 1)) as runs:
        outcomes = run_trials(trials, runs)
        again = run_trials(trials[1:], runs)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert [outcome.trial for outcome in outcomes] == trials
    assert [outcome.failure for outcome in outcomes[1:]] == [None, None]
    assert outcomes[0].failure.startswith("FloatingPointError: the training loss is nan at step 2, batch 2 of epoch 1:")
    summaries = [outcome.run_dir.read_summary() for outcome in outcomes]
    assert [s.world_size for s in summaries] == [2, 1, 2]
    assert summaries[0].status == "failed"
    assert summaries[2].best["test_log_loss"] == pytest.approx(summaries[1].best["test_log_loss"], rel=1e-4)
    assert [outcome.seconds for outcome in again] == [None, None]
    assert list(find_log(outcomes[2].run_dir).glob("**/stderr.log"))
    assert find_log(outcomes[1].run_dir).name == "log.txt"


@pytest.mark.dist
@pytest.mark.slow
def test_interrupting_a_sweep_of_jobs_ends_their_ranks(tmp_path):
    config, overrides, name = (c := trial(tmp_path, "demo_robe_s0")).config, c.overrides, c.name
    run_dir = RunDir(tmp_path / name)
    command = [sys.executable, "-m", "launch.sweep", config, *overrides, "training.epochs=1000"]
    ended = interrupt(command, lambda: any(run_dir.records()))
    assert ended.status == 130
    assert ended.said.splitlines()[-1] == "interrupted: the same command goes on from here"
    assert run_dir.read_summary().status == "interrupted"
    assert len(ended.family) >= 3, "torchrun and two ranks"
    assert ended.left == []


class FakeRunner:
    """A cluster: every job takes the states it is given, one a look, and stays in the last. None: not known."""

    def __init__(self, states):
        self.states = states
        self.submitted = []
        self.cancelled = []
        self.running, self.most = set(), 0

    def run(self, app, scheduler, cfg):
        self.submitted.append(app)
        name = re.search(r'run\.name="(\w+)"', " ".join(app.roles[0].args))[1]
        self.running.add(name)
        self.most = max(self.most, len(self.running))
        return f"{scheduler}://torchx/{name}"

    def status(self, handle):
        name = handle.rpartition("/")[2]
        states = self.states[name]
        state = states.pop(0) if len(states) > 1 else states[0]
        if state is KeyboardInterrupt:
            raise KeyboardInterrupt
        if state is None:
            time.sleep(0.06)
            return None
        if state in ("SUCCEEDED", "FAILED"):
            self.running.discard(name)
        return AppStatus(AppState[state])

    def cancel(self, handle):
        self.cancelled.append(handle)


@pytest.fixture
def cluster(monkeypatch):
    def start(states):
        runner = FakeRunner({name: list(found) for name, found in states.items()})
        monkeypatch.setattr(torchx_jobs, "get_runner", lambda: nullcontext(runner))
        monkeypatch.setattr(torchx_jobs, "_REMOTE_POLL_S", 0.0)
        monkeypatch.setattr(torchx_jobs, "_LOST_S", 0.1)
        return runner

    return start


def test_jobs_wait_for_a_place_and_end_each_in_its_own_way(cluster, tmp_path, capsys):
    runner = cluster(
        {
            "a": ["PENDING", "RUNNING", "SUCCEEDED"],
            "b": ["RUNNING", "FAILED"],
            "c": ["RUNNING", None],
            "d": [*3 * ["RUNNING", None], "RUNNING", "SUCCEEDED"],
        }
    )
    write_run(tmp_path, "b", summary={"status": "failed", "error": {"rank": 1, "message": "ValueError: wrong"}})
    ended = TorchxRunner(3, "slurm", options={"memMB": "64000"}).run([trial(tmp_path, name) for name in "abcd"])
    assert [found.failure for found in ended] == [
        None,
        "slurm://torchx/b failed: rank 1: ValueError: wrong",
        "slurm://torchx/c is not known to slurm: it left no error",
        None,
    ]
    assert [app.roles[0].resource.memMB for app in runner.submitted] == [64000] * 4
    assert (tmp_path / "a" / HANDLE).read_text() == "slurm://torchx/a\n"
    assert runner.most == 3
    assert "4/4" in capsys.readouterr().err


def test_a_job_that_still_runs_is_waited_for_and_not_submitted_again(cluster, tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / HANDLE).write_text(f"slurm://torchx/{name}\n")
    runner = cluster({"a": ["RUNNING", "SUCCEEDED"], "b": ["FAILED", "SUCCEEDED"]})
    ended = TorchxRunner(2, "slurm").run([trial(tmp_path, name) for name in "ab"])
    assert [found.failure for found in ended] == [None, None]
    assert len(runner.submitted) == 1  # b had failed: anew


def test_interrupting_cancels_the_jobs(cluster, tmp_path):
    runner = cluster({"a": ["RUNNING"], "b": ["RUNNING", KeyboardInterrupt]})
    with pytest.raises(KeyboardInterrupt):
        TorchxRunner(2, "slurm").run([trial(tmp_path, name) for name in "ab"])
    assert sorted(runner.cancelled) == ["slurm://torchx/a", "slurm://torchx/b"]


@pytest.mark.parametrize(("each", "layout"), [(None, "1 --nproc_per_node 8"), ("4", "2 --nproc_per_node 4")])
def test_ranks_are_spread_over_nodes(cluster, tmp_path, each, layout):
    runner = cluster({"a": ["SUCCEEDED"]})
    runs = TorchxRunner(1, "slurm", each and int(each))
    runs.run([trial(tmp_path, "a", "demo/robe", "parallelism.world_size=8")])
    (app,) = runner.submitted
    assert f"--nnodes {layout}" in " ".join(app.roles[0].args)
    assert app.roles[0].num_replicas == int(layout[0])


def meeting_ports(runner):
    return [int(re.search(r":=localhost}:(\d+) ", " ".join(app.roles[0].args))[1]) for app in runner.submitted]


def test_jobs_of_one_sweep_and_of_two_meet_at_ports_of_their_own(cluster, tmp_path):
    two_nodes = ("demo/robe", "parallelism.world_size=2")
    ports = []
    for sweep in ("one", "two"):
        runner = cluster({name: ["SUCCEEDED"] for name in "abc"})
        TorchxRunner(3, "slurm", 1).run([trial(tmp_path / sweep, name, *two_nodes) for name in "abc"])
        ports += meeting_ports(runner)
    assert len(set(ports)) == 6
    assert all(20_000 <= port < 32_768 for port in ports)


def test_a_port_that_another_job_has_is_passed_over(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(torchx_jobs.zlib, "crc32", lambda _: torchx_jobs._LAST_PORT - torchx_jobs._FIRST_PORT)
    runner = cluster({name: ["SUCCEEDED"] for name in "abc"})
    jobs = TorchxRunner(3, "slurm", 1)
    trials = [trial(tmp_path, name, "demo/robe", "parallelism.world_size=2") for name in "abc"]
    jobs.run(trials)
    assert meeting_ports(runner) == [32_767, 20_000, 20_001]
    cluster_again = cluster({name: ["SUCCEEDED"] for name in "abc"})
    jobs.run(trials)
    assert meeting_ports(cluster_again) == [32_767, 20_000, 20_001]


def test_as_many_runs_as_cores_and_memory_hold(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    single = trial("x", "a", "demo/robe_single").load()  # one rank of two threads
    double = trial("x", "a").load()  # two ranks of one
    quad = trial("x", "a", "demo/robe", "parallelism.world_size=4", "run.device=cpu").load()
    assert count_jobs([single, double]) == (4, 4)
    assert count_jobs([single, double, quad]) == (4, 2)
    assert count_jobs([single, double, quad], at_most=3) == (3, 2)
    assert count_jobs([quad], requested=5, at_most=1) == (5, 5)
    assert str(Jobs(4, 4)) == "4"
    assert str(Jobs(4, 2)) == "4 (2 of several ranks)"
