"""Files that are written whole or not at all: under a temporary name first, then renamed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from personaplug.errors import StorageError


def write_text(path: Path, text: str) -> None:
    """Write a text file, its folders made where absent.

    Raises:
        StorageError: if the disk is full or not writable; an earlier file of the name stays as it was.
    """
    attempt = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A lone half of a surrogate pair, which JSON may spell and UTF-8 may not, is written as its escape.
        attempt.write_bytes(text.encode("utf-8", "backslashreplace"))
        attempt.replace(path)
    except OSError as error:
        with suppress(OSError):
            attempt.unlink()
        raise _unwritten(path, error) from error


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON for people to read too; numbers that JSON lacks (NaN, infinity) become null.

    Raises:
        StorageError: if the disk is full or not writable; an earlier file of the name stays as it was.
    """
    write_text(path, json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A folder to write into that becomes `target`, in place of an earlier one, only when the block ends well.

    Raises:
        StorageError: if the disk is full or not writable; nothing is left of the attempt.
    """
    attempt = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(attempt, ignore_errors=True)
        attempt.mkdir(parents=True)
        yield attempt
        _sync(attempt)
        if target.exists():
            shutil.rmtree(target)
        attempt.rename(target)
    except BaseException as error:
        shutil.rmtree(attempt, ignore_errors=True)
        # safetensors reports a full disk as an error of its own, with the system's words in it.
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            raise _unwritten(target, error) from error
        raise


def _unwritten(target: Path, error: BaseException) -> StorageError:
    return StorageError(
        f"{target} could not be written ({error}). Free some space, or mend its permissions, and run the same command "
        f"again; what was complete before is still there."
    )


def _sync(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as handle:
            os.fsync(handle.fileno())


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value
