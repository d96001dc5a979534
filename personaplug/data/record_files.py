"""Read records from files and from rows in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from personaplug.data.delimited_files import NumberedRecord, delimited_records
from personaplug.data.json_stream import holds_list, json_lines, stream_values
from personaplug.data.parquet_files import import_pyarrow, parquet_records
from personaplug.data.tables import Table
from personaplug.data.values import Flaw
from personaplug.errors import ConfigError, MissingData

JSON_KINDS = (".json", ".jsonl", ".ndjson")
DELIMITED_KINDS = (".csv", ".tsv", ".dat", ".txt")


@dataclass(frozen=True)
class RecordSource:
    """A source of records.

    Attributes:
        name: a path, or the type of rows in memory; used in messages.
        read: yields the records with the given columns; without any, all columns.
    """

    name: str
    read: Callable[[Sequence[str]], Iterator[NumberedRecord]]


def record_source(
    source: object,
    *,
    kinds: Sequence[str] = (*JSON_KINDS, *DELIMITED_KINDS, ".parquet"),
    delimiter: str | None = None,
    encoding: str | None = None,
) -> RecordSource:
    """Open a file by its suffix, which .gz may follow, or rows in memory (see `Table`). Keep an open source.

    A *.json file contains a list of objects or one object per line. The delimiter and the encoding apply to CSV and
    similar files.
    """
    if isinstance(source, RecordSource):
        return source
    if not isinstance(source, (str, Path)):
        table = Table(source)
        return RecordSource(table.name, table.records)
    path = Path(source)
    kind = kind_of(path)
    if kind not in kinds:
        raise ConfigError(f"{path} should be one of *{', *'.join(kinds)}; each may also end in .gz.")
    if not path.is_file():
        raise MissingData(f"There is no file {path}.")
    if kind == ".parquet":
        import_pyarrow()
        return RecordSource(str(path), partial(parquet_records, path))
    if kind in DELIMITED_KINDS:
        return RecordSource(str(path), partial(delimited_records, path, delimiter=delimiter, encoding=encoding))
    return RecordSource(str(path), partial(_list_records if kind == ".json" else _line_records, path))


def kind_of(path: Path) -> str:
    """Return the suffix of a file without .gz, in lower case."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _list_records(path: Path, columns: Sequence[str]) -> Iterator[NumberedRecord]:
    """Yield the records of a *.json file: a list, or one object per line, since many programs use .json for both."""
    is_list = holds_list(path)
    first = None if is_list else next(_line_records(path, columns), None)
    if first is None and not is_list:
        return  # an empty file
    if first and not isinstance(first[2], Flaw):
        yield from _line_records(path, columns)
        return
    for number, value in stream_values(path, "item", opening=b"[", unit="record"):
        yield f"record {number}", number, value


def _line_records(path: Path, _: Sequence[str]) -> Iterator[NumberedRecord]:
    for number, value in json_lines(path):
        yield f"line {number}", number, value
