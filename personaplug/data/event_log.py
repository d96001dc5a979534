"""An app's log as a data set: one row per event (JSONL, CSV, Parquet), its columns named by a mapping.

Rows of a user may stand anywhere in the file, so all of them are held in memory, as compactly as they come; a
log larger than that is converted once, piece by piece, with `personaplug.data.write_lamp` and streamed
from then on.
"""

from __future__ import annotations

import csv
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from string import Formatter
from typing import Any

from personaplug.data.json_stream import json_lines, numbered_lines
from personaplug.data.parsing import Flaw, as_moment, as_name, as_text, options_of, query_of, target_of, value_of
from personaplug.data.records import HistoryItem, Sample
from personaplug.data.task import ReadReport, Task, check_max_history, check_skip_bad, latest_items
from personaplug.errors import ConfigError, MissingData, MissingExtra, RecordError, nearest


@dataclass(frozen=True)
class ColumnMapping:
    """Which column of a log holds what.

    Attributes:
        user: the column with the user's id.
        fields: for each of the task's item fields, but for its answer field, the column with its text. A
            further name is for the prompt alone (LaMP_7's items hold what the user wrote, its prompt holds
            what was to be written).
        answer: the column with what the user answered: the target, and the item's answer field if the task
            has one.
        prompt: the text for the language model, with names of `fields` in braces ("… review: {text}"); a
            literal brace is doubled. The answer field cannot be named in it.
        id: the column with an id of the event, unique in the file; without one the row's number makes it.
        date: the column with an ISO date or time; without one the file's order is the order of time.
    """

    user: str
    fields: Mapping[str, str]
    answer: str
    prompt: str
    id: str | None = None
    date: str | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column that is read, once."""
        named = (self.user, *self.fields.values(), self.answer, self.id, self.date)
        return tuple(dict.fromkeys(column for column in named if column is not None))


class EventLogReader:
    """Samples made of a log, cut by time within each user.

    A user's rows are put in time order. `dev` asks for the user's last `dev_queries` rows; `train` for the
    last `queries_per_user` of the rows before those. Only rows with at least `min_history` earlier rows are
    asked for, and the history of a query is the strictly earlier rows: where rows are dated, those of the
    same moment are left out, since nothing says which came first. So no target of dev is in train, neither as
    a target nor in a history, and no history holds its own query. Users come in the order of their first row,
    a user's queries oldest first.

    Attributes:
        task: as given.
        report: what the last (or current) pass met.
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
        """Check the settings; nothing is read yet.

        Args:
            path: a file *.jsonl, *.csv (both also *.gz) or *.parquet.
            mapping: which column holds what.
            task: what is asked; its item fields are the mapping's.
            split: "train" or "dev".
            queries_per_user: how many samples of a user train holds at most.
            dev_queries: how many of a user's last rows belong to dev.
            min_history: how many earlier rows a query needs.
            max_history: how many of the latest items of a history are kept.
            skip_bad: how many broken rows may be passed over.

        Raises:
            MissingData: if the file is not there.
            MissingExtra: if it is Parquet and pyarrow is not installed.
            ConfigError: if a setting is out of range, or mapping, prompt and task do not fit together.
        """
        self._path = Path(path)
        self._rows_of = _row_source(self._path)
        self._mapping, self.task = mapping, task
        self._template = _parsed(mapping, task)
        _check_settings(split, {"queries_per_user": queries_per_user, "dev_queries": dev_queries}, min_history)
        self._split, self._queries, self._dev_queries = split, queries_per_user, dev_queries
        self._min_history = min_history
        self._max_history, self._skip_bad = check_max_history(max_history), check_skip_bad(skip_bad)
        self.report = ReadReport()

    def __iter__(self) -> Iterator[Sample]:
        """Read the whole log, then yield its samples.

        Raises:
            RecordError: for the first broken row beyond `skip_bad`, and always where the file itself breaks
                off.
            ConfigError: if a column is not in the file.
        """
        self.report = report = ReadReport()
        for user, rows in self._users(report).items():
            for place in self._places(len(rows)):
                sample = self._sample(user, rows, place, report)
                if sample is not None:
                    yield report.add(sample)

    def _users(self, report: ReadReport) -> dict[str, list[_Row]]:
        users: dict[str, list[_Row]] = {}
        seen: set[str] = set()
        for where, number, values in self._rows_of(self._path, self._mapping.columns):
            try:
                if isinstance(values, Flaw):
                    raise values
                user, row = self._row(values, where, number)
                if row.item.id in seen:
                    raise Flaw("its id is another row's too")
            except Flaw as flaw:
                self._skip(report, where, flaw)
            else:
                seen.add(row.item.id)
                users.setdefault(user, []).append(row)
        for rows in users.values():
            rows.sort(key=lambda row: row.moment or datetime.min)
        return users

    def _row(self, values: Mapping[str, object], where: str, number: int) -> tuple[str, _Row]:
        mapping, task = self._mapping, self.task
        user = as_name(value_of(values, mapping.user), f"its {mapping.user!r}")
        row_id = as_name(value_of(values, mapping.id), f"its {mapping.id!r}") if mapping.id else f"row-{number}"
        moment = as_moment(value_of(values, mapping.date)) if mapping.date else None
        named = {name: as_text(value_of(values, column), f"its {column!r}") for name, column in mapping.fields.items()}
        target = target_of(task, as_text(value_of(values, mapping.answer), f"its {mapping.answer!r}"))
        if task.answer_field:
            named[task.answer_field] = target
        fields = tuple((name, named.pop(name)) for name in task.field_names)
        item = HistoryItem(row_id, fields, task.answer_field, moment.date() if moment else None)
        return user, _Row(item, target, moment, where, tuple(named.items()))

    def _places(self, count: int) -> range:
        cut = max(count - self._dev_queries, 0)
        first, end = (cut, count) if self._split == "dev" else (max(cut - self._queries, 0), cut)
        return range(max(first, self._min_history), end)

    def _sample(self, user: str, rows: Sequence[_Row], place: int, report: ReadReport) -> Sample | None:
        row = rows[place]
        earlier = [(old.moment, old.item) for old in rows[:place] if row.moment is None or old.moment != row.moment]
        if len(earlier) < self._min_history:
            return None
        prompt = _rendered(self._template, dict(row.item.fields + row.asked))
        try:
            query = query_of(self.task, prompt)
        except Flaw as flaw:
            self._skip(report, row.where, flaw)
            return None
        history = latest_items(earlier, max_history=self._max_history, report=report)
        options = options_of(self.task, prompt)
        return Sample(row.item.id, user, prompt, query, row.target, history, options=options)

    def _skip(self, report: ReadReport, where: str, flaw: Flaw) -> None:
        report.skip(RecordError(self._path, where, reason=str(flaw)), allowed=self._skip_bad)


