"""What a measurement of kernels depends on in the machine: the caches of its processor, and its memory."""

import re
from pathlib import Path

import torch

_CPU0_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_MEMORY_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def cache_bytes(directory: Path = _CPU0_CACHES) -> dict[str, int]:
    """Name -> bytes of the data caches that core 0 sees, {} where the system does not tell: L1, L2, L3.

    A virtual machine may be told of a whole L3 that it shares with others.
    """
    found = {}
    for index in sorted(directory.glob("index*")):
        try:
            kind, level, size = ((index / name).read_text().strip() for name in ("type", "level", "size"))
        except OSError:
            continue
        if kind != "Instruction":
            found[f"L{level}"] = int(size.removesuffix("K")) << 10
    return found


def huge_page_share(rollup: Path = Path("/proc/self/smaps_rollup")) -> float | None:
    """Of the memory of this process that is no file's; None where the system does not tell."""
    try:
        kilobytes = dict(re.findall(r"^(\w+): +(\d+) kB$", rollup.read_text(), re.MULTILINE))
        return int(kilobytes["AnonHugePages"]) / int(kilobytes["Anonymous"])
    except (OSError, KeyError, ZeroDivisionError):
        return None


def last_cache_bytes(device: torch.device) -> int:
    """Bytes of the last cache before memory, 0 where it is not known."""
    if device.type == "cuda":
        return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0))
    return max(cache_bytes().values(), default=0)


def available_bytes(device: torch.device) -> int:
    """Bytes that can be allocated now: of the device, or of the host within the limit of its container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with open("/proc/meminfo") as lines:
        (free,) = (int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    for path in map(Path, _MEMORY_LIMITS):
        if path.exists() and (limit := path.read_text().strip()) != "max":
            used = path.with_name("memory.current" if path.name == "memory.max" else "memory.usage_in_bytes")
            free = min(free, int(limit) - int(used.read_text()))
    return free
