"""Hosts with a network of chosen rate and delay between them, on one machine: for jobs whose communication matters.

Every host is a network namespace with one device, whose link goes to a switch: full duplex, of the same rate both ways,
with the same one-way delay between any two hosts. The links are a process, relay.c, between TUN devices. It is used
whatever the kernel offers: for delay that would be netem, which many kernels are built without, and one mechanism is
one to prove. It takes its share of the cores, which `Counts` tells.

Relay and namespaces end with the `with` block. Where this process is killed, the relay ends by itself, and the
namespaces, which carry the process's id in their names, are removed when the next network is made.

Linux and root. What is measured over such a network is emulated, and is to be called so.
"""

import contextlib
import hashlib
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.netlab.network_hosts import NAMESPACES, Host, Speed, measure_speed
from pss.kernels.build import build_once

SOURCE = Path(__file__).with_name("relay.c")
QUEUE_BYTES = 16 << 20
"""May wait before a link; more is dropped. Above the largest window of TCP's defaults: few connections lose none."""
_DEVICE = "link0"
_NAME = re.compile(r"pss-(\d+)-\d+-\d+")
_PACKET_S, _LEAST_MTU, _LARGEST_MTU = 1e-4, 1500, 65000
_CLOSE, _HOSTS_OWN_US = 0.25, 100
_networks = itertools.count()


@dataclass(frozen=True)
class Counts:
    """Count what went over the links of an emulated network so far, and the time of a core it cost."""

    packets: int
    bytes: int
    dropped: int
    cpu_s: float


@dataclass(frozen=True)
class Network:
    """Hold hosts that reach each other. rate_mbit, delay_us: as requested, one direction; None: not emulated."""

    hosts: Sequence[Host]
    rate_mbit: float | None = None
    delay_us: float | None = None
    relay: subprocess.Popen[str] | None = None

    @property
    def is_emulated(self) -> bool:
        """Return whether a relay makes the network."""
        return self.relay is not None

    def measure(self, seconds: float = 1.0) -> Speed:
        """Return the speed between the first two hosts, in about 2 × `seconds`."""
        return measure_speed(self.hosts[0], self.hosts[1], seconds)

    def is_as_asked(self, speed: Speed) -> bool:
        """Return whether rate and round trip are within 25 % of what was requested, the round trip or within 0.1 ms."""
        if self.rate_mbit is None or self.delay_us is None:
            return True
        asked_us = 2 * self.delay_us
        is_rate_close = abs(speed.rate_mbit / self.rate_mbit - 1) <= _CLOSE
        return is_rate_close and abs(speed.round_trip_us - asked_us) <= max(_CLOSE * asked_us, _HOSTS_OWN_US)

    def read_counts(self) -> Counts:
        """Return the counts so far. Raises RuntimeError where the network is not emulated or its relay has ended."""
        relay = self.relay
        if relay is None or relay.poll() is not None or not relay.stdin or not relay.stdout:
            raise RuntimeError("no relay is running")
        relay.stdin.write("counts\n")
        relay.stdin.flush()
        return Counts(**json.loads(relay.stdout.readline()))


def describe_obstacle() -> str | None:
    """Return why this machine cannot emulate a network, None where it can."""
    if platform.system() != "Linux":
        return f"emulated networks need Linux, this is {platform.system()}"
    for program in ("ip", "setpriv"):
        if not shutil.which(program):
            return f"emulated networks need the program {program!r} (Debian: apt install iproute2 util-linux)"
    if not shutil.which(_compiler()):
        return f"emulated networks need a C compiler, {_compiler()!r} is not there (CC names another)"
    if not Path("/dev/net/tun").exists():
        return "emulated networks need /dev/net/tun (modprobe tun)"
    probe = _new_names(1)[0]
    added = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    _remove_namespaces([probe])
    if added.returncode:
        return f"emulated networks need root and network namespaces: {added.stderr.strip()}"
    return None


