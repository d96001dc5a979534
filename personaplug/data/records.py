"""What a user did (HistoryItem) and what is asked for that user (Sample).

This module knows no file format and no tensor. The texts belong to users, so no `repr` shows them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date


@dataclass(frozen=True, slots=True, repr=False)
class HistoryItem:
    """One thing that a user wrote or chose.

    Attributes:
        id: not unique across users in LaMP's official files.
        fields: (name, value) pairs in the order of PPlug's Table 7, including the answer.
        answer_name: the field that is the user's answer (a score, a tag, a headline).
    """

    id: str
    fields: tuple[tuple[str, str], ...]
    answer_name: str | None = None
    date: date | None = None

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
        """The value of the answer field, or None if the task has no such field."""
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
        prompt: the text for the language model (LaMP's `input`).
        query: the part of the prompt that the encoder and the retrievers read.
        target: the correct answer, or None if it is hidden.
        history: oldest first if all items are dated, else in the file's order.
        soft_at: the number of prompt characters before the soft tokens; above 0 only if retrieved texts precede them.
        options: None unless labels stand for options in the prompt.
    """

    id: str
    user_id: str | None
    prompt: str
    query: str
    target: str | None
    history: tuple[HistoryItem, ...] = ()
    soft_at: int = 0
    options: Options | None = None

    @property
    def owner(self) -> str:
        """The group of the sample in statistics: its user, or the sample itself if no user is named."""
        return self.user_id if self.user_id is not None else f"sample:{self.id}"

    def __repr__(self) -> str:
        return f"Sample(id={self.id!r}, user_id={self.user_id!r}, items={len(self.history)})"


def _joined(fields: Sequence[tuple[str, str]]) -> str:
    return " ".join(f"{name}: {value}" for name, value in fields)
