"""Heuristics: the median, mean or majority of the user's own answers, their most frequent words, a copy of the query.

Users without answers get the label that the same heuristic derives from all answers in the training split.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from personaplug.baselines.no_lm import Baseline
from personaplug.data.label_set import Array, LabelSet, ratings
from personaplug.data.records import HistoryItem, Sample
from personaplug.data.task import Task
from personaplug.errors import ConfigError, MissingData

_WORD = re.compile(r"\w+")


class _UserLabel(Baseline):
    """A label derived from the user's own answers."""

    @abstractmethod
    def label(self, label_set: LabelSet, answers: Iterable[str | None]) -> str | None:
        """Derive a label from answers, oldest first; None if no answer is valid."""

    def check(self, task: Task) -> None:
        super().check(task)
        if task.answer_field is None:
            raise ConfigError(
                f"{self.name} needs history items with answers; task {task.name} declares no answer_field. Leave "
                f"out this row."
            )

    def fit(self, task: Task, train: Sequence[Sample]) -> FittedUserLabel:
        return FittedUserLabel(self, LabelSet(task.labels), train)


class FittedUserLabel:
    """A heuristic with a default label for users without answers."""

    def __init__(self, heuristic: _UserLabel, label_set: LabelSet, train: Sequence[Sample]) -> None:
        self.heuristic, self.label_set = heuristic, label_set
        default = heuristic.label(label_set, (sample.target for sample in train))
        if default is None:
            raise MissingData(
                "No training sample has an answer among the task's labels, so there is no label for a user without "
                "answers."
            )
        self.default = default

    def predict(self, samples: Sequence[Sample]) -> list[str]:
        """Predict a label for each sample."""
        labels = [self.heuristic.label(self.label_set, (item.answer for item in s.history)) for s in samples]
        return [self.default if label is None else label for label in labels]


@dataclass(frozen=True)
class UserRating(_UserLabel):
    """The label nearest to a statistic of the user's own ratings, (n,)."""

    name: str
    statistic: Callable[[Array], float]

    def check(self, task: Task) -> None:
        if task.kind == "label":
            raise ConfigError(
                f"{self.name} needs a task of kind rating, whose labels are numbers; task {task.name} is of kind "
                f"label. Use user-majority."
            )
        super().check(task)

    def label(self, label_set: LabelSet, answers: Iterable[str | None]) -> str | None:
        values = ratings(answers)
        return label_set.nearest(self.statistic(values)) if len(values) else None


@dataclass(frozen=True)
class UserMajority(_UserLabel):
    """The user's own most frequent answer; of equally frequent ones, the latest."""

    name: str = "user-majority"

    def label(self, label_set: LabelSet, answers: Iterable[str | None]) -> str | None:
        ids = [label_id for answer in answers if (label_id := label_set.index(answer)) >= 0]
        # Of equal counts, `most_common` returns the first.
        return label_set.labels[Counter(reversed(ids)).most_common(1)[0][0]] if ids else None


@dataclass(frozen=True)
class _WordsOfSample(Baseline):
    """A text that consists of words of the sample; `words` is their number, 0 = all."""

    name: str
    words: int = 0
    is_fitted_on_train: ClassVar[bool] = False

    def check(self, task: Task) -> None:
        if task.labels:
            raise ConfigError(
                f"{self.name} needs a task with free text; task {task.name} has labels. Leave out this row."
            )

    def fit(self, task: Task, train: Sequence[Sample]) -> Self:
        return self

    def predict(self, samples: Sequence[Sample]) -> list[str]:
        """Predict a text for each sample."""
        return [self.text(sample) for sample in samples]

    @abstractmethod
    def text(self, sample: Sample) -> str: ...


@dataclass(frozen=True)
class CopyQuery(_WordsOfSample):
    """The query as it is, or its first words."""

    def text(self, sample: Sample) -> str:
        return " ".join(sample.query.split()[: self.words]) if self.words else sample.query


@dataclass(frozen=True)
class UserWords(_WordsOfSample):
    """The words that occur in most of the user's own answers, the most frequent first; "" without a history.

    It shows how much a metric of word overlap rewards the words that a user always writes. All words of an item without
    an answer count.
    """

    def text(self, sample: Sample) -> str:
        counts = Counter(word for item in reversed(sample.history) for word in _distinct_words(item))
        return " ".join(word for word, _ in counts.most_common(self.words or None))


def user_median(ratings: Array) -> float:
    return float(np.median(ratings))


def user_mean(ratings: Array) -> float:
    return float(np.mean(ratings))


def _distinct_words(item: HistoryItem) -> list[str]:
    text = item.text if item.answer is None else item.answer
    return list(dict.fromkeys(_WORD.findall(text.lower())))
