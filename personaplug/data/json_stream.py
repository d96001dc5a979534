"""Data files: found plain or gzipped, and read one value or one line at a time."""

from __future__ import annotations

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from io import BufferedReader
from itertools import accumulate
from pathlib import Path
from typing import Any

import ijson

from personaplug.data.parsing import Flaw
from personaplug.errors import MissingData, RecordError

_DEEPEST = 64


def existing_folder(folder: str | Path) -> Path:
    """Return the folder as a path.

    Raises:
        MissingData: if it is not there.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise MissingData(f"There is no data folder {folder}.")
    return folder


def plain_or_gz(folder: Path, name: str) -> Path | None:
    """Return the file of that name, or else its gzipped form, or None where neither is there."""
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    return None


def unpacked(path: Path, *, size: int) -> Iterator[bytes]:
    """Yield a file's bytes in pieces of at most `size`, gzipped or not.

    Raises:
        RecordError: where the file is not valid gzip.
    """
    try:
        with _opened(path) as original:
            while chunk := original.read(size):
                yield chunk
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise RecordError(path, "in the file", reason="the gzip data is broken or cut short") from None


def stream_values(path: Path, prefix: str, *, opening: bytes, unit: str) -> Iterator[tuple[int, Any]]:
    """Yield the numbered values under `prefix`, one at a time in memory.

    Raises:
        RecordError: where the file is not valid JSON or gzip, nests values too deeply, or is not opened by `opening`;
            the rest of it is lost, so it is never skipped. The parser's own message quotes the file's text, so it
            is not passed on.
    """
    count = 0
    try:
        with _opened(path) as stream:
            _expect(stream, opening)
            for count, value in enumerate(ijson.items(_Shallow(stream), prefix, use_float=True), 1):
                yield count, value
    except Flaw as flaw:
        raise RecordError(path, f"after {unit} {count}" if count else "at the start", reason=str(flaw)) from None
    except (ijson.JSONError, UnicodeDecodeError):
        raise RecordError(path, f"after {unit} {count}", reason="the file is not valid JSON from here on") from None
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise RecordError(path, f"after {unit} {count}", reason="the gzip data is broken or cut short") from None


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines with their numbers, from 1, without a byte order mark.

    Raises:
        RecordError: where the file is not valid gzip; the rest of it is lost, so it is never skipped.
    """
    number = 0
    try:
        with _opened(path) as stream:
            for number, line in enumerate(stream, 1):
                yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise RecordError(path, f"after line {number}", reason="the gzip data is broken or cut short") from None


def json_lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any] | Flaw]]:
    """Yield the records of a file with one JSON object a line, blank lines left out; a Flaw in a broken one's place.

    Raises:
        RecordError: where the file is not valid gzip.
    """
    for number, line in numbered_lines(path):
        if line.strip():
            yield number, _json_record(line)


def _json_record(line: bytes) -> Mapping[str, Any] | Flaw:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return Flaw("it is not valid JSON")
    return values if isinstance(values, dict) else Flaw("it is not a JSON object")


def _opened(path: Path) -> gzip.GzipFile | BufferedReader:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


class _Shallow:
    """A stream of JSON that is read on only while its values are nested at most 64 deep.

    ijson keeps the path to every open value, so without a bound 100 KB of "[" would take 19 GB.
    """

    def __init__(self, stream: gzip.GzipFile | BufferedReader) -> None:
        self._stream = stream
        self._depth = 0
        self._in_string = False
        self._escape = b""

    def read(self, size: int) -> bytes:
        """Return the next bytes.

        Raises:
            Flaw: if they nest values too deeply.
        """
        chunk = self._stream.read(size)
        # What stands outside strings is found by a few sweeps in C; only its brackets are looked at one by one.
        bare = self._escape + chunk if self._escape else chunk
        if b"\\" in bare:
            bare = _ESCAPED.sub(b"", bare)
        self._escape = bare[-1:] if bare.endswith(b"\\") else b""
        parts = bare.translate(None, delete=_PLAIN).replace(b'""', b"").split(b'"')
        brackets = b"".join(parts[self._in_string :: 2])
        self._in_string ^= len(parts) % 2 == 0
        depths = list(accumulate(map(_STEPS.__getitem__, brackets), initial=self._depth))
        if max(depths) > _DEEPEST:
            raise Flaw(f"values are nested more than {_DEEPEST} deep from here on")
        self._depth = depths[-1]
        return chunk


_STEPS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
_ESCAPED = re.compile(rb"\\[\\\"]")
_PLAIN = bytes(byte for byte in range(256) if byte not in b'"[]{}')


def _expect(stream: Any, opening: bytes) -> None:
    # ijson finds nothing under a prefix, silently, where the outermost value has another shape.
    if stream.peek(3)[:3] == codecs.BOM_UTF8:
        stream.read(3)
    while (byte := stream.peek(1)[:1]) and byte in b" \t\r\n":
        stream.read(1)
    if byte != opening:
        shape = "a list" if opening == b"[" else "an object"
        raise Flaw(f"the file should hold {shape} and begin with {opening.decode()!r}")
