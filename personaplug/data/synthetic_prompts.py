"""Prompts that ask a model for synthetic samples, and parsing of its replies.

A prompt is a conversation with numbered examples as its earlier replies. Small chat models follow examples in this form
better than a list in one message. The two steps, a new input and then its answer, follow SELF-GUIDE (arXiv 2407.12874).
The wording is our own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from personaplug.data.parsing import Flaw, options_of, query_of
from personaplug.data.records import Chat, HistoryItem, Sample
from personaplug.data.task import Task

_NEW_NUMBER = re.compile(
    r"^(?:text )?[2-9][.):]\s+(?=\S)", re.IGNORECASE
)  # not 1, which begins a list inside an answer
_NEXT_TEXT = re.compile(r"^[ \t]*(?:text \d{1,2}:|\d{1,2}[.)]\s)", re.IGNORECASE | re.MULTILINE)
_ENDS = ".!?…"
_QUOTES = (('"', '"'), ("“", "”"))


@dataclass(frozen=True, repr=False)
class Example:
    """A real input and the user's answer to it."""

    input: str
    answer: str


@dataclass(frozen=True, repr=False)
class Request:
    """The prompt for a new text; `number` follows the numbers of the examples."""

    prompt: Chat
    number: int


@dataclass(frozen=True, repr=False)
class Reply:
    """The text in a model's reply."""

    text: str
    is_whole: bool  # False if the reply was cut off at the maximum length


def input_of(item: HistoryItem) -> str:
    """Return the fields of an item without its answer as one text; "" without other fields."""
    values = [value.strip() for name, value in item.fields if name != item.answer_name and value.strip()]
    starts = (value if value[-1] in _ENDS else f"{value}." for value in values[:-1])
    return " ".join((*starts, *values[-1:]))


def example_of(item: HistoryItem) -> Example | None:
    """Return the input and the answer of an item; None if one of them is missing."""
    text, answer = input_of(item), (item.answer or "").strip()
    return Example(text, answer) if text and answer else None


def with_query(task: Task, sample: Sample, query: str) -> str | None:
    """Replace the query in a sample's prompt; return None if the task would parse another query from the result."""
    if options_of(task, sample.prompt) is not None:
        return None
    before, old_query, after = sample.prompt.rpartition(sample.query)
    prompt = f"{before}{query}{after}"
    try:
        return prompt if old_query and query_of(task, prompt) == query else None
    except Flaw:
        return None


def input_request(inputs: Sequence[str]) -> Request:
    """Return the request for one more input like these."""
    number = len(inputs) + 1
    opening = f"Write {number} texts of the same kind, one after another, each about something else."
    questions = [f"Text {n}:" for n in range(1, number + 1)]
    return _request(opening, questions, inputs)


def answer_request(text: str, examples: Sequence[Example], *, opening: str, preferences: Sequence[str] = ()) -> Request:
    """Return the request for the answer that the user of the examples would give to a new input.

    Args:
        opening: the instruction: the text before the query in a prompt.
        preferences: the user's stated preferences.
    """
    first = "\n\n".join(filter(None, (opening.strip(), " ".join(preferences))))
    questions = [f"{n}. {question}" for n, question in enumerate((*(pair.input for pair in examples), text), 1)]
    return _request(first, questions, [pair.answer for pair in examples])


def read_input(reply: str, *, finished: bool) -> Reply:
    """Return the input in a reply: without number and quotes, up to the next number."""
    text = _NEW_NUMBER.sub("", reply.strip())
    following = _NEXT_TEXT.search(text)
    text = text[: following.start()] if following else text
    return Reply(_without_quotes(text), finished or following is not None)


def read_answer(reply: str, *, number: int, finished: bool) -> Reply:
    """Return the answer in a reply: without the number of the new input, up to the next number.

    An answer may contain a list, which begins with 1.
    """
    text = _NEW_NUMBER.sub("", reply.strip())
    has_list = re.search(r"^[ \t]*1[.)]\s", text, re.MULTILINE)
    following = None if has_list else re.search(rf"^[ \t]*{number + 1}[.)]\s", text, re.MULTILINE)
    text = text[: following.start()] if following else text
    return Reply(_without_quotes(text), finished or following is not None)


def _request(opening: str, questions: Sequence[str], answers: Sequence[str]) -> Request:
    """Return a conversation that answers every question except the last one."""
    first, *further = questions
    messages = ["\n\n".join(filter(None, (opening, first))), *further]
    turns = [
        turn for pair in zip(messages, answers, strict=False) for turn in zip(("user", "assistant"), pair, strict=True)
    ]
    return Request(Chat((*turns, ("user", messages[-1]))), len(questions))


def _without_quotes(text: str) -> str:
    text = text.strip()
    for opening, closing in _QUOTES:
        if len(text) > 1 and text.startswith(opening) and text.endswith(closing):
            text = text[1:-1].strip()
    return text
