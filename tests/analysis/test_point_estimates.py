"""Point estimates against brute force: each minimizes its expected error, and ties follow the documented rule."""

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


def _estimated(probabilities: list[float], estimate: str, labels: tuple[str, ...] = STARS) -> str:
    return point_predictions(np.array([probabilities]), labels, estimate=estimate)[0]


def _losses(line: np.ndarray, labels: tuple[str, ...], *, power: int) -> dict[str, float]:
    """Return the expected loss of each label."""
    values = np.array([float(label) for label in labels])
    return {label: float(line @ np.abs(values - float(label)) ** power) for label in labels}


@pytest.mark.parametrize("labels", SCALES)
def test_chosen_label_minimizes_the_expected_loss(labels: tuple[str, ...]) -> None:
    lines = np.random.default_rng(0).dirichlet(np.full(len(labels), 0.6), size=300)
    for estimate, power in (("median", 1), ("mean", 2)):
        for line, label in zip(lines, point_predictions(lines, labels, estimate=estimate), strict=True):
            losses = _losses(line, labels, power=power)
            assert losses[label] == pytest.approx(min(losses.values()), abs=1e-12)
    likeliest = [labels[index] for index in lines.argmax(axis=1)]
    assert point_predictions(lines, labels, estimate="argmax") == likeliest


def test_ties_agree_with_exact_arithmetic() -> None:
    """The probabilities are small counts divided by their total, so that exact ties are frequent."""
    rng, ties_of_medians, ties_of_means = random.Random(0), 0, 0
    for _ in range(3000):
        counts = [rng.randrange(5) for _ in STARS]
        total = sum(counts)
        if not total:
            continue
        cumulative = [Fraction(sum(counts[: index + 1]), total) for index in range(5)]
        mean = sum(Fraction(count, total) * index for index, count in enumerate(counts, start=1))
        ties_of_medians += Fraction(1, 2) in cumulative
        ties_of_means += mean.denominator == 2
        probabilities = [count / total for count in counts]
        assert _estimated(probabilities, "median") == str(
            1 + next(p for p, s in enumerate(cumulative) if s >= Fraction(1, 2))
        )
        assert _estimated(probabilities, "mean") == str(math.floor(mean + Fraction(1, 2)))
    assert min(ties_of_medians, ties_of_means) > 100


@pytest.mark.parametrize(
    ("probabilities", "median", "mean"),
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
def test_median_and_mean_of_known_cases(probabilities: list[float], median: str, mean: str) -> None:
    assert (_estimated(probabilities, "median"), _estimated(probabilities, "mean")) == (median, mean)


def test_mean_halfway_between_labels_becomes_the_greater_label() -> None:
    assert _estimated([0.5, 0.5, 0], "mean", ("-1", "0", "1")) == "0"
    assert _estimated([0, 0.5, 0.5, 0], "mean", ("-3", "-2", "-1", "0")) == "-1"
    assert _estimated([0.5, 0.5, 0], "mean", ("0", "5", "20")) == "5"
    assert _estimated([0.51, 0.49, 0], "mean", ("0", "5", "20")) == "0"


@pytest.mark.parametrize("estimate", ["median", "mean"])
def test_order_of_the_labels_does_not_matter(estimate: str) -> None:
    # these labels have another order as texts than as numbers
    labels, lines = ("2", "9", "10", "100"), np.random.default_rng(1).dirichlet(np.ones(4), size=200)
    expected = point_predictions(lines, labels, estimate=estimate)
    for order in ([3, 1, 0, 2], [2, 3, 0, 1]):
        assert point_predictions(lines[:, order], [labels[index] for index in order], estimate=estimate) == expected
    assert len(set(expected)) > 2


@pytest.mark.parametrize("estimate", POINT_ESTIMATES)
def test_probabilities_need_not_sum_to_one(estimate: str) -> None:
    lines = np.random.default_rng(2).dirichlet(np.ones(5), size=50)
    assert point_predictions(lines * 0.37, STARS, estimate=estimate) == point_predictions(
        lines, STARS, estimate=estimate
    )
    thirds = np.round(np.full((1, 3), 1 / 3), 6)  # they sum to less than 1
    assert point_predictions(thirds, ("1", "2", "3"), estimate=estimate) == ["1" if estimate == "argmax" else "2"]


def test_no_probabilities_give_no_labels() -> None:
    assert point_predictions(np.empty((0, 5)), STARS, estimate="median") == []


def test_unknown_estimates_and_labels_without_numbers_are_refused() -> None:
    lines = np.ones((1, 2))
    with pytest.raises(ConfigError, match="did you mean 'median'"):
        point_predictions(lines, ("1", "2"), estimate="medain")
    with pytest.raises(ConfigError, match="finite numbers"):
        point_predictions(lines, ("good", "bad"), estimate="mean")
    assert point_predictions(lines, ("good", "bad"), estimate="argmax") == ["good"]


def test_scale_needs_finite_numbers() -> None:
    scale = scale_of((" 1", "2.5"))
    assert scale is not None
    assert scale.tolist() == [1, 2.5]
    assert [scale_of(labels) for labels in ((), ("1", "inf"), ("1", "nan"), ("1", "x"))] == [None] * 4
