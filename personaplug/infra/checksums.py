"""Checksums that reveal damage when a file is read: of JSON objects, of lines of JSON and of bytes.

A CRC-32 detects every change of up to 32 bits in a row. It reveals accidents of disks and transfers and is no
signature: whoever changes a file on purpose can write a matching checksum.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from personaplug.errors import DamagedFile

KEY = "checksum"

_LINE_END = re.compile(rb',"checksum":"([0-9a-f]{8})"\}$')


def checksum(parts: Iterable[Any]) -> str:
    """Return 8 hex digits of some buffers, read one after the other."""
    value = 0
    for part in parts:
        value = zlib.crc32(part, value)
    return f"{value:08x}"


def json_checksum(value: Any) -> str:
    """Return the checksum of a JSON value. Indents and the writing of numbers do not count, the order of keys does."""
    return checksum([json.dumps(value, separators=(",", ":")).encode("ascii")])


def with_checksum(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return an object with its checksum as the last entry."""
    return {**values, KEY: json_checksum(values)}


def check_json(values: Mapping[str, Any], path: Path, *, remedy: str) -> dict[str, Any]:
    """Return an object that was read from a file without its checksum.

    Raises:
        DamagedFile: if the checksum is missing or another one; `remedy` says what to do.
    """
    found, rest = values.get(KEY), {key: value for key, value in values.items() if key != KEY}
    if found is None:
        raise DamagedFile(path, reason="it has no checksum; an older version may have made it", remedy=remedy)
    if found != json_checksum(rest):
        raise DamagedFile(path, reason="its content does not match its checksum", remedy=remedy)
    return rest


def read_json(path: Path, *, remedy: str) -> dict[str, Any]:
    """Read an object that `write_checked_json` has written; return it without its checksum.

    Raises:
        DamagedFile: if it is cut off or changed.
        OSError: if it cannot be read.
    """
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise DamagedFile(path, reason="it is not valid JSON", remedy=remedy) from None
    if not isinstance(values, dict):
        raise DamagedFile(path, reason="it holds no object", remedy=remedy)
    return check_json(values, path, remedy=remedy)


def line_with_checksum(line: bytes) -> bytes:
    """Return a JSON object on one line with its checksum as the last entry."""
    end = f',"{KEY}":"{checksum([line])}"}}'
    return line.removesuffix(b"}") + end.encode("ascii")


def checked_line(line: bytes) -> bytes | None:
    """Return a line without its checksum; None if it has none.

    Raises:
        ValueError: if the checksum is another one.
    """
    end = _LINE_END.search(line)
    if end is None:
        return None
    content = line[: end.start()] + b"}"
    if checksum([content]).encode("ascii") != end[1]:
        raise ValueError("The line does not match its checksum.")
    return content
