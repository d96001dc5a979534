"""Prompts of several turns: tokens, order of truncation, and position of soft tokens."""

from __future__ import annotations

from unittest.mock import Mock

import pytest

from personaplug.data.records import Chat, Turn
from personaplug.errors import ShapeMismatch
from personaplug.llm.prompt_tokenizer import PromptTokenizer, from_turn, starts_of_exchanges
from personaplug.llm.tiny import tiny_tokenizer

SYSTEM: Turn = ("system", "be kind")
TURNS: tuple[Turn, ...] = (
    SYSTEM,
    ("user", "first question"),
    ("assistant", "first answer"),
    ("user", "second question"),
    ("assistant", "second answer"),
    ("user", "last question"),
)


def tokenizer(max_tokens: int = 512) -> PromptTokenizer:
    """Return a tokenizer whose template prints all messages in one line."""
    own = tiny_tokenizer()
    own.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}<bot>"
    return PromptTokenizer(own, max_tokens=max_tokens, is_encoder_decoder=False)


def decoded(prompts: PromptTokenizer, chat: Chat) -> str:
    return str(prompts.tokenizer.decode(list(prompts.encode_prompt(chat).ids)))


def test_conversation_of_one_message_equals_the_message() -> None:
    prompts = tokenizer()
    assert prompts.encode_prompt(Chat((("user", "hello"),))) == prompts.encode_prompt("hello")


def test_conversation_that_fits_is_not_truncated() -> None:
    prompts = tokenizer()
    prompt = prompts.encode_prompt(Chat(TURNS))
    assert prompt.ids == prompts.encode_chat(TURNS).ids
    assert not prompt.truncated


def test_oldest_exchange_is_dropped_first_and_the_system_message_stays() -> None:
    whole = tokenizer()
    size = len(whole.encode_prompt(Chat(TURNS)).ids)
    without_one = whole.encode_prompt(Chat((SYSTEM, *TURNS[3:]))).ids
    prompt = tokenizer(size - 1).encode_prompt(Chat(TURNS))
    assert prompt.ids == without_one
    assert prompt.truncated
    without_two = whole.encode_prompt(Chat((SYSTEM, TURNS[-1]))).ids
    assert tokenizer(len(without_one) - 1).encode_prompt(Chat(TURNS)).ids == without_two


def test_end_of_the_last_message_is_cut_if_no_exchange_is_left() -> None:
    whole = tokenizer()
    shortest = whole.encode_prompt(Chat((SYSTEM, TURNS[-1]))).ids
    prompt = tokenizer(len(shortest) - 2).encode_prompt(Chat(TURNS))
    assert len(prompt.ids) == len(shortest) - 2
    assert prompt.truncated
    assert decoded(whole, Chat((SYSTEM, ("user", "last")))).split("last")[0] in whole.tokenizer.decode(list(prompt.ids))
    assert prompt.ids[-1] == shortest[-1], "the template's end stays"


def test_soft_tokens_of_prefix_come_before_the_last_message() -> None:
    prompts = tokenizer()
    before = prompts.encode_prompt(Chat(TURNS))
    head = str(prompts.tokenizer.decode(list(before.ids[: before.soft_position])))
    assert head.endswith("<user>")
    assert "second answer" in head
    later = prompts.encode_prompt(Chat(TURNS), 5)
    assert str(prompts.tokenizer.decode(list(later.ids[: later.soft_position]))).endswith("last ")
    with pytest.raises(ShapeMismatch, match="0 to 13"):
        prompts.encode_prompt(Chat(TURNS), 14)


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        (TURNS, [(SYSTEM, *TURNS[3:]), (SYSTEM, TURNS[-1])]),
        (TURNS[1:], [TURNS[3:], TURNS[-1:]]),
        ((SYSTEM, TURNS[-1]), []),
        (TURNS[-1:], []),
        ((SYSTEM, ("assistant", "hi"), TURNS[-1]), [(SYSTEM, TURNS[-1])]),
        ((("user", "a"), ("user", "b"), TURNS[-1]), [(("user", "b"), TURNS[-1]), TURNS[-1:]]),
        ((*TURNS[1:3], SYSTEM, TURNS[-1]), [(SYSTEM, TURNS[-1])]),
    ],
)
def test_shorter_conversations_keep_all_system_messages_and_the_last_one(
    turns: tuple[Turn, ...], expected: list[tuple[Turn, ...]]
) -> None:
    assert [from_turn(turns, start) for start in starts_of_exchanges(turns)] == expected


@pytest.mark.parametrize("soft_at", [0, 3])
def test_long_system_messages_leave_a_quarter_to_the_last_message(soft_at: int) -> None:
    prompts = tokenizer(64)
    turns = (("system", "kind " * 90), ("developer", "brief " * 90), *TURNS[1:5], ("user", "tea " * 90))
    prompt = prompts.encode_prompt(Chat(turns), soft_at)
    text, head = (str(prompts.tokenizer.decode(list(ids))) for ids in (prompt.ids, prompt.ids[: prompt.soft_position]))
    assert (len(prompt.ids), prompt.truncated) == (64, True)
    assert text.startswith("<system>kind kind")
    assert text.endswith("<user>tea tea tea </><bot>")
    assert head.endswith("<user>" + "tea"[:soft_at])


def test_conversation_of_thousands_of_messages_is_tokenized_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = [(role, f"{role} {number}") for number in range(2_000) for role in ("user", "assistant")]
    prompts = tokenizer(200)
    encode = Mock(wraps=prompts._encode_turns)
    monkeypatch.setattr(prompts, "_encode_turns", encode)
    prompt = prompts.encode_prompt(Chat((SYSTEM, *turns, TURNS[-1])))
    assert 150 < len(prompt.ids) <= 200
    assert encode.call_count < 20
