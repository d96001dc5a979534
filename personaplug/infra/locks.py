"""Locks between processes, held in SQLite files; the system releases them however a process ends."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from personaplug.errors import RunConflict, StorageError


def acquire_lock(path: Path, *, wait_s: float = 1) -> sqlite3.Connection:
    """Return a connection that holds the lock in a file until it is closed.

    Raises:
        sqlite3.Error: if the file cannot be made, or another process still holds the lock after the wait.
    """
    lock = sqlite3.connect(path, timeout=wait_s, isolation_level=None)
    try:
        lock.execute("BEGIN EXCLUSIVE")
    except sqlite3.Error:
        lock.close()
        raise
    return lock


@contextmanager
def sole_trainer(folder: Path) -> Iterator[None]:
    """Hold the right to train in a folder: two processes would remove each other's checkpoints.

    Raises:
        RunConflict: if another process holds it.
    """
    try:
        lock = acquire_lock(folder / "training.lock")
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorname", "") == "SQLITE_CANTOPEN":
            raise StorageError(f"{folder} cannot be written ({error}). Correct its permissions.") from error
        raise RunConflict(
            f"Another process trains in {folder} ({error}). Run the same command again after it, or choose "
            f"another --out."
        ) from error
    with closing(lock):
        yield
