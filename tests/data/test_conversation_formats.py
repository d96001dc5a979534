"""Conversation formats: exact samples and items, turns that are left out, and broken records."""

from __future__ import annotations

from datetime import date
from typing import Any

import pytest
from conversations import SECRET, assistant, chat, histories, kind_and_texts, read, reader_of, system, user

from personaplug.data.conversations import FORMATS
from personaplug.errors import ConfigError, RecordError

EARLIER = chat("Any tips?", "Drink water.", time="2024-01-01T09:00")
LATER = "2024-01-02T09:00"

PAIR: dict[str, dict[str, Any]] = {
    "openai-preference": {
        "input": {"messages": [system("Be kind."), user("Hi"), assistant("Hello!"), user("A pun?")], "tools": []},
        "preferred_output": [assistant("Lettuce laugh.")],
        "non_preferred_output": [assistant("No.")],
    },
    "trl-preference": {
        "prompt": [system("Be kind."), user("Hi"), assistant("Hello!"), user("A pun?")],
        "chosen": [assistant("Lettuce laugh.")],
        "rejected": [assistant("No.")],
    },
}
WHOLE_PAIR = {
    "prompt": "A pun?",
    "chosen": [*PAIR["trl-preference"]["prompt"], assistant("Lettuce laugh.")],
    "rejected": [*PAIR["trl-preference"]["prompt"], assistant("No.")],
    "messages": [user("A pun?")],
}
CONTEXT = (("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello!"))


def said(who: str, text: str) -> dict[str, str]:
    return {"from": who, "value": text}


def test_each_reply_of_a_chat_is_a_sample() -> None:
    line = {
        "user_id": "ann",
        "id": "c7",
        "created_at": LATER,
        "messages": [system("Be kind."), user(" Hi "), assistant("Hello!\n"), user("A pun?"), assistant("Lettuce.")],
    }
    first, second = read(EARLIER, line)
    assert (first.id, first.user_id, first.prompt, first.query, first.target) == ("c7/1", "ann", "Hi", "Hi", "Hello!")
    assert first.context == (("system", "Be kind."),)
    assert (second.id, second.prompt, second.target, second.context) == ("c7/2", "A pun?", "Lettuce.", CONTEXT)
    for sample in (first, second):
        assert [kind_and_texts(item) for item in sample.history] == [("answer", "Any tips?", "Drink water.")]
        assert [(item.id, item.date) for item in sample.history] == [("row-1/1", date(2024, 1, 1))]
        assert sample.rejected == ()


@pytest.mark.parametrize("name", PAIR)
def test_pair_is_one_sample_with_the_rejected_answer(name: str) -> None:
    (sample,) = read(EARLIER, PAIR[name] | {"user": "ann", "time": LATER})
    assert (sample.prompt, sample.context, sample.target) == ("A pun?", CONTEXT, "Lettuce laugh.")
    assert sample.rejected == ("No.",)


def test_pair_of_whole_conversations_is_the_same_sample() -> None:
    common = {"user": "ann", "time": LATER}
    assert read(EARLIER, WHOLE_PAIR | common) == read(EARLIER, PAIR["trl-preference"] | common)


def test_pair_becomes_a_rejection_and_an_exchange_of_the_history() -> None:
    pair = PAIR["trl-preference"] | {"user": "ann", "time": "2023-12-31"}
    (sample,) = read(EARLIER, pair)
    assert [kind_and_texts(item) for item in sample.history] == [
        ("rejection", "A pun?", "No."),
        ("answer", "A pun?", "Lettuce laugh."),
    ]
    assert [item.id for item in sample.history] == ["row-2/1/rejected-1", "row-2/1"]


def test_pair_of_equal_answers_is_only_an_exchange() -> None:
    prompt = [user("A pun?")]
    equal = {"chosen": [*prompt, assistant("No.")], "rejected": [*prompt, assistant("No.")]}
    reader = reader_of(EARLIER, equal | {"user": "ann", "time": LATER})
    (sample,) = reader
    assert (sample.target, sample.rejected) == ("No.", ())
    assert reader.report.left_out == {"rejected answers that equal the kept answer": 1}


