"""Intervals and paired tests against closed forms, scipy, and simulated data whose truth is known."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import scipy.stats
from numpy.typing import NDArray

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
    return [f"user {place}" for place in range(count)]


def clustered(rng: np.random.Generator, *, users: int, each: int, shift: float = 0.0) -> tuple[Array, list[str]]:
    """Samples (users·each, 1) that share most of their variance within a user, around a mean of `shift`."""
    tastes = rng.normal(shift, 1, size=users).repeat(each)
    values = tastes + rng.normal(0, 0.5, size=users * each)
    return values[:, None], [f"u{user}" for user in np.arange(users).repeat(each)]


def test_interval_of_a_mean_is_the_normal_one() -> None:
    values = np.random.default_rng(1).normal(3, 2, size=(400, 1))
    found = bootstrap_interval(values, one_each(400), ACCURACY, resamples=20_000)
    reach = 1.959964 * values.std() / math.sqrt(400)
    assert found.value == pytest.approx(values.mean(), abs=1e-12)
    assert (found.low, found.high) == pytest.approx((values.mean() - reach, values.mean() + reach), abs=0.05 * reach)


def test_one_sample_a_user_agrees_with_scipy_on_a_metric_that_is_no_mean() -> None:
    squares = np.random.default_rng(2).exponential(2, size=(150, 1))
    ours = bootstrap_interval(squares, one_each(150), RMSE, resamples=20_000)
    theirs = scipy.stats.bootstrap(
        (squares[:, 0],),
        lambda x, axis: np.sqrt(np.mean(x, axis=axis)),
        method="percentile",
        n_resamples=20_000,
        rng=np.random.default_rng(3),
    ).confidence_interval
    width = theirs.high - theirs.low
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.04 * width)
    assert ours.value == pytest.approx(math.sqrt(squares.mean()))


def naive(stats: Array, metric: Metric, *, picks: NDArray[np.int64], groups: list[str]) -> Array:
    """The same bootstrap written out: the samples of the picked groups, one resample after the other."""
    names = sorted(set(groups))
    rows = {name: [place for place, group in enumerate(groups) if group == name] for name in names}
    drawn = [np.concatenate([stats[rows[names[pick]]] for pick in line]) for line in picks]
    return np.array([metric.value(sample.mean(axis=0)) for sample in drawn])


@pytest.mark.parametrize("metric", [F1, ACCURACY, RMSE])
def test_groups_of_different_sizes_equal_the_bootstrap_written_out(metric: Metric) -> None:
    rng = np.random.default_rng(4)
    groups = ["a"] * 1 + ["b"] * 7 + ["c"] * 2 + ["d"] * 4
    golds, said = ([str(star) for star in rng.integers(1, 6, size=14)] for _ in range(2))
    stats = metric.statistics(said, golds)
    found = bootstrap_interval(stats, groups, metric, resamples=3000, seed=5)
    picks = np.random.default_rng(5).integers(4, size=(3000, 4))
    expected = np.quantile(naive(stats, metric, picks=picks, groups=groups), [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx(tuple(expected), abs=1e-12)


def test_users_are_resampled_whole() -> None:
    values, users = clustered(np.random.default_rng(6), users=40, each=25)
    by_user = bootstrap_interval(values, users, ACCURACY, resamples=4000)
    by_sample = bootstrap_interval(values, one_each(1000), ACCURACY, resamples=4000)
    reach = 1.959964 * values.reshape(40, 25).mean(axis=1).std() / math.sqrt(40)
    assert (by_user.high - by_user.low) / 2 == pytest.approx(reach, rel=0.06)
    assert by_user.high - by_user.low > 3 * (by_sample.high - by_sample.low)


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng, covered, naively_covered = np.random.default_rng(7), 0, 0
    for _ in range(200):
        values, users = clustered(rng, users=40, each=4)
        found = bootstrap_interval(values, users, ACCURACY, resamples=600)
        covered += found.low <= 0 <= found.high
        alone = bootstrap_interval(values, one_each(160), ACCURACY, resamples=600)
        naively_covered += alone.low <= 0 <= alone.high
    assert 0.90 <= covered / 200 <= 0.98
    assert naively_covered / 200 < 0.85


def test_paired_test_errs_at_its_level_and_finds_what_is_there() -> None:
    rng, false_alarms, found = np.random.default_rng(8), 0, 0
    for _ in range(200):
        a, users = clustered(rng, users=40, each=4)
        b, _ = clustered(rng, users=40, each=4)
        false_alarms += paired_bootstrap(a, b, users, ACCURACY, resamples=600).p < 0.05
        found += paired_bootstrap(a + 1, b, users, ACCURACY, resamples=600).p < 0.05
    assert 0.02 <= false_alarms / 200 <= 0.11
    assert found / 200 > 0.95


def test_gains_that_trainings_owe_to_luck_are_no_sure_ones() -> None:
    """Trainings differ by as much as users do: averaged beforehand, their luck is taken for skill."""
    rng, false_alarms, naive_alarms, found = np.random.default_rng(20), 0, 0, 0
    for _ in range(200):
        hard, users = clustered(rng, users=40, each=4)
        luck = rng.normal(0, 0.3, size=(6, 1, 1)) + rng.normal(0, 0.3, size=(6, 160, 1))
        a, b = hard + luck, np.repeat(hard[None], 6, axis=0)
        false_alarms += paired_bootstrap(a, b, users, ACCURACY, resamples=400).p < 0.05
        naive_alarms += paired_bootstrap(a.mean(axis=0), hard, users, ACCURACY, resamples=400).p < 0.05
        found += paired_bootstrap(a + 1, b, users, ACCURACY, resamples=400).p < 0.05
    assert false_alarms / 200 < 0.15
    assert naive_alarms / 200 > 0.5
    assert found / 200 > 0.95


@pytest.mark.parametrize("metric", [F1, RMSE])
def test_trainings_are_drawn_as_the_bootstrap_written_out_draws_them(metric: Metric) -> None:
    rng = np.random.default_rng(21)
    groups = [f"u{place % 12}" for place in range(80)]
    golds = [str(star) for star in rng.integers(1, 6, size=80)]
    trainings = [metric.statistics([str(star) for star in rng.integers(1, 6, size=80)], golds) for _ in range(3)]
    found = bootstrap_interval(np.stack(trainings), groups, metric, resamples=10_000)
    drawn = [
        naive(np.mean([trainings[place] for place in places], axis=0), metric, picks=picks[None], groups=groups)[0]
        for places, picks in zip(rng.integers(3, size=(4000, 3)), rng.integers(12, size=(4000, 12)), strict=True)
    ]
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.06 * (high - low))
    one = bootstrap_interval(np.mean(trainings, axis=0), groups, metric, resamples=10_000)
    assert high - low > 1.1 * (one.high - one.low)  # or the test could not tell
    assert found.value == pytest.approx(metric.value(np.mean(trainings, axis=(0, 1))))


def test_trainings_that_agree_are_as_one() -> None:
    values, users = clustered(np.random.default_rng(22), users=30, each=3)
    thrice = np.repeat(values[None], 3, axis=0)
    once, three = (bootstrap_interval(stats, users, RMSE, resamples=500) for stats in (values**2, thrice**2))
    assert (three.low, three.high, three.value) == pytest.approx((once.low, once.high, once.value))
    assert paired_bootstrap(thrice, thrice, users, ACCURACY, resamples=500) == Paired(0, 0, 0, 1)


def test_pairing_takes_out_what_the_samples_share() -> None:
    rng = np.random.default_rng(9)
    hard, users = clustered(rng, users=50, each=4)
    noise = rng.normal(0, 0.1, size=hard.shape)
    found = paired_bootstrap(hard + 0.1 + noise, hard, users, ACCURACY, resamples=2000)
    alone = bootstrap_interval(hard, users, ACCURACY, resamples=2000)
    assert found.low > 0
    assert found.high - found.low < 0.2 * (alone.high - alone.low)


def test_difference_is_the_interval_of_differences_for_a_mean() -> None:
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
        found = paired_bootstrap(good, bad, one_each(60), metric, resamples=999)
        turned = paired_bootstrap(bad, good, one_each(60), metric, resamples=999)
        assert found.difference > 0
        assert found.low > 0
        assert (turned.difference, turned.low, turned.high) == pytest.approx(
            (-found.difference, -found.high, -found.low)
        )
        assert turned.p == found.p
    assert paired_bootstrap(bad, good, one_each(60), ACCURACY, resamples=99).difference > 0


def test_p_by_hand() -> None:
    # Two users, one for a and one for b: a resample is a tie in two cases of four, else a win or a loss.
    a, b = np.array([[1.0], [0.0]]), np.array([[0.0], [1.0]])
    found = paired_bootstrap(a, b, ["x", "y"], ACCURACY, resamples=4000)
    assert (found.difference, found.low, found.high, found.p) == (0, -1, 1, 1)
    # Always better: no resample on the other side.
    assert paired_bootstrap(a + b, 0 * a, ["x", "y"], ACCURACY, resamples=999).p == 2 / 1000
    # Better for one of three users: the resamples without her, (2/3)³ of all, are ties.
    c = np.array([[1.0], [0.0], [0.0]])
    found = paired_bootstrap(c, 0 * c, ["x", "y", "z"], ACCURACY, resamples=20_000)
    assert found.p == pytest.approx(2 * (2 / 3) ** 3, abs=0.02)


@pytest.mark.parametrize("metric", [ACCURACY, MAE, RMSE])
def test_equal_methods_differ_by_nothing(metric: Metric) -> None:
    values = np.random.default_rng(12).uniform(size=(50, 1))
    assert paired_bootstrap(values, values.copy(), one_each(50), metric, resamples=500) == Paired(0, 0, 0, 1)


def test_tie_up_to_rounding_is_a_tie() -> None:
    # 0.1 + 0.2 is not 0.3 in binary: without care every resample would count as a win.
    a, b = np.array([[0.1], [0.2], [0.3]] * 20), np.array([[0.3], [0.2], [0.1]] * 20)
    users = [f"u{place // 3}" for place in range(60)]
    assert a[:3, 0].sum() != b[:3, 0].sum()
    assert paired_bootstrap(a, b, users, ACCURACY, resamples=500) == Paired(0, 0, 0, 1)


def test_order_of_samples_does_not_matter() -> None:
    rng = np.random.default_rng(13)
    a, users = clustered(rng, users=20, each=3)
    b, _ = clustered(rng, users=20, each=3)
    order = rng.permutation(60)
    mixed = [users[place] for place in order]
    one, other = bootstrap_interval(a, users, ACCURACY), bootstrap_interval(a[order], mixed, ACCURACY)
    assert (one.value, one.low, one.high) == pytest.approx((other.value, other.low, other.high), abs=1e-12)
    first, second = (
        paired_bootstrap(a, b, users, ACCURACY),
        paired_bootstrap(a[order], b[order], mixed, ACCURACY),
    )
    assert (first.low, first.high, first.p) == pytest.approx((second.low, second.high, second.p), abs=1e-12)


def test_seed_decides() -> None:
    values, users = clustered(np.random.default_rng(14), users=20, each=3)
    once, again, other = (bootstrap_interval(values, users, ACCURACY, resamples=500, seed=seed) for seed in (1, 1, 2))
    assert once == again
    assert once != other
    assert once.value == other.value


def test_samples_averaged_over_seeds_are_scored_exactly() -> None:
    golds, users = ["1", "2", "3", "4"], ["u", "u", "v", "w"]
    seeds = [F1.statistics(["1", "2", "3", "5"], golds), F1.statistics(["1", "1", "3", "4"], golds)]
    pooled = F1.statistics(["1", "2", "3", "5", "1", "1", "3", "4"], golds * 2)
    found = bootstrap_interval(np.mean(seeds, axis=0), users, F1, resamples=200)
    assert found.value == pytest.approx(float(F1.value(pooled.mean(axis=0))))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_visible_and_breaks_nothing(bad: float) -> None:
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
    with pytest.raises(ShapeMismatch, match="one shape"):
        paired_bootstrap(values, np.zeros((2, 1)), one_each(3), ACCURACY)
    with pytest.raises(ShapeMismatch):
        paired_bootstrap(values, values, one_each(2), ACCURACY)


def test_bootstrap_without_resamples_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1 resample; found 0"):
        bootstrap_interval(np.zeros((2, 1)), ["u", "v"], ACCURACY, resamples=0)


def test_size_of_blocks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values, users = clustered(np.random.default_rng(16), users=12, each=3)
    whole = bootstrap_interval(values, users, ACCURACY, resamples=1001)
    monkeypatch.setattr("personaplug.analysis.significance._BLOCK_SIZE", 40)
    assert bootstrap_interval(values, users, ACCURACY, resamples=1001) == whole


def test_many_users_take_little_time() -> None:
    values = np.random.default_rng(15).normal(size=(30_000, 1))
    start = time.process_time()
    found = bootstrap_interval(values, one_each(30_000), ACCURACY, resamples=200)
    assert found.low < found.value < found.high
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * values.std() / math.sqrt(30_000), rel=0.25)
    assert time.process_time() - start < 5


def hits(both: int, a_only: int, b_only: int, neither: int) -> tuple[Array, Array]:
    """Two methods' hits with these counts of agreement and disagreement."""
    counts = both, a_only, b_only, neither
    return np.repeat([[1.0], [1.0], [0.0], [0.0]], counts, axis=0), np.repeat(
        [[1.0], [0.0], [1.0], [0.0]], counts, axis=0
    )


