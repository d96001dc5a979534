"""Form: how a text is written, whatever it says; what an encoder of meaning leaves out.

How long somebody's headlines are, how they are capitalized and punctuated, is a habit: alike within a user, different
between users, and plain to count. The text itself is not kept.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

StyleArray = npt.NDArray[np.float16]

_WORD = re.compile(r"\S+")
_LINK = re.compile(r"https?://|www\.", re.IGNORECASE)
_MARKS = {
    "stops": ".…",
    "commas": ",;",
    "colons": ":",
    "exclamations": "!",
    "questions": "?",
    "quotes": '"“”«»',
    "apostrophes": "'’‘",
    "dashes": "-–—",
    "brackets": "()[]",
    "hashtags": "#",
    "mentions": "@",
}
_SPREADS = {
    "words": (2.3, 0.5),
    "letters": (1.7, 0.25),
    "capitals": (0.12, 0.1),
    "capitalized": (0.5, 0.35),
    "begins_small": (0.0, 0.5),
    "ends_marked": (0.5, 0.5),
    "digits": (0.0, 0.04),
    "links": (0.0, 0.1),
    "symbols": (0.0, 0.05),
} | dict.fromkeys(_MARKS, (0.0, 0.1))
"""The middle and the spread of each value over short texts; fixed, so that forms mean the same everywhere."""

FEATURES = tuple(_SPREADS)
"""What the values of a form are, in order."""

_MIDDLES, _SCALES = (np.array(column) for column in zip(*_SPREADS.values(), strict=True))
_FARTHEST = 4.0


def text_style(text: str) -> StyleArray:
    """The form of a text, (F,): values of about 1 in size, at most 4; all 0 for an empty text.

    Lengths are logarithms, marks are counted per word, kinds of letters per character.
    """
    words = _WORD.findall(text)
    if not words:
        return np.zeros(len(FEATURES), dtype=np.float16)
    raw = _raw(text, words)
    scaled = (np.array([raw[name] for name in FEATURES]) - _MIDDLES) / _SCALES
    bounded: StyleArray = np.clip(scaled, -_FARTHEST, _FARTHEST).astype(np.float16)
    return bounded


def style_features_of(texts: Iterable[str]) -> StyleArray:
    """The forms of some texts, (n, F)."""
    found = [text_style(text) for text in texts]
    return np.stack(found) if found else np.zeros((0, len(FEATURES)), dtype=np.float16)


def _raw(text: str, words: list[str]) -> dict[str, float]:
    letters = sum(map(len, words))
    marks = {name: sum(text.count(mark) for mark in signs) / len(words) for name, signs in _MARKS.items()}
    known = "".join(_MARKS.values())
    return marks | {
        "words": math.log(len(words)),
        "letters": math.log(letters / len(words)),
        "capitals": sum(letter.isupper() for letter in text) / letters,
        "capitalized": sum(word[0].isupper() for word in words) / len(words),
        "begins_small": float(text.lstrip()[0].islower()),
        "ends_marked": float(not text.rstrip()[-1].isalnum()),
        "digits": sum(letter.isdigit() for letter in text) / letters,
        "links": len(_LINK.findall(text)) / len(words),
        "symbols": sum(not (c.isalnum() or c.isspace() or c in known) for c in text) / letters,
    }
