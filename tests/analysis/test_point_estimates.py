"""Point estimates against brute force: no other label has less expected error, and ties go where the rule says."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import numpy as np
import pytest

from personaplug.analysis.point_estimates import POINT_ESTIMATES, point_predictions, scale_of
from personaplug.errors import ConfigError

STARS = ("1", "2", "3", "4", "5")
SCALES = [STARS, ("0", "5", "10"), ("-2", "-0.5", "0", "7"), ("1", "1.5", "2", "2.5"), ("3",), ("10", "9", "8", "2")]


def _one(shares: list[float], estimate: str, labels: tuple[str, ...] = STARS) -> str:
    return point_predictions(np.array([shares]), labels, estimate=estimate)[0]


def _losses(line: np.ndarray, labels: tuple[str, ...], *, power: int) -> dict[str, float]:
    """Expected loss of answering each label."""
    meant = np.array([float(label) for label in labels])
    return {label: float(line @ np.abs(meant - float(label)) ** power) for label in labels}


@pytest.mark.parametrize("labels", SCALES)
def test_no_label_has_less_expected_loss_than_the_one_that_is_chosen(labels: tuple[str, ...]) -> None:
    lines = np.random.default_rng(0).dirichlet(np.full(len(labels), 0.6), size=300)
    for estimate, power in (("median", 1), ("mean", 2)):
        for line, chosen in zip(lines, point_predictions(lines, labels, estimate=estimate), strict=True):
            losses = _losses(line, labels, power=power)
            assert losses[chosen] == pytest.approx(min(losses.values()), abs=1e-12)
    likeliest = [labels[place] for place in lines.argmax(axis=1)]
    assert point_predictions(lines, labels, estimate="argmax") == likeliest


def test_ties_and_floats_come_out_as_exact_arithmetic_has_them() -> None:
    """Shares that are counts by a small total, so that sums of exactly 1/2 and means half way are frequent."""
    draw, halves, middles = random.Random(0), 0, 0
    for _ in range(3000):
        counts = [draw.randrange(5) for _ in STARS]
        total = sum(counts)
        if not total:
            continue
        summed = [Fraction(sum(counts[: place + 1]), total) for place in range(5)]
        mean = sum(Fraction(count, total) * place for place, count in enumerate(counts, start=1))
        halves += Fraction(1, 2) in summed
        middles += mean.denominator == 2
        shares = [count / total for count in counts]
        assert _one(shares, "median") == str(1 + next(p for p, s in enumerate(summed) if s >= Fraction(1, 2)))
        assert _one(shares, "mean") == str(math.floor(mean + Fraction(1, 2)))
    assert min(halves, middles) > 100


@pytest.mark.parametrize(
    ("shares", "median", "mean"),
    [
        ([0.5, 0, 0, 0, 0.5], "1", "3"),
        ([0, 0.5, 0.5, 0, 0], "2", "3"),
        ([0.49, 0, 0, 0, 0.51], "5", "3"),
        ([0.4, 0.1, 0, 0, 0.5], "2", "3"),
        ([0.3, 0.3, 0.2, 0.1, 0.1], "2", "2"),
        ([0.45, 0.05, 0.05, 0.05, 0.4], "2", "3"),
        ([0, 0, 0, 0, 1], "5", "5"),
    ],
)
def test_median_and_mean_on_hand_cases(shares: list[float], median: str, mean: str) -> None:
    assert (_one(shares, "median"), _one(shares, "mean")) == (median, mean)


def test_half_is_rounded_up_below_zero_too_and_on_an_uneven_scale_to_the_greater() -> None:
    assert _one([0.5, 0.5, 0], "mean", ("-1", "0", "1")) == "0"
    assert _one([0, 0.5, 0.5, 0], "mean", ("-3", "-2", "-1", "0")) == "-1"
    assert _one([0.5, 0.5, 0], "mean", ("0", "5", "20")) == "5"
    assert _one([0.51, 0.49, 0], "mean", ("0", "5", "20")) == "0"


@pytest.mark.parametrize("estimate", ["median", "mean"])
def test_order_of_the_labels_does_not_matter(estimate: str) -> None:
    # as texts these sort otherwise than as numbers
    labels, lines = ("2", "9", "10", "100"), np.random.default_rng(1).dirichlet(np.ones(4), size=200)
    expected = point_predictions(lines, labels, estimate=estimate)
    for order in ([3, 1, 0, 2], [2, 3, 0, 1]):
        assert point_predictions(lines[:, order], [labels[place] for place in order], estimate=estimate) == expected
    assert len(set(expected)) > 2


@pytest.mark.parametrize("estimate", POINT_ESTIMATES)
def test_lines_need_not_sum_to_one(estimate: str) -> None:
    lines = np.random.default_rng(2).dirichlet(np.ones(5), size=50)
    assert point_predictions(lines * 0.37, STARS, estimate=estimate) == point_predictions(
        lines, STARS, estimate=estimate
    )
    history_thirds = np.round(np.full((1, 3), 1 / 3), 6)  # they sum to less than 1
    assert point_predictions(history_thirds, ("1", "2", "3"), estimate=estimate) == [
        "1" if estimate == "argmax" else "2"
    ]


def test_no_lines_are_no_answers() -> None:
    assert point_predictions(np.empty((0, 5)), STARS, estimate="median") == []


def test_what_cannot_be_decided_is_refused() -> None:
    lines = np.ones((1, 2))
    with pytest.raises(ConfigError, match="did you mean 'median'"):
        point_predictions(lines, ("1", "2"), estimate="medain")
    with pytest.raises(ConfigError, match="finite numbers"):
        point_predictions(lines, ("good", "bad"), estimate="mean")
    assert point_predictions(lines, ("good", "bad"), estimate="argmax") == ["good"]


def test_scale_is_finite_numbers() -> None:
    found = scale_of((" 1", "2.5"))
    assert found is not None
    assert found.tolist() == [1, 2.5]
    assert [scale_of(labels) for labels in ((), ("1", "inf"), ("1", "nan"), ("1", "x"))] == [None] * 4
