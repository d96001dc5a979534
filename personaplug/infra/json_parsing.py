"""Parse untrusted JSON; every failure is a ValueError with a reason."""

from __future__ import annotations

import json
from itertools import chain
from typing import Any

MAX_DEPTH = 64
"""Maximum levels of lists and objects, so that code may process a value recursively."""


def parse_json(text: bytes) -> Any:
    """Return the value of a JSON text; raise ValueError with a reason that quotes nothing from the text."""
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
    except ValueError:  # Python parses at most 4,300 digits
        raise ValueError(f"it contains a whole number of {len(digits):,} digits") from None


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        containers = [item for item in level if isinstance(item, (dict, list))]
        if not containers:
            return
        level = list(chain.from_iterable(item.values() if isinstance(item, dict) else item for item in containers))
    raise ValueError(_TOO_DEEP)
