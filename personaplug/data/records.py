"""What a user did (HistoryItem), and what is asked for that user (Sample): a prompt, or the last turn of a chat.

This module knows no file format and no tensor. The texts belong to users, so no `repr` shows them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from typing import Literal

ItemKind = Literal["answer", "rejection", "preference"]

ITEM_KINDS: tuple[ItemKind, ...] = ("answer", "rejection", "preference")
"""Kinds of items: what the user wrote, chose or kept; an answer that the user did not want; a stated preference."""

PREFERENCE, REJECTED = "preference", "rejected"
"""Fields of an item: the sentence of a stated preference; in place of the answer field, a rejected answer."""

Turn = tuple[str, str]
"""The role and the text of a message."""

SYSTEM_ROLES = ("system", "developer")
"""Roles of messages that instruct the model and belong to no exchange."""


@dataclass(frozen=True, slots=True, repr=False)
class Chat:
    """The messages of a conversation up to the user's last one, which is to be answered."""

    turns: tuple[Turn, ...]

    def __repr__(self) -> str:
        return f"Chat({len(self.turns)} messages)"


Prompt = str | Chat
"""What a language model answers: one message of a user, or a conversation."""


def in_context(text: str, context: Sequence[Turn]) -> Prompt:
    """Return a user's message behind earlier messages, if there are any."""
    return Chat((*context, ("user", text))) if context else text


def turns_of(prompt: Prompt) -> tuple[Turn, ...]:
    """Return the messages of a prompt."""
    return (("user", prompt),) if isinstance(prompt, str) else prompt.turns


def with_last_message(prompt: Prompt, text: str) -> Prompt:
    """Return a prompt with another text in place of the message that is to be answered."""
    return in_context(text, turns_of(prompt)[:-1])


def characters(prompt: Prompt) -> int:
    """Return the number of characters of all messages."""
    return len(prompt) if isinstance(prompt, str) else sum(len(text) for _, text in prompt.turns)


def last_message(prompt: Prompt) -> str:
    """Return the text of the message that is to be answered."""
    return prompt if isinstance(prompt, str) else prompt.turns[-1][1]


@dataclass(frozen=True, slots=True, repr=False)
class HistoryItem:
    """One thing that a user wrote, chose, rejected or stated.

    Attributes:
        id: not unique across users in LaMP's official files.
        fields: (name, value) pairs in the order of PPlug's Table 7, including the answer.
        answer_name: the field that is the user's answer (a score, a tag, a headline), or the answer that was rejected.
        answer_labels: the closed set that the answer is from; empty for a text, None if unknown. So a text such as
            "1984" is no rating, even where ratings are labels too.
    """

    id: str
    fields: tuple[tuple[str, str], ...]
    answer_name: str | None = None
    date: date | None = None
    kind: ItemKind = "answer"
    answer_labels: tuple[str, ...] | None = field(default=None, compare=False)

    @property
    def text(self) -> str:
        """The item as in PPlug's Table 7, with names and answer: `description: … tag: …`."""
        return _joined(self.fields)

    @property
    def content(self) -> str:
        """The item without its answer; equal to `text` if the answer is the only field."""
        return _joined([field for field in self.fields if field[0] != self.answer_name] or self.fields)

    def encoded(self, *, with_answer: bool) -> str:
        """Return the text for an encoder: `text` or `content`."""
        return self.text if with_answer else self.content

    @property
    def answer(self) -> str | None:
        """What the user answered; None if the task has no answer field, or the item is no answer of the user's."""
        return self.answer_text if self.kind == "answer" else None

    @property
    def answer_text(self) -> str | None:
        """The value of the answer field, also of a rejected answer; None without such a field."""
        return dict(self.fields).get(self.answer_name or "")

    def __repr__(self) -> str:
        names = ", ".join(name for name, _ in self.fields)
        return f"HistoryItem(id={self.id!r}, fields=({names}), date={self.date})"


@dataclass(frozen=True, slots=True, repr=False)
class Options:
    """The options that a prompt offers, in the order of their labels, and the question before the first one."""

    question: str
    texts: tuple[str, ...]


@dataclass(frozen=True, slots=True, repr=False)
class Sample:
    """One query of one user, with the user's earlier history.

    Attributes:
        user_id: None if the file does not name users (LaMP's official files do not).
        prompt: the text for the language model (LaMP's `input`); in a conversation, the user's last message.
        query: the part of the prompt that the encoder and the retrievers read.
        target: the correct answer, or None if it is hidden.
        history: oldest first if all items are dated, else in the file's order.
        soft_at: the number of prompt characters before the soft tokens; above 0 only if retrieved texts precede them.
        options: None unless labels stand for options in the prompt.
        context: the messages before the prompt, oldest first; empty outside conversations.
        rejected: answers to the prompt that the user did not want.
    """

    id: str
    user_id: str | None
    prompt: str
    query: str
    target: str | None
    history: tuple[HistoryItem, ...] = ()
    soft_at: int = 0
    options: Options | None = None
    context: tuple[Turn, ...] = ()
    rejected: tuple[str, ...] = ()

    @property
    def full_prompt(self) -> Prompt:
        """The prompt with the messages before it."""
        return in_context(self.prompt, self.context)

    def with_prompt(self, prompt: Prompt, *, soft_at: int = 0) -> Sample:
        """Return the sample with another full prompt; `soft_at` counts characters of its last message."""
        return replace(self, prompt=last_message(prompt), context=turns_of(prompt)[:-1], soft_at=soft_at)

    @property
    def owner(self) -> str:
        """The group of the sample in statistics: its user, or the sample itself if no user is named."""
        return self.user_id if self.user_id is not None else f"sample:{self.id}"

    def __repr__(self) -> str:
        return f"Sample(id={self.id!r}, user_id={self.user_id!r}, items={len(self.history)})"


def _joined(fields: Sequence[tuple[str, str]]) -> str:
    return " ".join(f"{name}: {value}" for name, value in fields)
