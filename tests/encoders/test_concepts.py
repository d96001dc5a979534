"""Concepts: which items a question mentions or shows, and the texts before the question."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from personaplug.data.records import HistoryItem
from personaplug.data.task import Task
from personaplug.data.task_registry import parse_task
from personaplug.encoders.concepts import MAX_CONCEPTS, Concept, concepts_of, find_concepts, mentioned, nearest
from personaplug.errors import ConfigError

TASK = Task("Pets", "chat", ("name", "category", "info"), None, ("rouge_1",), image_field="picture", name_field="name")


def item(name: str, *, category: str = "dog", info: str = "", kind: Any = "answer") -> HistoryItem:
    fields = (("name", name), ("category", category), ("info", info or f"<{name}> barks."))
    return HistoryItem(f"id of {name}", fields, kind=kind)


def concepts(*names: str) -> list[Concept]:
    return concepts_of(TASK, [item(name) for name in names])


def names(found: list[Concept]) -> list[str]:
    return [concept.name for concept in found]


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("Is bo a dog?", ["bo"]),
        ("Is <bo> a dog?", ["bo"]),
        ("IS BO'S COAT RED?", ["bo"]),
        ("What about a bowl?", []),
        ("Turbo or hobo", []),
        ("duck, then bo", ["duck", "bo"]),
        ("the brown-duck", ["brown-duck"]),
        ("the Brown duck and a duck", ["brown-duck", "duck"]),
        ("the brown\nbo and bo", ["bo"]),
        ("ZOË swims", ["Zoë"]),
        ("花花的尾巴长吗", ["花花"]),
        ("", []),
    ],
)
def test_a_name_is_found_as_whole_words_and_the_longest_name_counts(question: str, expected: list[str]) -> None:
    assert names(mentioned(concepts("bo", "duck", "brown-duck", "Zoë", "花花"), question)) == expected


def test_only_named_answers_are_concepts_and_brackets_are_no_part_of_a_name() -> None:
    items = [item("<bo>"), item("  "), item("mo", kind="rejection"), HistoryItem("x", (("preference", "Be brief."),))]
    (found,) = concepts_of(TASK, items)
    assert (found.name, found.row, found.id) == ("bo", 0, "id of <bo>")
    assert found.text == "name: <bo>; category: dog; info: <<bo>> barks."
    assert concepts_of(Task("Other", "text", ("name",), None, ("rouge_1",)), items) == []


def test_long_names_take_no_time_and_are_not_found() -> None:
    name = "la " * 1000
    assert mentioned(concepts(name, "bo"), name * 20 + "bo") == [mentioned(concepts("x", "bo"), "bo")[0]]


def _vectors(*rows: tuple[float, ...]) -> Any:
    return np.array(rows, dtype=np.float32)


def test_nearest_picture_and_its_margin_to_the_nearest_other_name() -> None:
    found = concepts("bo", "mo", "bo", "no")
    stored = _vectors((1, 0, 0), (0, 1, 0), (0.8, 0.6, 0), (0, 0, 0))
    near = nearest(found, pictures=stored, picture=_vectors((0.96, 0.28, 0))[0])
    assert near is not None
    assert (near.concept.name, near.concept.row) == ("bo", 0)
    assert near.cosine == pytest.approx(0.96)
    assert near.margin == pytest.approx(0.96 - 0.28)  # the other picture of bo is not another concept
    alone = nearest(concepts("bo"), pictures=stored[:1], picture=stored[0])
    assert alone is not None
    assert alone.margin == float("inf")
    assert nearest(found[3:], pictures=stored, picture=stored[0]) is None


def test_threshold_decides_whether_a_picture_shows_a_concept_and_the_text_says_so() -> None:
    found = concepts("bo", "mo")
    shown = [nearest(found, pictures=np.eye(2, dtype=np.float32), picture=_vectors((0.8, 0.6))[0]), None]
    at_once = find_concepts(found, "And mo?", shown=shown, threshold=0.79)
    assert at_once.text == (
        "The user has noted:\nname: bo; category: dog; info: <bo> barks.\nname: mo; category: dog; info: <mo> barks.\n"
        "Picture 1 shows bo.\nPicture 2 shows nothing that the user has noted.\n"
    )
    too_far = find_concepts(found, "What is it?", shown=shown[:1], threshold=0.81)
    assert (too_far.concepts, too_far.text) == ((), "The picture shows nothing that the user has noted.\n")
    assert find_concepts(found, "Hello").text == ""


def test_all_items_of_a_shown_name_count_and_their_number_is_limited() -> None:
    found = concepts("mo", "bo", "bo", *[f"pet {number}" for number in range(20)])
    stored = np.eye(len(found), dtype=np.float32)
    shown = [nearest(found, pictures=stored, picture=stored[1])]
    question = " and ".join(concept.name for concept in found[3:])
    about = find_concepts(found, question, shown=shown, threshold=0.5)
    assert [concept.row for concept in about.concepts[:3]] == [1, 2, 3]
    assert len(about.concepts) == MAX_CONCEPTS
    assert about.text.count("name: bo;") == 1  # equal texts are written once


def test_long_facts_are_cut() -> None:
    (long,) = concepts_of(TASK, [item("bo", info="He barks. " * 10_000)])
    assert len(long.text) == 1000
    assert find_concepts([long], "bo?").text == f"The user has noted:\n{long.text}\n"


@pytest.mark.parametrize(
    "change", [{"name_field": "title"}, {"name_field": "info", "answer_field": "info"}, {"name_field": ""}]
)
def test_name_field_is_a_field_of_the_items_texts(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="name_field"):
        parse_task({"name": "Pets", "kind": "chat", "item_fields": ["name", "info"], **change})


def test_chat_task_of_concepts_needs_no_answers() -> None:
    fields = ["name", "category", "info"]
    task = parse_task({"name": "Pets", "kind": "chat", "item_fields": fields, "name_field": "name"})
    assert (task.answer_field, task.field_names) == (None, tuple(fields))
    with pytest.raises(ConfigError, match="two fields"):
        parse_task({"name": "Pets", "kind": "chat", "item_fields": fields})
