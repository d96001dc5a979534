"""Ranks of a right candidate among others, by score."""

from __future__ import annotations

import numpy as np

from personaplug.analysis.metric_base import Array


def expected_reciprocal_rank(scores: Array, right: int, *, tolerance: float = 0.0) -> float:
    """Return 1 / rank of the candidate `right` by score, highest first, (C,) scores.

    Equal scores are in random order, so the value is the expectation over these orders. With C equal scores it is the
    chance level, the mean of 1/1 to 1/C. A score that is NaN ranks last.

    Args:
        tolerance: relative and absolute difference up to which scores are equal.
    """
    scores = np.nan_to_num(scores, nan=-np.inf, posinf=np.inf, neginf=-np.inf)
    is_equal = np.isclose(scores, scores[right], rtol=tolerance, atol=tolerance)
    better = int(((scores > scores[right]) & ~is_equal).sum())
    return float(np.mean(1 / np.arange(better + 1, better + int(is_equal.sum()) + 1)))


def chance_of_first(scores: Array, right: int) -> float:
    """Return the chance that the candidate `right` is first, if equal scores are in random order."""
    is_best = scores == np.nanmax(scores)
    return float(is_best[right] / is_best.sum())
