"""Attribution: who wrote a text? A linear model of characters, trained on users' past answers, ranks the users.

The features are the TF-IDF of the n-grams of 3 to 5 characters, case included. The model is a linear SVM, one user
against the others (scikit-learn). The users are split by seed into rounds of at most 20 candidates, with one model for
each round. Texts are judged in bundles of up to four of one user, because a short text says little about its author.

Training texts that repeat a right answer of any evaluated sample, or nearly so, are left out. A written text that
repeats a training text of its round says nothing new, so it counts for no candidate. A row that only repeats past
answers is at the chance level.

The row `reference` holds the right answers: its score is the *ceiling* of the table. `reference@wrong-user` holds a
stranger's right answers: the *floor*. Chance and floor depend on the number of candidates: compare only tables with
equally many users. With fewer than five users there is no score.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from personaplug.analysis.metric_base import Array, MeasuredMetric, per_counted
from personaplug.analysis.ranking import chance_of_first, expected_reciprocal_rank
from personaplug.analysis.words import unicode_words

CANDIDATES = 20  # users in a round
MIN_USERS = 5
_PAST_ANSWERS = 50  # latest ones of a user
_MAX_CHARACTERS = 1_000  # of a text
_BUNDLE = 4  # texts that are judged together
_NGRAMS = (3, 5)  # shortest and longest, in characters
_MAX_FEATURES = 30_000  # of a round
_COPY = 0.8  # of the words of two texts, or of the shorter one: with this share of common words a text repeats another
_MIN_CONTAINED = 4  # words of a text that a longer one may contain


class _Attribution(MeasuredMetric):
    """A mean over users. The statistics of a sample are its part of the user's score, and its part of the user."""

    needs = "the users' past answers"
    shown_for = "tasks with free text"
    averages_over_users = False  # the score is a mean over users already, and some users do not count

    def value(self, means: Array) -> Array:
        return per_counted(means)


class AttributionRank(_Attribution):
    """The reciprocal rank of the right user, averaged over a user's bundles, then over users."""

    name = "attribution"


class AttributionFirst(_Attribution):
    """The share of a user's bundles that are attributed to the user, averaged over users."""

    name = "attribution_top1"


class AuthorModels:
    """Models that attribute texts to the users of an evaluation.

    Args:
        past_answers: the past answers of each user, the latest last.
        references: the right answers of all evaluated samples.
        seed: seed of the rounds.
    """

    def __init__(self, past_answers: Mapping[str, Sequence[str]], references: Sequence[str], *, seed: int = 0) -> None:
        self.rounds: list[_Round] = []
        training = {
            owner: [text for text in texts if len(text.strip()) >= _NGRAMS[0]]
            for owner, texts in without_copies(_latest(past_answers), _shortened(references)).items()
        }
        users = sorted(owner for owner, texts in training.items() if texts)
        if len(users) < MIN_USERS:
            return
        drawn = np.random.default_rng([seed, 11]).permutation(users).tolist()
        for part in np.array_split(drawn, math.ceil(len(users) / CANDIDATES)):
            self.rounds.append(_Round.fitted([str(owner) for owner in part], training, seed=seed))

    def statistics(self, texts: Sequence[str], owners: Sequence[str]) -> dict[str, Array]:
        """Return the statistics of both metrics, (n, 2) each, by name; none if no user can be a candidate.

        Args:
            texts: (n,) written texts.
            owners: (n,) users whose texts they should be. Users without past answers do not count.
        """
        texts, by_owner = _shortened(texts), _indices_by_owner(owners)
        first, rank = np.zeros((len(texts), 2)), np.zeros((len(texts), 2))
        for one_round in self.rounds:
            for column, owner in enumerate(one_round.users):
                indices = by_owner.get(owner, [])
                for bundle in _bundles(indices):
                    scores = one_round.scores([texts[index] for index in bundle]).mean(axis=0)
                    share = 1 / len(indices)
                    rank[bundle] = share * expected_reciprocal_rank(scores, column), share
                    first[bundle] = share * chance_of_first(scores, column), share
        return {AttributionRank.name: rank, AttributionFirst.name: first} if rank.any() else {}


