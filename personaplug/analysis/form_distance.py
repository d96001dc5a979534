"""Form distance: how far a written answer is from the right one in length, capitals, marks and symbols.

The caller gives the features of form, because they belong to the encoders. They are scaled to about ±1 by constants, so
that rare features do not outweigh common ones.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from personaplug.analysis.metric_base import Array, MeasuredMetric

_MAX_DIFFERENCE = 4.0  # of one feature


class FormDistance(MeasuredMetric):
    """The mean over features of the absolute difference, at most 4.

    An empty answer has no form: it counts as the right answer of another sample that is farthest from the right one.
    """

    name = "form_distance"
    greater_is_better = False
    needs = "features of form"
    shown_for = "tasks with free text"

    def of_forms(self, written: Array, right: Array, *, is_empty: NDArray[np.bool_], farthest: Array) -> Array | None:
        """Compute the statistics of each sample, (n, 1); None if all right answers have the same form.

        Args:
            written, right: (n, F) features of the written and of the right answers.
            is_empty: (n,) whether nothing was written.
            farthest: (n,) distances that count for empty answers; see `farthest_distances`.
        """
        if not np.ptp(right, axis=0).any():  # an empty answer would be perfect
            return None
        return np.where(is_empty, farthest, _distances(written, right))[:, None]


def farthest_distances(right: Array) -> Array:
    """Return the distance of each right answer to the farthest other one: (n, F) to (n,)."""
    return np.array([_distances(right, one).max() for one in right])


def _distances(a: Array, b: Array) -> Array:
    return np.asarray(np.minimum(np.abs(a - b), _MAX_DIFFERENCE).mean(axis=-1), dtype=np.float64)
