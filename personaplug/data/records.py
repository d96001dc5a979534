"""Records: one action of a user (HistoryItem), and one query for a user (Sample).

The records depend on no file format and no tensor library. The texts are private, so no `repr` shows them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from typing import Literal

from personaplug.data.pictures import Picture

ItemKind = Literal["answer", "rejection", "preference"]

ITEM_KINDS: tuple[ItemKind, ...] = ("answer", "rejection", "preference")
"""Kinds of items: an answer that the user wrote or chose, an answer that the user rejected, a stated preference."""

PREFERENCE, REJECTED = "preference", "rejected"
"""Names of fields: a stated preference; a rejected answer, which replaces the answer field."""

Turn = tuple[str, str]
"""The role and the text of a message."""

SYSTEM_ROLES = ("system", "developer")
"""Roles of messages that instruct the model and belong to no exchange."""


@dataclass(frozen=True, slots=True, repr=False)
class Chat:
    """The messages of a conversation; the last one is the user's message to answer."""

    turns: tuple[Turn, ...]

    def __repr__(self) -> str:
        return f"Chat({len(self.turns)} messages)"


Prompt = str | Chat
"""The input of a language model: one message of a user, or a conversation."""


def in_context(text: str, context: Sequence[Turn]) -> Prompt:
    """Return a user's message as a prompt, with the earlier messages if there are any."""
    return Chat((*context, ("user", text))) if context else text


def turns_of(prompt: Prompt) -> tuple[Turn, ...]:
    """Return the messages of a prompt."""
    return (("user", prompt),) if isinstance(prompt, str) else prompt.turns


def with_last_message(prompt: Prompt, text: str) -> Prompt:
    """Replace the last message of a prompt."""
    return in_context(text, turns_of(prompt)[:-1])


def characters(prompt: Prompt) -> int:
    """Return the number of characters of all messages."""
    return len(prompt) if isinstance(prompt, str) else sum(len(text) for _, text in prompt.turns)


def last_message(prompt: Prompt) -> str:
    """Return the text of the last message."""
    return prompt if isinstance(prompt, str) else prompt.turns[-1][1]


@dataclass(frozen=True, slots=True, repr=False)
class ItemContent:
    """What an encoder reads of an item that is more than a text.

    Attributes:
        text: empty if the item has no text.
        vector: see `HistoryItem.vector`.
    """

    text: str
    picture: Picture | None = None
    vector: bytes | None = None

    def __repr__(self) -> str:
        return f"ItemContent(text={bool(self.text)}, picture={bool(self.picture)}, vector={bool(self.vector)})"


Content = str | ItemContent
"""What an encoder reads of an item: a text, or a text with a picture or a vector."""


@dataclass(frozen=True, slots=True, repr=False)
class HistoryItem:
    """One thing that a user wrote, chose, rejected or stated.

    Attributes:
        id: not unique across users in LaMP's official files.
        fields: (name, value) pairs in the order of PPlug's Table 7, including the answer.
        answer_name: the field with the user's answer (a score, a tag, a headline) or with the rejected answer.
        answer_labels: the closed set of possible answers; empty for free text, None if unknown. A free text such as
            "1984" therefore never counts as a rating.
        picture: the item's picture, if it has one.
        vector: an embedding of the item that the caller has computed, as little-endian float32.
    """

    id: str
    fields: tuple[tuple[str, str], ...]
    answer_name: str | None = None
    date: date | None = None
    kind: ItemKind = "answer"
    answer_labels: tuple[str, ...] | None = field(default=None, compare=False)
    picture: Picture | None = None
    vector: bytes | None = None

    @property
    def text(self) -> str:
        """The item as in PPlug's Table 7, with names and answer: `description: … tag: …`."""
        return _joined(self.fields)

    @property
    def content(self) -> str:
        """The item without its answer; equal to `text` if the answer is the only field."""
        return _joined(self._content_fields)

    def encoded(self, *, with_answer: bool) -> Content:
        """Return what an encoder reads: `text` or `content`, and the picture and the vector if there are any."""
        fields = self.fields if with_answer else self._content_fields
        if self.picture is None and self.vector is None:
            return _joined(fields)
        is_blank = not any(value.strip() for _, value in fields)
        return ItemContent("" if is_blank else _joined(fields), self.picture, self.vector)

    @property
    def _content_fields(self) -> Sequence[tuple[str, str]]:
        return [field for field in self.fields if field[0] != self.answer_name] or self.fields

    @property
    def answer(self) -> str | None:
        """The user's answer; None if the item has no answer field, or is a rejection or a preference."""
        return self.answer_text if self.kind == "answer" else None

    @property
    def answer_text(self) -> str | None:
        """The value of the answer field, even if it is a rejected answer; None without such a field."""
        return dict(self.fields).get(self.answer_name or "")

    def __repr__(self) -> str:
        names = ", ".join(name for name, _ in self.fields)
        picture = ", picture" if self.picture else ""
        return f"HistoryItem(id={self.id!r}, fields=({names}), date={self.date}{picture})"


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
        options: None unless the labels refer to options in the prompt.
        context: the messages before the prompt, oldest first; empty outside conversations.
        rejected: answers to the prompt that the user rejected.
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
