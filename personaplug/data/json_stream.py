"""Read data files, plain or gzipped: one JSON value or one line at a time."""

from __future__ import annotations

import codecs
import gzip
import json
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

import ijson

from personaplug.data.parsing import Flaw
from personaplug.errors import MissingData, RecordError

_GZIP_ERRORS = (EOFError, zlib.error, gzip.BadGzipFile)
_BROKEN_GZIP = "the gzip data is broken or cut short"
_MAX_DEPTH = 64
_DEPTH_CHANGE = {"start_map": 1, "start_array": 1, "end_map": -1, "end_array": -1}
_SHAPES = {b"[": ("start_array", "a list"), b"{": ("start_map", "an object")}

_Event = tuple[str, Any]


def existing_folder(folder: str | Path) -> Path:
    """Return the path of a folder that exists."""
    if not Path(folder).is_dir():
        raise MissingData(f"There is no data folder {folder}.")
    return Path(folder)


def plain_or_gz(folder: Path, name: str) -> Path | None:
    """Return the file with this name or, if there is none, its gzipped form."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def copy_plain(path: str | Path, target: Path) -> None:
    """Copy a file; unpack it if its name ends in .gz."""
    try:
        with _open_plain(Path(path)) as stream, target.open("wb") as copy:
            shutil.copyfileobj(stream, copy)
    except _GZIP_ERRORS:
        raise RecordError(path, "in the file", reason=_BROKEN_GZIP) from None


@contextmanager
def _open_plain(path: Path) -> Iterator[gzip.GzipFile | BufferedReader]:
    """Open a file for reading bytes: unpacked if its name ends in .gz, and without a byte order mark."""
    with gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb") as stream:
        if stream.peek(3).startswith(codecs.BOM_UTF8):
            stream.read(3)
        yield stream


def stream_values(path: Path, prefix: str, *, opening: bytes, unit: str) -> Iterator[tuple[int, Any]]:
    """Yield the values under a prefix, numbered from 1, with one value in memory at a time.

    If the file is not valid JSON or gzip, nests values too deeply, or has another outermost value, raise RecordError.
    The rest of such a file is lost, so this error must not be skipped.

    Args:
        prefix: the path to the values in ijson's notation, such as `golds.item`; "" for the whole file.
        opening: the bracket that starts the file's outermost value.
        unit: the name of a value in error messages.
    """
    count = 0
    try:
        with _open_plain(path) as stream:
            events = ijson.basic_parse(stream, use_float=True)
            first = next(events)
            event, shape = _SHAPES[opening]
            if first[0] != event:
                raise Flaw(f"the file should hold {shape} and begin with {opening.decode()!r}")
            for count, value in enumerate(_values_at(prefix.split(".") if prefix else [], first, events), 1):
                yield count, value
            next(events, None)  # fails if anything follows the outermost value
    except Flaw as flaw:
        reason = str(flaw)
    except (ijson.JSONError, UnicodeDecodeError):
        # The parser's own message quotes the file's text, so it is not passed on.
        reason = "the file is not valid JSON from here on"
    except _GZIP_ERRORS:
        reason = _BROKEN_GZIP
    else:
        return
    raise RecordError(path, f"after {unit} {count}" if count else "at the start", reason=reason)


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file, numbered from 1."""
    number = 0
    try:
        with _open_plain(path) as stream:
            for number, line in enumerate(stream, 1):
                yield number, line
    except _GZIP_ERRORS:
        raise RecordError(path, f"after line {number}", reason=_BROKEN_GZIP) from None


def json_lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any] | Flaw]]:
    """Yield the JSON object of each line that is not blank, or a Flaw if the line holds none."""
    for number, line in numbered_lines(path):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            yield number, Flaw("it is not valid JSON")
        else:
            yield number, values if isinstance(values, dict) else Flaw("it is not a JSON object")


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
    """Pass on the events of one value. The bound on its depth protects code that walks the value recursively."""
    name, value = first
    depth = 0
    while True:
        depth += _DEPTH_CHANGE.get(name, 0)
        if depth > _MAX_DEPTH:
            raise Flaw(f"values are nested more than {_MAX_DEPTH} deep from here on")
        receive(name, value)
        if depth == 0:
            return
        name, value = next(events)
