"""The vocabulary of the project: what a user did (HistoryItem) and what is asked for that user now (Sample).

Nothing here knows a file format or a tensor. The texts are the user's own, so neither class shows them in `repr`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date


@dataclass(frozen=True, slots=True, repr=False)
class HistoryItem:
    """One thing a user wrote or chose.

    Attributes:
        id: the file's own id; not unique across users in LaMP's official files.
        fields: (name, value) pairs in the order of PPlug's Table 7, the answer's field included.
        answer_name: which of the fields is the user's answer (a score, a tag, a headline), if any.
        date: when, where it is known.
    """

    id: str
    fields: tuple[tuple[str, str], ...]
    answer_name: str | None = None
    date: date | None = None

    @property
    def text(self) -> str:
        """The item as PPlug's Table 7 writes it: `description: … tag: …`, names and answer included."""
        return _named(self.fields)

    @property
    def content(self) -> str:
        """The item without the user's answer; the same as `text` where that would leave nothing."""
        rest = tuple(field for field in self.fields if field[0] != self.answer_name)
        return _named(rest or self.fields)

    def encoded(self, *, with_answer: bool) -> str:
        """What an encoder reads of the item: `text` or `content`."""
        return self.text if with_answer else self.content

    @property
    def answer(self) -> str | None:
        """What the user answered, or None where the task has no such field."""
        return dict(self.fields).get(self.answer_name) if self.answer_name else None

    def __repr__(self) -> str:
        names = ", ".join(name for name, _ in self.fields)
        return f"HistoryItem(id={self.id!r}, fields=({names}), date={self.date})"


@dataclass(frozen=True, slots=True, repr=False)
class Options:
    """What a prompt lets choose from.

    Attributes:
        question: what stands in front of the first option.
        texts: the options, in the order of the labels that stand for them.
    """

    question: str
    texts: tuple[str, ...]


@dataclass(frozen=True, slots=True, repr=False)
class Sample:
    """One query of one user, with the history that was known before it.

    Attributes:
        id: unique within its file.
        user_id: whose query it is; None where the file does not say (LaMP's official files do not).
        prompt: the text for the language model (LaMP's `input`).
        query: the part of it that the encoder and a retriever read.
        target: the right answer, or None where it is hidden.
        history: oldest first where dates are known, else in the file's order.
        soft_at: how many characters of the prompt stand before the soft tokens; 0 but where retrieved texts are put
            in front of them.
        options: what the prompt lets choose from, if labels stand for options in it.
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
        """Who the sample is grouped with: the user, or the sample itself where no user is named."""
        return self.user_id if self.user_id is not None else f"sample:{self.id}"

    def __repr__(self) -> str:
        return f"Sample(id={self.id!r}, user_id={self.user_id!r}, items={len(self.history)})"


def _named(fields: Sequence[tuple[str, str]]) -> str:
    return " ".join(f"{name}: {value}" for name, value in fields)
