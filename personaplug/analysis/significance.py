"""Bootstrap intervals and paired comparisons over users, and corrections for multiple comparisons.

Samples of one user are similar, so the bootstrap draws whole users with replacement. Each draw computes the metric from
the means of the drawn statistics. If a method was trained several times, its trainings are drawn too.

Limits: with fewer than about twenty users, intervals are too narrow and p is too small. Resampling three trainings
gives two thirds of the variance of new trainings; one training gives no estimate of this variance.

Sources: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapters 13 and 15; McNemar, "Note on the
sampling error of the difference between correlated proportions", Psychometrika 1947; Holm, "A simple sequentially
rejective multiple test procedure", Scandinavian Journal of Statistics 1979.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from personaplug.analysis.metrics import Array, Metric, value_of
from personaplug.errors import ConfigError, ShapeMismatch

Groups = Sequence[str] | Sequence[int]

_BLOCK_SIZE = 1 << 20  # users × resamples in memory at once (8 MB), which fits the processor's cache
_MAX_KEPT = 1 << 24  # users × resamples whose counts are kept for other comparisons (32 MB)
_ROUNDING = 1e-12  # a relative difference below this is a rounding error
_TAILS = ((1 - 0.95) / 2, (1 + 0.95) / 2)


class Interval(NamedTuple):
    """A metric with its percentile interval.

    The ends are NaN with fewer than two groups, or if a statistic is not finite. Draws in which the metric is undefined
    do not count.
    """

    value: float
    low: float
    high: float


class Paired(NamedTuple):
    """The advantage of a over b, positive if a is better, with its interval and two-sided p.

    The ends and p are NaN as in `Interval`. For p, an undefined draw counts against both methods.
    """

    difference: float
    low: float
    high: float
    p: float


class PairedStatistics(NamedTuple):
    """The statistics of two methods on the same samples.

    Attributes:
        a, b: (n, d) statistics of each method, or (S, n, d) of S trainings, paired by their seeds.
        groups: (n,) group of each sample.
    """

    a: Array
    b: Array
    groups: Groups


def bootstrap_interval(
    stats: Array, groups: Groups, metric: Metric, *, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Return a metric with its 95 % percentile bootstrap interval over groups.

    Args:
        stats: (n, d) statistics of the samples, or (S, n, d) of S trainings.
        groups: (n,) group of each sample; whole groups are resampled.
        seed: the draws depend on the seed, the group names, and the numbers of resamples and trainings only.
    """
    stats = _checked(stats, groups)
    value = value_of(stats.mean(axis=0), metric)
    if not _has_spread(stats, groups):
        return Interval(value, np.nan, np.nan)
    resampled = _bootstrap(stats, groups, metric.value, resamples=resamples, seed=seed)
    return Interval(value, *_ends(resampled))


def paired_bootstrap(
    stats_a: Array, stats_b: Array, groups: Groups, metric: Metric, *, resamples: int = 10_000, seed: int = 0
) -> Paired:
    """Compare two methods on the same samples; both see the same resampled groups and trainings.

    p = 2 · (min(#{difference <= 0}, #{difference >= 0}) + 1) / (resamples + 1), at most 1.

    Args:
        stats_a, stats_b: (n, d) statistics of each method, or (S, n, d) of S trainings, paired by their seeds.
        groups, seed: as in `bootstrap_interval`.
    """
    difference, resampled = _advantages(
        PairedStatistics(stats_a, stats_b, groups), metric, resamples=resamples, seed=seed
    )
    return _paired(difference, resampled)


def pooled_bootstrap(
    sets: Sequence[PairedStatistics], metric: Metric, *, resamples: int = 10_000, seed: int = 0
) -> Paired:
    """Compare two methods on several sets: the mean of the sets' differences, so that each set counts alike.

    The draws within a set are independent of the draws within the others.
    """
    parts = [_advantages(each, metric, resamples=resamples, seed=seed + place) for place, each in enumerate(sets)]
    draws = [resampled for _, resampled in parts if resampled is not None]
    difference = float(np.mean([difference for difference, _ in parts]))
    return _paired(difference, np.mean(draws, axis=0) if len(draws) == len(parts) else None)


def _advantages(paired: PairedStatistics, metric: Metric, *, resamples: int, seed: int) -> tuple[float, Array | None]:
    """Return the advantage of a over b on all samples and in each resample; None for resamples without a spread."""
    stats_a, stats_b, groups = paired
    if stats_a.shape != stats_b.shape:
        raise ShapeMismatch(f"Paired statistics need the same shape; found {stats_a.shape} and {stats_b.shape}.")
    joint = np.concatenate([_checked(stats_a, groups), _checked(stats_b, groups)], axis=2)

    def advantage(means: Array) -> Array:
        a, b = (metric.value(half) for half in np.split(means, 2, axis=-1))
        gap = a - b if metric.greater_is_better else b - a
        # The order of a sum changes its last digit, and such a difference must not count as a win.
        # "<" instead of "<=" keeps infinite gaps.
        return np.where(np.abs(gap) < _ROUNDING * (np.abs(a) + np.abs(b)), 0.0, gap)

    with np.errstate(invalid="ignore", over="ignore"):
        difference = float(advantage(joint.mean(axis=(0, 1)))) if len(groups) else np.nan
    if not _has_spread(joint, groups):
        return difference, None
    return difference, _bootstrap(joint, groups, advantage, resamples=resamples, seed=seed)


