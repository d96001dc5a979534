"""How the rows of a log are read: the columns that count, the values that are missing, the rows that are left out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import PurePath
from types import MappingProxyType
from typing import Any, Self

import numpy as np

from personaplug.data.event_log import ColumnMapping
from personaplug.data.ids import as_id
from personaplug.data.logs.answers import AnswerKind, labels_of
from personaplug.data.logs.date_forms import DateForms
from personaplug.data.logs.item_parts import OtherWidth, Part, PartReader, is_path
from personaplug.data.picture_decoding import is_damaged
from personaplug.data.pictures import PICTURE_KEYS, MissingPicture, Picture
from personaplug.data.task import Task
from personaplug.data.values import Flaw, as_text

Texts = dict[str, str | None]
"""The values of a row as texts; None for a value that is no text, such as a list."""

Parts = Mapping[str, Part]
"""The pictures and vectors of a row by their columns."""

_NO_PARTS: Parts = MappingProxyType({})
_NO_FILE = "whose picture file does not exist"

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
        others = (mapping.answer, mapping.date, mapping.image, mapping.vector)
        return tuple(filter(None, (mapping.user, *self.questions, *others)))

    def prompt_of(self, question: str) -> str:
        """Return the prompt that asks a question; the log has one column of questions."""
        (field,) = self.mapping.fields
        return self.mapping.prompt_of({field: question}, task=self.task)

    def event_of(self, row: Texts, parts: Parts) -> dict[str, Any] | str:
        """Return the values of a row, or the reason why it cannot be used: "without a user".

        Args:
            parts: the pictures and vectors of the row by their columns.
        """
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
        found = self._parts_of(row, parts)
        if isinstance(found, str):
            return found
        if not (questions[first] or "").strip() and not found:
            return f"without a value in {first!r}"
        values: dict[str, Any] = {mapping.user: user, **questions, mapping.answer: label, **found}
        if mapping.date and self.dates:
            date = row.get(mapping.date, "")
            if date is None or is_missing(date):
                return "without a date"
            values[mapping.date] = self.dates.read(date)
            if values[mapping.date] is None:
                return "with a date that cannot be read"
        return values

    def _parts_of(self, row: Texts, parts: Parts) -> dict[str, Part] | str:
        """Return the picture and the vector of a row by their columns, or the reason why the row cannot be used."""
        found: dict[str, Part] = {}
        for column, kind, defect in (
            (self.mapping.image, Picture, "with a damaged picture"),
            (self.mapping.vector, np.ndarray, "whose vector is no list of finite numbers or has only zeros"),
        ):
            if column is None:
                continue
            part, text = parts.get(column), row.get(column, "")
            if part is None and text is not None:
                if is_missing(text):
                    continue
                return _NO_FILE if kind is Picture else defect
            if isinstance(part, MissingPicture):
                return _NO_FILE
            if isinstance(part, OtherWidth):
                return "whose vector is not as wide as most"
            if part is None or not isinstance(part, kind) or self._is_damaged(part):
                return defect
            found[column] = part
        return found

    def _is_damaged(self, part: Part) -> bool:
        if not isinstance(part, Picture):
            return False
        checked, digest = self._checked, part.digest
        if digest not in checked:
            checked[digest] = is_damaged(part)
        return checked[digest]

    @cached_property
    def _checked(self) -> dict[bytes, bool]:
        """Whether pictures are damaged, by their digests."""
        return {}

    @cached_property
    def _answers(self) -> AnswerKind:
        return labels_of(self.task)


def texts_of(record: Mapping[Any, object]) -> Texts:
    """Return the values of a record as texts."""
    return {str(name).strip(): _text(value) for name, value in record.items()}


def texts_and_parts(record: Mapping[Any, object], reader: PartReader) -> tuple[Texts, Parts]:
    """Return the values of a record as texts, and its pictures and vectors. A path is in both."""
    texts: Texts = {}
    parts: dict[str, Part] = {}
    for key, value in record.items():
        name = str(key).strip()
        part = reader.part_of(name, value)
        if part is not None:
            parts[name] = part
        texts[name] = _text(value) if part is None or is_path(value) else None
    return texts, parts or _NO_PARTS


def user_name(text: str) -> str:
    """Return the user's id. Programs write a column of whole numbers with gaps as 7.0; the user is 7."""
    text = text.strip()
    match = _WHOLE_NUMBER.fullmatch(text)
    return match[1] if match else text


def is_missing(text: str | None) -> bool:
    """Return True for a value that is no text, and for words that programs write for a missing value."""
    return text is None or text.strip().casefold() in _MISSING


def _text(value: object) -> str | None:
    if value is None or (isinstance(value, Mapping) and value.keys() == PICTURE_KEYS and not any(value.values())):
        return ""
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, bool):
        return str(value).lower()
    try:
        return as_text(value, "it")
    except Flaw:
        return None