@dataclass(frozen=True, slots=True, repr=False)
class _Row:
    item: HistoryItem
    target: str
    moment: datetime | None
    where: str
    asked: tuple[tuple[str, str], ...]


def _check_settings(split: str, at_least_one: Mapping[str, int], min_history: int) -> None:
    if split not in ("train", "dev"):
        raise ConfigError(f"A log is cut into the splits 'train' and 'dev'; found {split!r}.")
    for name, value in at_least_one.items():
        if value < 1:
            raise ConfigError(f"{name} should be at least 1, found {value}.")
    if min_history < 0:
        raise ConfigError(f"min_history should be 0 or more, found {min_history}.")


# ---- the prompt

_Template = tuple[tuple[str, str | None], ...]


def _parsed(mapping: ColumnMapping, task: Task) -> _Template:
    """Cut the prompt at its placeholders, so that a user's text is put in as it is and never read as a
    template."""
    try:
        parts = list(Formatter().parse(mapping.prompt))
    except ValueError as error:
        raise ConfigError(f"The prompt template cannot be read: {error}. A literal brace is doubled.") from None
    for _, name, spec, conversion in parts:
        if name is not None and (name not in mapping.fields or spec or conversion):
            raise ConfigError(f"The prompt's placeholder {{{name}}} is no plain field; {nearest(name, mapping.fields)}")
    template = tuple((literal, name) for literal, name, _, _ in parts)
    _check_fields(mapping, task, {name for _, name in template if name})
    _check_prompt(template, mapping, task)
    return template


