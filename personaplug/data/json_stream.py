"""Read data files, plain or gzipped: one JSON value or one line at a time."""

from __future__ import annotations

import codecs
import gzip
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader, RawIOBase, TextIOWrapper
from itertools import islice
from pathlib import Path
from typing import Any

import ijson
from ijson.backends import python

from personaplug.data.values import Flaw
from personaplug.errors import MissingData, RecordError
from personaplug.infra.json_parsing import MAX_DEPTH, parse_json

_GZIP_ERRORS = (EOFError, zlib.error, gzip.BadGzipFile)
_GZIP_MARK = b"\x1f\x8b"
_BROKEN_GZIP = "the gzip data is broken or cut short"
_NOT_JSON = "the file is not valid JSON from here on"
_BIG_NUMBER = "the file is not valid JSON from here on, or contains a number with more than 4,300 digits or above 1e308"
_DEPTH_CHANGE = {"start_map": 1, "start_array": 1, "end_map": -1, "end_array": -1}
_SHAPES = {b"[": ("start_array", "a list"), b"{": ("start_map", "an object")}

_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark is a prefix of this one
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)

_Event = tuple[str, Any]


def existing_folder(folder: str | Path) -> Path:
    """Return the path of a folder; raise MissingData if it does not exist."""
    if not Path(folder).is_dir():
        raise MissingData(f"There is no data folder {folder}.")
    return Path(folder)


def plain_or_gz(folder: Path, name: str) -> Path | None:
    """Return the file with this name or, if there is none, its gzipped form."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def copy_plain(path: str | Path, target: Path) -> None:
    """Copy a file; unpack it if its name ends in .gz."""
    try:
        with open_plain(Path(path)) as stream, target.open("wb") as copy:
            shutil.copyfileobj(stream, copy)
    except _GZIP_ERRORS:
        raise RecordError(path, "in the file", reason=_BROKEN_GZIP) from None


@contextmanager
def open_plain(path: Path, *, encoding: str | None = None) -> Iterator[gzip.GzipFile | BufferedReader]:
    """Open a file as UTF-8. Decompress it if its name ends in .gz. Follow a byte order mark and remove it.

    Args:
        encoding: of a file without a byte order mark; None = UTF-8.
    """
    with gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb") as stream:
        head = stream.peek(4)[:4]
        if head.startswith(_GZIP_MARK):
            packed = "compressed twice" if path.suffix.lower() == ".gz" else "gzip data, so its name should end in .gz"
            raise RecordError(path, "at the start", reason=f"the file is {packed}")
        if head.startswith(codecs.BOM_UTF8):
            stream.read(3)
            encoding = None
        encoding = next((name for mark, name in _MARKS if head.startswith(mark)), encoding)
        yield BufferedReader(_Transcoder(stream, encoding)) if encoding else stream


class _Transcoder(RawIOBase):
    """Stream a file in another encoding as UTF-8 bytes."""

    def __init__(self, stream: gzip.GzipFile | BufferedReader, encoding: str) -> None:
        self._text = TextIOWrapper(stream, encoding, newline="")
        self._bytes = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._bytes = self._bytes or self._text.read(8192).encode("utf-8", "surrogatepass")
        size = min(len(buffer), len(self._bytes))
        buffer[:size], self._bytes = self._bytes[:size], self._bytes[size:]
        return size


def stream_values(path: Path, prefix: str, *, opening: bytes, unit: str) -> Iterator[tuple[int, Any]]:
    """Yield the values under a prefix, numbered from 1, with one value in memory at a time.

    If the file is not valid JSON or gzip, nests values too deeply, or has another outermost value, raise RecordError.
    Never skip this error, because the rest of the file is lost.

    Args:
        prefix: the path to the values in ijson's notation, such as `golds.item`; "" for the whole file.
        opening: the bracket that starts the file's outermost value.
        unit: the name of a value in error messages.
    """
    count, reason = 0, _NOT_JSON
    try:
        try:
            for count, value in enumerate(_parsed(ijson, path, prefix, opening=opening), 1):
                yield count, value
        except ijson.JSONError as error:
            if "overflow" not in str(error):
                raise
            # The fast parser limits whole numbers to 64 bits. Start again with the slow parser.
            reason = _BIG_NUMBER
            values = enumerate(_parsed(python, path, prefix, opening=opening), 1)
            for number, value in islice(values, count, None):
                yield number, value
                count = number
        return
    except Flaw as flaw:
        reason = str(flaw)
    except (ijson.JSONError, UnicodeDecodeError):
        pass  # The parser's message quotes the file's text, so it is not passed on.
    except _GZIP_ERRORS:
        reason = _BROKEN_GZIP
    raise RecordError(path, f"after {unit} {count}" if count else "at the start", reason=reason)


def _parsed(parser: Any, path: Path, prefix: str, *, opening: bytes) -> Iterator[Any]:
    with open_plain(path) as stream:
        events = parser.basic_parse(stream, use_float=True)
        first = next(events)
        event, shape = _SHAPES[opening]
        if first[0] != event:
            raise Flaw(f"the file should contain {shape} and begin with {opening.decode()!r}")
        yield from _values_at(prefix.split(".") if prefix else [], first, events)
        next(events, None)  # fails if anything follows the outermost value


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file, numbered from 1."""
    with broken_after_line(path) as numbers, open_plain(path) as stream:
        for numbers[0], line in enumerate(stream, 1):
            yield numbers[0], line