def test_sharegpt_with_a_system_text_is_read() -> None:
    turns = [said("human", "Hi"), said("gpt", "Hello!"), said("human", "A pun?"), said("gpt", "Lettuce.")]
    first, second = read(EARLIER, {"user": "ann", "time": LATER, "system": "Be kind.", "conversations": turns})
    assert (first.target, second.target, second.context) == ("Hello!", "Lettuce.", CONTEXT)


def aloe(*turns: tuple[str, str, Any, str], **more: Any) -> dict[str, Any]:
    return {
        "conversations": [
            {"user": asked, "assistant": {"preferred": kept, "rejected": other}, "chosen": chosen}
            for asked, kept, other, chosen in turns
        ],
        **more,
    }


def test_history_of_an_aloe_turn_is_its_own_earlier_turns() -> None:
    talk = aloe(
        ("My arms ache!", "Climbing again?", "Rest.", "preferred"),
        ("Yes, purple!", "Tell me more.", ["Nice.", "Ok."], "rejected"),
        ("It was hard.", "You did it!", "Indeed.", "preferred"),
    )
    samples = read(talk, talk | {"id": "second"})
    assert [sample.user_id for sample in samples] == ["row-1"] * 3 + ["second"] * 3
    one, two, three = samples[:3]
    assert [(one.target, one.rejected), (two.target, two.rejected)] == [
        ("Climbing again?", ("Rest.",)),
        ("Tell me more.", ("Nice.", "Ok.")),
    ]
    assert (one.history, one.context) == ((), ())
    assert three.context == (
        ("user", "My arms ache!"),
        ("assistant", "Climbing again?"),
        ("user", "Yes, purple!"),
        ("assistant", "Nice."),
    )
    assert [kind_and_texts(item) for item in two.history] == [("answer", "My arms ache!", "Climbing again?")]
    assert [kind_and_texts(item) for item in three.history] == [
        ("answer", "My arms ache!", "Climbing again?"),
        ("rejection", "Yes, purple!", "Nice."),
    ]


def test_history_of_aloe_with_users_is_from_other_conversations() -> None:
    lines = [
        aloe((f"Question {day}?", f"Kept {day}", "Other", "preferred"), user="ann", date=f"2024-01-0{day}")
        for day in (1, 2)
    ]
    assert histories(read(*lines)) == {"Kept 2": ["Kept 1"]}


def test_stated_preference_is_an_item_but_not_a_sample() -> None:
    stated = {"user": "ann", "preference": "Short answers, please.", "time": "2024-01-01", "id": "p1"}
    (sample,) = read(stated, chat("Hi", "Hello!", time=LATER))
    assert [kind_and_texts(item) for item in sample.history] == [("preference", "Short answers, please.")]
    assert sample.history[0].id == "p1/1"


def test_formats_may_be_mixed_unless_one_is_required() -> None:
    pair = PAIR["openai-preference"] | {"user": "ann", "time": LATER}
    assert histories(read(EARLIER, pair)) == {"Lettuce laugh.": ["Drink water."]}
    with pytest.raises(RecordError, match="row 2: its format is unknown"):
        read(EARLIER, pair, format="openai-chat")
    with pytest.raises(ConfigError, match="openai-chat"):
        read(EARLIER, format="openai-chats")


def test_each_record_fits_one_format() -> None:
    records = [
        EARLIER,
        *PAIR.values(),
        WHOLE_PAIR,
        {"conversations": [said("human", "Hi")]},
        {"conversations": []},
        aloe(("Hi", "Hello!", "Yo.", "preferred")),
    ]
    assert [sum(one.fits(record) for one in FORMATS.values()) for record in records] == [1] * len(records)


# ---- turns that are left out

