"""Wiping: what was removed from a shard is no longer found in the database's files either.

SQLite overwrites rows that are deleted, but not the copies that it leaves in free space of a page when it moves rows
between pages; PostgreSQL leaves removed rows until their pages are rewritten. So the shard's tables are written anew,
which costs one of so many parts of the database, and the log of changes, where removed rows live on, is emptied.
"""

from __future__ import annotations

import time

from personaplug.errors import StorageError
from personaplug.store.database import Connection, Database, SQLAlchemyError, sa
from personaplug.store.schema import Shard

_PAUSE_S = 0.05
_NOT_ALLOWED = "42501"


def wipe_shard(database: Database, shard: Shard) -> tuple[str, ...]:
    """Write a shard anew, so that its files hold nothing that was removed before this call.

    Returns:
        What was cleared: `tables`, and `log` where the database let us.
    Raises:
        StorageError: if somebody goes on reading the old state; then nothing is lost, and the call can be repeated.
    """
    if database.file:
        with database.writing() as connection:
            for table in shard.tables:
                _rewrite(connection, table)
        _empty_sqlite_log(database)
        return ("tables", "log")
    with database.plain() as connection:
        _await_older_readers(connection, wait_s=database.wait_s)
        for table in shard.tables:
            connection.execute(sa.text(f"VACUUM (FULL) {table.name}"))
        return ("tables", "log") if _empty_postgres_log(connection) else ("tables",)


def _rewrite(connection: Connection, table: sa.Table) -> None:
    """Copy a table's rows into a new one in its place; SQLite fills the old one's pages with zeros."""
    anew = table.to_metadata(sa.MetaData(), name=f"{table.name}_anew")
    connection.execute(sa.schema.CreateTable(anew))
    in_order = sa.select(table).order_by(*table.primary_key)
    connection.execute(anew.insert().from_select(list(table.c.keys()), in_order))
    connection.execute(sa.schema.DropTable(table))
    connection.execute(sa.text(f"ALTER TABLE {anew.name} RENAME TO {table.name}"))
    for index in table.indexes:
        index.create(connection)


def _empty_sqlite_log(database: Database) -> None:
    """Move all of the write-ahead log into the database and cut the log's file to nothing."""
    give_up_at = time.monotonic() + database.wait_s
    with database.plain() as connection:
        # A reader of an older state still needs the log, whatever the driver waits for by itself.
        while connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").one()[0]:
            _pause(give_up_at)


def _await_older_readers(connection: Connection, *, wait_s: float) -> None:
    """Wait for transactions that began before: a rewritten table keeps what they may still see."""
    give_up_at = time.monotonic() + wait_s
    now = connection.execute(sa.select(sa.func.clock_timestamp())).scalar_one()
    older = sa.text(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() "
        "AND (backend_xmin IS NOT NULL OR backend_xid IS NOT NULL) AND xact_start < :now"
    )
    while connection.execute(older, {"now": now}).scalar_one():
        _pause(give_up_at)


def _empty_postgres_log(connection: Connection) -> bool:
    """Begin a new file of the write-ahead log and let go of those before it, if our role may."""
    try:
        connection.execute(sa.text("SELECT pg_switch_wal()"))
        connection.execute(sa.text("CHECKPOINT"))
    except SQLAlchemyError as error:
        if getattr(getattr(error, "orig", None), "sqlstate", None) == _NOT_ALLOWED:
            return False
        raise
    return True


def _pause(give_up_at: float) -> None:
    if time.monotonic() > give_up_at:
        raise StorageError(
            "The rows are removed, but a reader that began before still needs their bytes. End it, then erase the same "
            "user again: that clears the files and gives the receipt."
        )
    time.sleep(_PAUSE_S)
