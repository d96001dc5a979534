"""Read an app's log as a data set: one row per event, in a file or in memory, with a mapping of columns.

A user's rows may be anywhere in the file, so all rows are held in memory. Convert a larger log once, piece by piece,
with `personaplug.data.write_lamp`, whose files are streamed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from string import Formatter
from typing import Unpack

from personaplug.data.dates import check_date_format
from personaplug.data.event_copies import Event, event_of, find_copies
from personaplug.data.parsing import (
    Flaw,
    as_datetime,
    as_record,
    field_of,
    id_of,
    picture_in,
    query_of,
    target_of,
    value_of,
    vector_in,
)
from personaplug.data.record_files import record_source
from personaplug.data.record_reader import Limits, RecordReader
from personaplug.data.records import HistoryItem, Sample
from personaplug.data.task import ReadReport, Task
from personaplug.errors import ConfigError, nearest

logger = logging.getLogger(__name__)

_ASKED = {"dev": "each user's last rows", "train": "each user's rows before the rows of 'dev'"}


@dataclass(frozen=True)
class ColumnMapping:
    """The columns of a log by their meaning, and the wording of a prompt.

    Attributes:
        fields: the column of each of the task's item fields, without its answer field. Further fields serve the
            prompt alone: LaMP_7's items hold the written text, its prompt holds the text to rewrite.
        answer: the column of the user's answer: the target, and the item's answer field if the task has one.
        prompt: the text for the language model, with names of `fields` in braces ("… review: {text}"); a literal
            brace is doubled.
        id: the column of the event's id, unique in the file; without it, the row's number is the id.
        date: the column of the date or time; without it, the rows are in time order.
        date_format: the format of the dates for `datetime.strptime`, such as `%d.%m.%Y`; None for ISO and similar
            forms, and for epoch times (`personaplug.data.dates.as_datetime`).
        image: the column of pictures, if the task has an `image_field`: bytes, data URLs, or paths from the log's
            folder (from the working folder for rows in memory).
        vector: the column of lists of numbers, if the task has a `vector_field`.
    """

    user: str
    fields: Mapping[str, str]
    answer: str
    prompt: str
    id: str | None = None
    date: str | None = None
    date_format: str | None = None
    image: str | None = None
    vector: str | None = None

    def __post_init__(self) -> None:
        if self.date_format is not None:
            check_date_format(self.date_format)

    def prompt_of(self, fields: Mapping[str, str], *, task: Task) -> str:
        """Return the prompt with the texts of its fields."""
        return _fill(_parse_template(self, task), fields)


class EventLogReader(RecordReader):
    """Samples from a log, split by time within each user.

    The log is a file (*.jsonl, *.json, *.csv, *.tsv, *.dat, *.parquet, all also *.gz), a DataFrame, or any iterable of
    mappings. A user's rows are sorted by time, and copies of an event are left out (`personaplug.data.event_copies`).
    `dev` asks the last `dev_queries` rows, `train` the last `queries_per_user` rows before them. Both ask only rows
    with at least `min_history` earlier rows. A history holds strictly earlier rows, without dated rows of the same
    time. So no target of dev is in train, and no history holds its own query. Users come in the order of their first
    row, their queries oldest first.
    """

    def __init__(
        self,
        source: object,
        mapping: ColumnMapping,
        task: Task,
        *,
        split: str = "train",
        queries_per_user: int = 4,
        dev_queries: int = 1,
        min_history: int = 1,
        delimiter: str | None = None,
        origin: str | None = None,
        **limits: Unpack[Limits],
    ) -> None:
        """Check the settings.

        Args:
            delimiter: of a file like CSV; None = find it.
            origin: the name of the log in messages; None = the file's name, or the type of the rows.
        """
        if split not in ("train", "dev"):
            raise ConfigError(f"A log has the splits 'train' and 'dev'; found {split!r}.")
        counts = {"queries_per_user": queries_per_user, "dev_queries": dev_queries, "min_history": min_history}
        for name, value in counts.items():
            minimum = 0 if name == "min_history" else 1
            if value < minimum:
                raise ConfigError(f"{name} should be at least {minimum}, found {value}.")
        self._source = record_source(source, delimiter=delimiter)
        super().__init__(task, origin=origin or self._source.name, **limits)
        _check_parts(mapping, task)
        self._mapping, self._template = mapping, _parse_template(mapping, task)
        self._picture_folder = Path(source).parent if isinstance(source, str | Path) else Path()
        self._split, self._queries_per_user, self._dev_queries = split, queries_per_user, dev_queries
        self._min_history = min_history
        self._has_reported = False

    def _samples(self) -> Iterator[Sample]:
        for user, rows in self._rows_by_user().items():
            end = max(len(rows) - self._dev_queries, 0)
            start = max(end - self._queries_per_user, 0)
            if self._split == "dev":
                start, end = end, len(rows)
            for index in range(start, end):
                if sample := self._sample(user, rows, index):
                    yield sample
        if not self._has_reported:
            self._has_reported = True
            logger.info("%s, split %s: %s", self._origin, self._split, self.report.summary())

    def histories(self) -> Iterator[tuple[str, list[HistoryItem]]]:
        """Yield each user with all items, oldest first, items of the asked rows too."""
        self.report = ReadReport()
        for user, rows in self._rows_by_user().items():
            yield user, [row.item for row in rows]

    def history_samples(self) -> Iterator[Sample]:
        """Yield the histories as samples without a question, to write them as a split."""
        prompt = _fill(self._template, dict.fromkeys(self._mapping.fields, "history"))
        for user, items in self.histories():
            yield self._sample_of(user, user, prompt, target=None, items=[(None, item) for item in items])

    def _reason_for_nothing(self) -> str:
        return (
            f"{super()._reason_for_nothing()} The split {self._split!r} asks for {_ASKED[self._split]}, and a question "
            f"needs min_history={self._min_history} rows of its user at earlier times."
        )

    def _rows_by_user(self) -> dict[str, list[_Row]]:
        users: dict[str, list[_Row]] = {}
        events: dict[str, tuple[str, _Row]] = {}
        mapping, report = self._mapping, self.report
        others = filter(None, (mapping.id, mapping.date, mapping.image, mapping.vector))
        columns = [mapping.user, *mapping.fields.values(), mapping.answer, *others]
        for position, number, values in self._source.read(list(dict.fromkeys(columns))):
            report.rows += 1
            try:
                user, row = self._row(as_record(values), position, number)
                earlier_user, earlier = events.setdefault(row.item.id, (user, row))
                if earlier is row:
                    users.setdefault(user, []).append(row)
                elif earlier_user == user and earlier.is_same_event(row):
                    report.copies += 1
                else:
                    raise Flaw("an earlier record has the same id")
            except Flaw as flaw:
                self._skip(self._source.name, position, flaw)
        distinct = {user: self._without_copies(rows) for user, rows in users.items()}
        report.users, report.rows_of_users = len(users), [len(rows) for rows in distinct.values()]
        return distinct

    def _without_copies(self, rows: list[_Row]) -> list[_Row]:
        rows.sort(key=lambda row: row.moment or datetime.min)
        copies = find_copies([row.event for row in rows])
        self.report.copies += len(copies.copies)
        return [
            replace(row, is_unclear=index in copies.unclear)
            for index, row in enumerate(rows)
            if index not in copies.copies
        ]

    def _row(self, values: Mapping[str, object], position: str, number: int) -> tuple[str, _Row]:
        mapping, task = self._mapping, self.task
        user = id_of(values, mapping.user)
        row_id = id_of(values, mapping.id) if mapping.id else f"row-{number}"
        moment = None
        if mapping.date:
            stamp = value_of(values, mapping.date)
            moment = as_datetime(stamp, f"its {mapping.date!r}", date_format=mapping.date_format)
        texts = {name: field_of(task, values, name, key=column) for name, column in mapping.fields.items()}
        target = target_of(task, field_of(task, values, task.answer_field or "", key=mapping.answer))
        if task.answer_field:
            texts[task.answer_field] = target
        fields = tuple((name, texts.pop(name)) for name in task.field_names)
        day = moment.date() if moment else None
        picture = picture_in(values, mapping.image, folder=self._picture_folder)
        vector = vector_in(values, mapping.vector)
        item = HistoryItem(
            row_id, fields, task.answer_field, day, answer_labels=task.labels, picture=picture, vector=vector
        )
        return user, _Row(item, target, moment, position, tuple(texts.items()))

    def _sample(self, user: str, rows: Sequence[_Row], index: int) -> Sample | None:
        row = rows[index]
        earlier = [(old.moment, old.item) for old in rows[:index] if row.moment is None or old.moment != row.moment]
        if len(earlier) < self._min_history:
            self.report.too_early += 1
            return None
        if row.is_unclear:
            self.report.unclear += 1
            return None
        if not row.has_question:
            self.report.left_out["questions without a text"] += 1
            return None
        prompt = _fill(self._template, dict(row.item.fields + row.prompt_fields))
        try:
            return self._sample_of(row.item.id, user, prompt, target=row.target, items=earlier)
        except Flaw as flaw:
            self._skip(self._source.name, row.position, flaw)
            return None


@dataclass(frozen=True, slots=True, repr=False)
class _Row:
    item: HistoryItem
    target: str
    moment: datetime | None
    position: str
    prompt_fields: tuple[tuple[str, str], ...]
    is_unclear: bool = False

    @property
    def event(self) -> Event:
        picture, vector = self.item.picture, self.item.vector
        parts = tuple(filter(None, (picture.digest if picture else b"", vector)))
        return event_of(self._content, self.target, self.moment, parts=parts)

    @property
    def has_question(self) -> bool:
        """False if the row has a picture or a vector, and all its texts are blank: it can be shown, but not asked."""
        has_parts = self.item.picture is not None or self.item.vector is not None
        return not has_parts or any(text.strip() for text in self._content)

    @property
    def _content(self) -> list[str]:
        fields = [*self.item.fields, *self.prompt_fields]
        return [text for name, text in fields if name != self.item.answer_name]

    def is_same_event(self, other: _Row) -> bool:
        """Return True if two rows with one id differ only in the time."""
        return replace(self.event, moment=None) == replace(other.event, moment=None)


_Template = tuple[tuple[str, str | None], ...]


def as_literal(text: str) -> str:
    """Double the braces of a text, so that a `ColumnMapping`'s prompt shows them."""
    return text.replace("{", "{{").replace("}", "}}")


