"""Write files and folders atomically: write under a temporary name, then rename. Also JSON-lines files."""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from personaplug.errors import StorageError
from personaplug.infra.checksums import checked_line, line_with_checksum, with_checksum

logger = logging.getLogger(__name__)


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` create a file under a temporary name, then rename it; create missing folders.

    An error removes the temporary file and leaves an existing file unchanged. Like all functions of this module, this
    one raises StorageError if the disk is full or not writable.
    """
    with _attempt(path) as temporary:
        write(temporary)
        _sync(temporary)
        temporary.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    # Text parsed from JSON may contain a lone surrogate, which UTF-8 cannot encode. Write it as an escape.
    encoded = text.encode("utf-8", "backslashreplace")
    atomic_write(path, lambda temporary: temporary.write_bytes(encoded))


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically; NaN and infinity become null."""
    write_text(path, json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_checked_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write an object like `write_json`, with a checksum as the last entry; `checksums.read_json` reads it."""
    write_json(path, with_checksum(_finite(values)))


class JsonLines:
    """An append-only file of JSON objects, one per line, each with a checksum.

    A killed process loses at most its current line. Readers skip truncated and damaged lines, and a warning gives
    their number.

    Args:
        is_strict: also skip lines without a checksum.
    """

    def __init__(self, path: Path, *, is_strict: bool = True) -> None:
        self.path, self.is_strict = path, is_strict

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the objects; none if the file does not exist."""
        lines = self.path.read_bytes().split(b"\n") if self.path.exists() else []
        damaged = 0
        for line in filter(bytes.strip, lines):
            try:
                yield self._parsed(line)
            except (ValueError, RecursionError):
                damaged += 1
        if damaged:
            logger.warning("%s: skipped %d truncated or damaged lines", self.path, damaged)

    def append(self, values: Mapping[str, Any]) -> None:
        """Append an object; NaN and infinity become null."""
        text = json.dumps(_finite(values), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        line = line_with_checksum(text.encode("utf-8", "backslashreplace"))
        with storage_errors(self.path), self.path.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                # End a truncated line; otherwise the new object would become part of it.
                file.write(b"" if file.read(1) == b"\n" else b"\n")
            file.write(line + b"\n")

    def _parsed(self, line: bytes) -> dict[str, Any]:
        content = checked_line(line)
        if content is None and self.is_strict:
            raise ValueError("The line has no checksum.")
        values = json.loads(line if content is None else content)
        if not isinstance(values, dict):
            raise ValueError("The line is not an object.")  # `__iter__` catches ValueError
        return values


@contextmanager
def atomic_folder(target: Path, *, replace: bool = True) -> Iterator[Path]:
    """Yield a temporary folder and rename it to `target` if the block succeeds.

    Args:
        replace: replace an existing target; otherwise keep it and drop the new folder.
    """
    with _attempt(target) as temporary:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                _sync(path)
        if replace and target.exists():
            shutil.rmtree(target)
        try:
            temporary.rename(target)
        except OSError:
            if replace or not target.is_dir():
                raise
            shutil.rmtree(temporary)


@contextmanager
def storage_errors(target: Path) -> Iterator[None]:
    """Create the parent folder of a file, and convert an OSError of the block to a StorageError with its path."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield
    except Exception as error:
        # safetensors reports a full disk as SafetensorError, not as OSError.
        if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
            raise
        raise StorageError(
            f"{target} could not be written ({error}). Free disk space or correct the permissions, then run the same "
            f"command again; completed files are unchanged."
        ) from error


@contextmanager
def _attempt(target: Path) -> Iterator[Path]:
    """Yield a temporary path next to `target`; remove the file or folder there after an error."""
    # Random, because containers that share a folder may have equal process ids.
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    with storage_errors(target):
        try:
            yield temporary
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            with suppress(OSError):
                temporary.unlink()
            raise


def _sync(path: Path) -> None:
    # Without fsync, a power failure after the rename can leave a file without content.
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value