def test_mcnemar_by_hand() -> None:
    # Six disagreements, one for b: 2 · (1 + 6) / 64.
    assert mcnemar(*hits(40, 5, 1, 9)) == pytest.approx(14 / 64, rel=1e-12)
    assert mcnemar(*hits(3, 1, 5, 0)) == pytest.approx(14 / 64, rel=1e-12)
    # All ten one way: 2 / 1024; an even split is no surprise at all.
    assert mcnemar(*hits(0, 10, 0, 0)) == pytest.approx(2 / 1024, rel=1e-12)
    assert mcnemar(*hits(0, 7, 7, 0)) == 1
    assert mcnemar(*hits(5, 0, 0, 5)) == 1
    assert mcnemar(*hits(0, 0, 0, 0)) == 1


@pytest.mark.parametrize("split", [(0, 1), (1, 2), (8, 21), (30, 30), (31, 30), (480, 620), (5100, 4800), (0, 900)])
def test_mcnemar_is_the_exact_binomial_test(split: tuple[int, int]) -> None:
    a_only, b_only = split
    expected = scipy.stats.binomtest(a_only, a_only + b_only).pvalue
    assert mcnemar(*hits(10, a_only, b_only, 10)) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_takes_an_accuracys_statistics() -> None:
    golds = ["1", "2", "3", "4", "5"]
    right, wrong = ACCURACY.statistics(golds, golds), ACCURACY.statistics(["1"] * 5, golds)
    assert mcnemar(right, wrong) == 2 / 16


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.2]) == [0.2]
    assert holm([]) == []
    # Never above 1, and never below a smaller p's: 0.05 · 1 would be.
    assert holm([0.9, 0.6, 0.5]) == [1, 1, 1]
    assert holm([0.05, 0.04]) == pytest.approx([0.08, 0.08])
    assert holm([0.02, 0.02, 0.02]) == pytest.approx([0.06, 0.06, 0.06])


