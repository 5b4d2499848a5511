"""Making kernels ready: the C++ ones are compiled once on each kind of machine and kept in a cache.

Without a compiler, without Triton on a GPU, or with PSS_BENCH_KERNELS=off, methods run in plain PyTorch: the same
numbers, more slowly.
"""

import fcntl
import hashlib
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from pss.kernels.plan import write_cpp_layout

SOURCES = Path(__file__).parent / "cpu"
_FLAGS = ["-O3", "-std=c++20", "-fopenmp", "-march=native", "-shared", "-fPIC"]
_FLAGS += ["-fno-math-errno", "-fno-trapping-math"]  # nobody asks for either; without them √ and ?: stay scalar
if platform.machine() == "x86_64":
    _FLAGS.append("-mprefer-vector-width=512")
_TIMEOUT_S = 600


@cache
def load_cpu_kernels() -> bool:
    """Register the CPU kernels with PyTorch, building them where they are not in the cache. False: there are none."""
    if os.environ.get("PSS_BENCH_KERNELS", "on") == "off":
        return False
    try:
        torch.ops.load_library(_build())
    except (OSError, RuntimeError, ImportError, subprocess.SubprocessError) as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        warnings.warn(
            f"ROBE runs in plain PyTorch, several times slower: its C++ kernels could not be built ({reason})",
            stacklevel=2,
        )
        return False
    return True


@cache
def load_cuda_kernels() -> bool:
    """Register the CUDA kernels, which Triton compiles as they are used. False: there is no Triton."""
    if os.environ.get("PSS_BENCH_KERNELS", "on") == "off":
        return False
    from pss.kernels import triton_robe_bags  # imports Triton

    return triton_robe_bags.register()


def cache_directory() -> Path:
    """Return PSS_BENCH_CACHE, or pss-bench under the user's cache directory."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("PSS_BENCH_CACHE") or Path(home) / "pss-bench")


def build_once(name: str, build: Callable[[Path], None]) -> Path:
    """Return the path of that file in the cache, made by `build(path)` where it is not there: whole or not at all.
    One process builds, others on the machine wait for it; a lock ends with its owner."""
    path = cache_directory() / name
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=path.parent) as directory:
                built = Path(directory) / name
                build(built)
                os.replace(built, path)
    return path


def _build() -> Path:
    """Return the path of the library."""
    return build_once(f"robe_bags_{_fingerprint()}.so", _compile_aloud)


def _compile_aloud(library: Path) -> None:
    started = time.perf_counter()
    print("building the C++ kernels, once for this machine ...", file=sys.stderr, flush=True)
    _compile(library)
    seconds, kept = time.perf_counter() - started, cache_directory() / library.name
    print(f"built the C++ kernels in {seconds:.0f} s: {kept}", file=sys.stderr, flush=True)


def _compile(library: Path) -> None:
    from torch.utils import cpp_extension  # slow to import, and seldom needed

    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    (library.parent / "plan_layout.h").write_text(write_cpp_layout())
    includes = [f"-I{path}" for path in (library.parent, *cpp_extension.include_paths())]
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    command = [cpp_extension.get_cxx_compiler(), *_FLAGS, abi, *includes, str(SOURCES / "robe_bags.cpp")]
    command += [*libraries, "-ltorch_cpu", "-ltorch", "-lc10", "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()[-1:]
        raise RuntimeError(f"{command[0]} ended with {done.returncode}: {''.join(errors[:1])}")


def _fingerprint() -> str:
    """Hash all that the library depends on: sources, flags, PyTorch, and what the processor can do."""
    parts = [torch.__version__, sys.platform, *_FLAGS, torch.backends.cpu.get_cpu_capability(), write_cpp_layout()]
    cpu = Path("/proc/cpuinfo")
    if cpu.exists():
        parts += [line for line in cpu.read_text().splitlines() if line.startswith(("flags", "Features"))][:1]
    sources = [path.read_bytes() for path in sorted(SOURCES.iterdir()) if path.suffix in (".h", ".cpp")]
    return hashlib.sha256(b"\0".join([*(part.encode() for part in parts), *sources])).hexdigest()[:16]
