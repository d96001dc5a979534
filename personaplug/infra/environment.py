"""Package versions and machine facts for results files, because scores and times depend on them."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("personaplug", "torch", "transformers", "sentence-transformers", "accelerate", "numpy", "scikit-learn")


def package_versions(packages: Sequence[str] = _PACKAGES) -> dict[str, str]:
    """Return the versions of Python and of packages, or "not installed" for a missing package."""
    versions = dict.fromkeys(packages, "not installed")
    for name in packages:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {"python": platform.python_version(), **versions}


def machine_info() -> dict[str, Any]:
    """Return the processor, its cores, torch's threads and the GPU, if any."""
    import torch

    processor = platform.processor() or platform.machine()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    info: dict[str, Any] = {"processor": processor, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        info["gpu"] = torch.cuda.get_device_name()
    return info
