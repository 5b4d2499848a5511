"""Emulated networks: rate and delay as asked, ranks on the hosts, and nothing left whatever ends the process."""

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from launch.netlab import emulated_network as module
from launch.netlab.emulated_network import (
    Network,
    describe_obstacle,
    emulated_network,
    local_network,
    remove_stale_namespaces,
)
from launch.netlab.network_hosts import Speed, connect, inside, receive, send
from launch.netlab.network_ranks import RankFailed, run_ranks

ROOT = Path(__file__).parents[3]
obstacle = describe_obstacle()
needs_network = pytest.mark.skipif(obstacle is not None, reason=obstacle or "")
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="ranks are started with setpriv")


def namespaces_of(pid):
    return sorted(path.name for path in Path("/run/netns").glob(f"pss-{pid}-*"))


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition, timeout_s=10):
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def connected(network, near, far):
    return connect(network.hosts[near], network.hosts[far])


def arrivals(network, near, far, packets, size):
    """When packets of `size` bytes, sent in a burst, came: by the kernel's clock, seconds after the first was sent."""
    stamp = 35  # SO_TIMESTAMPNS
    with inside(network.hosts[far]):
        receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with inside(network.hosts[near]):
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with receiver, sender:
        receiver.setsockopt(socket.SOL_SOCKET, 33, 8 << 20)  # SO_RCVBUFFORCE: all wait until they are read
        receiver.setsockopt(socket.SOL_SOCKET, stamp, 1)
        receiver.bind((network.hosts[far].address, 0))
        receiver.settimeout(10)
        data, address = bytes(size - 28), receiver.getsockname()
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))  # nothing else makes the burst longer
        started = time.clock_gettime(time.CLOCK_REALTIME)
        for _ in range(packets):
            sender.sendto(data, address)
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        found = []
        for _ in range(packets):
            ((_, kind, data),) = receiver.recvmsg(2000, 100)[1]
            assert kind == stamp
            seconds, nanoseconds = struct.unpack("qq", data)
            found.append(seconds - started + nanoseconds * 1e-9)
        return found


@needs_network
@pytest.mark.parametrize(("rate_mbit", "delay_us"), [(100, 5000), (1000, 1000), (10, 20_000)])
def test_packets_leave_at_the_rate_and_take_the_delay(rate_mbit, delay_us):
    size = module._choose_mtu(rate_mbit)
    packet_s = size * 8e-6 / rate_mbit
    with emulated_network(2, rate_mbit=rate_mbit, delay_us=delay_us) as network:
        for near, far in ((0, 1), (1, 0)):
            first = min(arrivals(network, near, far, 1, size)[0] for _ in range(10))
            assert 0 <= first - (delay_us * 1e-6 + packet_s) < 0.5e-3
            came = arrivals(network, near, far, 300, size)
            assert (came[-1] - came[99]) / 200 == pytest.approx(packet_s, rel=0.03)  # by then a queue waits
            assert came == sorted(came)


@needs_network
@pytest.mark.parametrize(("rate_mbit", "delay_us"), [(200, 5000), (500, 1000)])
def test_what_is_measured_is_what_was_asked_for(rate_mbit, delay_us):
    with emulated_network(2, rate_mbit=rate_mbit, delay_us=delay_us) as network:
        measured = network.measure(0.6)
        counts = network.read_counts()
    assert 0.7 * rate_mbit <= measured.rate_mbit <= rate_mbit  # 0.95 where nothing else needs the cores
    assert 2 * delay_us <= measured.round_trip_us <= 2 * delay_us + 1000  # 100 us where nothing else needs the cores
    assert counts.dropped == 0
    assert counts.bytes > measured.rate_mbit * 1e6 / 8 * 0.6 * 2
    assert 0 < counts.cpu_s < 5


