"""How much memory a piece of work needed at most, this process's and the GPU's, and how much is free."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # names of glibc's malloc.h
_KEPT_BYTES = 1 << 30


def reset_peak_memory() -> None:
    """Let `peak_memory` count from now on, where the system allows it (Linux); elsewhere from the process's start."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> int:
    """Most main memory held since the last reset, plus the most GPU memory, in bytes."""
    import torch

    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return _resident_peak() + gpu


def keep_freed_memory() -> None:
    """Let the C library keep what tensors give back for the next ones (glibc; elsewhere nothing happens).

    By default it returns each large block to the system at once, which then clears the same pages again for the next
    tensor of a step: half of the time of an elementwise product of tens of megabytes.
    """
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def free_memory() -> int:
    """Bytes of main memory that this process may still take: what the system has left, within its container's limit."""
    import psutil

    free = int(psutil.virtual_memory().available)
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError):
            group = Path("/sys/fs/cgroup")
            left = int((group / limit).read_text(encoding="ascii")) - int((group / used).read_text(encoding="ascii"))
            free = min(free, max(0, left))
    return free


def _resident_peak() -> int:
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
