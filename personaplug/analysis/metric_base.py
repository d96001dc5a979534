"""Base classes of metrics. A score is a function of means of per-sample statistics."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from personaplug.analysis.method_info import MethodInfo
from personaplug.analysis.point_estimates import ARGMAX, check_estimate, scale_of
from personaplug.errors import ConfigError, ShapeMismatch

Array = NDArray[np.float64]

Likelihoods = Sequence[Sequence[float]]
"""For each sample, −log p and the number of tokens of the right answer, then of each rejected answer.

For plain answers: for each sample, the sum of KL(plain ‖ row) over the tokens, and the number of tokens.
"""

AT = "@"  # separates a metric from the point estimate whose predictions it scores


class Metric(ABC):
    """A score of predictions against golds; its name contains the point estimate unless that is the argmax."""

    name: str
    greater_is_better: ClassVar[bool] = True
    takes_estimates: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False
    needs_scale: ClassVar[bool] = False  # whether the labels must be numbers for every estimate
    of_answers: ClassVar[bool] = True  # whether predictions and golds are all that the metric needs
    is_instrument: ClassVar[bool] = False  # whether tables show it apart, among the instruments of texts
    averages_over_users: ClassVar[bool] = True  # whether the metric is meaningful for one user's few samples

    def __init__(self, labels: Sequence[str] = (), *, estimate: str = ARGMAX) -> None:
        check_estimate(estimate)
        self.labels, self.estimate = tuple(label.strip() for label in labels), estimate
        if estimate != ARGMAX:
            if not self.takes_estimates:
                raise ConfigError(f"{self.name} takes no point estimate; remove {AT}{estimate}, which is for ratings.")
            self.name = f"{self.name}{AT}{estimate}"
        if self.needs_scale or estimate != ARGMAX:
            scale = scale_of(self.labels)
            if scale is None:
                raise ConfigError(f"{self.name} needs finite numbers as labels; found {list(self.labels)}.")
            self.low, self.high = float(scale.min()), float(scale.max())
        if self.needs_labels and (not self.labels or len(set(self.labels)) < len(self.labels)):
            raise ConfigError(f"{self.name} needs the task's labels, each once; found {list(labels)}.")

    def statistics(self, predictions: Sequence[str], golds: Sequence[str]) -> Array:
        """Compute the statistics of each sample: (n, d)."""
        if len(predictions) != len(golds):
            raise ShapeMismatch(f"Expected {len(golds)} predictions, one per gold; found {len(predictions)}.")
        return self._statistics(predictions, golds)

    @abstractmethod
    def _statistics(self, predictions: Sequence[str], golds: Sequence[str]) -> Array: ...

    def applies_to(self, method: MethodInfo) -> bool:
        """Return whether a row is expected to have the metric; a table names such rows that lack it."""
        return True

    def value(self, means: Array) -> Array:
        """Compute the metric from means of statistics: (..., d) to (...)."""
        return np.asarray(means[..., 0])

    def score(self, predictions: Sequence[str], golds: Sequence[str]) -> float:
        """Return the metric of these samples; NaN without samples."""
        return value_of(self.statistics(predictions, golds), self)


def value_of(stats: Array, metric: Metric) -> float:
    """Compute the metric from per-sample statistics (n, d); NaN without samples."""
    if not len(stats):
        return float("nan")
    with np.errstate(over="ignore", invalid="ignore"):  # the square of a rating such as "1e200" is infinity
        return float(metric.value(stats.mean(axis=0)))


class MeasuredMetric(Metric):
    """A score that needs more than predictions and golds. The evaluation computes its statistics."""

    of_answers = False
    is_instrument = True
    needs: ClassVar[str]  # what else the score needs
    shown_for: ClassVar[str]  # the rows or tables that show it without being asked

    def _statistics(self, predictions: Sequence[str], golds: Sequence[str]) -> Array:
        raise ConfigError(
            f"{self.name} needs {self.needs}, but the predictions are only texts. Remove {self.name} from "
            f"the task's metrics; tables show it for {self.shown_for}."
        )


class LikelihoodMetric(MeasuredMetric):
    """A score of the probabilities that a model gives to answers; rows without a language model lack it."""

    is_instrument = False
    of_plain_answers: ClassVar[bool] = False  # whether the plain model's answers are scored, not the right answers
    needs = "a model's probabilities"
    shown_for = "every row with a language model"

    @abstractmethod
    def of_likelihoods(self, likelihoods: Likelihoods) -> Array | None:
        """Compute the statistics of each sample, (n, d); None if no sample counts."""

    def applies_to(self, method: MethodInfo) -> bool:
        return method.has_language_model


def per_counted(means: Array) -> Array:
    """Return the mean score of the samples that count, from means (..., 2) of score and count; NaN if none counts."""
    scores, counted = means[..., 0], means[..., 1]
    return np.divide(scores, counted, out=np.full_like(scores, math.nan), where=counted > 0)
