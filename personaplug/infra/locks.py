"""Locks between processes, as SQLite files. The operating system releases them when a process ends, even by a crash."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from personaplug.errors import RunConflict, StorageError


def acquire_lock(path: Path, *, wait_s: float = 1) -> sqlite3.Connection:
    """Acquire the lock in a file, and return a connection that holds the lock until the connection is closed.

    Raises:
        sqlite3.Error: if the file cannot be created, or another process still holds the lock after the wait.
    """
    lock = sqlite3.connect(path, timeout=wait_s, isolation_level=None)
    try:
        lock.execute("BEGIN EXCLUSIVE")
    except sqlite3.Error:
        lock.close()
        raise
    return lock


@contextmanager
def sole_process(path: Path, *, work: str, remedy: str) -> Iterator[None]:
    """Hold the lock in a file during some work that only one process may do.

    Args:
        work: what the process does, for the error message, such as "training in FOLDER".
        remedy: advice for the error message, as a sentence.
    Raises:
        RunConflict: if another process holds the lock.
        StorageError: if the lock cannot be created.
    """
    try:
        lock = acquire_lock(path)
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorname", "") == "SQLITE_CANTOPEN":
            raise StorageError(f"{path.parent} is not writable ({error}). Correct its permissions.") from error
        raise RunConflict(f"Another process is {work} ({error}). {remedy}") from error
    with closing(lock):
        yield


@contextmanager
def sole_trainer(folder: Path) -> Iterator[None]:
    """Hold the lock to train in a folder, because two processes would remove each other's checkpoints; `sole_process`
    describes the errors."""
    remedy = "Wait for its end and run the same command again, or choose another --out."
    with sole_process(folder / "training.lock", work=f"training in {folder}", remedy=remedy):
        yield
