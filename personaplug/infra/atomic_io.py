"""Atomic writes of files and folders under a temporary name that is then renamed, and JSON-lines files."""

from __future__ import annotations

import json
import logging
import os
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

    An error leaves no temporary file, and an earlier file of that name unchanged. Like all functions here, raise
    StorageError if the disk is full or not writable.
    """
    with _attempt(path) as temporary:
        write(temporary)
        _sync(temporary)
        temporary.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    # JSON may spell half of a surrogate pair, which UTF-8 cannot encode: write its escape.
    encoded = text.encode("utf-8", "backslashreplace")
    atomic_write(path, lambda temporary: temporary.write_bytes(encoded))


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically; NaN and infinity become null."""
    write_text(path, json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_checked_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write an object as `write_json` does, with a checksum as its last entry; see `checksums.read_json`."""
    write_json(path, with_checksum(_finite(values)))


class JsonLines:
    """A growing file of JSON objects, one per line, each with a checksum.

    A killed process loses at most the line that it was writing. Lines that are cut off or damaged are left out, and a
    warning says how many.

    Args:
        is_strict: leave out lines without a checksum, too.
    """

    def __init__(self, path: Path, *, is_strict: bool = True) -> None:
        self.path, self.is_strict = path, is_strict

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the objects. A missing file holds none."""
        lines = self.path.read_bytes().split(b"\n") if self.path.exists() else []
        damaged = 0
        for line in filter(bytes.strip, lines):
            try:
                yield self._parsed(line)
            except (ValueError, RecursionError):
                damaged += 1
        if damaged:
            logger.warning("%s: lines left out because they are cut off or damaged: %d", self.path, damaged)

    def append(self, values: Mapping[str, Any]) -> None:
        """Add an object; NaN and infinity become null."""
        text = json.dumps(_finite(values), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        line = line_with_checksum(text.encode("utf-8", "backslashreplace"))
        with storage_errors(self.path), self.path.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                # End a line that was cut off; else the new value would become part of it.
                file.write(b"" if file.read(1) == b"\n" else b"\n")
            file.write(line + b"\n")

    def _parsed(self, line: bytes) -> dict[str, Any]:
        content = checked_line(line)
        if content is None and self.is_strict:
            raise ValueError("The line has no checksum.")
        values = json.loads(line if content is None else content)
        if not isinstance(values, dict):
            raise ValueError("The line holds no object.")  # the caller expects this kind
        return values


@contextmanager
def atomic_folder(target: Path, *, replace: bool = True) -> Iterator[Path]:
    """Yield a temporary folder that becomes `target` if the block succeeds; without `replace`, an old target stays."""
    with _attempt(target) as temporary:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        for path in temporary.iterdir():
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
    """Create the folder of a file, and turn an OSError of the block into a StorageError that names the file."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield
    except Exception as error:
        # safetensors reports a full disk as its own error, with the system's words in it.
        if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
            raise
        raise StorageError(
            f"{target} could not be written ({error}). Free some space, or correct its permissions, and run the same "
            f"command again; completed files are unchanged."
        ) from error


@contextmanager
def _attempt(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`; after an error, remove what it holds."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with storage_errors(target):
        try:
            yield temporary
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            with suppress(OSError):
                temporary.unlink()
            raise


def _sync(path: Path) -> None:
    # Otherwise a power cut may leave the new name on a file whose content never reached the disk.
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value
