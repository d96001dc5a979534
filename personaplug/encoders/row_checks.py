"""Vectorized checksums of an embedding store's rows.

A checksum is Σ word · multiplier mod 2⁶⁴ over the 32-bit words of a row, with odd random multipliers. A change of one
word always changes the sum. Other changes are missed with a probability of about 2⁻³². Every sum includes the salt of
its store, so files of another store do not pass. The checksums take a fraction of the time to read a history.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Checks = npt.NDArray[np.uint64]

_ROWS_AT_ONCE = 64  # so that their 64-bit copy fits into the CPU cache


class RowHash:
    """Computes the checksum of a vector of `width` float16 values and its row id, for the store with this salt."""

    def __init__(self, width: int, *, salt: int = 0) -> None:
        self._salt = np.uint64(salt)
        self._word = "<u4" if width % 2 == 0 else "<u2"
        self._multipliers = _multipliers(2 * width // np.dtype(self._word).itemsize + 1)

    def __call__(self, vectors: npt.NDArray[np.float16], row_ids: npt.NDArray[np.int64]) -> Checks:
        """Return the checksums of (n, E) vectors with (n,) row ids."""
        words = np.ascontiguousarray(vectors, dtype="<f2").view(self._word)
        checks: Checks = (row_ids.astype(np.uint64) + self._salt) * self._multipliers[-1]
        for start in range(0, len(words), _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            checks[part] += words[part].astype(np.uint64) @ self._multipliers[:-1]
        return checks


def key_checks(keys: Sequence[bytes], rows: npt.NDArray[np.int64], *, salt: int) -> npt.NDArray[np.int64]:
    """Return checksums that bind keys of 16 bytes to their rows, (n,), as signed integers for SQLite."""
    words = np.frombuffer(b"".join(keys), dtype="<u4").reshape(len(keys), 4).astype(np.uint64)
    salted = rows.astype(np.uint64) + np.uint64(salt)
    checks: Checks = words @ _KEY_MULTIPLIERS[:-1] + salted * _KEY_MULTIPLIERS[-1]
    return checks.view(np.int64)


def _multipliers(count: int) -> Checks:
    # SplitMix64 gives the same numbers in every version of numpy.
    steps = (np.arange(1, count + 1, dtype=np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
    steps = (steps ^ (steps >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    steps = (steps ^ (steps >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (steps ^ (steps >> np.uint64(31))) | np.uint64(1)


_KEY_MULTIPLIERS = _multipliers(5)
