"""Interrupting a command as Ctrl-C on a terminal does, and who is left of it."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

ROOT = Path(__file__).parent.parent.parent


class Interruption(NamedTuple):
    status: int
    said: str  # on stderr
    family: list[psutil.Process]  # the processes it had started
    left: list[psutil.Process]  # of these and its process group, alive half a minute later; killed since


def interrupt(command: Sequence[str], has_begun: Callable[[], bool]) -> Interruption:
    """Starts a command in a session of its own and, once it has begun, sends SIGINT to all its processes."""
    process = subprocess.Popen(
        command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    family, left = [], []
    try:
        deadline = time.time() + 120
        while not has_begun():
            assert time.time() < deadline
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.1)
        family = left = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=60)
        group = [other for other in psutil.process_iter() if _is_of_group(other, process.pid)]  # started since, too
        _, left = psutil.wait_procs({*family, *group}, timeout=30)
    finally:
        for survivor in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                survivor.kill()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return Interruption(process.returncode, said, family, left)


def _is_of_group(process: psutil.Process, group: int) -> bool:
    try:
        return os.getpgid(process.pid) == group
    except (ProcessLookupError, PermissionError):
        return False
