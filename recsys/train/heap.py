"""The heap of a training process: memory that is freed stays with it.

glibc gives blocks above 32 MiB back to the kernel as soon as they are freed, which hands them out again zeroed, page by
page: a fresh output of 68 MB costs more than every kernel that writes it (31 ms against 4). Activations and gradients
of a training step are such blocks, whatever the embedding method.
"""

import contextlib
import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_NEVER = -1


def keep_freed_memory() -> bool:
    """For the rest of the process, best before the first large tensor. False: this C library has no such switch."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))
    return False
