"""Find the encoding and the delimiter of a file like CSV, and its columns."""

from __future__ import annotations

import codecs
import csv
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from personaplug.data.dates import as_datetime
from personaplug.data.delimited_files import DELIMITERS, check_columns
from personaplug.data.json_stream import broken_after_line, open_plain, text_lines
from personaplug.data.logs.options import LogOptions
from personaplug.data.numbers import number_or_none
from personaplug.data.values import Flaw
from personaplug.errors import ConfigError, MissingData

_CHUNK = 1 << 20
_LINES = 400  # enough to find the delimiter
_IN_PYTHON = "In Python, you can read the file with pandas and give the DataFrame."
_MAX_NAME = 100  # characters of a column's name
_MAX_HIGH_SHARE = 0.25  # of the letters of a text in a Western European language that are not ASCII
_NOT_UTF8 = re.compile("[\udc80-\udcff]")
_UNASSIGNED = re.compile("[\udc81\udc8d\udc8f\udc90\udc9d]")  # bytes that Windows-1252 gives no character
_LETTERS = re.compile("[A-Za-z]")
_DELIMITER_NAMES = {"tab": "\t", "\\t": "\t", "comma": ",", "semicolon": ";", "pipe": "|"}


@dataclass(frozen=True)
class FileForm:
    """How a file like CSV is read.

    Attributes:
        encoding: None = UTF-8, or what the byte order mark says.
        columns: the names that stand once in the header, or numbers for a file without header.
        repeated: the names that several columns have; none of these columns is read.
        reason: how encoding and delimiter were found, in words.
    """

    encoding: str | None
    delimiter: str
    columns: tuple[str, ...]
    repeated: tuple[str, ...]
    reason: str


def find_form(path: Path, options: LogOptions) -> FileForm:
    """Find the form of a file; raise ConfigError if it is unclear.

    If the named columns are all numbers, the file has no header.
    """
    if not path.is_file():
        raise MissingData(f"There is no file {path}.")
    given, delimiter = options.encoding, options.delimiter
    encoding, words = (_codec(given), f"encoding {given}") if given else _find_encoding(path)
    lines = list(islice(_lines(path, encoding), _LINES))
    if not lines:
        raise MissingData(f"{path} holds no rows.")
    chosen = _DELIMITER_NAMES.get(delimiter, delimiter) if delimiter else _find_delimiter(path, lines)
    header = _rows(lines, chosen)[0]
    if len(header) == 1:
        raise ConfigError(
            f"{path}: the delimiter {chosen!r} does not split its first line into columns. Give another delimiter by "
            f"--delimiter, or none."
        )
    names = [name.strip("\ufeff \t\r\n") for name in header]
    counts, repeated = Counter(names), tuple[str, ...]()
    if _are_numbers(options.named_columns, names):
        columns = tuple(map(str, range(1, len(names) + 1)))
    else:
        _check_header(path, names)
        columns = tuple(name for name in names if name and counts[name] == 1)
        repeated = tuple(name for name, count in counts.items() if count > 1)
    named = options.named_columns if columns else repeated
    check_columns(path, names, sorted({*repeated} & {*named}))
    return FileForm(encoding, chosen, columns, repeated, f"{words}, split at {chosen!r}")


def _codec(encoding: str) -> str:
    try:
        "".encode(encoding)  # fails for codecs that are no encodings of text, such as base64
        return codecs.lookup(encoding).name
    except (LookupError, UnicodeError):
        raise ConfigError(
            f"There is no encoding {encoding!r}; expected a name such as utf-8, utf-16, windows-1252 or windows-1251."
        ) from None


def _find_encoding(path: Path) -> tuple[str | None, str]:
    """Return an encoding and its description. UTF-8 and UTF-16 are certain; Windows-1252 is a guess by its letters."""
    valid = broken = letters = 0
    has_unassigned = False
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    with broken_after_line(path), open_plain(path) as stream:
        chunk = stream.read(_CHUNK)
        if b"\0" in chunk:
            return _without_mark(path, chunk)
        while chunk:
            text = decoder.decode(chunk)
            if not text.isascii():
                wrong = len(_NOT_UTF8.findall(text))
                broken += wrong
                valid += sum(not char.isascii() for char in text) - wrong
                has_unassigned = has_unassigned or bool(_UNASSIGNED.search(text))
            letters += len(_LETTERS.findall(text))
            chunk = stream.read(_CHUNK)
    if not broken:
        return None, "UTF-8"
    if valid >= broken:
        return None, f"UTF-8, with {broken:,} other bytes"
    if has_unassigned or broken > _MAX_HIGH_SHARE * (letters + broken):
        raise ConfigError(
            f"{path} is not UTF-8, and its encoding is unclear. Give it by --encoding, such as windows-1251 or "
            f"shift_jis. {_IN_PYTHON}"
        )
    return "cp1252", "Windows-1252 (it is not UTF-8; --encoding gives another)"


def _without_mark(path: Path, chunk: bytes) -> tuple[str, str]:
    even, odd = chunk[::2].count(0), chunk[1::2].count(0)
    if max(even, odd) > len(chunk) // 4 and min(even, odd) < max(even, odd) // 10:
        name = "utf-16-be" if even > odd else "utf-16-le"
        return name, f"{name.upper()} without a mark"
    raise ConfigError(f"{path} holds zero bytes, so it is no text. Export it as CSV, or give --encoding. {_IN_PYTHON}")


def _lines(path: Path, encoding: str | None) -> Iterator[str]:
    """Yield the lines from the header on."""
    is_inside = False
    for line in text_lines(path, encoding=encoding):
        if is_inside or (line.strip() and not line.lower().startswith("sep=")):
            is_inside = True
            yield line


def _rows(lines: Sequence[str], delimiter: str) -> list[list[str]]:
    if len(delimiter) > 1:
        return [line.rstrip("\r\n").split(delimiter) for line in lines]
    rows = csv.reader(lines, delimiter=delimiter)
    return [row for row in rows if row]


def _find_delimiter(path: Path, lines: Sequence[str]) -> str:
    """Return the delimiter that splits most rows into as many values as the header; of equals, into most values."""
    best, chosen = (0.0, 1), ""
    for delimiter in DELIMITERS:
        header, *rows = _rows(lines, delimiter)
        share = sum(len(row) == len(header) for row in rows) / len(rows) if rows else 1.0
        if len(header) > 1 and (round(share, 1), len(header)) > best:
            best, chosen = (round(share, 1), len(header)), delimiter
    if not chosen:
        raise ConfigError(
            f"{path}: no delimiter of {', '.join(map(repr, DELIMITERS))} splits its first line into columns. The "
            f"first line should hold their names. Give another delimiter by --delimiter. {_IN_PYTHON}"
        )
    return chosen


def _are_numbers(named: Sequence[str], header: Sequence[str]) -> bool:
    """Return True if the caller names the columns by their numbers, because the file has no header."""
    return bool(named) and all(name.isdecimal() for name in named) and not set(named) <= set(header)


def _check_header(path: Path, names: Sequence[str]) -> None:
    if any(map(_is_value, names)):
        raise ConfigError(
            f"{path}: its first line has {len(names)} values, and some are numbers, dates or long texts, so they are "
            f"no names of columns. If the file has no header, name the columns by their numbers: --user 1 --answer 3, "
            f"or user='1', answer='3' in Python."
        )


def _is_value(name: str) -> bool:
    """Return True for a value that belongs to a row, not to a header."""
    if len(name) > _MAX_NAME or number_or_none(name) is not None:
        return True
    try:
        as_datetime(name)
    except Flaw:
        return False
    return True
