"""Peak memory."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from personaplug.infra.memory import peak_memory, reset_peak_memory


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process reset its peak")
def test_peak_memory_counts_from_the_last_reset() -> None:
    buffer = np.ones(40_000_000)  # 320 MB
    assert peak_memory() > buffer.nbytes
    high = peak_memory()
    del buffer
    reset_peak_memory()
    assert peak_memory() < high - 200_000_000
