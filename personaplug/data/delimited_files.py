"""Read files of delimited values: CSV and TSV as spreadsheets and pandas write them, and MovieLens' `::`."""

from __future__ import annotations

import csv
import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from personaplug.data.ids import short_id
from personaplug.data.json_stream import text_lines
from personaplug.data.values import Flaw
from personaplug.errors import ConfigError, RecordError

DELIMITERS = (",", ";", "\t", "|", "::")

_UNIT_SEPARATOR = "\x1f"  # replaces a delimiter of several characters; csv allows one
_MAX_SHOWN_COLUMNS = 30

csv.field_size_limit(2**31 - 1)  # for the process; the default of 131,072 characters rejects long texts

NumberedRecord = tuple[str, int, object]
"""A position in words, the number of the record (in JSON lines, of its line), and its value or a Flaw."""


def delimited_records(
    path: Path, columns: Sequence[str], *, delimiter: str | None, encoding: str | None = None
) -> Iterator[NumberedRecord]:
    """Yield the rows of a file as mappings of column to text.

    A quote that is never closed would swallow the rows after it, so it is an error that cannot be skipped.

    Args:
        columns: the columns to read. In a file without a header, columns are numbered from "1". A first line 0, 1, 2, …
            or 1, 2, 3, … is a header, as pandas writes it for columns without names.
        delimiter: None = the one of `DELIMITERS` that finds most of these columns in the first line.
        encoding: of a file without a byte order mark; None = UTF-8.
    """
    lines = _Lines(path, encoding)
    first = lines.skip_to_header()
    if first is None:
        return
    delimiter = _checked(delimiter) if delimiter else _delimiter_of(first, columns)
    rows = csv.reader(lines.separated_by(delimiter), **_dialect(delimiter))
    names = _split(first, delimiter)
    if _is_numbered(names, columns):
        header = [str(number) for number in range(1, len(names) + 1)]
    else:
        row = _next_row(rows, lines)
        if isinstance(row, Flaw):
            raise RecordError(path, "in the header", reason=str(row))
        header = [name.strip() for name in row or ()]
    _check_header(path, header, columns, delimiter)
    number = 0
    while (values := _next_row(rows, lines)) is not None:
        if values:  # a blank line has none
            number += 1
            if isinstance(values, list) and [name.strip("\ufeff ") for name in values] == header:
                values = Flaw("it repeats the header; files may have been joined")
            yield f"line {lines.record_start}", number, _record(header, values, lines)


class _Lines:
    """The lines of a file, and the position of the current record."""

    def __init__(self, path: Path, encoding: str | None) -> None:
        self.path, self.number, self.record_start = path, 0, 1
        self._lines = text_lines(path, encoding=encoding)
        self._pushed: list[str] = []
        self._quotes: list[int] = []  # how many each line of the record has

    def skip_to_header(self) -> str | None:
        """Return the first line without consuming it; skip blank lines and Excel's `sep=;`."""
        for line in self._lines:
            if line.strip() and not line.lower().startswith("sep="):
                self._pushed.append(line)
                return line
            self.number += 1
        return None

    def begin_record(self) -> None:
        self.record_start = self.number + 1
        self._quotes.clear()

    def separated_by(self, delimiter: str) -> Iterator[str]:
        while (line := self._pushed.pop() if self._pushed else next(self._lines, None)) is not None:
            self.number += 1
            self._quotes.append(line.count('"'))
            yield line if len(delimiter) == 1 else line.replace(delimiter, _UNIT_SEPARATOR)

    @property
    def has_many(self) -> bool:
        """True if the record has more than one line."""
        return len(self._quotes) > 1

    @property
    def quote_line(self) -> int:
        """The number of the line with the last opening quote; a doubled quote is an escaped one."""
        opened, is_open = self.record_start, False
        for number, count in enumerate(self._quotes, self.record_start):
            if count % 2:
                is_open = not is_open
                opened = number if is_open else opened
        return opened

    def quote_error(self, reason: str) -> RecordError:
        return RecordError(self.path, f"line {self.quote_line}", reason=f"{reason}; rows after it would be lost")


def _next_row(rows: Iterator[list[str]], lines: _Lines) -> list[str] | Flaw | None:
    lines.begin_record()
    try:
        return next(rows)
    except StopIteration:
        return None
    except csv.Error as error:
        if "unexpected end" in str(error):
            raise lines.quote_error("a quote is opened in this line and never closed") from None
        if lines.has_many:
            raise lines.quote_error(
                f"a quote is opened in this line, and line {lines.number} is not valid CSV"
            ) from None
        return Flaw("it is not valid CSV")


def _record(header: Sequence[str], values: list[str] | Flaw, lines: _Lines) -> dict[str, str] | Flaw:
    if isinstance(values, Flaw):
        return values
    if len(values) == len(header):
        return dict(zip(header, values, strict=True))
    defect = f"it has {len(values)} values, but the header has {len(header)}"
    if lines.has_many:
        raise lines.quote_error(f"{defect}, up to line {lines.number}; a quote may be missing or superfluous")
    return Flaw(defect)


def _is_numbered(names: Sequence[str], columns: Sequence[str]) -> bool:
    counts = [[str(number + start) for number in range(len(names))] for start in (0, 1)]
    return all(column.isdecimal() for column in columns) and list(names) not in counts


def _checked(delimiter: str) -> str:
    if set(delimiter) & set('"\r\n'):
        raise ConfigError(f"The delimiter should contain no quote and no line break; found {delimiter!r}.")
    return delimiter


def _dialect(delimiter: str) -> dict[str, Any]:
    if len(delimiter) > 1:
        return {"delimiter": _UNIT_SEPARATOR, "quoting": csv.QUOTE_NONE}
    return {"delimiter": delimiter, "strict": True}


def _split(line: str, delimiter: str) -> list[str]:
    line = line.rstrip("\r\n")
    if len(delimiter) > 1:
        return [name.strip() for name in line.split(delimiter)]
    return [name.strip() for name in next(csv.reader([line], delimiter=delimiter), [])]


def _delimiter_of(line: str, columns: Sequence[str]) -> str:
    """Return the delimiter that finds most of the columns in a line; among equals, the one that gives most values."""

    def fit(delimiter: str) -> tuple[int, int]:
        names = _split(line, delimiter)
        return len(set(columns).intersection(names)), len(names)

    return max(DELIMITERS, key=fit)


def _check_header(path: Path, header: Sequence[str], columns: Sequence[str], delimiter: str) -> None:
    if columns and set(columns).isdisjoint(header):
        raise ConfigError(
            f"{path}: the first line, split at {delimiter!r}, has {len(header)} values, but none of the columns "
            f"{', '.join(map(repr, columns))}. If the file has no header, give the numbers of the columns: '1', '2'. "
            f"If the file has another delimiter, set `delimiter`."
        )
    check_columns(path, header, columns, found=f", split at {delimiter!r},")


def check_columns(name: object, header: Sequence[str], columns: Sequence[str], *, found: str = "") -> None:
    """Raise ConfigError unless the header contains each of these columns exactly once."""
    for column in columns:
        if (count := header.count(column)) != 1:
            names = ", ".join(map(short_id, header[:_MAX_SHOWN_COLUMNS])) + (", …" * (len(header) > _MAX_SHOWN_COLUMNS))
            close = difflib.get_close_matches(column, header, n=1)
            hint = f"; did you mean {close[0]!r}?" if close and not count else "."
            amount = f"{count} columns" if count else "no column"
            raise ConfigError(f"{name} has {amount} {column!r}{hint} Its columns{found} are: {names}.")
