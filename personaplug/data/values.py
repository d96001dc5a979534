"""Convert values of JSON, CSV, Parquet, DataFrames and HTTP to plain Python values and to text."""

from __future__ import annotations

import datetime as dt
import math
from decimal import Decimal
from uuid import UUID

import numpy as np

MAX_EXACT_FLOAT = 2**53
"""From this number on, neighboring whole numbers share a float."""

_MAX_DIGITS = 4300  # Python's own limit for converting a whole number to text
_TYPE_NAMES: dict[type, str] = {
    dict: "an object", list: "a list", tuple: "a list", bool: "true or false", type(None): "null", bytes: "bytes",
}  # fmt: skip


class Flaw(ValueError):
    """A defect of a record. The message contains neither the position nor the user's text."""


def plain_value(value: object) -> object:
    """Convert a NumPy value to a Python value with the same digits; return other values unchanged."""
    if not isinstance(value, (np.generic, np.ndarray)):
        return value
    if isinstance(value, np.datetime64):
        plain = value.astype("datetime64[us]").item()
        return str(value) if isinstance(plain, int) else plain  # a year outside the range of Python's dates
    if isinstance(value, np.floating):
        return float(str(value))  # 4.1 in single precision is 4.1, not 4.0999999
    if isinstance(value, np.ndarray):
        return value.tolist()
    return value.item()


def type_name(value: object) -> str:
    """Return the name of a value's type for a message; the value itself may be personal."""
    return _TYPE_NAMES.get(type(value), f"a value of type {type(value).__name__}")


def as_text(value: object, what: str) -> str:
    """Convert a text, a finite number, a UUID, a date or UTF-8 bytes to text.

    A whole number has no decimals: 4.0 becomes "4".
    """
    if isinstance(value, str):
        return _encodable(value, what)
    value = plain_value(value)
    if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool):
        return _number_text(value, what)
    if isinstance(value, UUID):
        return str(value)
    if isinstance(value, (dt.date, dt.time)) and value == value:  # pandas' NaT is a datetime that does not equal itself
        return value.isoformat()
    if isinstance(value, (bytes, bytearray, memoryview)):
        return _decoded(bytes(value), what)
    raise Flaw(f"{what} is {type_name(value)}, expected a text or a number")


def _encodable(value: str, what: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:  # a lone surrogate would make the tokenizer fail in the middle of a run
        raise Flaw(f"{what} is not valid Unicode; encode it as UTF-8") from None
    return str(value)


def _decoded(value: bytes, what: str) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise Flaw(f"{what} is {len(value)} bytes that are not valid UTF-8") from None


def _number_text(value: float | Decimal, what: str) -> str:
    is_finite = value.is_finite() if isinstance(value, Decimal) else isinstance(value, int) or math.isfinite(value)
    if not is_finite:
        raise Flaw(f"{what} is not a finite number")
    if isinstance(value, Decimal):
        if abs(value.adjusted()) > _MAX_DIGITS:
            raise Flaw(f"{what} is a number with more than {_MAX_DIGITS:,} digits")
        if value != value.to_integral_value():
            return f"{value:f}".rstrip("0")
        value = int(value)
    if isinstance(value, int) or (value.is_integer() and abs(value) < 1e16):
        try:
            return str(int(value))
        except ValueError:
            raise Flaw(f"{what} is a number with more than {_MAX_DIGITS:,} digits") from None
    return repr(float(value))