def _check_parts(mapping: ColumnMapping, task: Task) -> None:
    """Raise ConfigError if the mapping names a column for which the task declares no field."""
    for role, column, field in (
        ("image", mapping.image, task.image_field),
        ("vector", mapping.vector, task.vector_field),
    ):
        if column is not None and field is None:
            raise ConfigError(
                f"The mapping's {role} is the column {column!r}, but task {task.name} has no {role}_field. Declare "
                f"one, or leave out the column."
            )


def _parse_template(mapping: ColumnMapping, task: Task) -> _Template:
    """Check the fields, and split the prompt at its placeholders, so that no user's text is read as a template."""
    try:
        parts = list(Formatter().parse(mapping.prompt))
    except ValueError as error:
        raise ConfigError(f"The prompt template cannot be read: {error}. Double a literal brace.") from None
    for _, name, spec, conversion in parts:
        if name is not None and (name not in mapping.fields or spec or conversion):
            raise ConfigError(f"The prompt's placeholder {{{name}}} is no plain field; {nearest(name, mapping.fields)}")
    required = [name for name in task.field_names if name != task.answer_field]
    if task.answer_field in mapping.fields:
        raise ConfigError(f"The mapping's field {task.answer_field!r} is the answer; name its column by `answer`.")
    for name in required:
        if name not in mapping.fields:
            raise ConfigError(f"The mapping names no column for {name!r}, an item field of task {task.name}.")
    template = tuple((literal, name) for literal, name, _, _ in parts)
    for name in mapping.fields:
        if name not in {*required, *(placeholder for _, placeholder in template)}:
            raise ConfigError(f"The mapping's field {name!r} is not used; {nearest(name, required)}")
    try:
        query_of(task, _fill(template, dict.fromkeys(mapping.fields, "x")))
    except Flaw as flaw:
        raise ConfigError(f"The prompt template does not fit task {task.name}: {flaw}.") from None
    return template


def _fill(template: _Template, fields: Mapping[str, str]) -> str:
    return "".join(literal + (fields[name] if name else "") for literal, name in template)