def _check_fields(mapping: ColumnMapping, task: Task, asked: set[str]) -> None:
    wanted = [name for name in task.field_names if name != task.answer_field]
    if task.answer_field in mapping.fields:
        raise ConfigError(
            f"The mapping's field {task.answer_field!r} is the task's answer; name its column by `answer`."
        )
    for name in wanted:
        if name not in mapping.fields:
            raise ConfigError(f"The mapping names no column for {name!r}, an item field of task {task.name}.")
    for name in mapping.fields:
        if name not in wanted and name not in asked:
            raise ConfigError(f"The mapping's field {name!r} is used by nothing; {nearest(name, wanted)}")


def _check_prompt(template: _Template, mapping: ColumnMapping, task: Task) -> None:
    try:
        query_of(task, _rendered(template, dict.fromkeys(mapping.fields, "x")))
    except Flaw as flaw:
        raise ConfigError(f"The prompt template does not fit task {task.name}: {flaw}.") from None


def _rendered(template: _Template, fields: Mapping[str, str]) -> str:
    return "".join(literal + (fields[name] if name is not None else "") for literal, name in template)


# ---- the files

_Place = tuple[str, int, "Mapping[str, object] | Flaw"]
_Source = Callable[[Path, Sequence[str]], Iterator[_Place]]


def _row_source(path: Path) -> _Source:
    sources: dict[str, _Source] = {
        ".jsonl": _jsonl_rows,
        ".jsonl.gz": _jsonl_rows,
        ".csv": _csv_rows,
        ".csv.gz": _csv_rows,
        ".parquet": _parquet_rows,
    }
    kind = next((suffix for suffix in sources if path.name.lower().endswith(suffix)), None)
    if kind is None:
        raise ConfigError(f"{path}: a log is one of *{', *'.join(sources)}.")
    if not path.is_file():
        raise MissingData(f"There is no file {path}.")
    if kind == ".parquet":
        _pyarrow()
    return sources[kind]


def _jsonl_rows(path: Path, columns: Sequence[str]) -> Iterator[_Place]:
    for number, values in json_lines(path):
        yield f"line {number}", number, values


def _csv_rows(path: Path, columns: Sequence[str]) -> Iterator[_Place]:
    # A byte that is no UTF-8 becomes a lone surrogate here, which `as_text` refuses for its row alone.
    rows = csv.reader((line.decode(errors="surrogateescape") for _, line in numbered_lines(path)), strict=True)
    header = next(rows, [])
    _check_columns(path, header, columns)
    number = 0
    while True:
        where = f"line {rows.line_num + 1}"
        try:
            values = next(rows, None)
        except csv.Error:
            values = []
            number += 1
            yield where, number, Flaw("it is not valid CSV")
        if values is None:
            return
        if values:
            number += 1
            yield where, number, _csv_object(header, values)


def _csv_object(header: Sequence[str], values: Sequence[str]) -> Mapping[str, object] | Flaw:
    if len(values) != len(header):
        return Flaw(f"it has {len(values)} values, the header {len(header)}")
    return dict(zip(header, values, strict=True))


def _parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[_Place]:
    pyarrow, parquet = _pyarrow()
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            _check_columns(path, file.schema_arrow.names, columns)
            for batch in file.iter_batches(columns=list(columns)):
                for values in _microseconds(pyarrow, batch).to_pylist():
                    number += 1
                    yield f"row {number}", number, values
    except (pyarrow.ArrowException, OSError):
        raise RecordError(path, f"after row {number}", reason="the file is not valid Parquet from here on") from None


def _microseconds(pyarrow: Any, batch: Any) -> Any:
    # Python's datetime ends at microseconds; pyarrow refuses finer ones rather than round them.
    types = [
        pyarrow.timestamp("us", tz=field.type.tz) if pyarrow.types.is_timestamp(field.type) else field.type
        for field in batch.schema
    ]
    arrays = [column.cast(kind, safe=False) for column, kind in zip(batch.columns, types, strict=True)]
    return pyarrow.RecordBatch.from_arrays(arrays, names=batch.schema.names)


def _pyarrow() -> tuple[Any, Any]:
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ModuleNotFoundError:
        raise MissingExtra("Reading Parquet", extra="parquet") from None


def _check_columns(path: Path, there: Sequence[str], columns: Sequence[str]) -> None:
    for column in columns:
        if there.count(column) != 1:
            raise ConfigError(f"{path} has {there.count(column)} columns {column!r}; {nearest(column, there)}")
