"""Own words: right words that one of two histories holds, with recall, precision and no gain without habits."""

from __future__ import annotations

import random

import numpy as np
import pytest

from personaplug.analysis.metric_base import value_of
from personaplug.analysis.metrics import get_metric
from personaplug.analysis.own_words import OwnWordsPrecision, OwnWordsRecall, own_words, words_of
from personaplug.analysis.significance import paired_bootstrap
from personaplug.errors import ConfigError

VOCABULARY = [f"w{number}" for number in range(200)]
RECALL, PRECISION = OwnWordsRecall(), OwnWordsPrecision()


def _own(right: str, *, past: str = "", stranger: str = "", inputs: str = "") -> set[str]:
    words = [words_of([text]) for text in (right, inputs, past, stranger)]
    return set(own_words(words[0], inputs=words[1], past=words[2], stranger=words[3]))


def test_own_words_are_right_words_of_exactly_one_of_two_histories() -> None:
    right = "BRUNCH at Tiffany's, привет"
    assert _own(right, past="at a brunch. Привет") == {"at", "brunch", "привет"}
    assert _own(right, past="brunch at noon", stranger="at tiffany") == {"brunch", "tiffany"}
    assert _own(right, past="brunch at noon", stranger="tiffany", inputs="Write about BRUNCH") == {"at", "tiffany"}
    assert _own(right, past="at", stranger="at") == set()


def test_recall_and_precision_are_sums_over_samples() -> None:
    own = [frozenset({"a", "b"}), frozenset({"d"}), frozenset[str](), frozenset[str]()]
    texts = ["A a c z", "q", "e", ""]
    # Own words written: a. Words written: a, c, z, q, e; the empty text counts as one word.
    recall, precision = RECALL.of_texts(texts, own), PRECISION.of_texts(texts, own)
    assert recall is not None
    assert precision is not None
    assert recall.tolist() == [[1, 2], [0, 1], [0, 0], [0, 0]]
    assert precision.tolist() == [[1, 3], [0, 1], [0, 1], [0, 1]]
    assert value_of(recall, RECALL) == pytest.approx(1 / 3)
    assert value_of(precision, PRECISION) == pytest.approx(1 / 6)


def test_metrics_are_absent_if_no_sample_has_own_words() -> None:
    assert RECALL.of_texts(["a"], [frozenset()]) is None
    assert PRECISION.of_texts(["a"], [frozenset()]) is None


def test_words_of_a_history_gain_nothing_among_users_without_habits() -> None:
    """All texts are random words of one vocabulary. A row writes all words of the history that it gets."""
    rng, samples = random.Random(0), 2000
    own, texts = [], []
    for _ in range(samples):
        right, past, stranger = (words_of([" ".join(rng.choices(VOCABULARY, k=k))]) for k in (10, 100, 100))
        own.append(own_words(right, inputs=frozenset(), past=past, stranger=stranger))
        texts.append((" ".join(past), " ".join(stranger)))
    for metric in (RECALL, PRECISION):
        own_row, control = (metric.of_texts([pair[side] for pair in texts], own) for side in (0, 1))
        assert own_row is not None
        assert control is not None
        gain = value_of(own_row, metric) - value_of(control, metric)
        assert abs(gain) < 0.1 * value_of(control, metric)


def test_precision_has_an_interval_and_a_p_that_agree_if_few_texts_hold_own_words() -> None:
    users = 40
    own = [frozenset({"x"})] * users
    a, b = (PRECISION.of_texts(["x"] * right + ["y"] * (users - right), own) for right in (1, 0))
    assert a is not None
    assert b is not None
    paired = paired_bootstrap(a, b, list(range(users)), PRECISION, resamples=500)
    assert paired.low <= 0 <= paired.high
    assert paired.p > 0.05


def test_own_words_are_registered_and_cannot_be_scored_from_texts_alone() -> None:
    metric = get_metric("own_words_recall")
    assert metric.greater_is_better
    assert np.isnan(metric.value(np.array([0.0, 0.0])))
    with pytest.raises(ConfigError, match="own_words_recall needs the users' past answers"):
        metric.statistics(["a"], ["a"])
