"""Rows of the input: prompts, histories in both forms, and reasons of invalid rows without the user's text."""

from __future__ import annotations

import json
from typing import Any

import pytest

from personaplug.data import LAMP_TASKS
from personaplug.data.records import Chat
from personaplug.data.task_registry import CHAT
from personaplug.data.wording import Wording
from personaplug.errors import ConfigError
from personaplug.offline.input_files import COLUMNS
from personaplug.offline.rows import RowParser, check_columns

SECRET = "zanzibar"
RATING = LAMP_TASKS["LaMP_3"]
ITEMS = [
    {"text": "Fine.", "score": 4, "rejected": None, "preference": None, "date": None},
    {"text": None, "score": 5.0, "rejected": None, "preference": None, "date": None},
    {"text": "Poor.", "score": None, "rejected": "5", "preference": None, "date": None},
    {"text": None, "score": None, "rejected": None, "preference": "No horror.", "date": None},
]


def row(**changes: Any) -> dict[str, Any]:
    return {"id": 7, "user_id": "u", "prompt": "review: tea", "history": None, **changes}


@pytest.mark.parametrize("history", [ITEMS, json.dumps(ITEMS)], ids=["structs", "JSON"])
def test_history_is_a_list_of_structs_or_json(history: Any) -> None:
    parsed = RowParser(RATING, COLUMNS).parse(row(history=history), default_id="a:1")
    assert (parsed.error, parsed.id, parsed.user, parsed.query.text) == ("", "7", "u", "tea")
    assert [(item.kind, item.text) for item in parsed.items] == [
        ("answer", "text: Fine. score: 4"),
        ("answer", "text:  score: 5"),
        ("rejection", "text: Poor. score: 5"),
        ("preference", "preference: No horror."),
    ]


def test_null_is_the_history_of_a_new_user_and_the_id_is_the_position(tmp_path: Any) -> None:
    parsed = RowParser(RATING, ("prompt", "history")).parse({"prompt": "review: x", "history": None}, default_id="a:1")
    assert (parsed.id, parsed.user, parsed.items, parsed.error) == ("a:1", None, (), "")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prompt": SECRET}, "A prompt of task LaMP_3 must contain 'review: '"),
        ({"prompt": None}, "its 'prompt' is null"),
        ({"prompt": [{"role": "assistant", "content": SECRET}]}, "does not end with a message of the user"),
        ({"prompt": [{"role": SECRET, "content": "x"}]}, "message 1 of its context: its 'role' is not one of"),
        ({"history": SECRET}, "its 'history': it is not valid JSON"),
        ({"history": [{"text": SECRET}]}, "item 1: its 'score' is missing"),
        ({"history": [SECRET]}, "item 1: it is not a JSON object"),
        ({"history": 3}, "its 'history' is neither a list of items nor JSON"),
    ],
)
def test_invalid_row_has_a_reason_without_text(changes: dict[str, Any], reason: str) -> None:
    parsed = RowParser(RATING, COLUMNS).parse(row(**changes), default_id="a:1")
    assert reason in parsed.error
    assert SECRET not in parsed.error
    assert (parsed.id, parsed.user, parsed.items) == ("7", "u", ())


def test_row_with_an_invalid_id_keeps_its_user() -> None:
    parsed = RowParser(RATING, COLUMNS).parse(row(id=""), default_id="a:1")
    assert (parsed.id, parsed.user, "its 'id'" in parsed.error) == ("a:1", "u", True)


def test_conversation_is_a_list_of_messages() -> None:
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    parsed = RowParser(CHAT, COLUMNS).parse(row(prompt=messages), default_id="a:1")
    assert isinstance(parsed.prompt, Chat)
    assert (parsed.prompt.turns[1], parsed.query.text) == (("user", "Hello"), "Hello")


def test_store_needs_the_user_of_each_row() -> None:
    parser = RowParser(RATING, ("user_id", "prompt"), needs_user=True)
    assert "its 'user_id' is null" in parser.parse({"user_id": None, "prompt": "review: x"}, default_id="a:1").error


def test_prompt_in_another_wording_than_in_training_is_marked() -> None:
    wording = Wording("Rate it. review: ", "Rate it. review: ", "", True)
    parser = RowParser(RATING, COLUMNS, wordings=[wording])
    prompts = ("Rate it. review: tea", "review: tea")
    assert [parser.parse(row(prompt=p), default_id="a:1").has_other_wording for p in prompts] == [False, True]


@pytest.mark.parametrize(
    ("columns", "needs", "message"),
    [
        (("history",), {"needs_prompt": True}, "needs a column 'prompt'"),
        (("prompt",), {}, "needs a column 'history'"),
        (("prompt",), {"has_store": True}, "--store needs a column 'user_id'"),
        (("user_id", "history"), {"has_store": True}, "not from both"),
        ((), {"is_plain": True, "needs_prompt": True}, "none of the known columns"),
    ],
)
def test_missing_column_is_refused(columns: tuple[str, ...], needs: dict[str, bool], message: str) -> None:
    needed = {"needs_prompt": False, "is_plain": False, "has_store": False, **needs}
    with pytest.raises(ConfigError, match=message):
        check_columns(columns, **needed)
