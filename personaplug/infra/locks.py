"""A lock on a run's folder; the system releases it however the process ends."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from personaplug.errors import RunConflict, StorageError


@contextmanager
def sole_trainer(folder: Path) -> Iterator[None]:
    """Hold the right to train in a folder: two processes would remove each other's checkpoints.

    Raises:
        RunConflict: if another process holds it.
    """
    try:
        lock = sqlite3.connect(folder / "training.lock", timeout=1, isolation_level=None)
    except sqlite3.Error as error:
        raise StorageError(f"{folder} cannot be written ({error}). Correct its permissions.") from error
    with closing(lock):
        try:
            lock.execute("BEGIN EXCLUSIVE")
        except sqlite3.Error as error:
            raise RunConflict(
                f"Another process trains in {folder} ({error}). Run the same command again after it, or choose "
                f"another --out."
            ) from error
        yield
