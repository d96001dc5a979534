"""Stream the records of a file: JSON lists, JSON lines and CSV, all also gzipped, and Parquet."""

from __future__ import annotations

import csv
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from personaplug.data.json_stream import json_lines, numbered_lines, stream_values
from personaplug.data.parsing import Flaw
from personaplug.errors import ConfigError, MissingExtra, RecordError, nearest

NumberedRecord = tuple[str, int, object]
"""A position in words, the number of the record from 1 (in JSON lines: of its line), and its value or a Flaw."""

RecordSource = Callable[[Path, Sequence[str]], Iterator[NumberedRecord]]


def record_source(path: Path, *, kinds: Sequence[str]) -> RecordSource:
    """Return the function that reads a file's records from its path and the columns to read (none means all).

    `kinds` are the accepted suffixes, out of ".json", ".jsonl", ".csv" and ".parquet".
    """
    name = path.name.lower()
    kind = Path(name.removesuffix(".gz")).suffix
    if kind not in kinds or name.endswith(".parquet.gz"):
        raise ConfigError(f"{path} should be one of *{', *'.join(kinds)}; all but *.parquet also *.gz.")
    if kind == ".parquet":
        _pyarrow()
    return _SOURCES[kind]


def _list_records(path: Path, _: Sequence[str]) -> Iterator[NumberedRecord]:
    for number, value in stream_values(path, "item", opening=b"[", unit="record"):
        yield f"record {number}", number, value


def _line_records(path: Path, _: Sequence[str]) -> Iterator[NumberedRecord]:
    for number, value in json_lines(path):
        yield f"line {number}", number, value


def _csv_records(path: Path, columns: Sequence[str]) -> Iterator[NumberedRecord]:
    # A byte that is not UTF-8 becomes a lone surrogate, which `as_text` refuses for its row alone.
    rows = csv.reader((line.decode(errors="surrogateescape") for _, line in numbered_lines(path)), strict=True)
    header = next(rows, [])
    _check_columns(path, header, columns)
    number = 0
    while True:
        position = f"line {rows.line_num + 1}"
        try:
            record = _csv_record(header, next(rows))
        except csv.Error:
            record = Flaw("it is not valid CSV")
        except StopIteration:
            return
        if record:
            number += 1
            yield position, number, record


def _csv_record(header: Sequence[str], values: Sequence[str]) -> dict[str, str] | Flaw | None:
    if not values:
        return None  # a blank line
    if len(values) != len(header):
        return Flaw(f"it has {len(values)} values, the header {len(header)}")
    return dict(zip(header, values, strict=True))


def _parquet_records(path: Path, columns: Sequence[str]) -> Iterator[NumberedRecord]:
    pyarrow, parquet = _pyarrow()
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            _check_columns(path, file.schema_arrow.names, columns)
            # A row with all its columns may hold a whole history, so few of them are in memory at once.
            batches = file.iter_batches(1 << 16, columns=list(columns)) if columns else file.iter_batches(64)
            for batch in batches:
                for values in _in_microseconds(pyarrow, batch).to_pylist():
                    number += 1
                    yield f"row {number}", number, values
    except (pyarrow.ArrowException, OSError):
        raise RecordError(path, f"after row {number}", reason="the file is not valid Parquet from here on") from None


def _in_microseconds(pyarrow: Any, batch: Any) -> Any:
    # Python's datetime has microseconds, and pyarrow refuses to round finer timestamps by itself.
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


def _check_columns(path: Path, header: Sequence[str], columns: Sequence[str]) -> None:
    for column in columns:
        if header.count(column) != 1:
            raise ConfigError(f"{path} has {header.count(column)} columns {column!r}; {nearest(column, header)}")


_SOURCES: Mapping[str, RecordSource] = {
    ".json": _list_records,
    ".jsonl": _line_records,
    ".csv": _csv_records,
    ".parquet": _parquet_records,
}
