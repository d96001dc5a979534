"""Intervals and paired tests against closed forms, scipy, and simulated data with known effects."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np
import pytest
import scipy.stats
from numpy.typing import NDArray

from personaplug.analysis import significance
from personaplug.analysis.metric_base import per_counted
from personaplug.analysis.metrics import Metric, get_metric
from personaplug.analysis.significance import (
    Paired,
    bootstrap_interval,
    holm,
    mcnemar,
    paired_bootstrap,
    per_group_mean,
)
from personaplug.errors import ConfigError, ShapeMismatch

Array = NDArray[np.float64]

STARS = ("1", "2", "3", "4", "5")
ACCURACY, MAE, RMSE, F1 = (get_metric(name, labels=STARS) for name in ("accuracy", "mae", "rmse", "f1"))


def one_each(count: int) -> list[str]:
    return [f"user {index}" for index in range(count)]


def clustered(rng: np.random.Generator, *, users: int, each: int, shift: float = 0.0) -> tuple[Array, list[str]]:
    """Return samples (users·each, 1) with a mean of `shift` and most variance between users, and their users."""
    user_means = rng.normal(shift, 1, size=users).repeat(each)
    values = user_means + rng.normal(0, 0.5, size=users * each)
    return values[:, None], [f"u{user}" for user in np.arange(users).repeat(each)]


def test_interval_of_a_mean_equals_the_normal_interval() -> None:
    values = np.random.default_rng(1).normal(3, 2, size=(400, 1))
    result = bootstrap_interval(values, one_each(400), ACCURACY, resamples=20_000)
    half_width = 1.959964 * values.std() / math.sqrt(400)
    assert result.value == pytest.approx(values.mean(), abs=1e-12)
    assert (result.low, result.high) == pytest.approx(
        (values.mean() - half_width, values.mean() + half_width), abs=0.05 * half_width
    )


def test_interval_of_rmse_agrees_with_scipy() -> None:
    squares = np.random.default_rng(2).exponential(2, size=(150, 1))
    interval = bootstrap_interval(squares, one_each(150), RMSE, resamples=20_000)
    scipy_interval = scipy.stats.bootstrap(
        (squares[:, 0],),
        lambda x, axis: np.sqrt(np.mean(x, axis=axis)),
        method="percentile",
        n_resamples=20_000,
        rng=np.random.default_rng(3),
    ).confidence_interval
    width = scipy_interval.high - scipy_interval.low
    assert (interval.low, interval.high) == pytest.approx((scipy_interval.low, scipy_interval.high), abs=0.04 * width)
    assert interval.value == pytest.approx(math.sqrt(squares.mean()))


def naive(stats: Array, metric: Metric, *, picks: NDArray[np.int64], groups: list[str]) -> Array:
    """Compute the same bootstrap naively: concatenate the samples of the picked groups of each resample."""
    names = sorted(set(groups))
    rows = {name: [index for index, group in enumerate(groups) if group == name] for name in names}
    drawn = [np.concatenate([stats[rows[names[pick]]] for pick in line]) for line in picks]
    return np.array([metric.value(sample.mean(axis=0)) for sample in drawn])


@pytest.mark.parametrize("metric", [F1, ACCURACY, RMSE])
def test_groups_of_different_sizes_agree_with_the_naive_bootstrap(metric: Metric) -> None:
    rng = np.random.default_rng(4)
    groups = ["a"] * 1 + ["b"] * 7 + ["c"] * 2 + ["d"] * 4
    golds, predictions = ([str(star) for star in rng.integers(1, 6, size=14)] for _ in range(2))
    stats = metric.statistics(predictions, golds)
    result = bootstrap_interval(stats, groups, metric, resamples=3000, seed=5)
    picks = np.random.default_rng(5).integers(4, size=(3000, 4))
    expected = np.quantile(naive(stats, metric, picks=picks, groups=groups), [0.025, 0.975])
    assert (result.low, result.high) == pytest.approx(tuple(expected), abs=1e-12)


def test_whole_users_are_resampled() -> None:
    values, users = clustered(np.random.default_rng(6), users=40, each=25)
    by_user = bootstrap_interval(values, users, ACCURACY, resamples=4000)
    by_sample = bootstrap_interval(values, one_each(1000), ACCURACY, resamples=4000)
    half_width = 1.959964 * values.reshape(40, 25).mean(axis=1).std() / math.sqrt(40)
    assert (by_user.high - by_user.low) / 2 == pytest.approx(half_width, rel=0.06)
    assert by_user.high - by_user.low > 3 * (by_sample.high - by_sample.low)


def test_interval_has_its_nominal_coverage() -> None:
    rng, covered, naively_covered = np.random.default_rng(7), 0, 0
    for _ in range(200):
        values, users = clustered(rng, users=40, each=4)
        result = bootstrap_interval(values, users, ACCURACY, resamples=600)
        covered += result.low <= 0 <= result.high
        alone = bootstrap_interval(values, one_each(160), ACCURACY, resamples=600)
        naively_covered += alone.low <= 0 <= alone.high
    assert 0.90 <= covered / 200 <= 0.98
    assert naively_covered / 200 < 0.85


def test_paired_test_has_its_nominal_level_and_detects_an_effect() -> None:
    rng, false_alarms, detections = np.random.default_rng(8), 0, 0
    for _ in range(200):
        a, users = clustered(rng, users=40, each=4)
        b, _ = clustered(rng, users=40, each=4)
        false_alarms += paired_bootstrap(a, b, users, ACCURACY, resamples=600).p < 0.05
        detections += paired_bootstrap(a + 1, b, users, ACCURACY, resamples=600).p < 0.05
    assert 0.02 <= false_alarms / 200 <= 0.11
    assert detections / 200 > 0.95


def test_paired_test_includes_the_variance_of_trainings() -> None:
    """The test on averaged trainings, which ignores their variance, has many false alarms."""
    rng, false_alarms, naive_alarms, detections = np.random.default_rng(20), 0, 0, 0
    for _ in range(200):
        base, users = clustered(rng, users=40, each=4)
        noise = rng.normal(0, 0.3, size=(6, 1, 1)) + rng.normal(0, 0.3, size=(6, 160, 1))
        a, b = base + noise, np.repeat(base[None], 6, axis=0)
        false_alarms += paired_bootstrap(a, b, users, ACCURACY, resamples=400).p < 0.05
        naive_alarms += paired_bootstrap(a.mean(axis=0), base, users, ACCURACY, resamples=400).p < 0.05
        detections += paired_bootstrap(a + 1, b, users, ACCURACY, resamples=400).p < 0.05
    assert false_alarms / 200 < 0.15
    assert naive_alarms / 200 > 0.5
    assert detections / 200 > 0.95


@pytest.mark.parametrize("metric", [F1, RMSE])
def test_drawn_trainings_agree_with_the_naive_bootstrap(metric: Metric) -> None:
    rng = np.random.default_rng(21)
    groups = [f"u{index % 12}" for index in range(80)]
    golds = [str(star) for star in rng.integers(1, 6, size=80)]
    trainings = [metric.statistics([str(star) for star in rng.integers(1, 6, size=80)], golds) for _ in range(3)]
    result = bootstrap_interval(np.stack(trainings), groups, metric, resamples=10_000)
    drawn = [
        naive(np.mean([trainings[index] for index in places], axis=0), metric, picks=picks[None], groups=groups)[0]
        for places, picks in zip(rng.integers(3, size=(4000, 3)), rng.integers(12, size=(4000, 12)), strict=True)
    ]
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert (result.low, result.high) == pytest.approx((low, high), abs=0.06 * (high - low))
    one = bootstrap_interval(np.mean(trainings, axis=0), groups, metric, resamples=10_000)
    assert high - low > 1.1 * (one.high - one.low)  # the trainings' variance widens the interval
    assert result.value == pytest.approx(metric.value(np.mean(trainings, axis=(0, 1))))


def test_equal_trainings_count_as_one_training() -> None:
    values, users = clustered(np.random.default_rng(22), users=30, each=3)
    thrice = np.repeat(values[None], 3, axis=0)
    once, three = (bootstrap_interval(stats, users, RMSE, resamples=500) for stats in (values**2, thrice**2))
    assert (three.low, three.high, three.value) == pytest.approx((once.low, once.high, once.value))
    assert paired_bootstrap(thrice, thrice, users, ACCURACY, resamples=500) == Paired(0, 0, 0, 1)


def test_pairing_removes_the_variance_that_methods_share() -> None:
    rng = np.random.default_rng(9)
    base, users = clustered(rng, users=50, each=4)
    noise = rng.normal(0, 0.1, size=base.shape)
    result = paired_bootstrap(base + 0.1 + noise, base, users, ACCURACY, resamples=2000)
    alone = bootstrap_interval(base, users, ACCURACY, resamples=2000)
    assert result.low > 0
    assert result.high - result.low < 0.2 * (alone.high - alone.low)


def test_paired_interval_of_a_mean_equals_the_interval_of_differences() -> None:
    rng = np.random.default_rng(10)
    a, users = clustered(rng, users=30, each=3)
    b, _ = clustered(rng, users=30, each=3)
    paired = paired_bootstrap(a, b, users, ACCURACY, seed=3)
    single = bootstrap_interval(a - b, users, ACCURACY, seed=3)
    assert (paired.difference, paired.low, paired.high) == pytest.approx((single.value, single.low, single.high))


def test_smaller_error_is_an_advantage() -> None:
    rng = np.random.default_rng(11)
    good, bad = rng.uniform(0, 1, size=(60, 1)), rng.uniform(1, 2, size=(60, 1))
    for metric in (MAE, RMSE):
        result = paired_bootstrap(good, bad, one_each(60), metric, resamples=999)
        reversed_result = paired_bootstrap(bad, good, one_each(60), metric, resamples=999)
        assert result.difference > 0
        assert result.low > 0
        assert (reversed_result.difference, reversed_result.low, reversed_result.high) == pytest.approx(
            (-result.difference, -result.high, -result.low)
        )
        assert reversed_result.p == result.p
    assert paired_bootstrap(bad, good, one_each(60), ACCURACY, resamples=99).difference > 0


def test_p_of_known_cases() -> None:
    # a is better for one user, b for the other. Two of the four resamples are ties, one is a win, one a loss.
    a, b = np.array([[1.0], [0.0]]), np.array([[0.0], [1.0]])
    result = paired_bootstrap(a, b, ["x", "y"], ACCURACY, resamples=4000)
    assert (result.difference, result.low, result.high, result.p) == (0, -1, 1, 1)
    # a is better in every resample.
    assert paired_bootstrap(a + b, 0 * a, ["x", "y"], ACCURACY, resamples=999).p == 2 / 1000
    # a is better for one of three users. The resamples without that user, (2/3)³ of all, are ties.
    c = np.array([[1.0], [0.0], [0.0]])
    result = paired_bootstrap(c, 0 * c, ["x", "y", "z"], ACCURACY, resamples=20_000)
    assert result.p == pytest.approx(2 * (2 / 3) ** 3, abs=0.02)


@pytest.mark.parametrize("metric", [ACCURACY, MAE, RMSE])
def test_equal_methods_have_no_difference(metric: Metric) -> None:
    values = np.random.default_rng(12).uniform(size=(50, 1))
    assert paired_bootstrap(values, values.copy(), one_each(50), metric, resamples=500) == Paired(0, 0, 0, 1)


def test_rounding_errors_count_as_ties() -> None:
    # In binary, 0.1 + 0.2 is not 0.3. Without a tolerance, every resample would count as a win.
    a, b = np.array([[0.1], [0.2], [0.3]] * 20), np.array([[0.3], [0.2], [0.1]] * 20)
    users = [f"u{index // 3}" for index in range(60)]
    assert a[:3, 0].sum() != b[:3, 0].sum()
    assert paired_bootstrap(a, b, users, ACCURACY, resamples=500) == Paired(0, 0, 0, 1)


def test_order_of_samples_does_not_matter() -> None:
    rng = np.random.default_rng(13)
    a, users = clustered(rng, users=20, each=3)
    b, _ = clustered(rng, users=20, each=3)
    order = rng.permutation(60)
    mixed = [users[index] for index in order]
    one, other = bootstrap_interval(a, users, ACCURACY), bootstrap_interval(a[order], mixed, ACCURACY)
    assert (one.value, one.low, one.high) == pytest.approx((other.value, other.low, other.high), abs=1e-12)
    first, second = (
        paired_bootstrap(a, b, users, ACCURACY),
        paired_bootstrap(a[order], b[order], mixed, ACCURACY),
    )
    assert (first.low, first.high, first.p) == pytest.approx((second.low, second.high, second.p), abs=1e-12)


def test_draws_depend_on_the_seed() -> None:
    values, users = clustered(np.random.default_rng(14), users=20, each=3)
    once, again, other = (bootstrap_interval(values, users, ACCURACY, resamples=500, seed=seed) for seed in (1, 1, 2))
    assert once == again
    assert once != other
    assert once.value == other.value


def test_samples_averaged_over_seeds_are_scored_exactly() -> None:
    golds, users = ["1", "2", "3", "4"], ["u", "u", "v", "w"]
    seeds = [F1.statistics(["1", "2", "3", "5"], golds), F1.statistics(["1", "1", "3", "4"], golds)]
    pooled = F1.statistics(["1", "2", "3", "5", "1", "1", "3", "4"], golds * 2)
    result = bootstrap_interval(np.mean(seeds, axis=0), users, F1, resamples=200)
    assert result.value == pytest.approx(float(F1.value(pooled.mean(axis=0))))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_not_finite_have_no_interval(bad: float) -> None:
    values = np.array([[bad], [1.0], [2.0]])
    interval = bootstrap_interval(values, one_each(3), RMSE, resamples=50)
    assert interval.value == pytest.approx(bad, nan_ok=True)
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)
    for a, b in ((values, values), (values, np.ones((3, 1))), (np.ones((3, 1)), values)):
        paired = paired_bootstrap(a, b, one_each(3), MAE, resamples=50)
        assert not math.isfinite(paired.difference)
        assert math.isnan(paired.low)
        assert math.isnan(paired.high)
        assert math.isnan(paired.p)


def test_one_user_gives_a_value_without_interval() -> None:
    values = np.array([[1.0], [0.0]])
    interval = bootstrap_interval(values, ["u", "u"], ACCURACY)
    paired = paired_bootstrap(values, 0 * values, ["u", "u"], ACCURACY)
    assert (interval.value, paired.difference) == (0.5, 0.5)
    assert all(map(math.isnan, (interval.low, interval.high, paired.low, paired.high, paired.p)))


def test_no_samples_give_nan() -> None:
    empty = np.zeros((0, 1))
    interval, paired = bootstrap_interval(empty, [], ACCURACY), paired_bootstrap(empty, empty, [], ACCURACY)
    assert all(map(math.isnan, (interval.value, interval.low, paired.difference, paired.p)))


def test_lengths_and_shapes_must_agree() -> None:
    values = np.zeros((3, 1))
    with pytest.raises(ShapeMismatch, match="found \\(3, 1\\)"):
        bootstrap_interval(values, ["u", "v"], ACCURACY)
    with pytest.raises(ShapeMismatch):
        bootstrap_interval(np.zeros(3), one_each(3), ACCURACY)
    with pytest.raises(ShapeMismatch, match="the same shape"):
        paired_bootstrap(values, np.zeros((2, 1)), one_each(3), ACCURACY)
    with pytest.raises(ShapeMismatch):
        paired_bootstrap(values, values, one_each(2), ACCURACY)


def test_bootstrap_without_resamples_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1 resample; found 0"):
        bootstrap_interval(np.zeros((2, 1)), ["u", "v"], ACCURACY, resamples=0)


def test_size_of_blocks_does_not_change_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    values, users = clustered(np.random.default_rng(16), users=12, each=3)
    whole = bootstrap_interval(values, users, ACCURACY, resamples=1001)
    monkeypatch.setattr("personaplug.analysis.significance._BLOCK_SIZE", 40)
    assert bootstrap_interval(values, users, ACCURACY, resamples=1001) == whole


def test_many_users_are_fast() -> None:
    values = np.random.default_rng(15).normal(size=(30_000, 1))
    start = time.process_time()
    result = bootstrap_interval(values, one_each(30_000), ACCURACY, resamples=200)
    assert result.low < result.value < result.high
    assert (result.high - result.low) / 2 == pytest.approx(1.96 * values.std() / math.sqrt(30_000), rel=0.25)
    assert time.process_time() - start < 5


def hits_of_counts(both: int, a_only: int, b_only: int, neither: int) -> tuple[Array, Array]:
    """Return the hits of two methods with these counts of agreements and disagreements."""
    counts = both, a_only, b_only, neither
    return np.repeat([[1.0], [1.0], [0.0], [0.0]], counts, axis=0), np.repeat(
        [[1.0], [0.0], [1.0], [0.0]], counts, axis=0
    )


def test_mcnemar_of_known_cases() -> None:
    # Six disagreements, one in favor of b: 2 · (1 + 6) / 64.
    assert mcnemar(*hits_of_counts(40, 5, 1, 9)) == pytest.approx(14 / 64, rel=1e-12)
    assert mcnemar(*hits_of_counts(3, 1, 5, 0)) == pytest.approx(14 / 64, rel=1e-12)
    # All ten disagreements in favor of a: 2 / 1024. An even split: 1.
    assert mcnemar(*hits_of_counts(0, 10, 0, 0)) == pytest.approx(2 / 1024, rel=1e-12)
    assert mcnemar(*hits_of_counts(0, 7, 7, 0)) == 1
    assert mcnemar(*hits_of_counts(5, 0, 0, 5)) == 1
    assert mcnemar(*hits_of_counts(0, 0, 0, 0)) == 1


@pytest.mark.parametrize("split", [(0, 1), (1, 2), (8, 21), (30, 30), (31, 30), (480, 620), (5100, 4800), (0, 900)])
def test_mcnemar_equals_the_exact_binomial_test(split: tuple[int, int]) -> None:
    a_only, b_only = split
    expected = scipy.stats.binomtest(a_only, a_only + b_only).pvalue
    assert mcnemar(*hits_of_counts(10, a_only, b_only, 10)) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_accepts_the_statistics_of_accuracy() -> None:
    golds = ["1", "2", "3", "4", "5"]
    right, wrong = ACCURACY.statistics(golds, golds), ACCURACY.statistics(["1"] * 5, golds)
    assert mcnemar(right, wrong) == 2 / 16


def test_holm_of_known_cases() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.2]) == [0.2]
    assert holm([]) == []
    # A corrected p is at most 1, and at least the corrected p of every smaller p.
    assert holm([0.9, 0.6, 0.5]) == [1, 1, 1]
    assert holm([0.05, 0.04]) == pytest.approx([0.08, 0.08])
    assert holm([0.02, 0.02, 0.02]) == pytest.approx([0.06, 0.06, 0.06])


def test_holm_rejects_the_same_hypotheses_as_the_threshold_rule() -> None:
    rng = np.random.default_rng(17)
    for _ in range(50):
        p = rng.uniform(0, 0.1, size=int(rng.integers(1, 12)))
        order, rejected = np.argsort(p), set()
        for rank, index in enumerate(order):
            if p[index] > 0.05 / (len(p) - rank):
                break
            rejected.add(int(index))
        assert {index for index, value in enumerate(holm(list(p))) if value <= 0.05} == rejected


def test_holm_ignores_nan() -> None:
    result = holm([0.04, math.nan, 0.01])
    assert result[0] == pytest.approx(0.04)
    assert math.isnan(result[1])
    assert result[2] == pytest.approx(0.02)
    p_values = [0.04, 0.01]
    holm(p_values)
    assert p_values == [0.04, 0.01]


def test_each_user_counts_once() -> None:
    values, users = np.array([[1.0], [1.0], [1.0], [0.0]]), ["busy", "busy", "busy", "quiet"]
    assert bootstrap_interval(values, users, ACCURACY).value == 0.75
    assert per_group_mean(values, users, ACCURACY) == 0.5
    assert per_group_mean(values[::-1], users[::-1], ACCURACY) == 0.5
    assert per_group_mean(values, one_each(4), ACCURACY) == 0.75


def test_root_is_computed_for_each_user() -> None:
    squares = np.array([[1.0], [7.0], [16.0]])
    assert per_group_mean(squares, ["u", "u", "v"], RMSE) == pytest.approx((2 + 4) / 2)


def test_macro_f1_is_not_averaged_over_users() -> None:
    stats = F1.statistics(["1", "2"], ["1", "2"])
    assert math.isnan(per_group_mean(stats, ["u", "v"], F1))
    assert math.isnan(per_group_mean(np.zeros((0, 1)), [], MAE))
    assert math.isnan(per_group_mean(np.array([[1.0], [math.nan]]), ["u", "v"], MAE))
    assert per_group_mean(np.array([[1.0], [math.inf]]), ["u", "v"], RMSE) == math.inf
    with pytest.raises(ShapeMismatch):
        per_group_mean(np.zeros((3, 1)), ["u"], MAE)


class _Share(Metric):
    """A ratio that is undefined if nothing counts."""

    name = "share"

    def _statistics(self, predictions: Sequence[str], golds: Sequence[str]) -> Array:
        raise NotImplementedError

    def value(self, means: Array) -> Array:
        return per_counted(means)


def test_draws_without_a_defined_metric_count_against_both_methods() -> None:
    # Only user 0 has a sample that counts, so a draw of 8 users misses it with a chance of (7/8)^8, about a third.
    a, b = np.zeros((8, 2)), np.zeros((8, 2))
    a[0], b[0] = (1, 1), (0, 1)
    paired = paired_bootstrap(a, b, list(range(8)), _Share(), resamples=1000)
    assert (paired.difference, paired.low, paired.high) == (1, 1, 1)
    assert paired.p == pytest.approx(2 * (7 / 8) ** 8, abs=0.1)
    interval = bootstrap_interval(a, list(range(8)), _Share(), resamples=1000)
    assert tuple(interval) == (1, 1, 1)
    empty = bootstrap_interval(np.zeros((8, 2)), list(range(8)), _Share(), resamples=100)
    assert all(map(math.isnan, empty))


def test_kept_draws_are_those_of_large_tables_and_are_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = np.random.default_rng(0).random((60, 1))
    groups = [index % 30 for index in range(60)]
    kept = bootstrap_interval(stats, groups, ACCURACY, resamples=300, seed=91)
    draws = significance._kept_counts.cache_info().misses
    paired_bootstrap(stats, stats[::-1], groups, ACCURACY, resamples=300, seed=91)
    assert significance._kept_counts.cache_info().misses == draws
    monkeypatch.setattr(significance, "_MAX_KEPT", 0)
    assert bootstrap_interval(stats, groups, ACCURACY, resamples=300, seed=91) == kept
