"""Own words: the words of a right answer that one of two histories holds.

The two histories are the past answers of the sample's user, and those of the stranger whose history the row
`wrong-user` gets with the same seed. An *own word* occurs in the right answer and in exactly one of the two, and not in
the input.

So a word of the stranger's history that happens to be right counts too. The words are the same for a row and its
control. Without anything personal, both histories hold equally many right words, so the gain is about 0.

A word counts once in a text.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence

import numpy as np

from personaplug.analysis.metric_base import Array, MeasuredMetric, per_counted
from personaplug.analysis.words import unicode_words

Words = frozenset[str]


def words_of(texts: Iterable[str]) -> Words:
    """Return the different words of some texts, in any script."""
    return frozenset(word for text in texts for word in unicode_words(text))


def own_words(right: Words, *, inputs: Words, past: Words, stranger: Words) -> Words:
    """Return the own words of a sample.

    Args:
        right: the words of the right answer.
        inputs: the words of the prompt.
        past: the words of the user's past answers.
        stranger: the words of the stranger's past answers.
    """
    # The first step keeps the sets small: a history may hold many words.
    return ((right & past) ^ (right & stranger)) - inputs


class _OwnWords(MeasuredMetric):
    """A share of own words. The statistics of a sample are the own words written, and the words that count."""

    needs = "the users' past answers"
    shown_for = "tasks with free text"
    averages_over_users = False  # the right answers of one user may hold no own words

    def of_texts(self, texts: Sequence[str], own: Sequence[Words]) -> Array | None:
        """Compute the statistics of each sample, (n, 2); None if no sample has own words.

        Args:
            texts: (n,) written answers.
            own: (n,) own words of each sample.
        """
        if not any(own):
            return None
        pairs = [(words_of([text]), words) for text, words in zip(texts, own, strict=True)]
        statistics = [(len(written & words), self._count(written, words)) for written, words in pairs]
        return np.array(statistics, dtype=np.float64)

    def value(self, means: Array) -> Array:
        return per_counted(means)

    @abstractmethod
    def _count(self, written: Words, own: Words) -> int: ...


class OwnWordsRecall(_OwnWords):
    """Own words written, divided by all own words."""

    name = "own_words_recall"

    def _count(self, written: Words, own: Words) -> int:
        return len(own)


class OwnWordsPrecision(_OwnWords):
    """Own words written, divided by all words written. An empty text counts as one word, so each text counts."""

    name = "own_words_precision"

    def _count(self, written: Words, own: Words) -> int:
        return max(1, len(written))