def text_lines(path: Path, *, encoding: str | None = None) -> Iterator[str]:
    """Yield the lines of a file as text with their ends: \\n, \\r\\n or \\r; see `open_plain`.

    A byte that is not UTF-8 becomes a lone surrogate, so `as_text` rejects only the record with this byte.
    """
    with broken_after_line(path) as numbers, open_plain(path, encoding=encoding) as stream:
        for numbers[0], line in enumerate(TextIOWrapper(stream, "utf-8", "surrogateescape", newline=""), 1):
            yield line


@contextmanager
def broken_after_line(path: Path) -> Iterator[list[int]]:
    """Turn the errors of a broken file into a RecordError. The caller stores the last line number in the list."""
    numbers = [0]
    try:
        yield numbers
    except _GZIP_ERRORS:
        raise RecordError(path, _after(numbers[0]), reason=_BROKEN_GZIP) from None
    except UnicodeError:
        raise RecordError(
            path, _after(numbers[0]), reason="the bytes are not valid text in the encoding of the file"
        ) from None


def _after(line: int) -> str:
    return f"after line {line}" if line else "at the start"


def json_lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any] | Flaw]]:
    """Yield the JSON object of each line that is not blank, or a Flaw if the line is something else."""
    for number, line in numbered_lines(path):
        if not line.strip():
            continue
        try:
            values = parse_json(line)
        except ValueError as error:
            yield number, Flaw(str(error))
        else:
            yield number, values if isinstance(values, dict) else Flaw("it is not a JSON object")


def holds_list(path: Path) -> bool:
    """Return whether a file's first character that is not blank opens a JSON list."""
    with broken_after_line(path), open_plain(path) as stream:
        while (chunk := stream.read(1024)) and not chunk.strip():
            pass
        return chunk.lstrip().startswith(b"[")


def _values_at(path: list[str], first: _Event, events: Iterator[_Event]) -> Iterator[Any]:
    """Yield the values at a path below the value that starts with the event `first`, and consume all its events."""
    if not path:
        builder = ijson.ObjectBuilder()
        _consume(first, events, builder.event)
        yield builder.value
    elif first[0] == "start_array" and path[0] == "item":
        while (event := next(events))[0] != "end_array":
            yield from _values_at(path[1:], event, events)
    elif first[0] == "start_map":
        while (key := next(events))[0] != "end_map":
            if key[1] == path[0]:
                yield from _values_at(path[1:], next(events), events)
            else:
                _consume(next(events), events)
    else:
        _consume(first, events)


def _consume(
    first: _Event, events: Iterator[_Event], receive: Callable[[str, Any], object] = lambda name, value: None
) -> None:
    """Pass the events of one value to `receive`. The depth limit protects code that walks the value recursively."""
    name, value = first
    depth = 0
    while True:
        depth += _DEPTH_CHANGE.get(name, 0)
        if depth > MAX_DEPTH:
            raise Flaw(f"values are nested more than {MAX_DEPTH} deep from here on")
        receive(name, value)
        if depth == 0:
            return
        name, value = next(events)
