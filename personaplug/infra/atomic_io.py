"""Files that are written whole or not at all: under a temporary name first, then renamed."""

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
    """Let `write` make a file under a temporary name, then give it its own; its folders are made where absent.

    Raises:
        StorageError: if the disk is full or not writable, said by the system or by safetensors; an earlier file of
            the name stays as it was, and whatever `write` raises, nothing is left of the attempt.
    """
    attempt = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(attempt)
        _sync(attempt)
        attempt.replace(path)
    except BaseException as error:
        with suppress(OSError):
            attempt.unlink()
        if _is_of_storage(error):
            raise _unwritten(path, error) from error
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file, its folders made where absent.

    Raises:
        StorageError: if the disk is full or not writable; an earlier file of the name stays as it was.
    """
    # A lone half of a surrogate pair, which JSON may spell and UTF-8 may not, is written as its escape.
    encoded = text.encode("utf-8", "backslashreplace")
    atomic_write(path, lambda attempt: attempt.write_bytes(encoded))


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON for people to read too; numbers that JSON lacks (NaN, infinity) become null.

    Raises:
        StorageError: if the disk is full or not writable; an earlier file of the name stays as it was.
    """
    write_text(path, json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


class JsonLines:
    """A file of JSON values, one a line, that grows; a kill costs at most the line that was being written.

    Args:
        path: made, with its folders, when the first value is added.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> Iterator[Any]:
        """Yield the values; nothing without a file. A line that a kill cut off is passed over."""
        if not self.path.exists():
            return
        for line in self.path.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):
                yield json.loads(line)

    def append(self, value: Any) -> None:
        """Add a value; numbers that JSON lacks (NaN, infinity) become null.

        Raises:
            StorageError: if the disk is full or not writable.
        """
        line = json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"
        with storage_errors(self.path), self.path.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                # A line that a kill cut off is closed, or it would swallow this one.
                file.write(b"" if file.read(1) == b"\n" else b"\n")
            file.write(line.encode("utf-8", "backslashreplace"))


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A folder to write into that becomes `target`, in place of an earlier one, only when the block ends well.

    Raises:
        StorageError: if the disk is full or not writable; nothing is left of the attempt.
    """
    attempt = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(attempt, ignore_errors=True)
        attempt.mkdir(parents=True)
        yield attempt
        for path in attempt.iterdir():
            _sync(path)
        if target.exists():
            shutil.rmtree(target)
        attempt.rename(target)
    except BaseException as error:
        shutil.rmtree(attempt, ignore_errors=True)
        if _is_of_storage(error):
            raise _unwritten(target, error) from error
        raise


@contextmanager
def storage_errors(target: Path) -> Iterator[None]:
    """Turn what the system says when it cannot store into a StorageError that names the file.

    Raises:
        StorageError: if the disk is full or not writable.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise _unwritten(target, error) from error


def _is_of_storage(error: BaseException) -> bool:
    # safetensors reports a full disk as an error of its own, with the system's words in it.
    return isinstance(error, OSError) or type(error).__name__ == "SafetensorError"


def _unwritten(target: Path, error: BaseException) -> StorageError:
    return StorageError(
        f"{target} could not be written ({error}). Free some space, or mend its permissions, and run the same command "
        f"again; what was complete before is still there."
    )


def _sync(path: Path) -> None:
    # Without it a power cut may leave the new name on a file whose content never reached the disk.
    with path.open("rb") as handle:
        os.fsync(handle.fileno())


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value