def test_holm_rejects_as_the_rule_by_thresholds_does() -> None:
    rng = np.random.default_rng(17)
    for _ in range(50):
        p = rng.uniform(0, 0.1, size=int(rng.integers(1, 12)))
        order, rejected = np.argsort(p), set()
        for rank, place in enumerate(order):
            if p[place] > 0.05 / (len(p) - rank):
                break
            rejected.add(int(place))
        assert {place for place, value in enumerate(holm(list(p))) if value <= 0.05} == rejected


def test_holm_leaves_out_comparisons_that_could_not_be_made() -> None:
    found = holm([0.04, math.nan, 0.01])
    assert found[0] == pytest.approx(0.04)
    assert math.isnan(found[1])
    assert found[2] == pytest.approx(0.02)
    given = [0.04, 0.01]
    holm(given)
    assert given == [0.04, 0.01]


def test_each_user_counts_once() -> None:
    values, users = np.array([[1.0], [1.0], [1.0], [0.0]]), ["busy", "busy", "busy", "quiet"]
    assert bootstrap_interval(values, users, ACCURACY).value == 0.75
    assert per_group_mean(values, users, ACCURACY) == 0.5
    assert per_group_mean(values[::-1], users[::-1], ACCURACY) == 0.5
    assert per_group_mean(values, one_each(4), ACCURACY) == 0.75


def test_root_is_taken_user_by_user() -> None:
    squares = np.array([[1.0], [7.0], [16.0]])
    assert per_group_mean(squares, ["u", "u", "v"], RMSE) == pytest.approx((2 + 4) / 2)


def test_no_macro_f1_of_single_users() -> None:
    stats = F1.statistics(["1", "2"], ["1", "2"])
    assert math.isnan(per_group_mean(stats, ["u", "v"], F1))
    assert math.isnan(per_group_mean(np.zeros((0, 1)), [], MAE))
    assert math.isnan(per_group_mean(np.array([[1.0], [math.nan]]), ["u", "v"], MAE))
    assert per_group_mean(np.array([[1.0], [math.inf]]), ["u", "v"], RMSE) == math.inf
    with pytest.raises(ShapeMismatch):
        per_group_mean(np.zeros((3, 1)), ["u"], MAE)
