"""Checksums of rows. SQLite does not check its pages, so a flipped bit could silently change a vector or a user.

The checksums detect damage, but not manipulation: whoever can change the file can also change the checksums.
"""

from __future__ import annotations

import zlib
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from personaplug.errors import StorageError

Words = npt.NDArray[np.uint64]


def checksum(*values: str | int | None, text: bytes | None = None) -> int:
    """Return a checksum of a row's values; -1 if `text` has a wrong type, which no stored checksum equals.

    Args:
        text: the long value of the row, such as a text in UTF-8 or a picture.
    """
    if not isinstance(text, bytes | None):
        return -1
    return zlib.crc32(text or b"", zlib.crc32(repr(values).encode("utf-8", "surrogatepass")))


def checksums_of_rows(words: Words) -> Words:
    """Return a checksum of each row of (n, W) words; the checksum of zeros is not 0."""
    return np.asarray(np.einsum("ij,j->i", words, _weights(words.shape[1])) + np.uint64(1))


def damaged(part: str) -> StorageError:
    return StorageError(f"The store is damaged: {part} differs from what was written. Restore the store from a backup.")


@lru_cache
def _weights(count: int) -> Words:
    """Return a different odd number for each word, to detect a change of one bit and a change of the words' order."""
    return np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) | np.uint64(1)
