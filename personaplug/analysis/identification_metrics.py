"""Identification by likelihood as metrics: mean reciprocal ranks of the own persona and of the right text.

`methods/identification.py` measures the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from personaplug.analysis.method_info import MethodInfo
from personaplug.analysis.metric_base import Array, MeasuredMetric, per_counted


class _Identification(MeasuredMetric):
    """A mean over the measured samples. The statistics of a sample are the reciprocal rank and 1, else 0 and 0."""

    needs = "passes of a language model"
    shown_for = "rows whose prompt depends on the user, if identification_samples is above 0"
    averages_over_users = False  # not all samples are measured
    place: ClassVar[int]

    def of_ranks(self, ranks: Sequence[Sequence[float]]) -> Array | None:
        """Compute the statistics, (n, 2), from the ranks of each sample; None if no sample is measured."""
        statistics = [(row[self.place], 1.0) if row else (0.0, 0.0) for row in ranks]
        return np.array(statistics) if any(ranks) else None

    def applies_to(self, method: MethodInfo) -> bool:
        has_other_control = method.is_control and method.history == "own"  # such as the mean persona
        return method.family in ("plug", "prompt") and method.history != "none" and not has_other_control

    def value(self, means: Array) -> Array:
        return per_counted(means)


class IdentifiedPersona(_Identification):
    """The reciprocal rank of log p(right text | own persona) among the same text under 19 strangers' personas."""

    name = "identified_persona"
    place = 0


class IdentifiedText(_Identification):
    """The reciprocal rank of the right text among 19 other users' right texts, by log p per token."""

    name = "identified_text"
    place = 1
