"""Item vectors as bytes and back: in half precision, or in one byte a value with a scale for each vector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from personaplug.encoders.embedding_store import Float16Array
from personaplug.errors import ConfigError, ItemError, ShapeMismatch, StorageError

Precision = Literal["float16", "int8"]
"""`float16` keeps what training sees; `int8` halves the bytes and turns a vector by less than a degree."""

_MOST = 127


def packed(vectors: npt.NDArray[Any], width: int, *, precision: Precision) -> list[bytes]:
    """The bytes of each of some vectors, little-endian whatever the machine.

    Args:
        vectors: (n, E) of any floating type.
        width: what E has to be.
        precision: how they are kept.
    Raises:
        ConfigError: if there is no such precision.
        ShapeMismatch: if they have another width.
        ItemError: if one holds NaN, or a value beyond half precision.
    """
    if vectors.ndim != 2 or vectors.shape[1] != width:
        raise ShapeMismatch(f"Vectors of shape {vectors.shape} were given; the store keeps shape (n, {width}).")
    records = np.zeros(len(vectors), dtype=_record(width, precision))
    with np.errstate(over="ignore", invalid="ignore"):
        halves = vectors.astype("<f2")
    bad = int((~np.isfinite(halves).all(axis=1)).sum())
    if bad:
        raise ItemError(f"{bad} of {len(vectors)} vectors hold NaN or infinite values; nothing was stored.")
    if precision == "float16":
        records["values"] = halves
    else:
        largest = np.abs(vectors).max(axis=1, initial=0).astype(np.float32)
        records["scale"] = np.where(largest > 0, largest / _MOST, 1)
        records["values"] = np.rint(vectors / records["scale"][:, None])
    return split_rows(records)


def split_rows(rows: npt.NDArray[Any]) -> list[bytes]:
    """The bytes of each row of an array."""
    joined = np.ascontiguousarray(rows).tobytes()
    size = len(joined) // max(len(rows), 1)
    return [joined[start : start + size] for start in range(0, len(joined), size)] if size else []


def unpacked(parts: Sequence[bytes], width: int, *, precision: Precision) -> Float16Array:
    """The vectors of such bytes, (n, E) float16.

    Raises:
        StorageError: if the bytes are not as many as they must be.
    """
    record = _record(width, precision)
    joined = b"".join(parts)
    if len(joined) != len(parts) * record.itemsize:
        raise StorageError(
            f"{len(parts)} stored vectors have {len(joined)} bytes together, not {record.itemsize} each: the store is "
            f"damaged. Restore it from a backup."
        )
    records = np.frombuffer(joined, dtype=record)
    if precision == "float16":
        return np.asarray(records["values"], dtype=np.float16)
    return np.asarray(records["values"] * records["scale"][:, None], dtype=np.float16)


def _record(width: int, precision: Precision) -> np.dtype[np.void]:
    if precision not in get_args(Precision):
        raise ConfigError(f"There is no precision {precision!r}; it is one of {', '.join(get_args(Precision))}.")
    if precision == "float16":
        return np.dtype([("values", "<f2", (width,))])
    return np.dtype([("scale", "<f4"), ("values", "i1", (width,))])
