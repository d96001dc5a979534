"""How the rows of a log are read: the columns that count, the values that are missing, the rows that are left out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Self

from personaplug.data.event_log import ColumnMapping
from personaplug.data.ids import as_id
from personaplug.data.logs.answers import AnswerKind, labels_of
from personaplug.data.logs.date_forms import DateForms
from personaplug.data.task import Task
from personaplug.data.values import Flaw, as_text

Texts = dict[str, str | None]
"""The values of a row as texts; None for a value that is no text, such as a list."""

_WHOLE_NUMBER = re.compile(r"(0|[1-9]\d*)\.0", re.ASCII)
_MISSING = frozenset({"", "null", "none", "nan", "nat", "n/a", "#n/a", "<na>"})


@dataclass(frozen=True)
class RowForm:
    """How a row of a log becomes an event. It is saved with a plug, which reads other rows in the same way.

    Attributes:
        mapping: the columns by their meaning, without an id.
        dates: how the column of dates is read; None = the rows are in time order.
    """

    task: Task
    mapping: ColumnMapping
    dates: DateForms | None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, task: Task) -> Self:
        """Return the form that `to_dict` has described; raise KeyError or TypeError for other values."""
        dates = values["dates"]
        forms = DateForms(tuple(dates["formats"]), dates["day_first"]) if dates else None
        return cls(task, ColumnMapping(**values["mapping"]), forms)

    def to_dict(self) -> dict[str, Any]:
        return {"mapping": asdict(self.mapping), "dates": asdict(self.dates) if self.dates else None}

    @property
    def questions(self) -> tuple[str, ...]:
        return tuple(self.mapping.fields.values())

    @property
    def columns(self) -> tuple[str, ...]:
        mapping = self.mapping
        return tuple(filter(None, (mapping.user, *self.questions, mapping.answer, mapping.date)))

    def prompt_of(self, question: str) -> str:
        """Return the prompt that asks a question; the log has one column of questions."""
        (field,) = self.mapping.fields
        return self.mapping.prompt_of({field: question}, task=self.task)

    def event_of(self, row: Texts) -> dict[str, Any] | str:
        """Return the values of a row, or the reason why it cannot be used: "without a user"."""
        mapping, first = self.mapping, self.questions[0]
        user, answer = row.get(mapping.user, ""), row.get(mapping.answer, "")
        questions = {name: row.get(name, "") for name in self.questions}
        if user is None or answer is None or None in questions.values():
            return "with values that are no text"
        if is_missing(user):
            return "without a user"
        try:
            user = as_id(user_name(user), "it")
        except Flaw:
            return "whose user is no id (longer than 255 characters, or with control characters)"
        if is_missing(answer):
            return "without an answer"
        label = self._answers.read(answer)
        if label is None:
            return "whose answer is none of the labels"
        if not (questions[first] or "").strip():
            return f"without a value in {first!r}"
        values: dict[str, Any] = {mapping.user: user, **questions, mapping.answer: label}
        if mapping.date and self.dates:
            date = row.get(mapping.date, "")
            if date is None or is_missing(date):
                return "without a date"
            values[mapping.date] = self.dates.read(date)
            if values[mapping.date] is None:
                return "with a date that cannot be read"
        return values

    @cached_property
    def _answers(self) -> AnswerKind:
        return labels_of(self.task)


def texts_of(record: Mapping[Any, object]) -> Texts:
    """Return the values of a record as texts."""
    return {str(name).strip(): _text(value) for name, value in record.items()}


def user_name(text: str) -> str:
    """Return the user's id. Programs write a column of whole numbers with gaps as 7.0; the user is 7."""
    text = text.strip()
    match = _WHOLE_NUMBER.fullmatch(text)
    return match[1] if match else text


def is_missing(text: str | None) -> bool:
    """Return True for a value that is no text, and for words that programs write for a missing value."""
    return text is None or text.strip().casefold() in _MISSING


def _text(value: object) -> str | None:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    try:
        return as_text(value, "it")
    except Flaw:
        return None
