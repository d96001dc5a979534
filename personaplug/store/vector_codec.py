"""Item vectors to bytes and back, in half precision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from personaplug.encoders.embedding_store import Float16Array
from personaplug.errors import ItemError, ShapeMismatch, StorageError

LITTLE_ENDIAN_HALF = "<f2"


def encode_vectors(vectors: npt.NDArray[Any], *, width: int) -> list[bytes]:
    """Return the bytes of each of (n, E) vectors as little-endian float16."""
    if vectors.ndim != 2 or vectors.shape[1] != width:
        raise ShapeMismatch(f"The store keeps vectors of shape (n, {width}); found shape {vectors.shape}.")
    with np.errstate(over="ignore", invalid="ignore"):
        halves = vectors.astype(LITTLE_ENDIAN_HALF)
    invalid = int((~np.isfinite(halves).all(axis=1)).sum())
    if invalid:
        raise ItemError(f"{invalid} of {len(vectors)} vectors hold NaN or infinite values; nothing was stored.")
    return split_rows(halves)


def split_rows(rows: npt.NDArray[Any]) -> list[bytes]:
    """Return the bytes of each row of an array."""
    buffer = np.ascontiguousarray(rows).tobytes()
    size = len(buffer) // max(len(rows), 1)
    return [buffer[start : start + size] for start in range(0, len(buffer), size)] if size else []


def decode_vectors(bodies: Sequence[bytes], *, width: int) -> Float16Array:
    """Return the vectors of such bytes, (n, E) float16."""
    values = np.frombuffer(b"".join(bodies), dtype=np.uint8)
    if values.size != 2 * width * len(bodies):
        raise StorageError(
            f"The store is damaged: {len(bodies)} vectors need {2 * width} bytes each; found {values.size} bytes in "
            f"total. Restore the store from a backup."
        )
    return values.view(LITTLE_ENDIAN_HALF).reshape(len(bodies), width).astype(np.float16)
