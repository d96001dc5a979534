"""Label ids of items, matched within the closed set of each answer."""

from __future__ import annotations

import pytest

from personaplug.data.records import HistoryItem
from personaplug.encoders.encoded_sample import label_ids

STARS, CHOICES = ("1", "2", "3"), ("[1]", "[2]")


def _item(answer: str, labels: tuple[str, ...] | None) -> HistoryItem:
    return HistoryItem("i", (("question", "When?"), ("answer", answer)), "answer", answer_labels=labels)


@pytest.mark.parametrize("answer", ["1984", "2", " 3 ", "2.4"])
def test_free_text_answer_has_no_label(answer: str) -> None:
    assert label_ids([_item(answer, ())], STARS).tolist() == [-1]
    assert label_ids([_item(answer, None)], STARS).tolist() != [-1]


def test_answer_is_matched_to_the_nearest_rating_of_its_own_scale() -> None:
    shared = (*CHOICES, *STARS)
    items = [_item("2.6", STARS), _item("[2]", CHOICES), _item("[1]", STARS)]
    assert label_ids(items, shared).tolist() == [4, 1, -1]
    assert label_ids([_item("3.6", STARS)], (*STARS, "4", "5")).tolist() == [2]


def test_answer_from_an_unknown_label_set_has_no_label() -> None:
    assert label_ids([_item("[2]", CHOICES)], ()).tolist() == [-1]
