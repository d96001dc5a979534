"""Point estimates: choose one label from probabilities over a scale of labels.

The likeliest label (argmax) maximizes the expected accuracy. The median minimizes the expected absolute error (MAE).
The label nearest to the mean minimizes the expected squared error (RMSE).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from personaplug.data.label_set import ratings
from personaplug.errors import ConfigError, nearest

ARGMAX, MEDIAN, MEAN = "argmax", "median", "mean"
POINT_ESTIMATES = (ARGMAX, MEDIAN, MEAN)

_TIE = 1e-9  # rounding error of a sum of floats, within which two values are a tie


def point_predictions(probabilities: NDArray[np.float64], labels: Sequence[str], *, estimate: str) -> list[str]:
    """Choose a label for each row of probabilities.

    argmax: the likeliest label; on a tie, the first.
    median: the smallest label up to which the probabilities sum to 1/2 or more.
    mean: the label nearest to the mean; on a tie, the greater.

    Args:
        probabilities: (n, C) in the labels' order; each row has a positive sum, and is normalized.
        labels: (C,) in any order; numbers, unless the estimate is argmax.
    """
    check_estimate(estimate)
    if estimate == ARGMAX:
        return [labels[index] for index in probabilities.argmax(axis=1)]
    numbers = scale_of(labels)
    if numbers is None:
        raise ConfigError(f"The {estimate} needs finite numbers as labels; found {list(labels)}.")
    order = np.argsort(numbers, kind="stable")
    shares = probabilities[:, order] / probabilities.sum(axis=1, keepdims=True)
    if estimate == MEDIAN:
        indices = (np.cumsum(shares, axis=1) >= 0.5 - _TIE).argmax(axis=1)
    else:
        rising = numbers[order]
        midpoints = rising[:-1] + np.diff(rising) * (0.5 - _TIE)
        indices = np.searchsorted(midpoints, shares @ rising, side="right")
    return [labels[order[index]] for index in indices]


def check_estimate(estimate: str) -> None:
    """Raise ConfigError if there is no point estimate of this name."""
    if estimate not in POINT_ESTIMATES:
        raise ConfigError(f"There is no point estimate {estimate!r}; {nearest(estimate, POINT_ESTIMATES)}")


def scale_of(labels: Sequence[str]) -> NDArray[np.float64] | None:
    """Return labels as numbers (C,), in their order; None without labels, or if a label is not a finite number."""
    numbers = ratings(labels)
    return numbers if len(numbers) == len(labels) > 0 else None


@dataclass(frozen=True)
class LabelDistribution:
    """Probabilities of the labels of a closed set.

    Attributes:
        median, mean: if the labels are numbers; the median is one of the labels.
    """

    probabilities: Mapping[str, float]
    median: str | None = None
    mean: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields that are not None."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def label_distribution(labels: Sequence[str], scores: Sequence[float]) -> LabelDistribution:
    """Normalize the log-scores of labels, (C,), to probabilities."""
    shares = np.exp(np.asarray(scores, dtype=np.float64) - max(scores))
    shares /= shares.sum()
    probabilities, numbers = dict(zip(labels, shares.tolist(), strict=True)), scale_of(labels)
    if numbers is None:
        return LabelDistribution(probabilities)
    (median,) = point_predictions(shares[None], labels, estimate=MEDIAN)
    return LabelDistribution(probabilities, median, float(shares @ numbers))
