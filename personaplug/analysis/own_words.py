"""Own words: the words of an answer that only the user's history holds.

An *own word* of a sample occurs in the user's past answers. It occurs neither in the input nor in the past answers of
the sample's strangers, whose histories the row `wrong-user` gets. So an own word in a text is a sign of the user.

The words depend on the sample alone, so they are the same for all rows of a table. A word counts once in a text.
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


def own_words(past_answers: Iterable[str], *, inputs: Iterable[str], strangers: Iterable[Words]) -> Words:
    """Return the own words of a sample.

    Args:
        past_answers: the user's.
        inputs: the texts of the prompt.
        strangers: the words of the past answers of each stranger.
    """
    return words_of(past_answers).difference(words_of(inputs), *strangers)


class _OwnWords(MeasuredMetric):
    """A share of own words. The statistics of a sample are the right own words written, and the words that count."""

    needs = "the users' past answers"
    shown_for = "tasks with free text"
    averages_over_users = False  # the answers of one user may hold no own words

    def of_texts(self, texts: Sequence[str], golds: Sequence[str], own: Sequence[Words]) -> Array | None:
        """Compute the statistics of each sample, (n, 2); None if no word counts.

        Args:
            texts, golds: (n,) written and right answers.
            own: (n,) own words of each sample.
        """
        statistics = [
            self._counts(words_of([text]) & words, words_of([gold]) & words)
            for text, gold, words in zip(texts, golds, own, strict=True)
        ]
        array = np.array(statistics, dtype=np.float64).reshape(-1, 2)
        return array if array[:, 1].any() else None

    def value(self, means: Array) -> Array:
        return per_counted(means)

    @abstractmethod
    def _counts(self, written: Words, right: Words) -> tuple[int, int]: ...


class OwnWordsRecall(_OwnWords):
    """Right own words written, divided by the own words of the right answers."""

    name = "own_words_recall"

    def _counts(self, written: Words, right: Words) -> tuple[int, int]:
        return len(written & right), len(right)


class OwnWordsPrecision(_OwnWords):
    """Right own words written, divided by all own words written."""

    name = "own_words_precision"

    def _counts(self, written: Words, right: Words) -> tuple[int, int]:
        return len(written & right), len(written)