CALL = {"type": "function", "id": "x", "function": {"name": "weather", "arguments": "{}"}}
PICTURE = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": "data:"}}]
LEFT_OUT: dict[str, tuple[list[dict[str, Any]], str]] = {
    "tool call": (
        [
            user("Rain?"),
            assistant(None, tool_calls=[CALL]),
            {"role": "tool", "content": "{}", "tool_call_id": "x"},
            assistant("It rains."),
        ],
        "turns with tool calls",
    ),
    "picture": ([user(PICTURE), assistant("A cat.")], "turns with images or other parts that are not text"),  # type: ignore[arg-type]
    "empty reply": ([user("Hm"), assistant(" ")], "turns with an empty message"),
    "empty question": ([user(""), assistant("Yes?")], "turns with an empty message"),
    "weight 0": ([user("Hm"), assistant("Bad.", weight=0)], "replies with weight 0"),
    "greeting": ([assistant("How can I help?")], "replies without a preceding message of the user"),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_unsuitable_turn_is_counted_and_the_next_turn_is_a_sample(name: str) -> None:
    messages, reason = LEFT_OUT[name]
    line = {"user": "ann", "time": LATER, "messages": [*messages, user("A pun?"), assistant("Lettuce.")]}
    reader = reader_of(EARLIER, line)
    (sample,) = reader
    assert (sample.prompt, sample.target) == ("A pun?", "Lettuce.")
    assert reader.report.left_out == {reason: 1}
    assert f"1 {reason} left out" in reader.report.summary()


def test_context_keeps_texts_of_unsuitable_turns_and_alternates_roles() -> None:
    messages = [
        *(message for name in ("tool call", "empty reply", "picture") for message in LEFT_OUT[name][0]),
        user("A pun?"),
        assistant("Lettuce."),
    ]
    (sample,) = read(EARLIER, {"user": "ann", "time": LATER, "messages": messages})
    assert sample.context == (
        ("user", "Rain?"),
        ("assistant", "It rains."),
        ("user", "What is this?"),
        ("assistant", "A cat."),
    )


def test_last_message_without_a_reply_is_counted() -> None:
    reader = reader_of(EARLIER, chat("Hi", "Hello!", "Are you there?", time=LATER))
    assert [sample.target for sample in reader] == ["Hello!"]
    assert reader.report.left_out == {"messages without a reply": 1}


def test_consecutive_messages_of_one_role_are_joined() -> None:
    messages = [user("Hi"), user("A pun?"), assistant("Lettuce."), assistant("Laugh."), user("More"), assistant("No.")]
    first, second = read(EARLIER, {"user": "ann", "time": LATER, "messages": messages})
    assert (first.prompt, first.target) == ("Hi\n\nA pun?", "Lettuce.\n\nLaugh.")
    assert [role for role, _ in second.context] == ["user", "assistant"]


def test_system_message_keeps_its_position() -> None:
    messages = [user("Hi"), assistant("Hello!"), system("Now rhyme."), user("A pun?"), assistant("Lettuce.")]
    first, second = read(EARLIER, {"user": "ann", "time": LATER, "messages": messages})
    assert first.context == ()
    assert second.context == (("user", "Hi"), ("assistant", "Hello!"), ("system", "Now rhyme."))


def test_rejected_answer_without_text_is_counted() -> None:
    pair = PAIR["openai-preference"] | {"non_preferred_output": [assistant(None, tool_calls=[CALL])]}
    reader = reader_of(EARLIER, pair | {"user": "ann", "time": LATER})
    assert [sample.rejected for sample in reader] == [()]
    assert reader.report.left_out == {"rejected answers without text": 1}


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "One"}, {"type": "text", "text": "Two", "image_url": None}]
    line = {"user": "ann", "time": LATER, "messages": [user("Count"), assistant(parts, tool_calls=None)]}
    assert [sample.target for sample in read(EARLIER, line)] == ["One\nTwo"]


def test_sharegpt_turn_with_an_image_or_a_tool_is_left_out() -> None:
    turns = [
        *(said("human", "<image>\nWhat?"), said("gpt", "A cat.")),
        *(said("human", "Rain?"), said("function_call", "{}"), said("observation", "{}"), said("gpt", "Yes.")),
        *(said("human", "Bye"), said("gpt", "Ciao.")),
    ]
    reader = reader_of(EARLIER, {"user": "ann", "time": LATER, "conversations": turns})
    assert [sample.target for sample in reader] == ["Ciao."]
    assert reader.report.left_out == {
        "turns with images or other parts that are not text": 1,
        "turns with tool calls": 1,
    }


# ---- broken records

