"""Own words: words that only the user's history holds, with recall and precision of the right ones."""

from __future__ import annotations

import numpy as np
import pytest

from personaplug.analysis.metric_base import value_of
from personaplug.analysis.metrics import get_metric
from personaplug.analysis.own_words import OwnWordsPrecision, OwnWordsRecall, own_words, words_of
from personaplug.errors import ConfigError

RECALL, PRECISION = OwnWordsRecall(), OwnWordsPrecision()


def _own(past: list[str], *, inputs: tuple[str, ...] = (), strangers: tuple[list[str], ...] = ()) -> set[str]:
    return set(own_words(past, inputs=inputs, strangers=map(words_of, strangers)))


def test_own_words_are_in_the_history_but_neither_in_the_input_nor_in_a_strangers_history() -> None:
    past = ["Brunch at Tiffany's", "Привет, Tiffany"]
    assert _own(past) == {"brunch", "at", "tiffany", "s", "привет"}
    assert _own(past, inputs=("Write about BRUNCH", "at noon")) == {"tiffany", "s", "привет"}
    assert _own(past, strangers=(["tiffany"], ["s at"])) == {"brunch", "привет"}
    assert _own([], inputs=("a",), strangers=(["b"],)) == set()


def test_recall_and_precision_are_sums_over_samples() -> None:
    own = [frozenset({"a", "b", "c"}), frozenset({"d"}), frozenset({"e"}), frozenset()]
    golds = ["A b x", "d", "y", "a"]
    texts = ["a a c z", "q", "e", "a"]
    # Right own words: a. Own words of the right answers: a, b, d. Own words written: a, c, e.
    recall, precision = RECALL.of_texts(texts, golds, own), PRECISION.of_texts(texts, golds, own)
    assert recall is not None
    assert precision is not None
    assert recall.tolist() == [[1, 2], [0, 1], [0, 0], [0, 0]]
    assert precision.tolist() == [[1, 2], [0, 0], [0, 1], [0, 0]]
    assert value_of(recall, RECALL) == pytest.approx(1 / 3)
    assert value_of(precision, PRECISION) == pytest.approx(1 / 3)


def test_right_answers_have_recall_and_precision_1() -> None:
    own, golds = [frozenset({"a", "b"}), frozenset({"c"})], ["a x", "c b"]
    for metric in (RECALL, PRECISION):
        statistics = metric.of_texts(golds, golds, own)
        assert statistics is not None
        assert value_of(statistics, metric) == 1


def test_metric_is_absent_if_no_word_counts() -> None:
    assert RECALL.of_texts(["a"], ["b"], [frozenset({"a"})]) is None
    assert PRECISION.of_texts(["b"], ["a"], [frozenset({"a"})]) is None
    assert RECALL.of_texts(["a"], ["a"], [frozenset()]) is None


def test_own_words_are_registered_and_cannot_be_scored_from_texts_alone() -> None:
    metric = get_metric("own_words_recall")
    assert metric.greater_is_better
    assert np.isnan(metric.value(np.array([0.0, 0.0])))
    with pytest.raises(ConfigError, match="own_words_recall needs the users' past answers"):
        metric.statistics(["a"], ["a"])