def local_network(num_hosts: int) -> Network:
    """Return hosts that are this machine, over its loopback: what an emulated network is compared with."""
    return Network([Host("127.0.0.1", "lo")] * num_hosts)


@contextlib.contextmanager
def emulated_network(num_hosts: int, *, rate_mbit: float, delay_us: float) -> Iterator[Network]:
    """Yield hosts joined by links of that rate (Mbit/s of IP packets) and one-way delay.

    Raises ValueError for what no network can be, RuntimeError where this one cannot be started.
    """
    if not 2 <= num_hosts <= 250:
        raise ValueError(f"num_hosts = {num_hosts}: an emulated network has 2 to 250 hosts")
    if not 0.1 <= rate_mbit <= 100_000:
        raise ValueError(f"rate_mbit = {rate_mbit:g}: must be from 0.1 to 100,000")
    if not 0 <= delay_us <= 1e6:
        raise ValueError(f"delay_us = {delay_us:g}: must be from 0 to 1,000,000")
    program = _build_relay()
    remove_stale_namespaces()
    hosts = [Host(f"10.78.0.{i + 1}", _DEVICE, name) for i, name in enumerate(_new_names(num_hosts))]
    relay = None
    try:
        for host in hosts:
            _run("ip", "netns", "add", host.namespace)
        mtu = _choose_mtu(rate_mbit)
        relay = _start_relay(program, rate_mbit, delay_us, mtu, hosts)
        for host in hosts:
            _set_up(host, mtu)
        yield Network(hosts, rate_mbit, delay_us, relay)
    finally:
        if relay:
            relay.kill()
            relay.communicate()
        _remove_namespaces([host.namespace for host in hosts if host.namespace])


def remove_stale_namespaces() -> list[str]:
    """Remove namespaces of processes that are no more, and return their names."""
    names = [path.name for path in NAMESPACES.glob("pss-*")]
    stale = [name for name in names if (match := _NAME.fullmatch(name)) and not Path("/proc", match[1]).exists()]
    _remove_namespaces(stale)
    return stale


def _new_names(count: int) -> list[str]:
    network = next(_networks)
    return [f"pss-{os.getpid()}-{network}-{i}" for i in range(count)]


def _remove_namespaces(names: Sequence[str]) -> None:
    for name in names:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, start_new_session=True)


def _choose_mtu(rate_mbit: float) -> int:
    """Return the size of packets of 0.1 ms: large ones cost less of the cores, and none waits long behind one."""
    return round(min(max(rate_mbit * 1e6 / 8 * _PACKET_S, _LEAST_MTU), _LARGEST_MTU))


def _start_relay(
    program: Path, rate_mbit: float, delay_us: float, mtu: int, hosts: Sequence[Host]
) -> subprocess.Popen[str]:
    settings = [str(rate_mbit * 1e6 / 8), str(delay_us * 1e-6), str(QUEUE_BYTES), str(mtu)]
    names = [str(host.namespace) for host in hosts]
    relay = subprocess.Popen(
        [program, *settings, *names],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert relay.stdout
    if relay.stdout.readline() != "ready\n":
        raise RuntimeError(f"the relay between emulated hosts did not start: {relay.communicate()[1].strip()}")
    return relay


def _set_up(host: Host, mtu: int) -> None:
    ip = ("ip", "-n", host.namespace)
    _run(*ip, "link", "set", "lo", "up")
    _run(*ip, "addr", "add", f"{host.address}/24", "dev", _DEVICE)
    _run(*ip, "link", "set", _DEVICE, "addrgenmode", "none", "mtu", str(mtu), "txqueuelen", "10000", "up")


def _run(*command: str | None) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, start_new_session=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: {done.stderr.strip()}")


def _compiler() -> str:
    return os.environ.get("CC", "cc")


def _build_relay() -> Path:
    """Return the program, compiled where it is not in the cache."""
    name = f"relay_{platform.machine()}_{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]}"
    return build_once(name, lambda built: _run(_compiler(), "-O2", str(SOURCE), "-o", str(built)))
