"""Style features: how a text is written, independent of its content. A semantic encoder does not capture them.

Length, capitals and punctuation are habits: similar within a user, different between users. The same holds for symbols
and for the first and last words of a text, such as a greeting and a sign-off. An encoder with a word vocabulary maps
all emoji to one unknown word, and a vector of a whole text depends little on its last words. Here, each symbol and each
such word sets two bits, which its hash selects (Bloom, 1970).
"""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

StyleArray = npt.NDArray[np.float16]

_WORD = re.compile(r"\S+")
_LETTERS = re.compile(r"\w+")
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
_ALL_MARKS = frozenset("".join(_MARKS.values()))
_EDGE_WORDS = 3  # at the beginning and at the end of a text
_BITS = 32


def _bit_names(part: str) -> tuple[str, ...]:
    return tuple(f"{part}_{number}" for number in range(_BITS))


_SYMBOL_BITS, _OPENING_BITS, _CLOSING_BITS = map(_bit_names, ("symbol", "opening", "closing"))
_ALL_BITS = _SYMBOL_BITS + _OPENING_BITS + _CLOSING_BITS
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
}
_SPREADS |= dict.fromkeys(_MARKS, (0.0, 0.1)) | dict.fromkeys(_ALL_BITS, (0.0, 0.5))
"""Center and spread of each feature over short texts. They are constants, so that features stay comparable."""

FEATURES = tuple(_SPREADS)
"""The names of the features in order."""

FORM_FEATURES = tuple(name for name in FEATURES if name not in _ALL_BITS)
"""The names of the features that are measured numbers: length, kinds of letters, marks, links and symbols."""

_MIDDLES, _SCALES = (np.array(column) for column in zip(*_SPREADS.values(), strict=True))
_MAX_VALUE = 4.0


def text_style(text: str) -> StyleArray:
    """Return the style features of a text, (F,), scaled to about ±1 and clipped to ±4; all 0 for an empty text.

    Lengths are logarithms. Punctuation marks are counted per word, kinds of letters per character.
    """
    words = _WORD.findall(text)
    if not words:
        return np.zeros(len(FEATURES), dtype=np.float16)
    values = _measure(text, words)
    scaled = (np.array([values[name] for name in FEATURES]) - _MIDDLES) / _SCALES
    clipped: StyleArray = np.clip(scaled, -_MAX_VALUE, _MAX_VALUE).astype(np.float16)
    return clipped


def style_features_of(texts: Iterable[str]) -> StyleArray:
    """Return the style features of each text, (n, F)."""
    return np.array([text_style(text) for text in texts], dtype=np.float16).reshape(-1, len(FEATURES))


def _measure(text: str, words: list[str]) -> dict[str, float]:
    letters = sum(map(len, words))
    marks = {name: sum(text.count(mark) for mark in signs) / len(words) for name, signs in _MARKS.items()}
    symbols = [character for character in text if _is_symbol(character)]
    bits = [bit for symbol in symbols if _is_whole(symbol) for bit in _bits_of(symbol, _SYMBOL_BITS)]
    return (
        marks
        | dict.fromkeys(_ALL_BITS, 0.0)
        | dict.fromkeys(bits + _edge_bits(text), 1.0)
        | {
            "words": math.log(len(words)),
            "letters": math.log(letters / len(words)),
            "capitals": sum(letter.isupper() for letter in text) / letters,
            "capitalized": sum(word[0].isupper() for word in words) / len(words),
            "begins_small": float(text.lstrip()[0].islower()),
            "ends_marked": float(not text.rstrip()[-1].isalnum()),
            "digits": sum(letter.isdigit() for letter in text) / letters,
            "links": len(_LINK.findall(text)) / len(words),
            "symbols": len(symbols) / letters,
        }
    )


def _is_symbol(character: str) -> bool:
    return not (character.isalnum() or character.isspace() or character in _ALL_MARKS)


def _is_whole(symbol: str) -> bool:
    """Return True for a whole symbol, False for a part of a letter or of another symbol."""
    return unicodedata.category(symbol)[0] in "SP"


def _edge_bits(text: str) -> list[str]:
    """Return the bits of the first and the last words of a text, in lower case."""
    words = _LETTERS.findall(text.lower())
    edges = (_OPENING_BITS, words[:_EDGE_WORDS]), (_CLOSING_BITS, words[-_EDGE_WORDS:])
    return [bit for names, edge in edges for word in edge for bit in _bits_of(word, names)]


def _bits_of(text: str, names: Sequence[str]) -> tuple[str, str]:
    """Return the two names that the hash of a symbol or word selects."""
    first, second = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=2).digest()
    return names[first % len(names)], names[second % len(names)]
