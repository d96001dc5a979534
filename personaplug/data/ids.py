"""Ids of users, items and samples: one rule for files, HTTP and the store."""

from __future__ import annotations

import math
import re

from personaplug.data.values import MAX_EXACT_FLOAT, Flaw, as_text, plain_value

MAX_ID_LENGTH = 255

# Control characters and line separators break logs and headers. Bidirectional controls and zero-width characters,
# such as a byte order mark between joined files, make different ids look equal.
# U+FFFD replaces invalid UTF-8, so different names can become equal. A lone surrogate cannot be encoded.
_FORBIDDEN = re.compile(
    "[\0-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060\u2066-\u2069\ufeff\ufffd\ud800-\udfff]"
)

_KINDS = {"\ufeff": "byte order mark", "\u200b": "invisible character", "\u2060": "invisible character"}
_KINDS |= {"\ufffd": "replacement character", "\u2028": "line separator", "\u2029": "paragraph separator"}


def as_id(value: object, what: str) -> str:
    """Convert an id to text of 1 to 255 characters. A number gets its shortest form: 7.0 becomes "7".

    Leading and trailing blanks are part of the id. Messages never show an id because it may be personal.
    """
    value = plain_value(value)
    if isinstance(value, float) and MAX_EXACT_FLOAT <= abs(value) < math.inf:
        raise Flaw(
            f"{what} is a floating-point number above 2^53, which is not exact; write it as text or a whole number"
        )
    text = as_text(value, what)
    if not text.strip():
        raise Flaw(f"{what} is empty")
    if len(text) > MAX_ID_LENGTH:
        raise Flaw(f"{what} has {len(text):,} characters; an id has at most {MAX_ID_LENGTH}")
    if match := _FORBIDDEN.search(text):
        kind = _KINDS.get(match[0], "control character")
        raise Flaw(f"{what} contains the {kind} U+{ord(match[0]):04X}, which is not allowed in an id")
    return text


def short_id(name: str) -> str:
    """Shorten an id for a message. If a long text was given as an id, it must not reach the logs."""
    line = _FORBIDDEN.sub("?", " ".join(name.split()))
    return line if len(line) <= 40 else f"{line[:12]}… of {len(name)} characters"
