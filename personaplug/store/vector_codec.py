"""Encode the values that the plug reads of an item as bytes: vector and style in float16, with a checksum."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from personaplug.encoders.style_features import FEATURES
from personaplug.errors import ItemError, ShapeMismatch
from personaplug.store.row_checksums import checksums_of_rows, damaged

LITTLE_ENDIAN_HALF = "<f2"
Bodies = npt.NDArray[Any]
"""(n) records with the fields `key`, `day`, `label_id`, `kind_id`, `style` (F) and `vector` (E)."""


def encode_vectors(vectors: npt.NDArray[Any], *, width: int) -> list[bytes]:
    """Return the bytes of each of (n, E) vectors as little-endian float16."""
    if vectors.ndim != 2 or vectors.shape[1] != width:
        raise ShapeMismatch(f"The store needs vectors of shape (n, {width}); found shape {vectors.shape}.")
    with np.errstate(over="ignore", invalid="ignore"):
        halves = vectors.astype(LITTLE_ENDIAN_HALF)
    invalid = int((~np.isfinite(halves).all(axis=1)).sum())
    if invalid:
        raise ItemError(f"{invalid} of {len(vectors)} vectors have NaN or infinite values; nothing was stored.")
    return split_rows(halves)


def split_rows(rows: npt.NDArray[Any]) -> list[bytes]:
    """Return the bytes of each row of an array."""
    buffer = np.ascontiguousarray(rows).tobytes()
    size = len(buffer) // max(len(rows), 1)
    return [buffer[start : start + size] for start in range(0, len(buffer), size)] if size else []


def encode_bodies(
    keys: Sequence[int],
    days: Sequence[int],
    *,
    label_ids: Sequence[int],
    kind_ids: Sequence[int],
    styles: Sequence[bytes],
    vectors: Sequence[bytes],
) -> list[bytes]:
    """Return the bytes of each item."""
    width = len(vectors[0]) // 2 if vectors else 0
    bodies = np.zeros(len(keys), dtype=_layout(width))
    bodies["key"], bodies["day"], bodies["label_id"], bodies["kind_id"] = keys, days, label_ids, kind_ids
    for name, rows in (("style", styles), ("vector", vectors)):
        bodies[name] = np.frombuffer(b"".join(rows), dtype=LITTLE_ENDIAN_HALF).reshape(bodies[name].shape)
    bodies["checksum"] = _checksums(bodies)
    return split_rows(bodies)


def decode_bodies(rows: Sequence[bytes], *, width: int, user_no: int, items_per_user: int) -> Bodies:
    """Decode a user's items, oldest first; raise StorageError if they are damaged, of another user or out of order."""
    layout = _layout(width)
    try:
        buffer = b"".join(rows)
    except TypeError:
        raise damaged("the type of a vector") from None
    if len(buffer) != len(rows) * layout.itemsize:
        raise damaged("the size of a vector")
    bodies = np.frombuffer(buffer, dtype=layout)
    if not (bodies["checksum"] == _checksums(bodies)).all():
        raise damaged("a vector")
    keys, days = bodies["key"], bodies["day"].astype(np.int64)
    later = np.diff(days)
    if not (keys // items_per_user == user_no).all() or not ((later > 0) | ((later == 0) & (np.diff(keys) > 0))).all():
        raise damaged("the order of a user's items")
    return bodies


def _checksums(bodies: Bodies) -> npt.NDArray[np.uint64]:
    words = bodies.view("<u8").reshape(len(bodies), bodies.dtype.itemsize // 8)
    return checksums_of_rows(words[:, :-1])


@lru_cache
def _layout(width: int) -> np.dtype[Any]:
    halves = len(FEATURES) + width
    fields: list[Any] = [("key", "<i8"), ("day", "<i4"), ("label_id", "<i2"), ("kind_id", "<i2")]
    fields += [("style", LITTLE_ENDIAN_HALF, (len(FEATURES),)), ("vector", LITTLE_ENDIAN_HALF, (width,))]
    fields += [("fill", "u1", (-2 * halves % 8,)), ("checksum", "<u8")]  # pads the record to words of 8 bytes
    return np.dtype(fields)
