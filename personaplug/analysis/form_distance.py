"""Form distance: how far a written answer is from the right one in length, capitals, marks and symbols.

The caller gives the features of form, because they belong to the encoders.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from personaplug.analysis.metric_base import Array, MeasuredMetric


class FormDistance(MeasuredMetric):
    """The mean over features of the absolute difference, in standard deviations of the right answers.

    Features that are equal for all right answers do not count. An empty answer has no form: it counts as the right
    answer of another sample that is farthest from the right one.
    """

    name = "form_distance"
    greater_is_better = False
    needs = "features of form"
    shown_for = "tasks with free text"

    def of_forms(self, written: Array, right: Array, *, is_empty: NDArray[np.bool_]) -> Array | None:
        """Compute the statistics of each sample, (n, 1); None if all right answers have the same form.

        Args:
            written, right: (n, F) features of the written and of the right answers.
            is_empty: (n,) whether nothing was written.
        """
        spread = right.std(axis=0)
        varies = spread > 0
        if not varies.any():
            return None
        written, right = (features[:, varies] / spread[varies] for features in (written, right))
        distances = np.abs(written - right).mean(axis=1)
        for index in np.flatnonzero(is_empty):
            distances[index] = np.abs(right - right[index]).mean(axis=1).max()
        return np.asarray(distances[:, None], dtype=np.float64)