def _paired(difference: float, resampled: Array | None) -> Paired:
    if resampled is None:
        return Paired(difference, np.nan, np.nan, np.nan)
    return Paired(difference, *_ends(resampled), _two_sided_p(resampled))


def _ends(resampled: Array) -> tuple[float, float]:
    """Return the ends of the percentile interval of the defined draws."""
    defined = resampled[~np.isnan(resampled)]
    if not len(defined):
        return np.nan, np.nan
    low, high = map(float, np.quantile(defined, _TAILS))
    return low, high


def _two_sided_p(resampled: Array) -> float:
    """Return p of resampled differences; an undefined draw counts on both sides."""
    rarer_side = min(np.count_nonzero(~(resampled > 0)), np.count_nonzero(~(resampled < 0)))
    return min(1.0, 2 * (int(rarer_side) + 1) / (len(resampled) + 1))


def mcnemar(hits_a: Array, hits_b: Array) -> float:
    """Return the two-sided p of McNemar's exact test on the hits (1 or 0) of two methods on the same samples, (n, 1).

    The test assumes independent samples. If users have several samples, p is too small; use the bootstrap over users.
    """
    a_only, b_only = int((hits_a > hits_b).sum()), int((hits_b > hits_a).sum())
    return float(binomtest(a_only, a_only + b_only).pvalue) if a_only + b_only else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values in the same order, corrected for their number by Holm's step-down method.

    NaN stands for a comparison without a p. It stays NaN and does not count.
    """
    p = np.asarray(p_values, dtype=np.float64)
    valid = np.flatnonzero(~np.isnan(p))
    order = valid[np.argsort(p[valid], kind="stable")]
    steps = p[order] * np.arange(len(order), 0, -1)
    p[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return [float(value) for value in p]


def per_group_mean(stats: Array, groups: Groups, metric: Metric) -> float:
    """Compute the metric of each group, and return the mean over groups; NaN without samples.

    Return NaN also for metrics that are not meaningful for one user, such as the macro-F1.
    """
    stats = _checked(stats, groups)
    if not len(groups) or not metric.averages_over_users:
        return float("nan")
    with np.errstate(over="ignore", invalid="ignore"):
        sums, sizes = _group_sums(stats.mean(axis=0), groups)
        return float(metric.value(sums / sizes[:, None]).mean())


def _bootstrap(stats: Array, groups: Groups, value: Callable[[Array], Array], *, resamples: int, seed: int) -> Array:
    """Return the value of each resample of (S, n, d) statistics: (resamples,)."""
    if resamples < 1:
        raise ConfigError(f"A bootstrap needs at least 1 resample; found {resamples}.")
    trainings, _, width = stats.shape
    sums, sizes = _group_sums(np.concatenate(list(stats), axis=1), groups)
    rng, parts = np.random.default_rng([seed, 1]), []
    for counts in _drawn_counts(len(sizes), resamples=resamples, seed=seed):
        totals = (counts @ sums).reshape(len(counts), trainings, width)
        weights = rng.multinomial(trainings, np.full(trainings, 1 / trainings), size=len(counts)) / trainings
        parts.append(value(np.einsum("rs,rsd->rd", weights, totals) / (counts @ sizes)[:, None]))
    return np.concatenate(parts)


def _drawn_counts(groups: int, *, resamples: int, seed: int) -> Iterator[Array]:
    """Yield how often each resample draws each group, in blocks (r, groups) of a total of (resamples, groups)."""
    is_small = groups * resamples <= _MAX_KEPT
    blocks = _kept_counts(groups, resamples, seed) if is_small else _count_blocks(groups, resamples, seed)
    yield from (block.astype(np.float64) for block in blocks)


@lru_cache(maxsize=8)
def _kept_counts(groups: int, resamples: int, seed: int) -> tuple[NDArray[np.uint16], ...]:
    """Keep the counts for the other metrics and comparisons of a table."""
    return tuple(block.astype(np.uint16) for block in _count_blocks(groups, resamples, seed))


def _count_blocks(groups: int, resamples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK_SIZE // groups)
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        draws = rng.integers(groups, size=(rows, groups)) + groups * np.arange(rows)[:, None]
        yield np.bincount(draws.ravel(), minlength=rows * groups).reshape(rows, groups)


def _group_sums(stats: Array, groups: Groups) -> tuple[Array, Array]:
    """Return the sums of statistics (G, d) and the numbers of samples (G,) of the groups, sorted by name."""
    names, codes = np.unique(np.asarray(groups), return_inverse=True)
    columns = [np.bincount(codes, weights=column, minlength=len(names)) for column in stats.T]
    return np.stack(columns, axis=1), np.bincount(codes, minlength=len(names)).astype(np.float64)


def _has_spread(stats: Array, groups: Groups) -> bool:
    return len(set(groups)) > 1 and bool(np.isfinite(stats).all())


def _checked(stats: Array, groups: Groups) -> Array:
    """Return the statistics with a dimension for trainings, (S, n, d)."""
    trainings = stats[None] if stats.ndim == 2 else stats
    if trainings.ndim != 3 or trainings.shape[1] != len(groups) or not len(trainings):
        shapes = f"({len(groups)}, d), or (S, {len(groups)}, d) for S trainings"
        raise ShapeMismatch(f"Expected statistics of shape {shapes}; found {stats.shape}.")
    return trainings
