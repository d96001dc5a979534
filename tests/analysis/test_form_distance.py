"""Form distance: known distances, features of form only, and no reward for empty answers."""

from __future__ import annotations

import numpy as np
import pytest

from personaplug.analysis.form_distance import FormDistance
from personaplug.encoders.style_features import FEATURES, FORM_FEATURES, style_features_of

METRIC = FormDistance()


def _distances(written: list[list[float]], right: list[list[float]], *, empty: tuple[int, ...] = ()) -> list[float]:
    is_empty = np.isin(np.arange(len(right)), empty)
    statistics = METRIC.of_forms(np.array(written), np.array(right), is_empty=is_empty)
    assert statistics is not None
    assert statistics.shape == (len(right), 1)
    return [float(distance) for distance in statistics[:, 0]]


def test_distance_is_the_mean_over_features_in_standard_deviations() -> None:
    right = [[0.0, 10.0, 7.0], [2.0, 30.0, 7.0]]  # standard deviations 1, 10 and 0; the third feature does not count
    written = [[3.0, 10.0, 0.0], [2.0, 25.0, 9.0]]
    assert _distances(written, right) == pytest.approx([(3 + 0) / 2, (0 + 0.5) / 2])
    assert _distances(right, right) == [0, 0]
    assert not METRIC.greater_is_better


def test_empty_answer_counts_as_the_farthest_right_answer() -> None:
    right = [[0.0], [1.0], [5.0]]
    spread = np.std([0, 1, 5])
    assert _distances([[0.0], [1.0], [5.0]], right, empty=(1,)) == pytest.approx([0, 4 / spread, 0])


def test_metric_is_absent_if_all_right_answers_have_the_same_form() -> None:
    assert METRIC.of_forms(np.ones((2, 1)), np.zeros((2, 1)), is_empty=np.zeros(2, dtype=bool)) is None


def test_features_of_form_ignore_which_words_are_written() -> None:
    columns = [FEATURES.index(name) for name in FORM_FEATURES]
    same, other = style_features_of(["Good news, friends!", "Glad luck, parents!"])[:, columns]
    assert len(columns) == 20
    assert same.tolist() == pytest.approx(other.tolist(), abs=0.2)
    loud, quiet = style_features_of(["GOOD NEWS!!!", "good news"])[:, columns]
    assert np.abs(loud - quiet).max() > 2
