"""Split texts into words, in English or in any script, and measure the words that two texts share."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

# Scripts without blanks between words, or with few: each letter with its marks is a word.
_UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x3040, 0x30FF),  # Hiragana, Katakana
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),  # Han
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
)
_JOINERS = "\u200c\u200d"  # occur inside words of Persian and of Indian scripts


def ascii_words(text: str) -> list[str]:
    """Return the lower-cased runs of a-z and 0-9, as Google's `rouge_score` does without a stemmer."""
    return re.findall("[a-z0-9]+", text.lower())


def unicode_words(text: str) -> list[str]:
    """Return the case-folded runs of letters, marks and digits; letters of Chinese, Japanese, Thai, … one by one.

    The text is normalized (NFKC) first. ASCII texts have the same words as with `ascii_words`.
    """
    if text.isascii():
        return ascii_words(text)  # faster
    words: list[str] = []
    is_inside = False  # whether the last character belongs to a word
    can_grow = False  # whether that word may continue with a letter
    for char in unicodedata.normalize("NFKC", text).casefold():
        kind = unicodedata.category(char)[0]
        if kind not in "LMN":
            is_inside = can_grow = (is_inside and can_grow) if char in _JOINERS else False
            continue
        if is_inside and (kind == "M" or (can_grow and not _is_unspaced(char))):
            words[-1] += char
        else:
            words.append(char)
            can_grow = not _is_unspaced(char)
        is_inside = True
    return words


def is_read_by_ascii_words(text: str) -> bool:
    """Return whether at least half of a text's letters are a to z; True for a text without letters."""
    if text.isascii():
        return True
    letters = [char.isascii() for char in text if char.isalpha()]
    return 2 * sum(letters) >= len(letters)


def _is_unspaced(char: str) -> bool:
    code = ord(char)
    return code >= _UNSPACED[0][0] and any(first <= code <= last for first, last in _UNSPACED)


def longest_common_subsequence(left: Sequence[str], right: Sequence[str]) -> int:
    """Return the length of the longest common subsequence.

    Each row of the dynamic programming table is one integer. A zero bit marks each position at which the row increases.

    Source: Hyyrö, "Bit-parallel LCS-length computation revisited", AWOCA 2004.
    """
    positions: dict[str, int] = {}
    for index, word in enumerate(left):
        positions[word] = positions.get(word, 0) | 1 << index
    row = all_ones = (1 << len(left)) - 1
    for word in right:
        matches = row & positions.get(word, 0)
        row = ((row + matches) | (row - matches)) & all_ones
    return len(left) - row.bit_count()
