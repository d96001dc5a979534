"""What all metrics have in common: a score is a function of means of per-sample statistics."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from personaplug.analysis.point_estimates import ARGMAX, check_estimate, scale_of
from personaplug.errors import ConfigError, ShapeMismatch

Array = NDArray[np.float64]

Likelihoods = Sequence[Sequence[float]]
"""Of each sample −log p and the number of tokens of the right answer, then of each rejected one.

Of plain answers: of each sample the sum of KL(plain ‖ row) over the tokens, and their number.
"""

AT = "@"  # between a metric and the point estimate whose predictions it scores


class Metric(ABC):
    """A score of predictions against golds; its name tells the point estimate if that is not the argmax."""

    name: str
    greater_is_better: ClassVar[bool] = True
    takes_estimates: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False
    needs_scale: ClassVar[bool] = False  # whether its labels are numbers whatever the estimate
    of_answers: ClassVar[bool] = True  # else it scores probabilities, which rows without a language model lack
    averages_over_users: ClassVar[bool] = True  # whether it means something of one user's few samples

    def __init__(self, labels: Sequence[str] = (), *, estimate: str = ARGMAX) -> None:
        check_estimate(estimate)
        self.labels, self.estimate = tuple(label.strip() for label in labels), estimate
        if estimate != ARGMAX:
            if not self.takes_estimates:
                raise ConfigError(f"{self.name} knows no scale; leave out {AT}{estimate}, which is for ratings.")
            self.name = f"{self.name}{AT}{estimate}"
        if self.needs_scale or estimate != ARGMAX:
            scale = scale_of(self.labels)
            if scale is None:
                raise ConfigError(f"{self.name} needs finite numbers as labels, the scale; found {list(self.labels)}.")
            self.low, self.high = float(scale.min()), float(scale.max())
        if self.needs_labels and (not self.labels or len(set(self.labels)) < len(self.labels)):
            raise ConfigError(f"{self.name} needs the task's labels, each once; found {list(labels)}.")

    def statistics(self, predictions: Sequence[str], golds: Sequence[str]) -> Array:
        """Compute what the metric averages, sample by sample: (n, d)."""
        if len(predictions) != len(golds):
            raise ShapeMismatch(f"Expected {len(golds)} predictions, one per gold; found {len(predictions)}.")
        return self._statistics(predictions, golds)

    @abstractmethod
    def _statistics(self, predictions: Sequence[str], golds: Sequence[str]) -> Array: ...

    def value(self, means: Array) -> Array:
        """Return the metric of means of statistics: (..., d) to (...)."""
        return np.asarray(means[..., 0])

    def score(self, predictions: Sequence[str], golds: Sequence[str]) -> float:
        """Return the metric of these samples; NaN without samples."""
        return value_of(self.statistics(predictions, golds), self)


def value_of(stats: Array, metric: Metric) -> float:
    """Return the metric of per-sample statistics (n, d); NaN without samples."""
    if not len(stats):
        return float("nan")
    with np.errstate(over="ignore", invalid="ignore"):  # a rating of "1e200" squares to infinity: that is its score
        return float(metric.value(stats.mean(axis=0)))


class LikelihoodMetric(Metric):
    """A score of the probabilities that a model gave to answers; rows without a language model lack it."""

    of_answers = False
    of_plain_answers: ClassVar[bool] = False  # whether it is of the plain model's answers, not of the right ones

    @abstractmethod
    def of_likelihoods(self, likelihoods: Likelihoods) -> Array | None:
        """Compute what the metric averages, sample by sample, (n, d); None if there is nothing to average."""

    def _statistics(self, predictions: Sequence[str], golds: Sequence[str]) -> Array:
        raise ConfigError(
            f"{self.name} is of a model's probabilities, and of these answers only texts are known. Leave it out of "
            f"the task's metrics: if a language model answers, it is a column of its own."
        )


def per_counted(means: Array) -> Array:
    """Return the mean of a score over the samples that count, of means (..., 2); NaN without such a sample."""
    scores, counted = means[..., 0], means[..., 1]
    return np.divide(scores, counted, out=np.full_like(scores, math.nan), where=counted > 0)
