"""Peak memory of this process and its GPU, and free memory, in bytes."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_CGROUP_FILES = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))


def reset_peak_memory() -> None:
    """Reset `peak_memory`. Outside Linux, RSS cannot be reset and counts from the start of the process."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> int:
    """Return peak RSS plus peak GPU memory since the last reset."""
    import torch

    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024 + gpu
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) + gpu


def free_memory() -> int:
    """Return the main memory that this process can still allocate, within the limit of its container."""
    import psutil

    free = int(psutil.virtual_memory().available)
    for limit, used in _CGROUP_FILES:
        with suppress(OSError, ValueError):
            free = min(free, int((_CGROUP / limit).read_text()) - int((_CGROUP / used).read_text()))
    return max(0, free)
