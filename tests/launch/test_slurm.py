"""The components on a real Slurm of two nodes: `make test-slurm`, as root, with the packages slurm/cluster.py names.

The cluster lives in namespaces of its own: nothing of it stays, and nothing of this machine's changes. About a minute.
"""

import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from rich.console import Console

from recsys.runs.run_directory import RunDir
from tests.launch.slurm.cluster import Cluster, missing, start_cluster

ROOT = Path(__file__).parent.parent.parent
SMALL = [
    "data.synthetic.scale=0.001",
    "data.synthetic.train_rows=40000",
    "data.synthetic.validation_rows=400",
    "data.synthetic.test_rows=2000",
    "training.global_batch_size=200",
    "evaluation.global_batch_size=200",
    "training.epochs=1",
]
JOB_S = 180

_reason = "PSS_BENCH_SLURM=1 is not set" if os.environ.get("PSS_BENCH_SLURM") != "1" else missing()
pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.skipif(bool(_reason), reason=_reason)]


class Slurm:
    """Submits components to the cluster. directory: where jobs run and leave their logs."""

    def __init__(self, cluster: Cluster, directory: Path, console: Console) -> None:
        self.cluster, self.directory, self.console = cluster, directory, console
        self.runs = directory / "runs"
        tracker = directory / "tracker"
        tracker.mkdir()
        (directory / "tracker.conf").write_text(f"protocol=file\nroot_path={tracker}\n")

    def command(self, *command: str, timeout_s: float = 60) -> str:
        """What the command printed; it must succeed."""
        environ = {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "TORCHXCONFIG": str(ROOT / ".torchxconfig"),
            "TORCHX_TRACKERS": "fsspec",
            "TORCHX_TRACKER_FSSPEC_CONFIG": str(self.directory / "tracker.conf"),
        }
        done = self.cluster.run(command, cwd=self.directory, environ=environ, timeout_s=timeout_s)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout

    def submit(self, component: str, *arguments: str) -> str:
        """The job's handle, slurm://torchx/<job>."""
        where = f"{ROOT}/launch/components.py:{component}"
        handle = self.command("torchx", "run", "-s", "slurm", where, "--memMB", "1500", *arguments).split()[-1]
        self.console.print(f"slurm: {component} is job {job_id(handle)}")
        return handle

    def train(self, component: str, config: str, *overrides: str, options: Sequence[str] = ()) -> str:
        """Submits a training job of two nodes, one rank each. options: more options of the component."""
        options = ["--config", str(ROOT / f"configs/{config}.toml"), "--j", "2x1", *options]
        return self.submit(component, *options, f"run.dir={self.runs}", *SMALL, *overrides)

    def wait(self, handle: str) -> str:
        """The state in which the job ended, as torchx names it."""
        started = time.monotonic()
        while time.monotonic() - started < JOB_S:
            status = self.command("torchx", "status", handle)
            state = re.search(r"State: (\w+)", status)
            assert state is not None, status
            if state[1] in ("SUCCEEDED", "FAILED", "CANCELLED"):
                self.console.print(f"slurm: job {job_id(handle)} {state[1]} after {time.monotonic() - started:.0f} s")
                return state[1]
            time.sleep(1)
        raise TimeoutError(f"{handle} has not ended within {JOB_S} s\n{self.logs()}")

    def wait_until(self, is_so: Callable[[], bool]) -> None:
        deadline = time.monotonic() + JOB_S
        while not is_so():
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.2)

    def logs(self) -> str:
        """What Slurm knows of the jobs, and the ends of their logs."""
        paths = sorted(self.directory.glob("slurm-*"))
        ends = (f"{path.name}: {path.read_text(errors='replace')[-1500:]}" for path in paths)
        return "\n".join([self.command("squeue"), self.command("sacct", "--duplicates"), *ends])


def job_id(handle: str) -> str:
    return handle.rpartition("/")[2]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory, request):
    directory = tmp_path_factory.mktemp("slurm")
    jobs = directory / "jobs"
    jobs.mkdir()
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():  # it takes a while: say what is being done
        console = Console(stderr=True, highlight=False)
        with start_cluster(directory, console) as cluster:
            yield Slurm(cluster, jobs, console)


