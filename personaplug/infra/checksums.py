"""Checksums of JSON objects, JSON lines and bytes, to detect damaged files.

CRC-32 detects every change of up to 32 consecutive bits. It detects accidents of disks and transfers. It is not a
signature: anyone who changes a file on purpose can write a matching checksum.
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
    """Return the checksum of concatenated buffers as 8 hex digits."""
    value = 0
    for part in parts:
        value = zlib.crc32(part, value)
    return f"{value:08x}"


def json_checksum(value: Any) -> str:
    """Return the checksum of a JSON value. It ignores indents and the format of numbers, but not the order of keys."""
    return checksum([json.dumps(value, separators=(",", ":")).encode("ascii")])


def with_checksum(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of an object with its checksum as the last entry."""
    return {**values, KEY: json_checksum(values)}


def check_json(values: Mapping[str, Any], path: Path, *, remedy: str) -> dict[str, Any]:
    """Verify the checksum of an object from a file, and return the object without it.

    Args:
        remedy: advice for the error message, as a sentence.
    Raises:
        DamagedFile: if the checksum is missing or differs.
    """
    stored, rest = values.get(KEY), {key: value for key, value in values.items() if key != KEY}
    if stored is None:
        raise DamagedFile(path, reason="it has no checksum; an older version may have written it", remedy=remedy)
    if stored != json_checksum(rest):
        raise DamagedFile(path, reason="its content does not match its checksum", remedy=remedy)
    return rest


def read_json(path: Path, *, remedy: str) -> dict[str, Any]:
    """Read an object from a file of `write_checked_json`, without its checksum.

    Raises:
        DamagedFile: if the file is truncated or changed.
        OSError: if the file cannot be read.
    """
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise DamagedFile(path, reason="it is not valid JSON", remedy=remedy) from None
    if not isinstance(values, dict):
        raise DamagedFile(path, reason="it is not a JSON object", remedy=remedy)
    return check_json(values, path, remedy=remedy)


def line_with_checksum(line: bytes) -> bytes:
    """Return a JSON object on one line with its checksum as the last entry."""
    end = f',"{KEY}":"{checksum([line])}"}}'
    return line.removesuffix(b"}") + end.encode("ascii")


def checked_line(line: bytes) -> bytes | None:
    """Verify a line and return it without its checksum; return None if it has no checksum.

    Raises:
        ValueError: if the checksum differs.
    """
    end = _LINE_END.search(line)
    if end is None:
        return None
    content = line[: end.start()] + b"}"
    if checksum([content]).encode("ascii") != end[1]:
        raise ValueError("The line does not match its checksum.")
    return content
