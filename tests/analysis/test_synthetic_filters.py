"""Filters of texts that a model wrote as training data."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from personaplug.analysis.synthetic_filters import (
    FilterReport,
    RealTexts,
    UsualRange,
    balanced,
    lowest_usual_cosine,
    nearest_cosines,
    with_shares,
    words_key,
)


def test_a_usual_value_is_within_two_standard_deviations_of_the_mean() -> None:
    usual = UsualRange.of([8, 12])
    assert [usual.holds(value) for value in (5.9, 6, 14, 14.1)] == [False, True, True, False]


def test_equal_values_allow_only_that_value() -> None:
    usual = UsualRange.of([0.1] * 3)
    assert (usual.holds(0.1), usual.holds(0.2)) == (True, False)


@pytest.mark.parametrize(
    ("left", "right"),
    [("A warm, dry day!", "a warm dry  day"), ("Straße", "STRASSE"), ("晴れの日。", "晴れの日"), ("!!", " !! ")],
)
def test_case_and_punctuation_are_ignored(left: str, right: str) -> None:
    assert words_key(left) == words_key(right)
    assert RealTexts([left]).has(right)


def test_a_different_text_is_not_a_duplicate() -> None:
    real = RealTexts(["A warm, dry day", "?!"])
    assert [real.has(text) for text in ("A warm, wet day", "warm dry day a", "!?")] == [False, False, False]


@pytest.mark.parametrize(
    ("text", "is_copy"),
    [
        ("one two three four five six seven eight nine TEN", True),
        ("one two three four five six seven eight other words", True),
        ("one two three four five six seven other words here", False),
        ("one two three four", False),
        ("ten nine eight seven six five four three two one", True),
        ("", False),
    ],
)
def test_a_near_copy_shares_four_fifths_of_its_words_with_a_real_text(text: str, is_copy: bool) -> None:
    real = RealTexts(["something else", "one two three four five six seven eight nine ten"])
    assert real.has_near_copy(text) is is_copy


def test_the_usual_cosine_is_between_nearest_real_texts() -> None:
    angles = np.array([0.0, 0.1, 0.2, 0.3])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    assert lowest_usual_cosine(vectors) == pytest.approx(np.cos(0.1), abs=1e-4)
    assert nearest_cosines(vectors[:1], vectors[2:]).tolist() == pytest.approx([np.cos(0.2)])
    assert lowest_usual_cosine(vectors[:1]) == -1


def test_no_label_exceeds_its_real_share_by_more_than_the_bound() -> None:
    labels = ["a"] * 9 + ["b", "b", "a"]
    balanced_labels = [labels[index] for index in balanced(labels, {"a": 0.5, "b": 0.5})]
    assert Counter(balanced_labels) == {"a": 3, "b": 2}, "3 of 5 is the share .5 plus the bound .1"
    assert balanced(labels, {"a": 0.5, "b": 0.5}) == [0, 1, 2, 9, 10], "the last texts are left out"


def test_a_single_label_cannot_be_balanced() -> None:
    assert balanced(["a"] * 50, {"a": 0.5, "b": 0.5}) == []
    assert balanced(["a", "c"], {"a": 1.0}) == [0], "a label that no real answer has stays rare"
    assert balanced([], {"a": 1.0}) == []


def test_balanced_labels_are_unchanged() -> None:
    rng = np.random.default_rng(0)
    labels = rng.choice(["a", "b", "c"], size=300).tolist()
    shares = {label: count / 300 for label, count in Counter(labels).items()}
    assert balanced(labels, shares) == list(range(300))


def test_the_report_counts_the_texts_of_each_filter() -> None:
    report = FilterReport(written=10)
    report.left_out["cut"] += 4
    report.left_out["repeats"] += 0
    report.left_out["no label"] += 3
    assert report.lines() == [
        "cut: 4 of 10 left out (40%)",
        "repeats: 0 of 6 left out (0%)",
        "no label: 3 of 6 left out (50%)",
        "kept: 3 of 10",
    ]


def test_calibration_gives_each_label_its_real_share_and_keeps_the_order() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(200, 3)) + np.array([0, 6, -4])
    probabilities = with_shares(scores, [0.5, 0.3, 0.2])
    assert probabilities.sum(axis=1) == pytest.approx(np.ones(200))
    assert probabilities.mean(axis=0) == pytest.approx([0.5, 0.3, 0.2], abs=1e-6)
    odds = scores[:, 0] - scores[:, 1]
    assert (np.argsort(odds) == np.argsort(np.log(probabilities[:, 0] / probabilities[:, 1]))).all()


def test_a_label_without_a_real_answer_gets_no_probability() -> None:
    probabilities = with_shares(np.array([[9.0, 0.0, -900.0]] * 4), [0.0, 0.75, 0.25])
    assert probabilities == pytest.approx(np.array([[0.0, 0.75, 0.25]] * 4))
    assert with_shares(np.zeros((0, 2)), [0.5, 0.5]).shape == (0, 2)