@pytest.fixture(scope="module")
def finished(slurm):
    """Handles of a sharded and a ROBE run, on both nodes at the same time, and of a report that waits for them."""
    sharded = slurm.train("baseline", "demo/sharded", options=["--rdzv_port", "29501"])
    robe = slurm.train("compressed", "demo/robe", options=["--rdzv_port", "29502"])
    after = f"--dependency=afterok:{job_id(sharded)}:{job_id(robe)}"
    report = "python -m launch.compare runs/demo_sharded runs/demo_robe --output after"
    waiting = slurm.command("sbatch", "--parsable", after, "--wrap", report).strip()
    assert "Dependency" in slurm.command("squeue", "--noheader", f"--jobs={waiting}", "--format=%r")
    assert [slurm.wait(sharded), slurm.wait(robe)] == ["SUCCEEDED", "SUCCEEDED"], slurm.logs()
    return sharded, robe, f"slurm://torchx/{waiting}"


@pytest.mark.parametrize(("config", "placement"), [("demo/sharded", "shard"), ("demo/robe", "replicate")])
def test_both_setups_run_over_two_nodes(slurm, finished, config, placement):
    summary = RunDir(slurm.runs / config.replace("/", "_")).read_summary()
    assert (summary.status, summary.world_size, summary.placement) == ("finished", 2, placement)
    assert summary.steps == 200


def test_the_trackers_know_the_jobs_by_their_handles(slurm, finished):
    assert set(finished[:2]) <= set(slurm.command("torchx", "tracker", "list", "jobs").split())


def test_the_report_is_a_job(slurm, finished):
    job = slurm.submit("compare", "--runs", "runs/demo_sharded,runs/demo_robe", "--output", "reported")
    assert slurm.wait(job) == "SUCCEEDED", slurm.logs()
    assert "test AUC" in (slurm.directory / f"slurm-{job_id(job)}-compare-0.out").read_text()
    assert (slurm.directory / "reported" / "report.html").stat().st_size > 10_000


def test_a_report_that_depends_on_the_runs_is_made_after_them(slurm, finished):
    assert slurm.wait(finished[2]) == "SUCCEEDED", slurm.logs()
    assert (slurm.directory / "after" / "report.html").exists()


def test_a_sweep_runs_as_jobs_and_tells_what_failed(slurm):
    config = str(ROOT / "configs/demo/robe.toml")
    swept = ["--set", "optimizer.embedding_learning_rate=3,1e30", "--job", "memMB=1500"]
    command = [config, *SMALL, f"run.dir={slurm.runs}/swept", "--scheduler", "slurm", "--ranks-per-node", "1", *swept]
    said = slurm.command("bash", "-c", f"{shlex.join(['python', '-m', 'launch.sweep', *command])} 2>&1 || true",
                         timeout_s=JOB_S)  # fmt: skip
    assert "1 of 2 runs are finished" in said, said + slurm.logs()
    assert re.search(r"failed: slurm://torchx/\d+ failed: .*the training loss is nan", said), said
    summary = RunDir(slurm.runs / "swept/demo_robe_embedding_learning_rate3_s0").read_summary()
    assert (summary.status, summary.world_size, summary.steps) == ("finished", 2, 200)


def test_a_job_that_fails_is_failed_and_its_run_directory_says_why(slurm):
    job = slurm.train("compressed", "demo/robe", "run.name=diverging", "optimizer.embedding_learning_rate=1e30")
    assert slurm.wait(job) == "FAILED", slurm.logs()
    summary = RunDir(slurm.runs / "diverging").read_summary()
    assert summary.status == "failed"
    assert "lower optimizer.embedding_learning_rate" in summary.error.message


def test_a_job_that_was_killed_starts_again_and_continues_from_its_checkpoint(slurm):
    keys = ["run.name=killed", "training.epochs=5", "checkpoint.every_steps=100", "checkpoint.keep_last=100"]
    job = slurm.train("compressed", "demo/robe", *keys, options=["--max_retries", "1"])
    run_dir = RunDir(slurm.runs / "killed")
    first = run_dir.checkpoints / "step_100"
    slurm.wait_until(first.exists)
    written = first.stat().st_mtime_ns
    slurm.command("scancel", "--signal=KILL", f"{job_id(job)}.0")
    reason = ["squeue", "--noheader", f"--jobs={job_id(job)}", "--format=%r"]
    slurm.wait_until(lambda: "BeginTime" in slurm.command(*reason))
    assert run_dir.read_summary().status in ("running", "interrupted")
    # Slurm waits for two minutes lest the end of the first attempt be taken for that of the second: look instead.
    slurm.wait_until(lambda: not slurm.cluster.answers("pgrep", "slurmstepd"))
    slurm.command("scontrol", "update", f"JobId={job_id(job)}", "StartTime=now")
    assert slurm.wait(job) == "SUCCEEDED", slurm.logs()
    assert (run_dir.read_summary().status, run_dir.read_summary().steps) == ("finished", 1000)
    assert first.stat().st_mtime_ns == written
