"""Form distance: known distances, features of form only, and no reward for empty answers."""

from __future__ import annotations

import numpy as np
import pytest

from personaplug.analysis.form_distance import FormDistance, farthest_distances
from personaplug.encoders.style_features import FEATURES, FORM_FEATURES, style_features_of

METRIC = FormDistance()


def _distances(written: list[list[float]], right: list[list[float]], *, empty: tuple[int, ...] = ()) -> list[float]:
    is_empty, forms = np.isin(np.arange(len(right)), empty), np.array(right)
    statistics = METRIC.of_forms(np.array(written), forms, is_empty=is_empty, farthest=farthest_distances(forms))
    assert statistics is not None
    assert statistics.shape == (len(right), 1)
    return [float(distance) for distance in statistics[:, 0]]


def test_distance_is_the_mean_over_features_with_at_most_4_for_each() -> None:
    right = [[0.0, 1.0], [2.0, 3.0]]
    written = [[3.0, 1.0], [-4.0, 2.5]]
    assert _distances(written, right) == pytest.approx([(3 + 0) / 2, (4 + 0.5) / 2])
    assert _distances(right, right) == [0, 0]
    assert not METRIC.greater_is_better


def test_feature_that_few_right_answers_have_does_not_outweigh_the_others() -> None:
    right = [[0.0, 0.0]] * 99 + [[0.0, 0.01]]
    assert _distances([[1.0, 0.0], *right[1:]], right)[0] == 0.5
    assert _distances([[0.0, 1.0], *right[1:]], right)[0] == 0.5


def test_empty_answer_counts_as_the_farthest_right_answer() -> None:
    assert _distances([[0.0], [1.0], [3.0]], [[0.0], [1.0], [3.0]], empty=(1,)) == [0, 2, 0]


def test_metric_is_absent_if_all_right_answers_have_the_same_form() -> None:
    zeros = np.zeros(2)
    assert METRIC.of_forms(np.ones((2, 1)), zeros[:, None], is_empty=zeros > 0, farthest=zeros) is None


def test_features_of_form_ignore_which_words_are_written() -> None:
    columns = [FEATURES.index(name) for name in FORM_FEATURES]
    same, other = style_features_of(["Good news, friends!", "Glad luck, parents!"])[:, columns]
    assert len(columns) == 20
    assert same.tolist() == pytest.approx(other.tolist(), abs=0.2)
    loud, quiet = style_features_of(["GOOD NEWS!!!", "good news"])[:, columns]
    assert np.abs(loud - quiet).max() > 2
