"""Read an app's log as a data set: one row per event in JSONL, CSV or Parquet, with a mapping of columns.

The rows of a user may be anywhere in the file, so all rows are held in memory. Convert a larger log once, piece by
piece, with `personaplug.data.write_lamp`; the result is streamed.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from string import Formatter

from personaplug.data.json_stream import json_lines, numbered_lines
from personaplug.data.parquet import check_columns, check_pyarrow, parquet_rows
from personaplug.data.parsing import (
    Flaw,
    as_datetime,
    as_name,
    as_record,
    as_text,
    options_of,
    query_of,
    target_of,
    value_of,
)
from personaplug.data.record_reader import RecordReader
from personaplug.data.records import HistoryItem, Sample
from personaplug.data.task import Task
from personaplug.errors import ConfigError, MissingData, nearest


@dataclass(frozen=True)
class ColumnMapping:
    """The meaning of a log's columns.

    Attributes:
        user: the column of the user's id.
        fields: the column of each of the task's item fields, without its answer field. Further fields serve the
            prompt alone: LaMP_7's items hold the written text, its prompt holds the text to rewrite.
        answer: the column of the user's answer: the target, and the item's answer field if the task has one.
        prompt: the text for the language model, with names of `fields` in braces ("… review: {text}"); a literal
            brace is doubled.
        id: the column of the event's id, unique in the file; without it, the row's number is the id.
        date: the column of an ISO date or time; without it, the rows are in time order.
    """

    user: str
    fields: Mapping[str, str]
    answer: str
    prompt: str
    id: str | None = None
    date: str | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns that are read, without duplicates."""
        names = (self.user, *self.fields.values(), self.answer, self.id, self.date)
        return tuple(dict.fromkeys(name for name in names if name is not None))


class EventLogReader(RecordReader):
    """Samples from a log, split by time within each user.

    A user's rows are sorted by time. `dev` holds the last `dev_queries` rows as queries, `train` the last
    `queries_per_user` rows before them, and both only rows with at least `min_history` earlier rows. A history holds
    the strictly earlier rows: of dated rows, those at the same time are left out. So no target of dev is in train,
    and no history holds its own query. Users come in the order of their first row, their queries oldest first.
    """

    def __init__(
        self,
        path: str | Path,
        mapping: ColumnMapping,
        task: Task,
        *,
        split: str = "train",
        queries_per_user: int = 4,
        dev_queries: int = 1,
        min_history: int = 1,
        max_history: int = 512,
        skip_bad: int = 0,
    ) -> None:
        """Check the settings. The log is read later.

        Args:
            path: a file *.jsonl, *.csv (both also *.gz) or *.parquet.
            mapping: the meaning of the columns.
            task: the task, whose item fields are the mapping's.
            split: "train" or "dev".
            queries_per_user: the maximum number of a user's queries in train.
            dev_queries: the number of a user's last rows that belong to dev.
            min_history: the number of earlier rows that a query needs.
            max_history: see `RecordReader`.
            skip_bad: see `RecordReader`.

        Raises:
            MissingData: if the file does not exist.
            MissingExtra: if the file is Parquet and pyarrow is not installed.
            ConfigError: if a setting is out of range, or mapping, prompt and task do not fit together.
        """
        if split not in ("train", "dev"):
            raise ConfigError(f"A log has the splits 'train' and 'dev'; found {split!r}.")
        for name, value, least in (
            ("queries_per_user", queries_per_user, 1),
            ("dev_queries", dev_queries, 1),
            ("min_history", min_history, 0),
        ):
            if value < least:
                raise ConfigError(f"{name} should be at least {least}, found {value}.")
        super().__init__(task, skip_bad=skip_bad, max_history=max_history)
        self._path = Path(path)
        self._rows_of = _row_source(self._path)
        self._mapping, self._template = mapping, _parse_template(mapping, task)
        self._split, self._queries_per_user, self._dev_queries = split, queries_per_user, dev_queries
        self._min_history = min_history

    def _samples(self) -> Iterator[Sample]:
        for user, rows in self._rows_by_user().items():
            for index in self._query_range(len(rows)):
                sample = self._sample(user, rows, index)
                if sample is not None:
                    yield sample

    def _rows_by_user(self) -> dict[str, list[_Row]]:
        users: dict[str, list[_Row]] = {}
        seen: set[str] = set()
        for position, number, values in self._rows_of(self._path, self._mapping.columns):
            try:
                user, row = self._row(as_record(values), position, number)
                if row.item.id in seen:
                    raise Flaw("an earlier record has the same id")
            except Flaw as flaw:
                self._skip(self._path, position, flaw)
            else:
                seen.add(row.item.id)
                users.setdefault(user, []).append(row)
        for rows in users.values():
            rows.sort(key=lambda row: row.moment or datetime.min)
        return users

    def _row(self, values: Mapping[str, object], position: str, number: int) -> tuple[str, _Row]:
        mapping, task = self._mapping, self.task
        user = as_name(value_of(values, mapping.user), f"its {mapping.user!r}")
        row_id = as_name(value_of(values, mapping.id), f"its {mapping.id!r}") if mapping.id else f"row-{number}"
        moment = as_datetime(value_of(values, mapping.date)) if mapping.date else None
        texts = {name: as_text(value_of(values, column), f"its {column!r}") for name, column in mapping.fields.items()}
        target = target_of(task, as_text(value_of(values, mapping.answer), f"its {mapping.answer!r}"))
        if task.answer_field:
            texts[task.answer_field] = target
        fields = tuple((name, texts.pop(name)) for name in task.field_names)
        item = HistoryItem(row_id, fields, task.answer_field, moment.date() if moment else None)
        return user, _Row(item, target, moment, position, tuple(texts.items()))

    def _query_range(self, count: int) -> range:
        dev_start = max(count - self._dev_queries, 0)
        if self._split == "dev":
            return range(max(dev_start, self._min_history), count)
        return range(max(dev_start - self._queries_per_user, self._min_history), dev_start)

    def _sample(self, user: str, rows: Sequence[_Row], index: int) -> Sample | None:
        row = rows[index]
        earlier = [(old.moment, old.item) for old in rows[:index] if row.moment is None or old.moment != row.moment]
        if len(earlier) < self._min_history:
            return None
        prompt = _fill(self._template, dict(row.item.fields + row.prompt_fields))
        try:
            query = query_of(self.task, prompt)
        except Flaw as flaw:
            self._skip(self._path, row.position, flaw)
            return None
        options = options_of(self.task, prompt)
        return Sample(row.item.id, user, prompt, query, row.target, self._latest(earlier), options=options)


