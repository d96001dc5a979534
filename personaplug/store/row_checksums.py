"""Checksums of rows. SQLite has none of its pages, so a flipped bit would silently be another vector or another user.

They find damage, not malice: whoever can change the file can change them too.
"""

from __future__ import annotations

import zlib
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from personaplug.errors import StorageError

Words = npt.NDArray[np.uint64]


def checksum(*values: str | int, text: bytes | None = None) -> int:
    """Return a checksum of values of a row; -1 if one has a type that is never written."""
    if not isinstance(text, bytes | None):
        return -1
    return zlib.crc32(text or b"", zlib.crc32(repr(values).encode("utf-8", "surrogatepass")))


def checksums_of_rows(words: Words) -> Words:
    """Return a checksum of each row of (n, W) words; zeros have another one than 0."""
    return np.asarray(np.einsum("ij,j->i", words, _weights(words.shape[1])) + np.uint64(1))


def damaged(part: str) -> StorageError:
    return StorageError(f"The store is damaged: {part} is not as it was written. Restore the store from a backup.")


@lru_cache
def _weights(count: int) -> Words:
    """Return an odd number for each word, so that a change of any one bit, and words in another order, are noticed."""
    return np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) | np.uint64(1)
