"""A closed set of labels: indices of answers, nearest ratings, and features of a history."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from personaplug.data.numbers import number_or_none
from personaplug.data.records import HistoryItem

Array = npt.NDArray[np.float64]
LabelIds = npt.NDArray[np.int64]

_LATEST = 5  # items whose mean shows the trend of a user's ratings


class LabelSet:
    """A closed set of labels. Numbers in ascending order form a rating scale. `width` is the length of `features`."""

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels = tuple(labels)
        self._indices = {label: index for index, label in enumerate(labels)}
        numbers = ratings(labels)
        is_rising = len(numbers) == len(labels) > 1 and all(low < high for low, high in pairwise(numbers))
        self._scale = numbers if is_rising else None
        self.width = len(labels) + (0 if self._scale is None else 4)

    def index(self, answer: str | None) -> int:
        """Return the index of an answer's label, or of the nearest label of a scale; -1 for neither."""
        index = self._indices.get((answer or "").strip(), -1)
        number = number_or_none(answer) if index < 0 and self._scale is not None else None
        return index if number is None else self._nearest_index(number)

    def indices(self, items: Sequence[HistoryItem]) -> LabelIds:
        """Return the label indices of the items' answers in order; skip answers without a label."""
        indices = np.array([self.index(item.answer) for item in items], dtype=np.int64)
        return indices[indices >= 0]

    def nearest(self, value: float) -> str:
        """Return the label nearest to a rating; halfway between two labels, the higher one."""
        return self.labels[self._nearest_index(value)]

    def features(self, items: Sequence[HistoryItem]) -> Array:
        """Return the share of each label; for ratings also mean, median, spread and latest mean.

        The shape is (width,); all values are NaN if no answer has a label.
        """
        indices = self.indices(items)
        if not len(indices):
            return np.full(self.width, np.nan)
        shares: Array = np.bincount(indices, minlength=len(self.labels)) / len(indices)
        if self._scale is None:
            return shares
        values = ratings(item.answer for item in items)
        return np.array([*shares, values.mean(), np.median(values), values.std(), values[-_LATEST:].mean()])

    def _nearest_index(self, value: float) -> int:
        assert self._scale is not None
        midpoints = (self._scale[:-1] + self._scale[1:]) / 2
        return int(np.searchsorted(midpoints, value, side="right"))


def ratings(answers: Iterable[str | None]) -> Array:
    """Return the answers that are finite numbers, in order."""
    return np.array([number for answer in answers if (number := number_or_none(answer)) is not None])
