"""Decisions: how probabilities over a scale of labels become one answer.

The likeliest label is right most often. Of all labels the median has the least expected distance from what is meant,
and the one nearest to the mean the least expected squared distance; so an MAE and an RMSE each have an answer of their
own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from personaplug.errors import ConfigError, ShapeMismatch, nearest

ARGMAX, MEDIAN, MEAN = "argmax", "median", "mean"
POINT_ESTIMATES = (ARGMAX, MEDIAN, MEAN)

_TIE = 1e-9  # what sums of floats may miss a tie by; probabilities are kept to far fewer digits


def point_predictions(probabilities: NDArray[np.float64], labels: Sequence[str], *, decision: str) -> list[str]:
    """Choose a label for each line of probabilities.

    argmax: the likeliest label, of equally likely ones the first.
    median: the smallest label up to which the probabilities sum to 1/2 or more.
    mean: the label nearest to the mean, of two equally near ones the greater (on a scale of whole numbers that is the
    mean rounded half up).

    Args:
        probabilities: (n, C) in the labels' order; lines need not sum to 1, but to more than 0.
        labels: (C,) in any order; numbers, unless the decision is argmax.
        decision: one of `POINT_ESTIMATES`.
    Raises:
        ConfigError: if there is no such decision, or labels to be ordered are no numbers.
        ShapeMismatch: if there is not one column per label.
    """
    check_estimate(decision)
    if probabilities.ndim != 2 or probabilities.shape[1] != len(labels):
        raise ShapeMismatch(f"Expected probabilities of {len(labels)} labels; found the shape {probabilities.shape}.")
    if decision == ARGMAX:
        return [labels[place] for place in probabilities.argmax(axis=1)]
    numbers = scale_of(labels)
    if numbers is None:
        raise ConfigError(f"The {decision} is of finite numbers; found the labels {list(labels)}.")
    order = np.argsort(numbers, kind="stable")
    shares = probabilities[:, order] / probabilities.sum(axis=1, keepdims=True)
    places = _medians(shares) if decision == MEDIAN else _nearest_to_means(shares, numbers[order])
    return [labels[order[place]] for place in places]


def check_estimate(decision: str) -> None:
    """Refuse what is no decision.

    Raises:
        ConfigError: if there is none of this name.
    """
    if decision not in POINT_ESTIMATES:
        raise ConfigError(f"There is no decision {decision!r}; {nearest(decision, POINT_ESTIMATES)}")


def scale_of(labels: Sequence[str]) -> NDArray[np.float64] | None:
    """Return labels as numbers (C,), in their order; None if there are none, or one is no finite number."""
    try:
        numbers = np.array([float(label.strip()) for label in labels], dtype=np.float64)
    except ValueError:
        return None
    return numbers if len(numbers) and np.isfinite(numbers).all() else None


def _medians(shares: NDArray[np.float64]) -> NDArray[np.intp]:
    """The place of the median in each line of shares (n, C), whose columns rise: (n,)."""
    return np.asarray((np.cumsum(shares, axis=1) >= 0.5 - _TIE).argmax(axis=1))


def _nearest_to_means(shares: NDArray[np.float64], rising: NDArray[np.float64]) -> NDArray[np.intp]:
    """The place of the number (C,) that is nearest to the mean of each line of shares (n, C): (n,)."""
    ends = rising[:-1] + np.diff(rising) * (0.5 - _TIE)
    return np.searchsorted(ends, shares @ rising, side="right")