TURN = {"user": SECRET, "assistant": {"preferred": "Yes", "rejected": ["No"]}, "chosen": "preferred"}
BROKEN: dict[str, tuple[Any, str]] = {
    "unknown form": ({"user": "ann", "text": SECRET}, "its format is unknown; expected the keys"),
    "half a pair": ({"user": "ann", "chosen": [user(SECRET)]}, "its format is unknown"),
    "no object": ([SECRET], "it is not a JSON object"),
    "no user": ({"messages": [user(SECRET)]}, "its 'user' or 'user_id' is missing"),
    "null user": (chat(SECRET, "Yes", user=None), "its 'user' or 'user_id' is missing"),
    "odd role": (
        {"user": "ann", "messages": [user("Hi"), {"role": SECRET, "content": "Yes"}]},
        "message 2 of its 'messages': its 'role' is not one of system, developer, user, assistant, tool, function",
    ),
    "no role": (
        {"user": "ann", "messages": [{"content": SECRET}]},
        "message 1 of its 'messages': its 'role' is missing",
    ),
    "text as messages": ({"user": "ann", "messages": SECRET}, "its 'messages' is not a list of messages"),
    "object as content": (
        {"user": "ann", "messages": [{"role": "user", "content": {SECRET: 1}}]},
        "its 'content' is an object",
    ),
    "text as a part": ({"user": "ann", "messages": [user([SECRET])]}, "it is not a JSON object"),  # type: ignore[arg-type]
    "odd time": (chat(SECRET, "Yes", time="05.01.2024"), "its 'time' has the form 99.99.9999"),
    "odd time of a message": (
        {"user": "ann", "messages": [user(SECRET, timestamp="noon")]},
        "message 1 of its 'messages': its 'timestamp' has the form",
    ),
    "text as chosen": ({"user": "ann", "prompt": "a", "chosen": SECRET, "rejected": "c"}, "its 'chosen' is not a list"),
    "no prompt": (
        {"user": "ann", "chosen": [assistant(SECRET)], "rejected": [assistant("c")]},
        "its 'prompt' is missing",
    ),
    "pair without an answer": (
        {"user": "ann", "prompt": [user(SECRET)], "chosen": [], "rejected": [assistant("c")]},
        "one of its two answers has no message of the assistant",
    ),
    "text as input": (PAIR["openai-preference"] | {"user": "ann", "input": SECRET}, "its 'input' is not an object"),
    "one output": (
        {"user": "ann", "input": {"messages": []}, "preferred_output": []},
        "'non_preferred_output' is missing",
    ),
    "sharegpt role": ({"user": "ann", "conversations": [said(SECRET, "Hi")]}, "its 'from' is not one of system, human"),
    "aloe without a choice": (
        {"conversations": [TURN, {**TURN, "chosen": SECRET}]},
        "turn 2 of its 'conversations': its 'chosen'",
    ),
    "aloe without answers": (
        {"conversations": [{**TURN, "assistant": {"preferred": SECRET}}]},
        "its 'rejected' is missing",
    ),
    "aloe chose nothing": (
        {"conversations": [{**TURN, "assistant": {"preferred": SECRET, "rejected": []}, "chosen": "rejected"}]},
        "there is no rejected answer",
    ),
    "empty preference": ({"user": "ann", "preference": " "}, "its 'preference' is empty"),
    "id of another user": (chat(SECRET, "Yes", who="bob", id="c1"), "a record of another user has the same id c1"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_record_is_reported_without_its_text_and_can_be_skipped(name: str) -> None:
    broken, message = BROKEN[name]
    good = [chat("Any tips?", "Drink water.", id="c1"), chat("Hi", "Hello!")]
    with pytest.raises(RecordError) as caught:
        read(good[0], broken, good[1])
    assert "the list, row 2: " in str(caught.value)
    assert message in str(caught.value)
    assert SECRET not in str(caught.value)
    reader = reader_of(good[0], broken, good[1], skip_bad=1)
    assert histories(list(reader)) == {"Hello!": ["Drink water."]}
    assert (reader.report.rows, reader.report.skipped, reader.report.users) == (3, 1, 1)


def test_answers_to_different_messages_are_not_a_pair() -> None:
    pair = {
        "user": "ann",
        "chosen": [user("A pun?"), assistant("Lettuce.")],
        "rejected": [user("Tea?"), assistant("No.")],
    }
    with pytest.raises(RecordError, match="its two answers reply to different messages"):
        read(EARLIER, pair | {"time": LATER})
