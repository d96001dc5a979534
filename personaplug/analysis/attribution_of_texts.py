"""Attribution: who wrote a text? A linear model of characters, trained on users' past answers, ranks the users.

The features are the TF-IDF of the n-grams of 3 to 5 characters, case included. The model is a linear SVM, one user
against the others (scikit-learn). The users are split by seed into rounds of at most 20 candidates, with one model for
each round. Texts are judged in bundles of up to four of one user, because a short text says little about its author.

Training texts that repeat a right answer of any evaluated sample, or nearly so, are left out.

The row `reference` holds the right answers: its score is the *ceiling* of the table. `reference@wrong-user` holds a
stranger's right answers: the *floor*.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from personaplug.analysis.metric_base import Array, MeasuredMetric, per_counted
from personaplug.analysis.ranking import chance_of_first, expected_reciprocal_rank
from personaplug.analysis.words import unicode_words

CANDIDATES = 20  # users in a round
_BUNDLE = 4  # texts that are judged together
_NGRAMS = (3, 5)  # shortest and longest, in characters
_MAX_FEATURES = 50_000
_COPY = 0.8  # of the words of two texts: a text with this share of common words repeats the other


class _Attribution(MeasuredMetric):
    """A mean over users. The statistics of a sample are its part of the user's score, and its part of the user."""

    needs = "the users' past answers"
    shown_for = "tasks with free text"

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
        past_answers: the past answers of each user.
        references: the right answers of all evaluated samples.
        seed: seed of the rounds.
    """

    def __init__(self, past_answers: Mapping[str, Sequence[str]], references: Sequence[str], *, seed: int = 0) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer

        self.rounds: list[_Round] = []
        training = {
            owner: [text for text in texts if len(text.strip()) >= _NGRAMS[0]]
            for owner, texts in without_copies(past_answers, references).items()
        }
        users = sorted(owner for owner, texts in training.items() if texts)
        if len(users) < 2:
            return
        self.vectorizer = TfidfVectorizer(
            analyzer="char", ngram_range=_NGRAMS, lowercase=False, sublinear_tf=True, max_features=_MAX_FEATURES
        )
        self.vectorizer.fit([text for owner in users for text in training[owner]])
        drawn = np.random.default_rng([seed, 11]).permutation(users).tolist()
        for part in np.array_split(drawn, math.ceil(len(users) / CANDIDATES)):
            candidates = [str(owner) for owner in part]
            self.rounds.append(_Round.fitted(candidates, training, vectorize=self.vectorizer.transform, seed=seed))

    def statistics(self, texts: Sequence[str], owners: Sequence[str]) -> dict[str, Array]:
        """Return the statistics of both metrics, (n, 2) each, by name; none if no user can be a candidate.

        Args:
            texts: (n,) written texts.
            owners: (n,) users whose texts they should be. Users without past answers do not count.
        """
        if not self.rounds:
            return {}
        vectors, by_owner = self.vectorizer.transform(texts), _indices_by_owner(owners)
        first, rank = np.zeros((len(texts), 2)), np.zeros((len(texts), 2))
        for one_round in self.rounds:
            for column, owner in enumerate(one_round.users):
                indices = by_owner.get(owner, [])
                for bundle in _bundles(indices):
                    scores = one_round.scores(vectors[bundle]).mean(axis=0)
                    share = 1 / len(indices)
                    rank[bundle] = share * expected_reciprocal_rank(scores, column), share
                    first[bundle] = share * chance_of_first(scores, column), share
        return {AttributionRank.name: rank, AttributionFirst.name: first} if rank.any() else {}


@dataclass(frozen=True, eq=False)
class _Round:
    """A linear model of some users: C users, F features."""

    users: list[str]
    weights: NDArray[np.float32]  # (F, C)
    biases: NDArray[np.float32]  # (C,)

    @classmethod
    def fitted(
        cls, users: list[str], texts: Mapping[str, Sequence[str]], *, vectorize: Callable[[list[str]], Any], seed: int
    ) -> _Round:
        """Train the model of a round. Users with many texts weigh no more than others."""
        from sklearn.svm import LinearSVC

        vectors = vectorize([text for owner in users for text in texts[owner]])
        labels = np.repeat(np.arange(len(users)), [len(texts[owner]) for owner in users])
        model = LinearSVC(class_weight="balanced", random_state=seed).fit(vectors, labels)
        weights, biases = model.coef_, model.intercept_
        if len(users) == 2:  # scikit-learn has one weight vector for two classes
            weights, biases = np.concatenate([-weights, weights]), np.concatenate([-biases, biases])
        return cls(users, weights.T.astype(np.float32), biases.astype(np.float32))

    def scores(self, vectors: Any) -> Array:
        """Return the scores of texts for each user, (n, C)."""
        return np.asarray(vectors @ self.weights + self.biases, dtype=np.float64)


def without_copies(past_answers: Mapping[str, Sequence[str]], references: Sequence[str]) -> dict[str, list[str]]:
    """Return each user's different past answers, without those that repeat a right answer, or nearly so.

    Two texts repeat each other if the words that both have are at least 80 % of their words (Dice coefficient of the
    different words). Texts without words must be equal.
    """
    is_copy = _copy_test(references)
    return {
        owner: [text for text in dict.fromkeys(texts) if not is_copy(text)] for owner, texts in past_answers.items()
    }


def _copy_test(references: Iterable[str]) -> Callable[[str], bool]:
    exact = {text.strip() for text in references}
    word_sets = list({words for text in exact if (words := frozenset(unicode_words(text)))})
    with_word: dict[str, list[int]] = {}
    for index, words in enumerate(word_sets):
        for word in words:
            with_word.setdefault(word, []).append(index)
    sizes = np.array([len(words) for words in word_sets])

    def is_copy(text: str) -> bool:
        if text.strip() in exact or not text.strip():
            return True
        words = set(unicode_words(text))
        found = [index for word in words for index in with_word.get(word, ())]
        common = np.bincount(np.array(found, dtype=np.int64), minlength=len(sizes))
        return bool((2 * common >= _COPY * (sizes + len(words))).any()) if words else False

    return is_copy


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
