"""Conversations with a user's history: order of the turns, dropped turns, tokens of the prompt."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from families import small_llm

from personaplug.baselines.conversation_prompt import ConversationFormatter, open_formatter
from personaplug.baselines.history_prompt import HistoryPrompt, HistoryPromptFormatter
from personaplug.data.records import Chat, HistoryItem, Prompt, Turn, turns_of
from personaplug.data.task_registry import CHAT, lamp_task
from personaplug.llm.base import LanguageModel
from personaplug.llm.prompt_tokenizer import PromptTokenizer
from personaplug.llm.tiny import tiny_tokenizer

SYSTEM: Turn = ("system", "Be kind.")
CONTEXT: tuple[Turn, ...] = (("user", "first"), ("assistant", "reply"))
LAST: Turn = ("user", "last")
WHOLE = Chat((SYSTEM, *CONTEXT, LAST))
REFUSING = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}</>{% endfor %}<bot>"
)


def exchange(number: int, *, answer: str | None = None) -> HistoryItem:
    fields = (("question", f"q{number}"), ("answer", answer if answer is not None else f"a{number}"))
    return HistoryItem(str(number), fields, "answer")


def preference(text: str) -> HistoryItem:
    return HistoryItem(text, (("preference", text),), kind="preference")


def turns_for(number: int) -> tuple[Turn, ...]:
    return ("user", f"q{number}"), ("assistant", f"a{number}")


@pytest.fixture(scope="module")
def llm() -> LanguageModel:
    return small_llm("llama", chat=True)  # type: ignore[no-any-return]


def with_template(template: str, *, max_tokens: int = 512) -> Any:
    """Return a model whose tokens are bytes, with another chat template or length."""
    llm, tokenizer = small_llm("llama", chat=True), tiny_tokenizer()
    tokenizer.chat_template = template
    llm.prompt_tokenizer = PromptTokenizer(tokenizer, max_tokens=max_tokens, is_encoder_decoder=False)
    llm.max_text_tokens = llm.prompt_tokenizer.max_text_tokens
    return llm


def short_llm(max_tokens: int) -> Any:
    return with_template(tiny_template(), max_tokens=max_tokens)


def tiny_template() -> str:
    return str(small_llm("llama", chat=True).prompt_tokenizer.tokenizer.chat_template)


def size(prompt: Prompt) -> int:
    """Return the tokens of a whole prompt, template included."""
    return len(small_llm("llama", chat=True).prompt_tokenizer.encode_chat(turns_of(prompt)).ids)


# ---- exchanges


def test_exchanges_follow_the_system_message_with_the_best_one_last(llm: LanguageModel) -> None:
    written = ConversationFormatter(CHAT, llm).format(WHOLE, [exchange(1), exchange(2)])
    turns = (SYSTEM, *turns_for(2), *turns_for(1), *CONTEXT, LAST)
    assert written == HistoryPrompt(Chat(turns), 0, offered=2, included=2, shortened=0)


def test_exchanges_stand_before_a_single_message(llm: LanguageModel) -> None:
    written = ConversationFormatter(CHAT, llm).format("last", [exchange(1)])
    assert written.prompt == Chat((*turns_for(1), LAST))
    prompt = llm.prompt_tokenizer.encode_prompt(written.prompt)
    shown = llm.prompt_tokenizer.tokenizer.decode(list(prompt.ids))
    assert shown == "<user>q1</><assistant>a1</><user>last</><bot>"
    before = llm.prompt_tokenizer.tokenizer.decode(list(prompt.ids[: prompt.soft_position]))
    assert before.endswith("</><user>"), "soft tokens of prefix come after the exchanges"


def test_long_exchange_is_dropped_and_a_shorter_one_still_fits() -> None:
    longest, short = exchange(1, answer="z" * 40), exchange(2)
    room = size(Chat((SYSTEM, *turns_for(2), *CONTEXT, LAST)))
    written = ConversationFormatter(CHAT, short_llm(room)).format(WHOLE, [longest, short, exchange(3)])
    assert written.prompt == Chat((SYSTEM, *turns_for(2), *CONTEXT, LAST))
    assert (written.offered, written.included, written.shortened) == (3, 1, 0)
    assert not short_llm(room).measure([written.prompt])[0].truncated
    none = ConversationFormatter(CHAT, short_llm(room - 1)).format(WHOLE, [short])
    assert none == HistoryPrompt(WHOLE, 0, offered=1, included=0, shortened=0)


def test_messages_beyond_the_limit_leave_no_room_for_exchanges() -> None:
    llm = short_llm(size(WHOLE) - 3)
    assert llm.measure([WHOLE])[0].truncated
    assert ConversationFormatter(CHAT, llm).format(WHOLE, [exchange(1)]).prompt == WHOLE


def test_history_tokens_limit_the_exchanges(llm: LanguageModel) -> None:
    one = size(Chat((*turns_for(1), LAST))) - size("last")
    for limit, included in ((one - 1, 0), (one, 1), (2 * one, 2)):
        formatter = ConversationFormatter(CHAT, llm, history_tokens=limit)
        assert formatter.format("last", [exchange(1), exchange(2), exchange(3)]).included == included


def test_exchange_without_an_answer_is_dropped(llm: LanguageModel) -> None:
    written = ConversationFormatter(CHAT, llm).format("last", [exchange(1, answer=""), exchange(2)])
    assert (written.prompt, written.included) == (Chat((*turns_for(2), LAST)), 1)


# ---- stated preferences and notes


@pytest.mark.parametrize("task", ["Chat", "LaMP_3"])
def test_preferences_stand_in_the_system_message(llm: LanguageModel, task: str) -> None:
    formatter = open_formatter(CHAT if task == "Chat" else lamp_task(task), llm)
    preferences = [preference("I like lists"), preference("No emoji, please!")]
    text = "The user has said: I like lists. No emoji, please!"
    assert formatter.add_preferences("last", preferences).prompt == Chat((("system", text), LAST))
    appended = formatter.add_preferences(WHOLE, preferences)
    assert appended.prompt == Chat((("system", f"Be kind.\n\n{text}"), *CONTEXT, LAST))
    assert (appended.offered, appended.included, appended.soft_at) == (2, 2, 0)
    assert formatter.add_preferences(WHOLE, []) == HistoryPrompt(WHOLE, 0, 0, 0, 0)


def test_preferences_are_appended_to_the_last_of_several_system_messages(llm: LanguageModel) -> None:
    prompt = Chat((SYSTEM, ("system", "Be brief."), LAST))
    written = ConversationFormatter(CHAT, llm).add_preferences(prompt, [preference("Hm.")]).prompt
    assert written == Chat((SYSTEM, ("system", "Be brief.\n\nThe user has said: Hm."), LAST))


def test_preferences_precede_the_first_message_if_the_template_refuses_system_messages() -> None:
    llm = with_template(REFUSING)
    assert not llm.takes_system_messages
    formatter = ConversationFormatter(CHAT, llm)
    text = "The user has said: Hm.\n\n"
    alone = formatter.add_preferences("last", [preference("Hm")])
    assert (alone.prompt, alone.soft_at) == (f"{text}last", len(text))
    behind = formatter.format(alone.prompt, [exchange(1)], soft_at=alone.soft_at)
    assert (behind.prompt, behind.soft_at) == (Chat((*turns_for(1), ("user", f"{text}last"))), len(text))
    assert llm.prompt_tokenizer.encode_prompt(behind.prompt, behind.soft_at).soft_position > 0
    earlier = formatter.add_preferences(Chat((*CONTEXT, LAST)), [preference("Hm")])
    assert earlier.prompt == Chat((("user", f"{text}first"), CONTEXT[1], LAST))
    assert earlier.soft_at == 0


@pytest.mark.parametrize(("family", "between"), [("llama", "\n"), ("t5", " ")])
def test_preferences_are_a_line_without_a_chat_template(family: str, between: str) -> None:
    llm = small_llm(family)
    written = ConversationFormatter(CHAT, llm).add_preferences("last", [preference("Hm")]).prompt
    ids = list(llm.prompt_tokenizer.encode_prompt(written).ids)
    assert llm.prompt_tokenizer.decode(ids) == f"The user has said: Hm.{between}last"


def test_earliest_preferences_are_dropped_if_room_is_short() -> None:
    preferences = [preference("older"), preference("later"), preference("new")]
    kept = Chat((("system", "The user has said: later. new."), LAST))
    written = ConversationFormatter(CHAT, short_llm(size(kept))).add_preferences("last", preferences)
    assert written == HistoryPrompt(kept, 0, offered=3, included=2, shortened=0)
    none = ConversationFormatter(CHAT, short_llm(size("last") + 9)).add_preferences("last", preferences)
    assert none == HistoryPrompt("last", 0, offered=3, included=0, shortened=0)


def test_exchanges_take_the_room_that_preferences_leave(llm: LanguageModel) -> None:
    stated = ConversationFormatter(CHAT, llm).add_preferences(WHOLE, [preference("Hm")])
    written = ConversationFormatter(CHAT, llm).format(stated.prompt, [exchange(1)])
    system = ("system", "Be kind.\n\nThe user has said: Hm.")
    assert written.prompt == Chat((system, *turns_for(1), *CONTEXT, LAST))
    tight = ConversationFormatter(CHAT, short_llm(size(written.prompt) - 1)).format(stated.prompt, [exchange(1)])
    assert (tight.prompt, tight.included) == (stated.prompt, 0)


def test_profile_stands_in_the_system_message_and_is_cut_to_the_room() -> None:
    note = "Writes about films and books"
    llm = short_llm(512)
    written = ConversationFormatter(CHAT, llm).add_note(WHOLE, note)
    assert written.prompt == Chat((("system", f"Be kind.\n\nAbout this user: {note}."), *CONTEXT, LAST))
    cut = Chat((("system", "About this user: Writes about."), LAST))
    tight = ConversationFormatter(CHAT, short_llm(size(cut))).add_note("last", note)
    assert tight == HistoryPrompt(cut, 0, offered=1, included=1, shortened=1)


# ---- tasks with templates


def test_items_in_the_wording_of_a_task_go_into_the_last_message(llm: LanguageModel) -> None:
    task = lamp_task("LaMP_3")
    item = HistoryItem("1", (("text", "good"), ("score", "5")), "score")
    written = HistoryPromptFormatter(task, llm).format(Chat((*CONTEXT, LAST)), [item])
    assert written.prompt == Chat((*CONTEXT, ("user", '5 is the score for "good". last')))
    assert written.soft_at == len('5 is the score for "good". ')
    noted = HistoryPromptFormatter(task, llm).add_note(Chat((*CONTEXT, LAST)), "Mild")
    assert noted.prompt == Chat((*CONTEXT, ("user", "About this user: Mild. last")))


def test_history_after_is_searched_after_the_soft_tokens(llm: LanguageModel) -> None:
    task, item = lamp_task("LaMP_1"), HistoryItem("1", (("title", "t"), ("abstract", "")))
    preferences = "The user has said: a title is short.\n\n"
    written = HistoryPromptFormatter(task, llm).format(f"{preferences}the title X", [item], soft_at=len(preferences))
    assert written.prompt == f'{preferences}the title, and "t" X'
    assert written.soft_at == len(preferences)


def test_task_decides_how_items_are_written(llm: LanguageModel) -> None:
    assert isinstance(open_formatter(CHAT, llm), ConversationFormatter)
    assert isinstance(open_formatter(lamp_task("LaMP_3"), llm), HistoryPromptFormatter)
    assert isinstance(open_formatter(replace(CHAT, name="Support"), llm), ConversationFormatter)
