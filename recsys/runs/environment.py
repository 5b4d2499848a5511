"""What a run or a measurement was made with: commit, versions, command, and what the machine offers."""

import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "torchx", "numpy")
_CPU0_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_MEMORY_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def describe_environment(device: torch.device, world_size: int) -> dict[str, Any]:
    """Return when and from what this process was started: commit, versions, hardware, threads and command."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_cores": os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "world_size": world_size,
        "threads_per_rank": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", ""),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def _git(*arguments: str) -> str | None:
    root = Path(__file__).parent
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()


def count_cores() -> int:
    """Return how many cores this process may use: fewer than the machine has where it is bound to some."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cache_bytes(directory: Path = _CPU0_CACHES) -> dict[str, int]:
    """Return the bytes of the data caches that core 0 sees, by name (L1, L2, L3); {} where the system does not tell.

    A virtual machine may be told of a whole L3 that it shares with others.
    """
    caches = {}
    for index in sorted(directory.glob("index*")):
        try:
            kind, level, size = ((index / name).read_text().strip() for name in ("type", "level", "size"))
        except OSError:
            continue
        if kind != "Instruction":
            caches[f"L{level}"] = int(size.removesuffix("K")) << 10
    return caches


def huge_page_share(rollup: Path = Path("/proc/self/smaps_rollup")) -> float | None:
    """Return the share of this process's memory that lies in huge pages; None where the system does not tell.

    Of the memory that is no file's.
    """
    try:
        kilobytes = dict(re.findall(r"^(\w+): +(\d+) kB$", rollup.read_text(), re.MULTILINE))
        return int(kilobytes["AnonHugePages"]) / int(kilobytes["Anonymous"])
    except (OSError, KeyError, ZeroDivisionError):
        return None


def last_cache_bytes(device: torch.device) -> int:
    """Return the bytes of the last cache before memory, 0 where it is not known."""
    if device.type == "cuda":
        return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0))
    return max(cache_bytes().values(), default=0)


def available_bytes(device: torch.device) -> int:
    """Return the bytes that can be allocated now: of the device, or of the host within the limit of its container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with open("/proc/meminfo") as lines:
        (free,) = (int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    for path in map(Path, _MEMORY_LIMITS):
        if path.exists() and (limit := path.read_text().strip()) != "max":
            used = path.with_name("memory.current" if path.name == "memory.max" else "memory.usage_in_bytes")
            free = min(free, int(limit) - int(used.read_text()))
    return free