@dataclass(frozen=True, slots=True, repr=False)
class _Row:
    item: HistoryItem
    target: str
    moment: datetime | None
    position: str
    prompt_fields: tuple[tuple[str, str], ...]


# ---- the prompt

_Template = tuple[tuple[str, str | None], ...]


def _parse_template(mapping: ColumnMapping, task: Task) -> _Template:
    """Split the prompt at its placeholders, so that a user's text is never read as a template."""
    try:
        parts = list(Formatter().parse(mapping.prompt))
    except ValueError as error:
        raise ConfigError(f"The prompt template cannot be read: {error}. Double a literal brace.") from None
    for _, name, spec, conversion in parts:
        if name is not None and (name not in mapping.fields or spec or conversion):
            raise ConfigError(f"The prompt's placeholder {{{name}}} is no plain field; {nearest(name, mapping.fields)}")
    template = tuple((literal, name) for literal, name, _, _ in parts)
    _check_fields(mapping, task, {name for _, name in template if name})
    try:
        query_of(task, _fill(template, dict.fromkeys(mapping.fields, "x")))
    except Flaw as flaw:
        raise ConfigError(f"The prompt template does not fit task {task.name}: {flaw}.") from None
    return template


def _check_fields(mapping: ColumnMapping, task: Task, placeholders: set[str]) -> None:
    required = [name for name in task.field_names if name != task.answer_field]
    if task.answer_field in mapping.fields:
        raise ConfigError(f"The mapping's field {task.answer_field!r} is the answer; name its column by `answer`.")
    for name in required:
        if name not in mapping.fields:
            raise ConfigError(f"The mapping names no column for {name!r}, an item field of task {task.name}.")
    for name in mapping.fields:
        if name not in required and name not in placeholders:
            raise ConfigError(f"The mapping's field {name!r} is not used; {nearest(name, required)}")


def _fill(template: _Template, fields: Mapping[str, str]) -> str:
    return "".join(literal + (fields[name] if name is not None else "") for literal, name in template)


# ---- the files

_PositionedRow = tuple[str, int, "Mapping[str, object] | Flaw"]
_RowSource = Callable[[Path, Sequence[str]], Iterator[_PositionedRow]]


def _row_source(path: Path) -> _RowSource:
    suffix = next((suffix for suffix in _ROW_SOURCES if path.name.lower().endswith(suffix)), None)
    if suffix is None:
        raise ConfigError(f"{path}: a log should be one of *{', *'.join(_ROW_SOURCES)}.")
    if not path.is_file():
        raise MissingData(f"There is no file {path}.")
    if suffix == ".parquet":
        check_pyarrow()
    return _ROW_SOURCES[suffix]


def _jsonl_rows(path: Path, columns: Sequence[str]) -> Iterator[_PositionedRow]:
    for number, values in json_lines(path):
        yield f"line {number}", number, values


def _csv_rows(path: Path, columns: Sequence[str]) -> Iterator[_PositionedRow]:
    # A byte that is not UTF-8 becomes a lone surrogate, which `as_text` refuses for its row alone.
    rows = csv.reader((line.decode(errors="surrogateescape") for _, line in numbered_lines(path)), strict=True)
    header = next(rows, [])
    check_columns(path, header, columns)
    number = 0
    while True:
        position = f"line {rows.line_num + 1}"
        try:
            values = next(rows, None)
        except csv.Error:
            number += 1
            yield position, number, Flaw("it is not valid CSV")
            continue
        if values is None:
            return
        if values:
            number += 1
            yield position, number, _csv_record(header, values)


def _csv_record(header: Sequence[str], values: Sequence[str]) -> Mapping[str, object] | Flaw:
    if len(values) != len(header):
        return Flaw(f"it has {len(values)} values, the header {len(header)}")
    return dict(zip(header, values, strict=True))


def _parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[_PositionedRow]:
    for number, values in parquet_rows(path, columns=columns):
        yield f"row {number}", number, values


_ROW_SOURCES: Mapping[str, _RowSource] = {
    ".jsonl": _jsonl_rows,
    ".jsonl.gz": _jsonl_rows,
    ".csv": _csv_rows,
    ".csv.gz": _csv_rows,
    ".parquet": _parquet_rows,
}
