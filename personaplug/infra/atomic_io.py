"""Atomic writes of files and folders under a temporary name that is then renamed, and JSON-lines files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from personaplug.errors import StorageError


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


class JsonLines:
    """A growing file of JSON values, one per line; a killed process loses at most the line it was writing."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __iter__(self) -> Iterator[Any]:
        """Yield the values; skip lines that a killed process cut off. A missing file holds none."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        for line in lines:
            with suppress(ValueError):
                yield json.loads(line)

    def append(self, value: Any) -> None:
        """Add a value; NaN and infinity become null."""
        line = json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"
        with storage_errors(self.path), self.path.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                # End a line that was cut off; else the new value would become part of it.
                file.write(b"" if file.read(1) == b"\n" else b"\n")
            file.write(line.encode("utf-8", "backslashreplace"))


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
