"""What a history says of a user's answers: places among a closed set of labels, ratings as numbers, and features."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from personaplug.data.records import HistoryItem

Array = npt.NDArray[np.float64]
Places = npt.NDArray[np.int64]

_LATEST = 5  # items whose mean tells where a user's ratings are going


class LabelSet:
    """A closed set of labels, and what answers are among them; labels that are rising numbers are a scale of ratings.

    Attributes:
        labels: in the order of their places.
        width: how many numbers `features` makes.
    """

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels = tuple(labels)
        self._place = {label: place for place, label in enumerate(labels)}
        self._scale = _scale_of(labels)
        self.width = len(labels) + (0 if self._scale is None else 4)

    def place(self, answer: str | None) -> int:
        """Where an answer stands among the labels, -1 for none of them; a rating at the nearest label."""
        place = self._place.get((answer or "").strip(), -1)
        if place >= 0 or self._scale is None:
            return place
        number = _number(answer)
        return -1 if number is None else self._nearest(number)

    def places(self, items: Sequence[HistoryItem]) -> Places:
        """Where the answers in a history stand among the labels, in the history's order, without those of no label."""
        found = np.array([self.place(item.answer) for item in items], dtype=np.int64)
        return found[found >= 0]

    def nearest(self, value: float) -> str:
        """The label nearest to a rating, of two equally near the higher: rounded half up, kept within the scale."""
        return self.labels[self._nearest(value)]

    def features(self, items: Sequence[HistoryItem]) -> Array:
        """The share of each label among a user's answers and, of ratings, mean, median, spread and latest mean.

        Returns:
            (width,); NaN where the history holds no answer.
        """
        places = self.places(items)
        if not len(places):
            return np.full(self.width, np.nan)
        shares = np.bincount(places, minlength=len(self.labels)) / len(places)
        if self._scale is None:
            return np.asarray(shares)
        given = ratings(item.answer for item in items)
        return np.array([*shares, given.mean(), np.median(given), given.std(), given[-_LATEST:].mean()])

    def _nearest(self, value: float) -> int:
        assert self._scale is not None
        between = (self._scale[:-1] + self._scale[1:]) / 2
        return int(np.searchsorted(between, value, side="right"))


def ratings(answers: Iterable[str | None]) -> Array:
    """Those of some answers that are finite numbers, in order."""
    return np.array([number for answer in answers if (number := _number(answer)) is not None])


def _scale_of(labels: Sequence[str]) -> Array | None:
    numbers = ratings(labels)
    rising = len(numbers) == len(labels) > 1 and all(low < high for low, high in pairwise(numbers))
    return numbers if rising else None


def _number(answer: str | None) -> float | None:
    try:
        number = float((answer or "").strip())
    except ValueError:
        return None
    return number if np.isfinite(number) else None