@needs_network
def test_three_hosts_reach_each_other_and_two_senders_share_the_receivers_link():
    with emulated_network(3, rate_mbit=100, delay_us=500) as network:
        for near in range(3):
            for far in range(3):
                with connected(network, near, far) as (here, there):
                    here.sendall(bytes([near, far]))
                    assert there.recv(2) == bytes([near, far])
        with connected(network, 1, 0) as (one, at_zero), connected(network, 2, 0) as (two, also_at_zero):
            end = time.perf_counter() + 1
            rates = [0.0, 0.0]

            def count(i, end_of_connection):
                rates[i] = receive(end_of_connection, end - 0.6, end)

            threads = [threading.Thread(target=send, args=(sender, end)) for sender in (one, two)]
            threads += [threading.Thread(target=count, args=pair) for pair in ((0, at_zero), (1, also_at_zero))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    assert 70 <= sum(rates) * 8e-6 <= 101, rates


@needs_network
def test_a_full_queue_drops_and_counts():
    with emulated_network(2, rate_mbit=10, delay_us=0) as network:
        with inside(network.hosts[0]):
            sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with sender:
            datagrams = 2 * module.QUEUE_BYTES // 1400
            for _ in range(datagrams):
                sender.sendto(bytes(1372), (network.hosts[1].address, 9))
        counts = network.read_counts()
    assert 0.4 * datagrams < counts.dropped < 0.6 * datagrams
    assert counts.packets < 0.05 * datagrams


@needs_network
def test_two_networks_at_once_do_not_meet():
    with (
        emulated_network(2, rate_mbit=1000, delay_us=0) as fast,
        emulated_network(2, rate_mbit=1000, delay_us=9000) as slow,
    ):
        assert len(namespaces_of(os.getpid())) == 4
        assert fast.measure(0.1).round_trip_us < 2000 < slow.measure(0.1).round_trip_us
        assert remove_stale_namespaces() == []
    assert namespaces_of(os.getpid()) == []


@needs_network
def test_an_exception_leaves_nothing():
    with contextlib.suppress(ZeroDivisionError), emulated_network(2, rate_mbit=100, delay_us=0) as network:
        assert is_alive(network.relay.pid)
        assert len(namespaces_of(os.getpid())) == 2
        raise ZeroDivisionError
    assert namespaces_of(os.getpid()) == []
    assert not is_alive(network.relay.pid)
    with pytest.raises(RuntimeError, match="no relay is running"):
        network.read_counts()


LAB = """
import signal
from launch.netlab.emulated_network import emulated_network
from launch.netlab.network_ranks import run_ranks
signal.signal(signal.SIGTERM, signal.default_int_handler)
with emulated_network(2, rate_mbit=100, delay_us=0) as network:
    print(network.relay.pid, flush=True)
    run_ranks(network, ["sh", "-c", "echo $$ > $PIDS/$RANK; exec sleep 60"], timeout_s=60)
"""


@needs_network
@pytest.mark.parametrize("ended_by", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_of_a_process_ended_by(ended_by, tmp_path):
    env = os.environ | {"PIDS": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", LAB], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as lab:
        relay = int(lab.stdout.readline())
        files = [tmp_path / str(rank) for rank in range(2)]
        wait_until(lambda: all(file.exists() and file.read_text().endswith("\n") for file in files))
        ranks = [int(file.read_text()) for file in files]
        assert len(namespaces_of(lab.pid)) == 2
        assert all(map(is_alive, [relay, *ranks]))
        lab.send_signal(ended_by)
        lab.wait(10)
    wait_until(lambda: not any(map(is_alive, [relay, *ranks])))
    if ended_by == signal.SIGKILL:
        assert len(namespaces_of(lab.pid)) == 2
        assert sorted(remove_stale_namespaces()) == [f"pss-{lab.pid}-{n}" for n in ("0-0", "0-1")]
    assert namespaces_of(lab.pid) == []


@needs_network
def test_ranks_are_told_who_they_are(tmp_path):
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GLOO_SOCKET_IFNAME", "MASTER_ADDR", "EXTRA")
    command = ["sh", "-c", f"echo {' '.join(f'${name}' for name in names)} > $OUT/$RANK"]
    with emulated_network(2, rate_mbit=100, delay_us=0) as network:
        run_ranks(network, command, timeout_s=30, ranks_per_host=2, env={"EXTRA": "x", "OUT": str(tmp_path)})
    said = [(tmp_path / str(rank)).read_text() for rank in range(4)]
    assert said == [f"{rank} 4 {rank % 2} 2 link0 10.78.0.1 x\n" for rank in range(4)]


COLLECTIVE = """
import os, sys, torch, torch.distributed as dist
dist.init_process_group("gloo")
ones = torch.ones(1000)
dist.all_reduce(ones)
assert ones.tolist() == [dist.get_world_size()] * 1000
dist.destroy_process_group()
"""


@needs_network
@pytest.mark.dist
def test_gloo_ranks_meet_over_the_links():
    with emulated_network(2, rate_mbit=100, delay_us=0) as network:
        before = network.read_counts()
        run_ranks(network, [sys.executable, "-c", COLLECTIVE], timeout_s=120)
        after = network.read_counts()
    assert after.bytes - before.bytes > 4000
    assert after.dropped == 0


@needs_linux
def test_the_first_rank_to_fail_is_named_and_the_others_are_killed(tmp_path):
    code = """if True:
        import os, sys, time
        print(os.getpid(), file=open(sys.argv[1] + os.environ["RANK"], "w"))
        while len(os.listdir(sys.argv[1])) < 2: time.sleep(0.01)
        time.sleep(60) if os.environ["RANK"] == "0" else sys.exit("the disk is on fire")
    """
    started = time.monotonic()
    with pytest.raises(RankFailed, match=r"rank 1 ended with status 1\n  the disk is on fire"):
        run_ranks(local_network(2), [sys.executable, "-c", code, f"{tmp_path}/"], timeout_s=30)
    assert time.monotonic() - started < 10
    assert not is_alive(int((tmp_path / "0").read_text()))


@needs_linux
def test_a_rank_that_hangs_is_ended():
    with pytest.raises(RankFailed, match=r"not ended within 0.5 s: ranks 0, 1\n  thinking"):
        run_ranks(local_network(2), ["sh", "-c", "echo thinking; sleep 60"], timeout_s=0.5)
    with pytest.raises(RankFailed, match="rank 0 ended with SIGABRT"):
        run_ranks(local_network(1), ["sh", "-c", "kill -ABRT $$"], timeout_s=10)


@needs_linux
def test_the_loopback_is_measured_the_same_way():
    network = local_network(2)
    measured = network.measure(0.2)
    assert measured.rate_mbit > 100
    assert measured.round_trip_us < 5000
    assert network.is_as_asked(measured)
    with pytest.raises(RuntimeError, match="no relay is running"):
        network.read_counts()


def test_what_is_as_asked():
    network = Network([], rate_mbit=1000, delay_us=1000)
    assert network.is_as_asked(Speed(930, 2100))
    assert not network.is_as_asked(Speed(700, 2100))
    assert not network.is_as_asked(Speed(930, 2600))
    assert Network([], rate_mbit=1000, delay_us=20).is_as_asked(Speed(930, 90))


@pytest.mark.parametrize(
    ("hosts", "rate_mbit", "delay_us", "said"),
    [
        (1, 100, 0, "num_hosts = 1"),
        (2, 0, 0, "rate_mbit = 0"),
        (2, 100, -1, "delay_us = -1"),
        (2, 100, 1e9, "delay_us"),
    ],
)
def test_impossible_networks_are_refused(hosts, rate_mbit, delay_us, said):
    with pytest.raises(ValueError, match=said), emulated_network(hosts, rate_mbit=rate_mbit, delay_us=delay_us):
        pass


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(module.shutil, "which", lambda name: None if name == "setpriv" else f"/bin/{name}")
    assert "'setpriv'" in (describe_obstacle() or "")
    monkeypatch.setattr(module.shutil, "which", lambda name: None if name == "none-cc" else f"/bin/{name}")
    monkeypatch.setenv("CC", "none-cc")
    assert "'none-cc' is not there" in (describe_obstacle() or "")
    monkeypatch.setattr(module.platform, "system", lambda: "Darwin")
    assert describe_obstacle() == "emulated networks need Linux, this is Darwin"


@needs_network
def test_a_relay_that_cannot_be_compiled_says_why(monkeypatch, tmp_path):
    monkeypatch.setenv("PSS_BENCH_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "SOURCE", tmp_path / "broken.c")
    (tmp_path / "broken.c").write_text("int main(")
    with pytest.raises(RuntimeError, match=r"broken\.c"), emulated_network(2, rate_mbit=100, delay_us=0):
        pass
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("relay")] == []
