"""Parse ratings and other numbers, which files store as numbers or as text."""

from __future__ import annotations

import math
import re

from personaplug.data.values import Flaw, as_text

_NUMBER = re.compile(r"[+-]?(?:\d+(?:[.,]\d*)?|[.,]\d+)(?:[eE][+-]?\d+)?")
_MAX_LENGTH = 4300


def as_number(value: object, what: str) -> float:
    """Convert a finite number, or a text with one, to a float.

    A text may have a decimal point or a decimal comma, and blanks around it: "4", "4.0", " 4,0".
    """
    text = as_text(value, what).strip()
    if len(text) > _MAX_LENGTH or not _NUMBER.fullmatch(text):
        raise Flaw(f"{what} is not a finite number")
    number = float(text.replace(",", "."))
    if not math.isfinite(number):
        raise Flaw(f"{what} is not a finite number")
    return number


def number_or_none(value: object) -> float | None:
    """Convert a value like `as_number`, but return None if it is not a finite number."""
    try:
        return as_number(value, "it")
    except Flaw:
        return None
