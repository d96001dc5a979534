"""Read a log from files or from rows in memory: find its columns, declare its task, leave out rows, and report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from personaplug.data.delimited_files import NumberedRecord
from personaplug.data.event_log import ColumnMapping, EventLogReader
from personaplug.data.ids import short_id
from personaplug.data.logs.answers import AnswerKind, check_answers, decide_answers, labels_of
from personaplug.data.logs.columns import Column, FoundColumns, check_named, find_columns
from personaplug.data.logs.declaration import declare, declare_for, field_name, is_request
from personaplug.data.logs.file_form import find_form
from personaplug.data.logs.item_parts import PartReader, PictureFile, with_one_width
from personaplug.data.logs.options import LogOptions
from personaplug.data.logs.row_form import Parts, RowForm, Texts, is_missing, texts_and_parts
from personaplug.data.pictures import Picture
from personaplug.data.record_files import DELIMITED_KINDS, kind_of, record_source
from personaplug.data.task import Task
from personaplug.data.values import Flaw
from personaplug.errors import ConfigError, MissingData, RecordError

_SNIFFED_ROWS = 20_000  # enough to find the meaning of the columns
_MAX_SHOWN_PROBLEMS = 5


@dataclass
class LogReport:
    """Counts of the rows of a log.

    Attributes:
        files: how each file was read.
        without_text: rows with a picture or a vector, but no text to ask.
        dropped: rows that are left out, by the reason in words ("without a user").
        repeated: names that several columns of a file have; these columns are not read.
        problems: positions of the first rows that are no records, and their defects.
        max_dropped: how many rows may be left out; None = any number.
    """

    rows: int = 0
    without_text: int = 0
    files: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    max_dropped: int | None = None

    def drop(self, reason: str, error: RecordError) -> None:
        """Count a row that is left out; raise the error if the row is one too many."""
        self.dropped[reason] += 1
        if self.max_dropped is not None and self.dropped.total() > self.max_dropped:
            raise error


@dataclass(frozen=True)
class Log:
    """A log that was read.

    Attributes:
        name: its files, for messages.
        rows: by column: the user, the questions, the answer, perhaps the date and the id.
        event_id: the column of the rows' ids.
    """

    name: str
    rows: Sequence[Mapping[str, Any]] = field(repr=False)
    form: RowForm
    event_id: str | None
    found: FoundColumns
    answers: AnswerKind
    report: LogReport

    @property
    def task(self) -> Task:
        return self.form.task

    def reader(self, split: str = "train", **settings: Any) -> EventLogReader:
        """Return a reader of a split; see EventLogReader for the settings."""
        mapping = replace(self.form.mapping, id=self.event_id)
        return EventLogReader(self.rows, mapping, self.task, split=split, origin=self.name, **settings)


class _Row(NamedTuple):
    source: str
    position: str
    texts: Texts
    parts: Parts


def read_log(
    sources: Sequence[object], options: LogOptions, *, task: Task | None = None, max_dropped: int | None = None
) -> Log:
    """Read the files of one log, or rows in memory; raise ConfigError if the meaning of a column is unclear.

    Answers of another kind than those of `task` are a ConfigError too.

    Args:
        sources: files, DataFrames or iterables of mappings; see `record_source`.
        task: of a run that is to read the log; None = declare one from the columns.
        max_dropped: how many rows may be left out because they cannot be used; None = any number.
    """
    report = LogReport(max_dropped=max_dropped)
    names, rows = _read_rows(sources, options, report)
    try:
        found = find_columns(_columns(rows), options, task=task)
    except ConfigError as error:
        if not report.repeated:
            raise
        raise ConfigError(f"{error} Not read: {_repeated(report.repeated)}.") from None
    if found.vector:
        checked = with_one_width([row.parts for row in rows], found.vector)
        rows = [row._replace(parts=parts) for row, parts in zip(rows, checked, strict=True)]
    if task is None:
        answers = _decide(rows, found, options)
        name = options.name or Path(names[0]).name.partition(".")[0] or "log"
        declaration = declare(
            name,
            questions=found.questions,
            answer=found.answer,
            answers=answers,
            image=found.image,
            vector=found.vector,
            prompt=options.prompt,
        )
    else:
        has_same_name = field_name(found.answer) == task.answer_field
        check_answers(_answers(rows, found), column=found.answer, task=task, has_same_name=has_same_name)
        answers, declaration = labels_of(task), declare_for(task, questions=found.questions)
    mapping = ColumnMapping(
        user=found.user,
        fields=declaration.fields,
        answer=found.answer,
        prompt=declaration.prompt,
        date=found.date,
        image=found.image,
        vector=found.vector,
    )
    form = RowForm(declaration.task, mapping, found.dates.forms if found.dates else None)
    event_id = found.id if found.id and (options.id or _tells_rows_apart(rows, found)) else None
    events = _events(rows, form, event_id=event_id, report=report)
    return Log(", ".join(names), events, form, event_id, found, answers, report)


def read_rows(source: object, form: RowForm, **settings: Any) -> EventLogReader:
    """Read rows with the columns of an earlier log; raise RecordError if a row cannot be used.

    Rows with pictures or vectors need no question.

    Args:
        settings: of EventLogReader.
    """
    mapping = form.mapping
    options = LogOptions(user=mapping.user, questions=form.questions, answer=mapping.answer, date=mapping.date)
    report = LogReport(max_dropped=0)
    parts = replace(options, image=mapping.image, vector=mapping.vector, detects_parts=False)
    (name,), rows = _read_rows([source], parts, report)
    columns = _columns(rows)
    if any(row.parts or not is_missing(row.texts.get(mapping.image or "", "")) for row in rows):
        others = [column.name for column in columns if column.name not in form.columns]
        options = replace(options, questions=tuple(q for q in form.questions if get_close_matches(q, others)))
    check_named(columns, options)
    events = _events(rows, form, event_id=None, report=report)
    return EventLogReader(events, mapping, form.task, origin=name, **settings)


def _read_rows(sources: Sequence[object], options: LogOptions, report: LogReport) -> tuple[list[str], list[_Row]]:
    """Return the names of the sources and their rows."""
    names, rows, file = list[str](), list[_Row](), PictureFile()
    for source in sources:
        name, how, records = _open(source, options, report)
        is_file = isinstance(source, str | Path)
        reader = PartReader(options, Path(name).parent if is_file else Path(), file if is_file else None)
        names.append(name)
        report.files.append(f"{name}: {how}")
        for position, _, record in records:
            report.rows += 1
            if isinstance(record, Mapping):
                rows.append(_Row(name, position, *texts_and_parts(record, reader)))
                continue
            error = RecordError(name, position, reason=str(record if isinstance(record, Flaw) else "it is no object"))
            report.drop("that are no records", error)
            if len(report.problems) < _MAX_SHOWN_PROBLEMS:
                report.problems.append(str(error))
    if not rows:
        first = f" The first defect: {report.problems[0]}." if report.problems else ""
        raise MissingData(f"{', '.join(names)}: it holds no records.{first}")
    return names, rows


def _open(source: object, options: LogOptions, report: LogReport) -> tuple[str, str, Iterator[NumberedRecord]]:
    """Return the name of a source, how it is read, and its records."""
    if not isinstance(source, str | Path):
        rows = record_source(source)
        return rows.name, "rows in memory", rows.read(())
    path = Path(source)
    if kind_of(path) not in DELIMITED_KINDS:
        return str(path), kind_of(path).removeprefix("."), record_source(path).read(())
    form = find_form(path, options)
    records = record_source(path, delimiter=form.delimiter, encoding=form.encoding).read(form.columns)
    if not form.repeated:
        return str(path), form.reason, records
    report.repeated += [name for name in form.repeated if name]
    how = f"{form.reason}; not read: {_repeated(form.repeated)}"
    return str(path), how, ((at, number, _without(record, form.repeated)) for at, number, record in records)


def _without(record: object, names: Sequence[str]) -> object:
    return {key: value for key, value in record.items() if key not in names} if isinstance(record, Mapping) else record


def _repeated(names: Sequence[str]) -> str:
    return f"{', '.join(repr(short_id(name)) for name in dict.fromkeys(names))}, because several columns have this name"


def _columns(rows: Sequence[_Row]) -> list[Column]:
    """Return the columns with the values of rows that are spread over the log."""
    sniffed = rows[:: max(1, len(rows) // _SNIFFED_ROWS)]
    names = dict.fromkeys(name for row in sniffed for name in row.texts)
    columns = []
    for name in names:
        values = [row.texts.get(name, "") for row in sniffed]
        texts = [text for text in values if text is not None and not is_missing(text)]
        filled = len(texts) + sum(value is None for value in values)
        parts = [row.parts.get(name) for row in sniffed]
        pictures = sum(isinstance(part, Picture) for part in parts)
        vectors = sum(isinstance(part, np.ndarray) for part in parts)
        columns.append(Column(name, texts, len(sniffed), filled, pictures, vectors))
    return columns


def _decide(rows: Sequence[_Row], found: FoundColumns, options: LogOptions) -> AnswerKind:
    """Decide what the answers are. Texts that answer requests are a chat."""
    answers = decide_answers(_answers(rows, found), column=found.answer, options=options)
    is_chat = answers.kind == "text" and not (options.kind or options.prompt) and is_request(found.questions)
    return replace(answers, kind="chat") if is_chat else answers


def _answers(rows: Sequence[_Row], found: FoundColumns) -> list[str]:
    values = (row.texts.get(found.answer) for row in rows)
    return [text for text in values if text is not None and not is_missing(text)]


def _tells_rows_apart(rows: Sequence[_Row], found: FoundColumns) -> bool:
    """Return True if rows with one id are copies of each other."""
    names = (found.user, *found.questions, found.answer)
    first: dict[str, tuple[str | None, ...]] = {}
    for _, _, row, _ in rows:
        event_id, content = row.get(found.id or ""), tuple(row.get(name) for name in names)
        if event_id is None or is_missing(event_id) or first.setdefault(event_id, content) != content:
            return False
    return True


def _events(rows: Sequence[_Row], form: RowForm, *, event_id: str | None, report: LogReport) -> list[dict[str, Any]]:
    """Return the rows that can be used, and count the others by their reason."""
    events = []
    for source, position, row, parts in rows:
        event = form.event_of(row, parts)
        if isinstance(event, str):
            report.drop(event, RecordError(source, position, reason=f"it is a row {event}"))
            continue
        if event_id:
            event[event_id] = row.get(event_id)
        report.without_text += not any(event[name].strip() for name in form.questions)
        events.append(event)
    if not events:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in report.dropped.items())
        raise MissingData(f"None of the {report.rows:,} rows can be used: {reasons}.")
    return events
