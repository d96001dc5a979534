"""How much memory a piece of work needed at most, this process's and the GPU's, and how much is free."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path


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
