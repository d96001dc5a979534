"""Heuristics: the median, mean or majority of the user's own answers, their most frequent words, a copy of the query.

A user without answers gets what the same heuristic makes of all answers in the training split.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from personaplug.baselines.no_lm import Baseline
from personaplug.data.label_set import Array, LabelIds, LabelSet, ratings
from personaplug.data.records import HistoryItem, Sample
from personaplug.data.task import Task
from personaplug.errors import ConfigError, MissingData

_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class UserRating(Baseline):
    """A number made of the user's own ratings, as the nearest label.

    Attributes:
        statistic: makes one number of (n,) ratings.
    """

    name: str
    statistic: Callable[[Array], float]

    def check(self, task: Task) -> None:
        super().check(task)
        if task.kind != "rating":
            raise ConfigError(
                f"{self.name} needs labels that are numbers (kind rating); those of {task.name} are none. "
                f"user-majority takes any labels."
            )
        _check_answers(self.name, task)

    def fit(self, task: Task, train: Sequence[Sample]) -> FittedUserRating:
        """Raises MissingData if no training sample has an answer that is a number."""
        return FittedUserRating(LabelSet(task.labels), train, statistic=self.statistic)


class FittedUserRating:
    """`UserRating`, with a label for users who have given no rating."""

    def __init__(self, label_set: LabelSet, train: Sequence[Sample], *, statistic: Callable[[Array], float]) -> None:
        self.label_set, self.statistic = label_set, statistic
        targets = ratings(sample.target for sample in train)
        if not len(targets):
            raise _no_answers()
        self.default = label_set.nearest(statistic(targets))

    def predict(self, samples: Sequence[Sample]) -> list[str]:
        """Predict a label for each sample."""
        histories = [ratings(item.answer for item in sample.history) for sample in samples]
        return [self.label_set.nearest(self.statistic(own)) if len(own) else self.default for own in histories]


@dataclass(frozen=True)
class UserMajority(Baseline):
    """The user's own most frequent answer; of equally frequent ones, the one given last."""

    name: str = "user-majority"

    def check(self, task: Task) -> None:
        super().check(task)
        _check_answers(self.name, task)

    def fit(self, task: Task, train: Sequence[Sample]) -> FittedUserMajority:
        """Raises MissingData if no training sample has an answer among the labels."""
        return FittedUserMajority(LabelSet(task.labels), train)


class FittedUserMajority:
    """`UserMajority`, with a label for users who have given no answer."""

    def __init__(self, label_set: LabelSet, train: Sequence[Sample]) -> None:
        self.label_set = label_set
        label_ids = [label_set.index(sample.target) for sample in train]
        known = np.array([label_id for label_id in label_ids if label_id >= 0], dtype=np.int64)
        if not len(known):
            raise _no_answers()
        self.default = label_set.labels[_majority(known)]

    def predict(self, samples: Sequence[Sample]) -> list[str]:
        """Predict a label for each sample."""
        histories = [self.label_set.indices(sample.history) for sample in samples]
        return [self.label_set.labels[_majority(own)] if len(own) else self.default for own in histories]


@dataclass(frozen=True)
class _WordsOfSample(Baseline):
    """A text made of words of the sample, with nothing to learn.

    Attributes:
        words: how many words; 0 = all.
    """

    name: str
    words: int = 0
    is_fitted_on_train: ClassVar[bool] = False

    def check(self, task: Task) -> None:
        if task.kind != "text":
            raise ConfigError(f"{self.name} predicts words, which are no label of {task.name}; it is for free text.")


@dataclass(frozen=True)
class CopyQuery(_WordsOfSample):
    """The query as it is, or its first words."""

    def fit(self, task: Task, train: Sequence[Sample]) -> CopyQuery:
        return self

    def predict(self, samples: Sequence[Sample]) -> list[str]:
        """Predict a text for each sample."""
        if not self.words:
            return [sample.query for sample in samples]
        return [" ".join(sample.query.split()[: self.words]) for sample in samples]


@dataclass(frozen=True)
class UserWords(_WordsOfSample):
    """The words that most of the user's own answers hold, the most frequent first; nothing for a user without any.

    A metric of common words rewards the words that somebody always uses; this is what that alone is worth. An item
    without an answer counts as a whole.
    """

    def fit(self, task: Task, train: Sequence[Sample]) -> UserWords:
        return self

    def predict(self, samples: Sequence[Sample]) -> list[str]:
        """Predict a text for each sample."""
        return [" ".join(_most_frequent_words(sample.history, count=self.words)) for sample in samples]


def user_median(ratings: Array) -> float:
    """Return the median of a user's ratings."""
    return float(np.median(ratings))


def user_mean(ratings: Array) -> float:
    """Return the mean of a user's ratings."""
    return float(np.mean(ratings))


def _most_frequent_words(items: Sequence[HistoryItem], *, count: int) -> list[str]:
    texts = [item.text if item.answer is None else item.answer for item in reversed(items)]  # of ties, the later words
    counts = Counter(word for text in texts for word in dict.fromkeys(_WORD.findall(text.lower())))
    return [word for word, _ in counts.most_common(count)]


def _majority(label_ids: LabelIds) -> int:
    counts = np.bincount(label_ids)
    return int(next(label_id for label_id in label_ids[::-1] if counts[label_id] == counts.max()))


def _check_answers(name: str, task: Task) -> None:
    if task.answer_field is None:
        raise ConfigError(
            f"{name} needs the answers in a history, and the items of {task.name} hold none (answer_field)."
        )


def _no_answers() -> MissingData:
    return MissingData(
        "No training sample has an answer among the task's labels, so there is no label for a user without answers."
    )
