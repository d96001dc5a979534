"""Identification by likelihood as a metric: the mean reciprocal rank of the own persona.

`methods/identification.py` measures the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from personaplug.analysis.method_info import MethodInfo
from personaplug.analysis.metric_base import Array, MeasuredMetric, per_counted


class IdentifiedPersona(MeasuredMetric):
    """The reciprocal rank of log p(right text | own persona) among the same text under 19 strangers' personas.

    The value is a mean over the measured samples. Their statistics are the reciprocal rank and 1, others' 0 and 0.
    """

    name = "identified_persona"
    needs = "passes of a language model"
    shown_for = "rows whose prompt depends on the user, if identification_samples is above 0"
    averages_over_users = False  # not all samples are measured

    def of_ranks(self, ranks: Sequence[float | None]) -> Array | None:
        """Compute the statistics, (n, 2), from the reciprocal rank of each sample; None if no sample is measured."""
        statistics = [(0.0, 0.0) if rank is None else (rank, 1.0) for rank in ranks]
        return np.array(statistics) if any(rank is not None for rank in ranks) else None

    def applies_to(self, method: MethodInfo) -> bool:
        has_other_control = method.is_control and method.history == "own"  # such as the mean persona
        return method.family in ("plug", "prompt", "counts") and method.history != "none" and not has_other_control

    def value(self, means: Array) -> Array:
        return per_counted(means)
