"""Checks of SQLite's file before a store is opened."""

from __future__ import annotations

from personaplug.errors import ConfigError, StorageError
from personaplug.store.database import Database

_SQLITE_MARK = b"SQLite format 3\0"


def check_is_database(database: Database) -> None:
    """Raise ConfigError for a folder or a file of another kind, whose secret nobody can restore."""
    file, secret = database.file, database.secret_file
    if file is None or secret is None or not file.exists() or secret.exists():
        return
    if file.is_dir():
        raise ConfigError(f"{file} is a folder, but a history store is a file. Name the file.")
    with file.open("rb") as stream:
        if stream.read(len(_SQLITE_MARK)) not in (_SQLITE_MARK, b""):
            raise ConfigError(f"{file} is no history store, but another file. Name the file of the store.")


def check_not_emptied(database: Database) -> None:
    """Raise StorageError for an empty file beside a secret, because `open` would silently create a new store."""
    file, secret = database.file, database.secret_file
    if file is None or secret is None or not (file.exists() and secret.exists()):
        return
    if not file.stat().st_size and not file.with_name(f"{file.name}-wal").exists():
        raise StorageError(
            f"The store {database} is an empty file, although its secret exists. Restore the store from a backup. If "
            f"the store was never used, delete both files."
        )
