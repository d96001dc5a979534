"""Peak memory."""

from __future__ import annotations

import subprocess
import sys

import pytest

# A process of its own, because a test process may have free memory that a new array takes.
SCRIPT = """
import numpy as np
from personaplug.infra.memory import peak_memory, reset_peak_memory

buffer = np.ones(40_000_000)  # 320 MB
assert peak_memory() > buffer.nbytes
high = peak_memory()
del buffer
reset_peak_memory()
assert peak_memory() < high - 200_000_000
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process reset its peak")
def test_peak_memory_counts_from_the_last_reset() -> None:
    subprocess.run([sys.executable, "-c", SCRIPT], check=True, timeout=120)
