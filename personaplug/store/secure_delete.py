"""Erase users: delete their rows, then rewrite the shard so that the database's files no longer contain their bytes.

SQLite overwrites deleted rows. But when it moves rows to another page, it leaves copies in the old page. PostgreSQL
keeps deleted rows until their pages are rewritten. So an erasure rewrites the shard's tables, and empties the
write-ahead log, which also contains the deleted rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from personaplug.errors import StorageError
from personaplug.store.database import Connection, Database, SQLAlchemyError, execute
from personaplug.store.receipts import Receipt
from personaplug.store.schema import Shard, create_index, create_tables

_RETRY_PAUSE_S = 0.05


def record_erasure(connection: Connection, erasure: dict[str, Any]) -> None:
    """Insert an erasure, given as a dict of its row's columns."""
    sql = (
        "INSERT INTO history_erasures (tenant, hashed_user, items, erased_at, shard, wiped) "
        "VALUES (:tenant, :hashed_user, :items, :erased_at, :shard, :wiped)"
    )
    execute(connection, sql, erasure)


def record_erasure_of_nobody(connection: Connection, erasure: dict[str, Any]) -> None:
    """Insert an erasure of a user without rows; it replaces earlier erasures of this kind."""
    execute(connection, "DELETE FROM history_erasures WHERE hashed_user = :hashed_user AND wiped = ''", erasure)
    record_erasure(connection, erasure | {"items": 0, "wiped": ""})


def forget_erasures_of_nobody(database: Database, *, before: str) -> None:
    """Delete erasures of users without rows that are older than all valid tickets; `before` is ISO 8601 in UTC."""
    with database.write_transaction() as connection:
        execute(connection, "DELETE FROM history_erasures WHERE wiped = '' AND erased_at < :before", {"before": before})


def unfinished_erasures(connection: Connection) -> dict[int, str]:
    """Return the hashed user of each erasure whose bytes are not removed from the files yet, by erasure number."""
    sql = "SELECT number, hashed_user FROM history_erasures WHERE wiped IS NULL ORDER BY number"
    return {row.number: row.hashed_user for row in execute(connection, sql)}


def last_erasure(connection: Connection, hashed_user: str) -> str:
    """Return when a user was last erased, in ISO 8601; "" = never."""
    sql = "SELECT max(erased_at) FROM history_erasures WHERE hashed_user = :user"
    return execute(connection, sql, {"user": hashed_user}).scalar_one() or ""


def finish_erasure(database: Database, number: int) -> Receipt:
    """Rewrite the shard unless another call has done so, and return the receipt without a signature.

    The rewriting finishes all erasures of the shard whose rows were deleted before it.
    """
    with database.read_transaction() as connection:
        row = execute(connection, "SELECT * FROM history_erasures WHERE number = :number", {"number": number}).one()
        sql = "SELECT number FROM history_erasures WHERE wiped IS NULL AND shard = :shard"
        numbers = execute(connection, sql, {"shard": row.shard}).scalars().all()
    wiped = row.wiped
    if wiped is None:
        wiped = " ".join(rewrite_shard(database, Shard(row.shard)))
        sql = "UPDATE history_erasures SET wiped = :wiped WHERE number = :number AND wiped IS NULL"
        with database.write_transaction() as connection:
            execute(connection, sql, [{"wiped": wiped, "number": finished} for finished in numbers])
    return Receipt(row.tenant, row.hashed_user, row.items, row.erased_at, wiped=tuple(wiped.split()))


def rewrite_shard(database: Database, shard: Shard) -> tuple[str, ...]:
    """Rewrite a shard so that the files contain no deleted rows, and return the rewritten parts of `Receipt.wiped`.

    Raises StorageError if another transaction still reads the old rows. The call can be repeated.
    """
    if database.file:
        with database.write_transaction() as connection:
            _rewrite_sqlite_tables(connection, shard)
        with database.autocommit() as connection:
            # While a transaction reads an older snapshot, SQLite keeps the log and returns 1 (busy).
            checkpoint = "PRAGMA wal_checkpoint(TRUNCATE)"
            _wait_while(lambda: execute(connection, checkpoint).one()[0], wait_s=database.wait_s)
        return ("tables", "log")
    with database.autocommit() as connection:
        _await_older_readers(connection, wait_s=database.wait_s)
        for table in (shard.users, *shard.tables_of_items):
            execute(connection, f"VACUUM (FULL) {table}")
        return ("tables", "log") if _empty_postgres_log(connection) else ("tables",)


def _rewrite_sqlite_tables(connection: Connection, shard: Shard) -> None:
    """Copy the rows into new tables and drop the old tables, whose pages SQLite fills with zeros."""
    tables = (shard.users, *shard.tables_of_items)
    for table in tables:
        execute(connection, f"ALTER TABLE {table} RENAME TO old_{table}")
    create_tables(connection, shard)
    for table in tables:
        execute(connection, f"INSERT INTO {table} SELECT * FROM old_{table} ORDER BY 1")
        execute(connection, f"DROP TABLE old_{table}")
    create_index(connection, shard)


def _await_older_readers(connection: Connection, *, wait_s: float) -> None:
    """Wait until older transactions end, because a rewritten table keeps the rows that they can still see."""
    now = execute(connection, "SELECT clock_timestamp()").scalar_one()
    older = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() "
        "AND (backend_xmin IS NOT NULL OR backend_xid IS NOT NULL) AND xact_start < :now"
    )
    _wait_while(lambda: execute(connection, older, {"now": now}).scalar_one(), wait_s=wait_s)


def _empty_postgres_log(connection: Connection) -> bool:
    """Start a new file of the write-ahead log, and release the older files; return whether our role has the right."""
    try:
        execute(connection, "SELECT pg_switch_wal()")
        execute(connection, "CHECKPOINT")
    except SQLAlchemyError as error:
        if getattr(getattr(error, "orig", None), "sqlstate", None) != "42501":  # insufficient privilege
            raise
        return False
    return True


def _wait_while(is_blocked: Callable[[], int], *, wait_s: float) -> None:
    deadline = time.monotonic() + wait_s
    while is_blocked():
        if time.monotonic() > deadline:
            raise StorageError(
                "The rows are deleted, but an older transaction still reads them. End that transaction. Then erase the "
                "same user again to remove the bytes from the files and get the receipt."
            )
        time.sleep(_RETRY_PAUSE_S)
