"""A real Slurm of two nodes with accounting on this machine, made for a test and gone with it.

munged, mariadbd, slurmdbd, slurmctld and two slurmd, from Debian's packages, run in namespaces of their own (see
namespaces.sh) and write into one temporary directory. Needs root. Killing the first process of the namespaces ends
everything in them; it is killed when the block is left, and by the kernel when this process dies.
"""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from string import Template

from rich.console import Console

PROGRAMS = ("munged", "mariadbd", "slurmdbd", "slurmctld", "slurmd")
PACKAGES = "slurm-wlm slurmdbd munge mariadb-server"
START_S = 60
_NAMESPACES = ("--mount", "--pid", "--net", "--uts", "--ipc")
_FILES = Path(__file__).parent
_HOSTS = "127.0.0.1 localhost slurm n1 n2\n"


def missing() -> str:
    """Why a cluster cannot be started here; empty when it can."""
    if os.geteuid() != 0:
        return "needs root"
    absent = [name for name in (*PROGRAMS, "ip", "unshare", "nsenter", "setpriv") if not _program(name)]
    hint = f": apt-get install --no-install-recommends {PACKAGES} iproute2 util-linux"
    return f"{', '.join(absent)} not installed{hint}" if absent else ""


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


class Cluster:
    """Runs commands on the cluster's machine. directory: where its files and logs are."""

    def __init__(self, directory: Path, first_pid: int) -> None:
        self.directory = directory
        self._enter = ["nsenter", "--target", str(first_pid), *_NAMESPACES]
        self._environ = os.environ | {"SLURM_CONF": str(directory / "slurm.conf")}

    def run(
        self, command: Sequence[str], *, cwd: Path, environ: dict[str, str] | None = None, timeout_s: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """The ended command with its output. Raises subprocess.TimeoutExpired."""
        return subprocess.run(
            [*self._enter, f"--wd={cwd}", "--", *command],
            env=self._environ | (environ or {}),
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )

    def start(self, name: str, command: Sequence[str], is_ready: Callable[[], bool]) -> None:
        """Starts a daemon that logs to <directory>/<name>.log. Raises RuntimeError when it does not get ready."""
        log = self.directory / f"{name}.log"
        program = _program(command[0])
        assert program is not None
        with log.open("w") as output:
            daemon = subprocess.Popen(
                [*self._enter, "--", program, *command[1:]],
                env=self._environ,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        deadline = time.monotonic() + START_S
        while not is_ready():
            if daemon.poll() is not None or time.monotonic() > deadline:
                end = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
                raise RuntimeError(f"{name} is not ready (exit status {daemon.poll()}): {end}")
            time.sleep(0.2)

    def answers(self, *command: str, words: str = "") -> bool:
        """Whether the command succeeds and its output contains the words."""
        done = self.run(command, cwd=self.directory)
        return done.returncode == 0 and words in done.stdout


@contextlib.contextmanager
def start_cluster(directory: Path, console: Console) -> Iterator[Cluster]:
    """A cluster whose two nodes are idle. directory: an empty one, not below /run."""
    for name in ("slurm.conf", "slurmdbd.conf", "database.sql"):
        text = Template((_FILES / name).read_text()).substitute(directory=directory)
        path = directory / name
        path.write_text(text)
        path.chmod(0o600)
    (directory / "hosts").write_text(_HOSTS)
    (directory / "state").mkdir()
    key = directory / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    with _namespaces(directory) as first_pid:
        cluster = Cluster(directory, first_pid)
        _start_daemons(cluster, console)
        yield cluster


@contextlib.contextmanager
def _namespaces(directory: Path) -> Iterator[int]:
    """The PID of the first process of new namespaces."""
    command = ["setpriv", "--pdeathsig", "KILL", "unshare", *_NAMESPACES, "--fork", "--kill-child", "--mount-proc"]
    unshare = subprocess.Popen([*command, "sh", str(_FILES / "namespaces.sh"), str(directory)])
    try:
        deadline = time.monotonic() + START_S
        while not (directory / "ready").exists():
            if unshare.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("namespaces could not be made (CAP_SYS_ADMIN is needed)")
            time.sleep(0.05)
        children = Path(f"/proc/{unshare.pid}/task/{unshare.pid}/children").read_text().split()
        yield int(children[0])
    finally:
        unshare.send_signal(signal.SIGKILL)
        unshare.wait()


def _start_daemons(cluster: Cluster, console: Console) -> None:
    directory, started = cluster.directory, time.monotonic()

    def start(name: str, command: Sequence[str], is_ready: Callable[[], bool]) -> None:
        cluster.start(name, command, is_ready)
        console.print(f"slurm: {name} ready after {time.monotonic() - started:.1f} s")

    files = [f"--{name}-file={directory}/munge.{name}" for name in ("key", "seed")]
    start("munged", ["munged", "--foreground", *files], lambda: cluster.answers("munge", "--no-input"))
    database = directory / "database"
    done = cluster.run(
        ["mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={database}", "--skip-test-db"],
        cwd=directory,
    )
    if done.returncode:
        raise RuntimeError(f"mariadb-install-db failed: {done.stdout}{done.stderr}")
    mariadbd = ["mariadbd", "--no-defaults", "--user=root", f"--datadir={database}", "--bind-address=127.0.0.1"]
    mariadbd += [f"--socket={directory}/mysql", "--pid-file=/run/mariadbd", f"--init-file={directory}/database.sql"]
    ask = ["mariadb", "-h127.0.0.1", "-uslurm", "-pslurm", "slurm_acct_db", "-e", "SELECT 1"]
    start("mariadbd", [*mariadbd, "--innodb-buffer-pool-size=64M"], lambda: cluster.answers(*ask))
    start("slurmdbd", ["slurmdbd", "-D"], lambda: cluster.answers("sacctmgr", "--noheader", "list", "cluster"))
    start("slurmctld", ["slurmctld", "-D"], lambda: cluster.answers("scontrol", "ping", words="UP"))
    for node in ("n1", "n2"):
        idle = ["sinfo", "--noheader", "--nodes", node, "--format=%T"]
        start(f"slurmd-{node}", ["slurmd", "-D", "-N", node], lambda idle=idle: cluster.answers(*idle, words="idle"))
