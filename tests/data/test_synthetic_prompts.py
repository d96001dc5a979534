"""Prompts for synthetic samples, and parsing of a model's replies."""

from __future__ import annotations

from dataclasses import replace

import pytest

from personaplug.data.records import Chat, HistoryItem, Sample
from personaplug.data.synthetic_prompts import (
    Example,
    answer_request,
    example_of,
    input_of,
    input_request,
    read_answer,
    read_input,
    with_query,
)
from personaplug.data.task_registry import CHAT, lamp_task, parse_task

STARS = lamp_task("LaMP_3")


def _sample(prompt: str, query: str) -> Sample:
    return Sample("1", "ann", prompt, query, "4")


def test_input_request_has_the_examples_as_numbered_replies() -> None:
    request = input_request(["a film", "a song", "a book"])
    assert request.number == 4
    assert request.prompt == Chat((
        ("user", "Write 4 texts of the same kind, one after another, each about something else.\n\nText 1:"),
        ("assistant", "a film"),
        ("user", "Text 2:"),
        ("assistant", "a song"),
        ("user", "Text 3:"),
        ("assistant", "a book"),
        ("user", "Text 4:"),
    ))  # fmt: skip


def test_answer_request_has_task_and_preferences_before_the_examples() -> None:
    pairs = [Example("a film", "3"), Example("a song", "5")]
    request = answer_request("a book", pairs, opening="Which score? review: ", preferences=["Be strict.", "No 5."])
    assert request.number == 3
    assert request.prompt.turns == (
        ("user", "Which score? review:\n\nBe strict. No 5.\n\n1. a film"),
        ("assistant", "3"),
        ("user", "2. a song"),
        ("assistant", "5"),
        ("user", "3. a book"),
    )
    assert answer_request("Hi", pairs, opening="").prompt.turns[0] == ("user", "1. a film")


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        ("A fine film.", "A fine film."),
        ("5. A fine film.\n6. A dull one.", "A fine film."),
        ("Text 5: “A fine film.”\n\nText 6: A dull one.", "A fine film."),
        ('"A fine film."', "A fine film."),
        ('"Fine" and dull', '"Fine" and dull'),
        ("", ""),
    ],
)
def test_an_input_ends_at_the_next_number(reply: str, text: str) -> None:
    read = read_input(reply, finished=True)
    assert (read.text, read.is_whole) == (text, True)


def test_a_truncated_reply_is_whole_only_before_a_next_number() -> None:
    assert not read_input("A fine fi", finished=False).is_whole
    assert read_input("A fine film.\n6. A du", finished=False).is_whole
    assert not read_answer("Because it", number=5, finished=False).is_whole
    assert read_answer("4\n6. A du", number=5, finished=False).is_whole


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        ("4", "4"),
        ("4.", "4."),
        ("5. 3", "3"),
        ("3\n6. A dull film", "3"),
        ("1. Salt it.\n2. Wait.\n6. Eat.", "1. Salt it.\n2. Wait.\n6. Eat."),
        ("First line.\nSecond line.", "First line.\nSecond line."),
    ],
)
def test_an_answer_keeps_its_own_lists_and_lines(reply: str, text: str) -> None:
    assert read_answer(reply, number=5, finished=True).text == text


def test_an_item_gives_its_input_and_answer() -> None:
    item = HistoryItem("1", (("title", "Rain"), ("text", "It rains."), ("tag", "news")), "tag")
    assert example_of(item) == Example("Rain. It rains.", "news")
    assert example_of(replace(item, kind="rejection")) is None
    alone = HistoryItem("2", (("text", "a tweet"),), "text")
    assert (input_of(alone), example_of(alone)) == ("", None)
    preference = HistoryItem("3", (("preference", "Short, please"),), kind="preference")
    assert (input_of(preference), example_of(preference)) == ("Short, please", None)


def test_a_new_query_replaces_the_query_of_the_sample() -> None:
    sample = _sample("Score? review: a film", "a film")
    assert with_query(STARS, sample, "a book") == "Score? review: a book"
    assert with_query(STARS, sample, " ") is None, "a blank query cannot be read back"
    assert with_query(CHAT, _sample("Hello", "Hello"), "Tea?\nOr milk?") == "Tea?\nOr milk?"


def test_a_query_that_the_task_would_parse_differently_has_no_prompt() -> None:
    values = {"name": "T", "kind": "rating", "labels": ["1", "2"], "item_fields": ["text"]}
    task = parse_task({**values, "query_pattern": r"film: \[(.*?)\]"})
    sample = _sample("Which score? film: [a film] Be brief.", "a film")
    assert with_query(task, sample, "a book") == "Which score? film: [a book] Be brief."
    assert with_query(task, sample, "a ] book") is None


def test_a_query_of_several_options_cannot_be_replaced() -> None:
    prompt = 'Choose without explanation. [1]: "a" [2]: "b"'
    assert with_query(lamp_task("LaMP_1"), _sample(prompt, "a b"), "c d") is None
