"""Items of three kinds, the context of a prompt, and rejected answers, as JSON and as records."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from personaplug.data import open_dataset
from personaplug.data.lamp_writer import write_lamp
from personaplug.data.parsing import Flaw, context_of, item_of, record_of
from personaplug.data.records import Chat, HistoryItem, Sample, last_message
from personaplug.data.task_registry import CHAT, lamp_task, parse_task
from personaplug.errors import ConfigError, RecordError

EXCHANGE = {"id": "1", "question": "How are you?", "answer": "fine, thanks"}
REJECTION = {"id": "2", "question": "How are you?", "rejected": "I AM FINE."}
PREFERENCE = {"id": "3", "preference": "Answer in lower case."}


def item(record: dict[str, Any], task: str = "Chat") -> HistoryItem:
    return item_of(CHAT if task == "Chat" else lamp_task(task), record)[1]


def conversation() -> Sample:
    return Sample(
        "s",
        "ann",
        "And tomorrow?",
        "And tomorrow?",
        "sunny, they say",
        tuple(map(item, (EXCHANGE, REJECTION, PREFERENCE))),
        context=(("system", "Be brief."), ("user", "Rain today?"), ("assistant", "no rain")),
        rejected=("SUNNY.", "Sun."),
    )


@pytest.mark.parametrize(
    ("record", "kind", "answer", "text"),
    [
        (EXCHANGE, "answer", "fine, thanks", "question: How are you? answer: fine, thanks"),
        (REJECTION, "rejection", None, "question: How are you? answer: I AM FINE."),
        (PREFERENCE, "preference", None, "preference: Answer in lower case."),
    ],
)
def test_kind_of_an_item_follows_from_its_fields(
    record: dict[str, Any], kind: str, answer: str | None, text: str
) -> None:
    parsed = item(record)
    assert (parsed.kind, parsed.answer, parsed.text) == (kind, answer, text)
    assert {"id": parsed.id, **record_of(parsed)} == record


def test_items_of_every_task_may_be_preferences_and_rejections() -> None:
    assert item({"id": "1", "preference": "no spoilers"}, "LaMP_3").kind == "preference"
    rejected = item({"id": "1", "text": "a film", "rejected": "5.0"}, "LaMP_3")
    assert (rejected.kind, rejected.answer, rejected.answer_text) == ("rejection", None, "5")
    with pytest.raises(Flaw, match="items of task LaMP_1 have no answers"):
        item({"id": "1", "title": "a", "abstract": "b", "rejected": "c"}, "LaMP_1")


@pytest.mark.parametrize(
    ("record", "defect"),
    [
        (EXCHANGE | {"preference": "x"}, "and fields of an answer"),
        (PREFERENCE | {"rejected": "x"}, "and fields of an answer"),
        (EXCHANGE | {"rejected": "x"}, "split it into two items"),
        ({"id": "1", "preference": " "}, "its 'preference' is empty"),
        ({"id": "1", "rejected": "x"}, "its 'question' is missing"),
        (EXCHANGE | {"kind": "rejection"}, "its 'kind' is 'rejection', but its fields belong to the kind 'answer'"),
    ],
)
def test_item_with_fields_of_two_kinds_is_refused(record: dict[str, Any], defect: str) -> None:
    with pytest.raises(Flaw, match=defect):
        item(record)


def test_conversation_round_trips_through_the_lamp_layout(tmp_path: Path) -> None:
    sample = conversation()
    write_lamp([sample, replace(sample, id="t", context=(), rejected=())], tmp_path, "train", task=CHAT)
    first, second = open_dataset(tmp_path, "train")
    assert first == sample
    assert first.full_prompt == Chat((*sample.context, ("user", "And tomorrow?")))
    assert second.full_prompt == "And tomorrow?"
    assert last_message(first.full_prompt) == last_message(second.full_prompt)


@pytest.mark.parametrize(
    ("context", "defect"),
    [
        ("hello", "not a list"),
        ([{"role": "user"}], "message 1 of its context: its 'content' is missing"),
        ([{"role": "user", "content": "a"}, {"role": " ", "content": "a"}], "message 2 of its context: its 'role'"),
        (["hello"], "message 1 of its context: it is not a JSON object"),
        ([{"role": "User", "content": "a"}], "its 'role' is not one of system, developer, user, assistant, tool"),
    ],
)
def test_broken_context_is_a_flaw(context: object, defect: str) -> None:
    with pytest.raises(Flaw, match=defect):
        context_of(context)


def test_context_that_could_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be written .* its 'role' is not one of"):
        write_lamp([replace(conversation(), context=(("Ann", "Hi"),))], tmp_path, "train", task=CHAT)
    assert not list(tmp_path.glob("*.json"))


def test_broken_context_names_its_question(tmp_path: Path) -> None:
    write_lamp([conversation()], tmp_path, "train", task=CHAT)
    path = tmp_path / "train_questions.json"
    path.write_text(path.read_text().replace('"role": "system"', '"role": null'))
    with pytest.raises(RecordError, match="question 1"):
        list(open_dataset(tmp_path, "train"))


@pytest.mark.parametrize(
    ("change", "defect"),
    [
        ({"labels": ["1", "2"]}, "'text' and 'chat' have none"),
        ({"query_after": "message: "}, "'chat' takes any prompt"),
        ({"query_pattern": "(.*)"}, "'chat' takes any prompt"),
        ({"item_fields": ["question"]}, "two fields"),
        ({"answer_field": "question"}, "two fields"),
        ({"item_fields": ["question", "preference"], "answer_field": "preference"}, "a reserved key of items"),
    ],
)
def test_inconsistent_chat_task_is_refused(change: dict[str, Any], defect: str) -> None:
    with pytest.raises(ConfigError, match=defect):
        parse_task({"name": "Talk", "kind": "chat", **change})


def test_chat_task_needs_only_a_name() -> None:
    assert replace(parse_task({"name": "Chat", "kind": "chat"})) == CHAT


def test_repr_shows_no_text_of_a_conversation() -> None:
    sample = conversation()
    for text_of_repr in (repr(sample), repr(sample.full_prompt), *map(repr, sample.history)):
        assert "fine" not in text_of_repr.lower()
        assert "rain" not in text_of_repr.lower()