@dataclass(frozen=True, eq=False)
class _Round:
    """A linear model of some users: C users, F features."""

    users: list[str]
    vectorizer: Any
    copies: Copies
    weights: NDArray[np.float32]  # (F, C)
    biases: NDArray[np.float32]  # (C,)

    @classmethod
    def fitted(cls, users: list[str], texts: Mapping[str, Sequence[str]], *, seed: int) -> _Round:
        """Train the model of a round. Users with many texts weigh no more than others."""
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.svm import LinearSVC

        vectorizer = TfidfVectorizer(
            analyzer="char", ngram_range=_NGRAMS, lowercase=False, sublinear_tf=True, max_features=_MAX_FEATURES
        )
        of_round = [text for owner in users for text in texts[owner]]
        labels = np.repeat(np.arange(len(users)), [len(texts[owner]) for owner in users])
        model = LinearSVC(class_weight="balanced", random_state=seed)
        model.fit(vectorizer.fit_transform(of_round), labels)
        weights, biases = model.coef_.T.astype(np.float32), model.intercept_.astype(np.float32)
        return cls(users, vectorizer, Copies(of_round), weights, biases)

    def scores(self, texts: Sequence[str]) -> Array:
        """Return the scores of texts for each user, (n, C); 0 for texts that repeat a training text."""
        is_new = np.array([text not in self.copies for text in texts])
        scores = self.vectorizer.transform(texts) @ self.weights + self.biases
        scores_of_new: Array = np.asarray(scores, dtype=np.float64) * is_new[:, None]
        return scores_of_new


def without_copies(past_answers: Mapping[str, Sequence[str]], references: Sequence[str]) -> dict[str, list[str]]:
    """Return each user's different past answers, without those that repeat a right answer, or nearly so."""
    copies = Copies(references)
    return {
        owner: [text for text in dict.fromkeys(texts) if text not in copies] for owner, texts in past_answers.items()
    }


class Copies:
    """The texts that repeat one of n texts, or nearly so: `text in Copies(texts)`. Empty texts are copies.

    Two texts repeat each other if 80 % of their words are common (Dice coefficient of the different words), or 80 % of
    the shorter one's, if it has four words or more. Texts without words must be equal.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = {text.strip() for text in texts}
        word_sets = list({words for text in self._texts if (words := frozenset(unicode_words(text)))})
        with_word: dict[str, list[int]] = {}
        for index, words in enumerate(word_sets):
            for word in words:
                with_word.setdefault(word, []).append(index)
        self._with_word = {word: np.array(indices) for word, indices in with_word.items()}
        self._sizes = np.array([len(words) for words in word_sets], dtype=np.int64)

    def __contains__(self, text: str) -> bool:
        if text.strip() in self._texts or not text.strip():
            return True
        words = set(unicode_words(text))
        found = [self._with_word[word] for word in words if word in self._with_word]
        if not found:
            return False
        common, sizes = np.bincount(np.concatenate(found), minlength=len(self._sizes)), self._sizes
        shorter = np.minimum(sizes, len(words))
        is_contained = (common >= _COPY * shorter) & (shorter >= _MIN_CONTAINED)
        return bool((is_contained | (2 * common >= _COPY * (sizes + len(words)))).any())


def _latest(past_answers: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Return the latest past answers of each user, shortened; a repeated answer counts once, at its last place."""
    return {
        owner: [*dict.fromkeys(_shortened(list(dict.fromkeys(reversed(texts)))[:_PAST_ANSWERS]))][::-1]
        for owner, texts in past_answers.items()
    }


def _shortened(texts: Iterable[str]) -> list[str]:
    return [text[:_MAX_CHARACTERS] for text in texts]


def _indices_by_owner(owners: Sequence[str]) -> dict[str, list[int]]:
    by_owner: dict[str, list[int]] = {}
    for index, owner in enumerate(owners):
        by_owner.setdefault(owner, []).append(index)
    return by_owner


def _bundles(indices: Sequence[int]) -> list[list[int]]:
    """Split a user's samples into as few bundles as possible, of nearly equal sizes."""
    if not indices:
        return []
    parts = np.array_split(np.asarray(indices), math.ceil(len(indices) / _BUNDLE))
    return [part.tolist() for part in parts]
