"""Filter texts that a model wrote as training data: by length, duplicates, near duplicates and label balance.

Source: the filters of Zhao et al., "SELF-GUIDE: Better Task-Specific Instruction Following via Self-Synthetic
Finetuning", arXiv 2407.12874. The bound on each label's share and the two bounds on similarity are added here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from scipy.special import softmax

from personaplug.analysis.words import unicode_words

Vectors = npt.NDArray[np.float32]

MAX_COMMON_WORDS = 0.8
"""Two texts are near copies if the F1 of their words is at least this."""

MAX_EXTRA_SHARE = 0.1
"""The most by which a label's share may exceed its share among the real answers."""

_WIDTH = 2.0  # standard deviations around the mean
_ROUNDING = 1e-9
_SCALINGS, _TINY = 200, 1e-300


@dataclass(frozen=True)
class UsualRange:
    """The range within two standard deviations of the mean of the real values."""

    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> UsualRange:
        mean, spread = float(np.mean(values)), _WIDTH * float(np.std(values))
        return cls(mean - spread - _ROUNDING, mean + spread + _ROUNDING)

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclass
class FilterReport:
    """The number of texts that were written, and the number that each filter left out, in the filters' order."""

    written: int = 0
    left_out: Counter[str] = field(default_factory=Counter)

    @property
    def kept(self) -> int:
        return self.written - self.left_out.total()

    def lines(self) -> list[str]:
        """Return a line for each filter: how many texts it checked, and how many it left out."""
        lines, reached = [], self.written
        for reason, count in self.left_out.items():
            share = f" ({count / reached:.0%})" if reached else ""
            lines.append(f"{reason}: {count:,} of {reached:,} left out{share}")
            reached -= count
        return [*lines, f"kept: {self.kept:,} of {self.written:,}"]


def words_key(text: str) -> str:
    """Return the words of a text, in lower case, to compare texts; a text without words is returned stripped."""
    return " ".join(unicode_words(text)) or text.strip()


class RealTexts:
    """The real texts that a new one must not repeat."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._keys = {words_key(text) for text in texts}
        self._counts = [Counter(key.split()) for key in sorted(self._keys)]

    def has(self, text: str) -> bool:
        """Return whether a real text has the same words in the same order."""
        return words_key(text) in self._keys

    def has_near_copy(self, text: str) -> bool:
        """Return whether a real text shares most of its words with this text, in any order."""
        words = Counter(words_key(text).split())
        return any(_common_words(words, other) >= MAX_COMMON_WORDS for other in self._counts)


def nearest_cosines(vectors: Vectors, others: Vectors) -> npt.NDArray[np.float64]:
    """Return the highest cosine of each unit vector to any of the others."""
    nearest: npt.NDArray[np.float64] = (vectors @ others.T).max(axis=1).astype(np.float64)
    return nearest


def lowest_usual_cosine(vectors: Vectors) -> float:
    """Return the lower end of the usual range of cosines between a real text and its nearest real text.

    The vectors have length 1. A single text returns -1.
    """
    if len(vectors) < 2:
        return -1.0
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -1.0)
    return UsualRange.of(cosines.max(axis=1).tolist()).low


def balanced(labels: Sequence[str], shares: Mapping[str, float]) -> list[int]:
    """Return the indices of the longest list in which no label exceeds its real share by more than MAX_EXTRA_SHARE.

    If a label has too many texts, the last ones are left out.
    """
    counts = Counter(labels)
    while counts != (capped := _capped(counts, shares)):
        counts = capped
    remaining, indices = Counter(counts), []
    for index, label in enumerate(labels):
        if remaining[label] > 0:
            indices.append(index)
            remaining[label] -= 1
    return indices


def with_shares(scores: npt.NDArray[np.float64], shares: Sequence[float]) -> npt.NDArray[np.float64]:
    """Return probabilities (n, C) from log-likelihoods, calibrated so that their mean over the texts is `shares`.

    A bias per label, found by iterative scaling, removes the model's preference for labels that does not depend on the
    input. Source of the idea: Zhao et al., "Calibrate Before Use", arXiv 2102.09690.
    """
    present = np.flatnonzero(np.asarray(shares) > 0)
    log_shares, logits = np.log(np.asarray(shares)[present]), scores[:, present]
    for _ in range(_SCALINGS if len(scores) else 0):
        logits = logits + log_shares - np.log(np.maximum(softmax(logits, axis=1).mean(axis=0), _TINY))
    probabilities = np.zeros_like(scores)
    probabilities[:, present] = softmax(logits, axis=1)
    return probabilities


def _capped(counts: Counter[str], shares: Mapping[str, float]) -> Counter[str]:
    total = counts.total()
    limits = {label: math.floor((shares.get(label, 0.0) + MAX_EXTRA_SHARE) * total + _ROUNDING) for label in counts}
    return Counter({label: min(count, limits[label]) for label, count in counts.items()})


def _common_words(left: Counter[str], right: Counter[str]) -> float:
    """Return the F1 of the words that two texts have in common."""
    total, shorter = left.total() + right.total(), min(left.total(), right.total())
    if not total or 2 * shorter < MAX_COMMON_WORDS * total:
        return 0.0  # too different in length to reach the bound
    return 2 * (left & right).total() / total
