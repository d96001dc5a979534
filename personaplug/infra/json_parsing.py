"""Parse JSON that somebody else wrote: a ValueError with the reason for everything that cannot be read."""

from __future__ import annotations

import json
from itertools import chain
from typing import Any

MAX_DEPTH = 64
"""Levels of lists and objects. Code that walks a value may be recursive."""


def parse_json(text: bytes) -> Any:
    """Return the value of a JSON text; raise ValueError with a reason that holds nothing of the text."""
    try:
        value = json.loads(text, parse_int=_whole_number)
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ValueError("it is not valid JSON") from None
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    if text.count(b"[") + text.count(b"{") > MAX_DEPTH:
        _check_depth(value)
    return value


_TOO_DEEP = f"it is nested more than {MAX_DEPTH} levels deep"


def _whole_number(digits: str) -> int:
    try:
        return int(digits)
    except ValueError:  # Python reads 4,300 digits at most
        raise ValueError(f"it holds a whole number of {len(digits):,} digits") from None


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        containers = [item for item in level if isinstance(item, (dict, list))]
        if not containers:
            return
        level = list(chain.from_iterable(item.values() if isinstance(item, dict) else item for item in containers))
    raise ValueError(_TOO_DEEP)
