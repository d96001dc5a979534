"""Read a log: its rows with the meaning of their columns, without those that cannot be used, and the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from personaplug.data.event_log import ColumnMapping, EventLogReader
from personaplug.data.ids import as_id
from personaplug.data.logs.answers import AnswerKind, decide_answers, labels_of
from personaplug.data.logs.columns import MISSING, Column, FoundColumns, find_columns
from personaplug.data.logs.date_forms import DateForms
from personaplug.data.logs.declaration import Declaration, declare, declare_for
from personaplug.data.logs.file_form import find_form
from personaplug.data.logs.options import LogOptions
from personaplug.data.record_files import DELIMITED_KINDS, kind_of, record_source
from personaplug.data.task import Task
from personaplug.data.values import Flaw, as_text
from personaplug.errors import MissingData

_SNIFFED_ROWS = 20_000  # that tell what the columns are
_MAX_SHOWN_PROBLEMS = 5
_BROKEN = "that are no records"

Texts = dict[str, str | None]
"""The values of a row as texts; None for a value that is none, such as a list."""


@dataclass
class LogReport:
    """Counts of the rows of a log.

    Attributes:
        files: how each file was read.
        dropped: rows that are left out, by the reason in words ("without a user").
        problems: positions of the first rows that are no records, and their defects.
    """

    rows: int = 0
    files: list[str] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Log:
    """A log that was read.

    Attributes:
        name: its files, for messages.
        rows: by column: the user, the fields, the answer, perhaps the date and the id.
        mapping: what EventLogReader needs to read the rows.
    """

    name: str
    rows: Sequence[Mapping[str, Any]] = field(repr=False)
    mapping: ColumnMapping
    found: FoundColumns
    answers: AnswerKind
    declaration: Declaration
    report: LogReport

    @property
    def task(self) -> Task:
        return self.declaration.task

    def reader(self, split: str = "train", **settings: Any) -> EventLogReader:
        """Return a reader of a split; see EventLogReader for the settings."""
        return EventLogReader(self.rows, self.mapping, self.task, split=split, origin=self.name, **settings)


def read_log(files: Sequence[Path], options: LogOptions, *, task: Task | None = None) -> Log:
    """Read files of one log; raise ConfigError if the meaning of a column cannot be told.

    Args:
        task: of a run that is to read the log; None = declare one from the columns.
    """
    report = LogReport()
    rows = list(_texts_of(files, options, report))
    if not rows:
        first = f" The first defect: {report.problems[0]}." if report.problems else ""
        raise MissingData(f"{', '.join(map(str, files))}: it holds no records.{first}")
    answer_field = task.answer_field if task else None
    fields = [name for name in task.field_names if name != answer_field] if task else []
    found = find_columns(_columns(rows), options, fields=fields, answer_field=answer_field)
    if task is None:
        answers = _decide(rows, found.answer, options)
        name = options.name or _name_of(files[0])
        declaration = declare(
            name, questions=found.questions, answer=found.answer, answers=answers, prompt=options.prompt
        )
    else:
        answers, declaration = labels_of(task), declare_for(task, questions=found.questions)
    event_id = found.id if found.id and (options.id or _tells_rows_apart(rows, found)) else None
    kept = _clean(rows, found, answers=answers, event_id=event_id, report=report)
    mapping = ColumnMapping(
        user=found.user,
        fields=declaration.fields,
        answer=found.answer,
        prompt=declaration.prompt,
        id=event_id,
        date=found.date,
    )
    return Log(", ".join(map(str, files)), kept, mapping, found, answers, declaration, report)


def _texts_of(files: Sequence[Path], options: LogOptions, report: LogReport) -> Iterator[Texts]:
    for path in files:
        for position, _, record in _records(path, options, report):
            report.rows += 1
            if isinstance(record, Mapping):
                yield {str(name).strip(): _text(value) for name, value in record.items()}
                continue
            report.dropped[_BROKEN] += 1
            if len(report.problems) < _MAX_SHOWN_PROBLEMS:
                defect = record if isinstance(record, Flaw) else "it is no object"
                report.problems.append(f"{path}, {position}: {defect}")


def _records(path: Path, options: LogOptions, report: LogReport) -> Iterator[tuple[str, int, object]]:
    if kind_of(path) not in DELIMITED_KINDS:
        source = record_source(path)
        report.files.append(f"{path}: {kind_of(path).removeprefix('.')}")
        return source.read(())
    form = find_form(path, encoding=options.encoding, delimiter=options.delimiter, named=options.named_columns)
    report.files.append(f"{path}: {form.reason}")
    return record_source(path, delimiter=form.delimiter, encoding=form.encoding).read(form.columns)


def _text(value: object) -> str | None:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    try:
        return as_text(value, "it")
    except Flaw:
        return None


def _columns(rows: Sequence[Texts]) -> list[Column]:
    """Return the columns with the values of rows that are spread over the log."""
    sniffed = rows[:: max(1, len(rows) // _SNIFFED_ROWS)]
    names = dict.fromkeys(name for row in sniffed for name in row)
    columns = []
    for name in names:
        values = [row.get(name, "") for row in sniffed]
        texts = [text for text in values if text is not None and not _is_missing(text)]
        is_nested = sum(value is None for value in values) > len(texts)
        columns.append(Column(name, texts, len(sniffed), is_nested))
    return columns


def _is_missing(text: str | None) -> bool:
    return text is None or text.strip().casefold() in MISSING


def _decide(rows: Sequence[Texts], column: str, options: LogOptions) -> AnswerKind:
    texts = [text for row in rows if (text := row.get(column)) is not None and not _is_missing(text)]
    return decide_answers(texts, column=column, kind=options.kind, labels=options.labels)


def _name_of(path: Path) -> str:
    return path.name.split(".")[0] or "log"


def _tells_rows_apart(rows: Sequence[Texts], found: FoundColumns) -> bool:
    """True if rows with one id are copies of each other."""
    names = (found.user, *found.questions, found.answer)
    first: dict[str, tuple[str | None, ...]] = {}
    for row in rows:
        event_id, content = row.get(found.id or ""), tuple(row.get(name) for name in names)
        if _is_missing(event_id) or event_id is None or first.setdefault(event_id, content) != content:
            return False
    return True


def _clean(
    rows: Sequence[Texts], found: FoundColumns, *, answers: AnswerKind, event_id: str | None, report: LogReport
) -> list[dict[str, Any]]:
    """Return the rows that can be used, and count the others by their reason."""
    kept = []
    forms = found.dates.forms if found.dates else None
    for row in rows:
        cleaned = _cleaned(row, found, answers=answers, forms=forms)
        if isinstance(cleaned, str):
            report.dropped[cleaned] += 1
            continue
        if event_id:
            cleaned[event_id] = row[event_id]
        kept.append(cleaned)
    if not kept:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in report.dropped.items())
        raise MissingData(f"None of the {report.rows:,} rows can be used: {reasons}.")
    return kept


def _cleaned(row: Texts, found: FoundColumns, *, answers: AnswerKind, forms: DateForms | None) -> dict[str, Any] | str:
    """Return the values of a row, or the reason why it cannot be used."""
    user, answer = row.get(found.user, ""), row.get(found.answer, "")
    questions = {name: row.get(name, "") for name in found.questions}
    if user is None or answer is None or None in questions.values():
        return "with values that are no texts of the file's encoding"
    if _is_missing(user):
        return "without a user"
    try:
        as_id(user.strip(), "it")
    except Flaw:
        return "whose user is no id (longer than 255 characters, or with control characters)"
    if _is_missing(answer):
        return "without an answer"
    read = answers.read(answer)
    if read is None:
        return "whose answer is none of the labels"
    first = found.questions[0]
    if not (questions[first] or "").strip():
        return f"without a value in {first!r}"
    values: dict[str, Any] = {found.user: user.strip(), **questions, found.answer: read}
    if found.date and forms:
        text = row.get(found.date, "")
        if text is None or _is_missing(text):
            return "without a date"
        values[found.date] = forms.read(text)
        if values[found.date] is None:
            return "with a date that cannot be read"
    return values
