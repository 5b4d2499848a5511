"""A job over a network: one command as every rank, on the hosts it is given."""

import contextlib
import os
import select
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.netlab.emulated_network import Network

_MASTER_PORT = 29500
_TAIL_LINES = 15


class RankFailed(RuntimeError):
    """Raised where a rank does not succeed; the message ends with the last lines that it printed."""


def run_ranks(
    network: Network,
    command: Sequence[str],
    *,
    timeout_s: float,
    ranks_per_host: int = 1,
    env: Mapping[str, str] | None = None,
) -> None:
    """Run a command as every rank of a job, host by host, and wait for all of them.

    Ranks find each other as torchrun's do (RANK, WORLD_SIZE, MASTER_ADDR, ...); env is laid over that. Raises
    RankFailed when one fails, or has not ended in time. No rank, nor what it started, outlives the call.
    """
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        processes = []
        port = _choose_port(network)
        for rank in range(len(network.hosts) * ranks_per_host):
            variables = _rank_variables(network, rank, ranks_per_host) | {"MASTER_PORT": port} | dict(env or {})
            prefix = network.hosts[rank // ranks_per_host].prefix
            with Path(directory, str(rank)).open("w") as log:
                process = subprocess.Popen(
                    # The kernel ends a rank with us where we are killed, and a terminal's Ctrl-C is for us alone.
                    ["setpriv", "--pdeathsig", "KILL", *prefix, *command],
                    env=os.environ | variables,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            stack.callback(_kill, process)
            processes.append(process)
        _wait(processes, Path(directory), timeout_s)


def _choose_port(network: Network) -> str:
    """Return a free port; a namespace has all ports to itself, this machine has not."""
    if network.is_emulated:
        return str(_MASTER_PORT)
    with socket.create_server((network.hosts[0].address, 0)) as server:
        return str(server.getsockname()[1])


def _rank_variables(network: Network, rank: int, ranks_per_host: int) -> dict[str, str]:
    """Return what torchrun would set; TCP's store is each job's own, and waiting threads leave cores to others."""
    variables = {
        "RANK": rank,
        "WORLD_SIZE": len(network.hosts) * ranks_per_host,
        "LOCAL_RANK": rank % ranks_per_host,
        "LOCAL_WORLD_SIZE": ranks_per_host,
        "MASTER_ADDR": network.hosts[0].address,
        "GLOO_SOCKET_IFNAME": network.hosts[rank // ranks_per_host].interface,
        "OMP_NUM_THREADS": 1,
        "OMP_WAIT_POLICY": "PASSIVE",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": 1,
    }
    return {name: str(value) for name, value in variables.items()}


def _wait(processes: Sequence[subprocess.Popen], directory: Path, timeout_s: float) -> None:
    """Return when all have succeeded; raise at the first that has not: those after it fail because of it."""
    end_s = time.monotonic() + timeout_s
    with contextlib.ExitStack() as stack:
        running = {}
        for rank, process in enumerate(processes):
            descriptor = os.pidfd_open(process.pid)
            stack.callback(os.close, descriptor)
            running[descriptor] = rank
        while running:
            ended = select.select(list(running), [], [], max(0.0, end_s - time.monotonic()))[0]
            if not ended:
                late = list(running.values())
                which = f"rank{'s' * (len(late) > 1)} {', '.join(map(str, late))}"
                raise RankFailed(f"not ended within {timeout_s:g} s: {which}{_tail(directory, late[0])}")
            for rank in map(running.pop, ended):
                if code := processes[rank].wait():
                    how = f"status {code}" if code > 0 else signal.Signals(-code).name
                    raise RankFailed(f"rank {rank} ended with {how}{_tail(directory, rank)}")


def _tail(directory: Path, rank: int) -> str:
    lines = (directory / str(rank)).read_text(errors="replace").splitlines()[-_TAIL_LINES:]
    return "".join(f"\n  {line}" for line in lines)


def _kill(process: subprocess.Popen) -> None:
    """Kill a rank with the processes it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
