"""Backups of a store in SQLite: one file with a checksum, made while the store is in use, and the way back.

To copy the database's file is not enough: its latest rows may stand in the write-ahead log beside it.
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
from personaplug.store.refill import copy_erasures, user_pages

_KIND = "personaplug backup 1"
_LONGEST_HEADER = 1000
_CHUNK_BYTES = 2**20
_LOGS = ("-wal", "-journal", "-shm")  # of an earlier file of that name; SQLite would write their rows into the new one


def back_up(store: HistoryStore, target: Path) -> None:
    """Write all of a store into a new file: a line that describes it, then a SQLite database.

    Raises:
        StorageError: if the store is damaged; then there is no file.
        ConfigError: if the store is in PostgreSQL, or the file exists.
    """
    source = store.database.file
    if source is None:
        raise ConfigError("PostgreSQL has its own backups: pg_dump --format=custom --file=FILE URL")
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
    """Make a store in SQLite from a backup.

    Args:
        target: the store's file, which must not exist.
        secret: file of the store's secret; None = the file beside the target.
        current: the store in use until now; whoever was erased from it is erased from the new one too.
    Raises:
        StorageError: if the backup is not as it was written.
    """
    if not backup.exists() or backup.is_dir():
        raise MissingData(f"There is no backup at {backup}: name a file that `personaplug backup` has made.")
    _check_is_new(target)
    for ending in _LOGS:
        _check_is_new(target.with_name(target.name + ending))
    secret = secret or target.with_name(f"{target.name}.secret")
    with _temporary(target) as copy:
        with storage_errors(backup), backup.open("rb") as content, copy.open("wb") as file:
            header = _read_header(content, backup)
            if _copy(content, file) != header["sha256"] or file.tell() != header["bytes"]:
                raise StorageError(f"The backup {backup} is damaged: it is not as it was written. Use another one.")
            os.fsync(file.fileno())
        with closing(HistoryStore.open(copy, secret=secret)) as store:
            if current is not None:
                copy_erasures(current, store)
            verify(store)
        with closing(sqlite3.connect(copy)) as database:
            database.execute("PRAGMA journal_mode=DELETE")  # all in one file
        copy.rename(target)


def verify(store: HistoryStore) -> None:
    """Read all that is stored; raise StorageError if anything is not as it was written."""
    for _, users in user_pages(store):
        for user in users:
            store.load_history(user.tenant, user.user_id)
            store.list_items(user.tenant, user.user_id)


def _copy_database(source: Path, copy: Path) -> None:
    try:
        with (
            closing(sqlite3.connect(f"{source.as_uri()}?mode=ro", uri=True)) as old,
            closing(sqlite3.connect(copy)) as new,
        ):
            old.backup(new)
            new.execute("PRAGMA journal_mode=DELETE")  # all in one file
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
        raise StorageError(f"{backup} is not a backup that `personaplug backup` has made, or it is damaged.")
    return header


def _copy(content: BinaryIO, target: BinaryIO | None) -> str:
    """Copy the rest of a file, if there is a target, and return its SHA-256."""
    digest = hashlib.sha256()
    while chunk := content.read(_CHUNK_BYTES):
        digest.update(chunk)
        if target:
            target.write(chunk)
    return digest.hexdigest()


def _check_is_new(path: Path) -> None:
    if path.exists() or path.is_symlink():
        raise ConfigError(f"{path} exists, and is not replaced: name another file, or move it away.")


@contextmanager
def _temporary(target: Path) -> Iterator[Path]:
    """Yield a private empty file in a new folder beside the target; remove both in the end."""
    folder = target.absolute().with_name(f".{target.name}.{os.urandom(4).hex()}.tmp")
    with storage_errors(target):
        make_private_folder(folder)
        try:
            os.close(create_private(folder / "file"))
            yield folder / "file"
        finally:
            shutil.rmtree(folder, ignore_errors=True)
