"""Hosts of a job on one machine, perhaps in network namespaces of their own, and how fast the way between two is."""

import contextlib
import os
import socket
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from ctypes import CDLL, get_errno
from dataclasses import dataclass
from pathlib import Path

NAMESPACES = Path("/run/netns")
_BLOCK_BYTES = 1 << 18
_LEAST_PINGS, _PINGS, _PING_S = 5, 200, 0.5
_TIMEOUT_S = 30


@dataclass(frozen=True)
class Host:
    """Describe a host of a job. namespace: None is this machine as it is."""

    address: str
    interface: str
    namespace: str | None = None

    @property
    def prefix(self) -> list[str]:
        """Return what a command begins with that runs on the host."""
        return ["ip", "netns", "exec", self.namespace] if self.namespace else []


@dataclass(frozen=True)
class Speed:
    """Hold the rate that TCP carries each way while both are used, and how long a byte takes there and back.

    Beside a link's own: 2 to 8 % of the rate are TCP's and IP's headers, and 20 to 60 µs of the round trip are the
    hosts' own way to their links.
    """

    rate_mbit: float
    round_trip_us: float


def measure_speed(near: Host, far: Host, seconds: float = 1.0) -> Speed:
    """Return the speed between two hosts, in about 2 × `seconds`. Both send at once, as in a collective."""
    with connect(near, far) as ends:
        round_trip_s = _measure_round_trip_s(*ends)
    with connect(near, far) as ends:
        begin_s = time.perf_counter() + max(seconds / 2, 20 * round_trip_s)  # TCP finds its windows
        bytes_per_s = _measure_bytes_per_s(ends, begin_s, begin_s + seconds)
    return Speed(bytes_per_s * 8e-6, round_trip_s * 1e6)


@contextlib.contextmanager
def inside(host: Host) -> Iterator[None]:
    """Make sockets of this thread the host's within the block. Raises OSError without the right to."""
    if host.namespace is None:
        yield
        return
    libc = CDLL(None, use_errno=True)
    own = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    other = os.open(NAMESPACES / host.namespace, os.O_RDONLY)
    try:
        if libc.setns(other, 0):
            raise OSError(get_errno(), f"cannot enter the network namespace {host.namespace}")
        try:
            yield
        finally:
            libc.setns(own, 0)
    finally:
        os.close(own)
        os.close(other)


@contextlib.contextmanager
def connect(near: Host, far: Host) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Yield both ends of a TCP connection between two hosts."""
    with contextlib.ExitStack() as stack:
        with inside(far):
            listener = stack.enter_context(socket.create_server((far.address, 0)))
        with inside(near):
            client = stack.enter_context(socket.create_connection(listener.getsockname(), timeout=_TIMEOUT_S))
        server = stack.enter_context(listener.accept()[0])
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            end.settimeout(_TIMEOUT_S)
        yield client, server


def _measure_round_trip_s(near: socket.socket, far: socket.socket) -> float:
    """Return the median of one byte's way there and back. One thread does both ends: none has to wait for a core."""
    times: list[float] = []
    end_s = time.perf_counter() + _PING_S
    while len(times) < _LEAST_PINGS or (len(times) < _PINGS and time.perf_counter() < end_s):
        started = time.perf_counter()
        for sender, receiver in ((near, far), (far, near)):
            sender.sendall(b"?")
            receiver.recv(1)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _measure_bytes_per_s(ends: Sequence[socket.socket], begin_s: float, end_s: float) -> float:
    """Return what each end gets in a second of that time while both send, in the mean."""
    with ThreadPoolExecutor(2 * len(ends)) as threads:
        received = [threads.submit(receive, end, begin_s, end_s) for end in ends]
        for end in ends:
            threads.submit(send, end, end_s)
        return statistics.fmean(result.result() for result in received)


def send(end: socket.socket, end_s: float) -> None:
    """Send as fast as it goes until that time of time.perf_counter."""
    block = bytes(_BLOCK_BYTES)
    with contextlib.suppress(OSError):
        while time.perf_counter() < end_s:
            end.sendall(block)
    end.shutdown(socket.SHUT_WR)


def receive(end: socket.socket, begin_s: float, end_s: float) -> float:
    """Return bytes a second between the first and the last of that time; all are taken until the sender is done."""
    buffer, received, first_s, last_s = bytearray(_BLOCK_BYTES), 0, 0.0, 0.0
    while size := end.recv_into(buffer):
        now_s = time.perf_counter()
        if begin_s <= now_s <= end_s:
            received += size if first_s else 0
            first_s, last_s = first_s or now_s, now_s
    return received / (last_s - first_s) if last_s > first_s else 0.0
