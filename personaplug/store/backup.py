"""Back up a store in SQLite into one file with a checksum, while the store is in use, and restore it.

A copy of the database's file is not enough, because its latest rows may still be in the write-ahead log.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from personaplug.errors import ConfigError, MissingData, StorageError
from personaplug.infra.atomic_io import storage_errors
from personaplug.store.history_store import HistoryStore
from personaplug.store.private_files import create_private, make_private_folder
from personaplug.store.reads import check_pictures
from personaplug.store.receipts import Secret
from personaplug.store.refill import copy_erasures, user_pages
from personaplug.store.writes import UserRow

_KIND = "personaplug backup 1"
_LONGEST_HEADER = 1000
_CHUNK_BYTES = 2**20
_LOGS = ("-wal", "-journal", "-shm")  # of an earlier file with this name; SQLite would apply them to the new file


def back_up(store: HistoryStore, target: Path) -> None:
    """Write a store into a new file: a header line in JSON, then a SQLite database.

    Raises:
        StorageError: if the store is damaged; no file is written.
        ConfigError: if the store is in PostgreSQL, or the file exists.
    """
    source = store.database.file
    if source is None:
        raise ConfigError("Only stores in SQLite can be backed up here; run pg_dump --format=custom --file=FILE URL")
    _check_is_new(target)
    verify(store)
    with _temporary(target) as copy, _temporary(target) as whole:
        _copy_database(source, copy)
        with copy.open("rb") as content, whole.open("wb") as file:
            header = {"kind": _KIND, "bytes": copy.stat().st_size, "sha256": _copy(content, None)}
            file.write(json.dumps(header).encode() + b"\n")
            content.seek(0)
            _copy(content, file)
            os.fsync(file.fileno())
        whole.rename(target)


def restore(backup: Path, target: Path, *, secret: Path | None, current: HistoryStore | None) -> None:
    """Create a store in SQLite from a backup.

    Args:
        target: the store's file, which must not exist.
        secret: file of the store's secret; None = the file beside the target. If it is missing, it becomes a copy of
            the secret of `current`.
        current: the store in use until now; users who were erased from it are erased from the new store too.
    Raises:
        MissingData: if the backup or the secret is missing.
        StorageError: if the backup is damaged.
    """
    if not backup.exists() or backup.is_dir():
        raise MissingData(f"There is no backup at {backup}. Name a file that `personaplug backup` wrote.")
    _check_is_new(target)
    for ending in _LOGS:
        _check_is_new(target.with_name(target.name + ending))
    own_secret = target.with_name(f"{target.name}.secret")
    with _temporary(target) as copy:
        with storage_errors(backup), backup.open("rb") as content, copy.open("wb") as file:
            header = _read_header(content, backup)
            if _copy(content, file) != header["sha256"] or file.tell() != header["bytes"]:
                raise StorageError(f"The backup {backup} is damaged: its checksum does not match. Use another backup.")
            os.fsync(file.fileno())
        key = _secret_of_backup(secret or own_secret, None if secret else current)
        with closing(HistoryStore.open(copy, secret=key.key)) as store:
            if current is not None:
                copy_erasures(current, store)
            verify(store)
        with closing(sqlite3.connect(copy)) as database:
            database.execute("PRAGMA journal_mode=DELETE")  # leaves no log beside the file
        if not secret:
            key.save(own_secret)
        copy.rename(target)


def _secret_of_backup(file: Path, current: HistoryStore | None) -> Secret:
    if file.exists():
        return Secret.from_file(file, create=False)
    if current is not None:
        return current.secret
    raise MissingData(
        f"The secret {file} is missing: a backup does not hold the secret of its store. Copy the secret of the store "
        f"that was backed up there (STORE.secret, beside its file), or name it with --secret."
    )


def verify(store: HistoryStore) -> None:
    """Read all users' items and their checksums; raise StorageError if one is damaged."""
    for shard, users in user_pages(store):
        for user in users:
            store.load_history(user.tenant, user.user_id)
            store.list_items(user.tenant, user.user_id)
            with store.database.read_transaction() as connection:
                check_pictures(connection, shard, UserRow.of(user, tenant=user.tenant, user=user.user_id))


def _copy_database(source: Path, copy: Path) -> None:
    try:
        with (
            closing(sqlite3.connect(f"{source.as_uri()}?mode=ro", uri=True)) as old,
            closing(sqlite3.connect(copy)) as new,
        ):
            old.backup(new)
            new.execute("PRAGMA journal_mode=DELETE")  # leaves no log beside the file
            problems = new.execute("PRAGMA integrity_check(1)").fetchall()
    except sqlite3.Error as error:
        raise StorageError(f"{source} could not be copied ({type(error).__name__}): {error}") from None
    if problems != [("ok",)]:
        raise StorageError(f"{source} is damaged: restore it from an earlier backup.")


def _read_header(content: BinaryIO, backup: Path) -> dict[str, Any]:
    try:
        header = json.loads(content.readline(_LONGEST_HEADER))
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict) or header.get("kind") != _KIND or header.keys() < {"bytes", "sha256"}:
        raise StorageError(f"{backup} is not a backup from `personaplug backup`, or it is damaged. Use another backup.")
    return header


def _copy(content: BinaryIO, target: BinaryIO | None) -> str:
    """Copy the rest of a file to the target, and return its SHA-256; None = only compute the SHA-256."""
    digest = hashlib.sha256()
    while chunk := content.read(_CHUNK_BYTES):
        digest.update(chunk)
        if target:
            target.write(chunk)
    return digest.hexdigest()


def _check_is_new(path: Path) -> None:
    if path.exists() or path.is_symlink():
        raise ConfigError(f"{path} already exists. Name another file, or move the existing file away.")


@contextmanager
def _temporary(target: Path) -> Iterator[Path]:
    """Yield a private empty file in a new folder beside the target; remove both at the end."""
    folder = target.absolute().with_name(f".{target.name}.{os.urandom(4).hex()}.tmp")
    with storage_errors(target):
        make_private_folder(folder)
        try:
            os.close(create_private(folder / "file"))
            yield folder / "file"
        finally:
            shutil.rmtree(folder, ignore_errors=True)
