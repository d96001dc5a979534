"""Label sets against values computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from personaplug.data.label_set import LabelSet, ratings
from personaplug.data.records import HistoryItem

STARS = LabelSet(("1", "2", "3", "4", "5"))
HALVES = LabelSet(("0", "0.5", "4"))
TAGS = LabelSet(("a", "b", "c"))


def _items(*answers: str) -> list[HistoryItem]:
    return [HistoryItem(str(k), (("text", "x"), ("score", answer)), "score") for k, answer in enumerate(answers)]


@pytest.mark.parametrize(
    ("value", "label"), [(2.5, "3"), (2.49, "2"), (3.0, "3"), (-7.0, "1"), (99.0, "5"), (4.5, "5"), (1.5, "2")]
)
def test_nearest_rounds_half_up_within_the_scale(value: float, label: str) -> None:
    assert STARS.nearest(value) == label


def test_nearest_label_is_nearest_by_value_and_not_by_rank() -> None:
    assert [HALVES.nearest(value) for value in (0.2, 0.25, 2.2, 2.25, 9)] == ["0", "0.5", "0.5", "4", "4"]


def test_other_numbers_have_the_nearest_label_only_on_a_rating_scale() -> None:
    assert [STARS.index(answer) for answer in (" 4 ", "4.0", "3.5", "9", "", "good", None)] == [3, 3, 3, 4, -1, -1, -1]
    assert [TAGS.index(answer) for answer in ("b ", "B", "2")] == [1, -1, -1]
    assert LabelSet(("2", "1")).index("1.0") == -1, "labels that do not ascend are not a scale"


def test_features_of_ratings_match_hand_computation() -> None:
    answers = ["5", "1", "2.0", " 4 ", "5", "5", "2"]
    values = np.array([5, 1, 2, 4, 5, 5, 2.0])
    shares = np.array([1, 2, 0, 1, 3]) / 7
    expected = [*shares, values.mean(), 4.0, values.std(), (2 + 4 + 5 + 5 + 2) / 5]
    assert STARS.features(_items(*answers)) == pytest.approx(expected)
    assert STARS.width == 9


def test_features_ignore_items_without_answer() -> None:
    bare = HistoryItem("x", (("text", "x"),), None)
    assert STARS.features([*_items("4", "good", "nan", "inf"), bare]) == pytest.approx([0, 0, 0, 1, 0, 4, 4, 0, 4])
    assert np.isnan(STARS.features(_items("good"))).all()
    assert np.isnan(TAGS.features([])).all()
    assert TAGS.features(_items("b", "b ", "A", "c", "b")) == pytest.approx([0, 3 / 4, 1 / 4])
    assert TAGS.indices(_items("b", "A", "c")).tolist() == [1, 2]
    assert ratings(["3", None, "", "2.5", "-inf"]).tolist() == [3, 2.5]
