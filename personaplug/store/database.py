"""Database: SQLite or PostgreSQL through SQLAlchemy. Connections, transactions, and errors that show no user's text."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from personaplug.errors import ConfigError, MissingExtra, StorageError
from personaplug.infra.atomic_io import storage_errors

try:
    import sqlalchemy as sa
    from sqlalchemy import event
    from sqlalchemy.engine import URL, Connection, Engine, make_url
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError
except ImportError as error:
    raise MissingExtra("the store of histories", extra="serve") from error

__all__ = ["Connection", "Database", "SQLAlchemyError", "insert_rows", "mark_of", "sa"]

_LOCK = 0x706572736F6E61  # "persona": what writers of one PostgreSQL database share, and who must be alone takes whole
_PAUSE_S = 0.01
_PRAGMAS = (
    "page_size=8192",
    "journal_mode=WAL",
    "synchronous=FULL",  # in WAL mode, anything less may lose commits that were acknowledged
    "secure_delete=ON",  # what is removed is overwritten, pages that become free included
    "temp_store=MEMORY",  # no user's bytes in files beside the database
)


class Database:
    """A database that threads and processes use at once.

    Connections are bounded in number, made when needed and never carried over a fork. A commit has reached the disk
    when it returns.

    Args:
        where: a path or `sqlite:///…` URL of a file, or a `postgresql://…` URL.
        connections: at most so many at once; who needs another one waits.
        wait_s: how long a transaction waits for a connection or for another one's lock, in seconds.
    Raises:
        ConfigError: if it is neither.
        MissingExtra: if PostgreSQL's driver is not installed.

    Attributes:
        url: where it is; its text form hides the password.
        file: SQLite's file, or None.
        wait_s: as given.
    """

    def __init__(self, where: str | Path, *, connections: int = 8, wait_s: float = 30) -> None:
        self.url = _url(where)
        self.file = Path(self.url.database or "") if self.url.get_backend_name() == "sqlite" else None
        self.wait_s, self._connections = wait_s, connections
        self._process, self._engine, self._inherited = os.getpid(), self._new_engine(), list[Engine]()

    @contextlib.contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that sees one state of everything, whatever is committed meanwhile.

        Raises:
            StorageError: if the database cannot be used.
        """
        options: dict[str, Any] = {} if self.file else {"isolation_level": "REPEATABLE READ"}
        with self._transaction(options) as connection:
            yield connection

    @contextlib.contextmanager
    def writing(self, *, alone: bool = False) -> Iterator[Connection]:
        """A transaction that is on disk when the block ends well, and leaves nothing when it does not.

        Args:
            alone: no other such transaction is under way meanwhile. In SQLite none ever is.
        Raises:
            StorageError: if the database cannot be used.
        """
        with self._transaction({"personaplug_writes": True}) as connection:
            if not self.file:
                lock = sa.func.pg_advisory_xact_lock if alone else sa.func.pg_advisory_xact_lock_shared
                connection.execute(sa.select(lock(_LOCK)))
            yield connection

    @contextlib.contextmanager
    def plain(self) -> Iterator[Connection]:
        """A connection without a transaction, for statements that cannot stand in one.

        Raises:
            StorageError: if the database cannot be used.
        """
        with self._errors(), self._current().connect() as connection:
            yield connection.execution_options(isolation_level="AUTOCOMMIT")

    def close(self) -> None:
        """Close the connections that are not in use; the next transaction opens new ones."""
        self._current().dispose()

    def __repr__(self) -> str:
        return f"Database({self.url.render_as_string(hide_password=True)!r})"

    @contextlib.contextmanager
    def _transaction(self, options: dict[str, Any]) -> Iterator[Connection]:
        with (
            self._errors(),
            self._current().connect() as connection,
            connection.execution_options(**options).begin(),
        ):
            yield connection

    def _current(self) -> Engine:
        """The engine of this process: a fork's child must neither use nor close its parent's connections."""
        if self._process != os.getpid():
            self._inherited.append(self._engine)
            self._process, self._engine = os.getpid(), self._new_engine()
        return self._engine

    def _new_engine(self) -> Engine:
        try:
            engine = sa.create_engine(
                self.url,
                hide_parameters=True,
                pool_size=self._connections,
                max_overflow=0,
                pool_timeout=self.wait_s,
                pool_pre_ping=not self.file,
                **({"connect_args": {"timeout": self.wait_s}} if self.file else {}),
            )
        except ImportError as error:
            raise MissingExtra("a store in PostgreSQL", extra="postgres") from error
        if self.file:
            event.listen(engine, "connect", self._prepare_sqlite)
            event.listen(engine, "begin", _begin_sqlite)
        else:
            event.listen(engine, "connect", self._prepare_postgres)
        return engine

    def _prepare_sqlite(self, connection: Any, _: object) -> None:
        connection.isolation_level = None  # transactions begin where `_begin_sqlite` says, not where the driver guesses
        for pragma in _PRAGMAS:
            self._patiently(connection, f"PRAGMA {pragma}")

    def _patiently(self, connection: Any, statement: str) -> None:
        """Run a statement again while others are in the way, which SQLite does not wait for when it turns to a log."""
        give_up_at = time.monotonic() + self.wait_s
        while True:
            try:
                connection.execute(statement)
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorname != "SQLITE_BUSY" or time.monotonic() > give_up_at:
                    raise
                time.sleep(_PAUSE_S)

    def _prepare_postgres(self, connection: Any, _: object) -> None:
        connection.execute(f"SET lock_timeout = {int(self.wait_s * 1000)}")
        connection.commit()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            if self.file:
                with storage_errors(self.file):
                    yield
            else:
                yield
        except SQLAlchemyError as error:
            raise self._described(error) from None  # the driver's own words quote rows

    def _described(self, error: SQLAlchemyError) -> StorageError:
        cause = getattr(error, "orig", None)
        name = getattr(cause, "sqlite_errorname", None) or getattr(cause, "sqlstate", None) or type(error).__name__
        if name in ("SQLITE_BUSY", "SQLITE_LOCKED", "55P03", "TimeoutError"):
            advice = f"Others kept it for more than {self.wait_s:g} s: try again"
        elif name in ("SQLITE_CORRUPT", "SQLITE_NOTADB"):
            advice = "It is damaged: restore it from a backup"
        else:
            advice = "Make room, give leave to write, or start its server; then do the same again"
        where = self.url.render_as_string(hide_password=True)
        return StorageError(
            f"The store {where} did not do what it was asked ({name}). {advice}. Nothing was half done."
        )


def insert_rows(connection: Connection, table: sa.Table, rows: Sequence[tuple[Any, ...]]) -> None:
    """Insert many rows, their values in the order of the table's columns.

    The driver gets them as they are: SQLAlchemy's own preparation takes longer than SQLite's work.
    """
    if rows:
        marks = ", ".join([mark_of(connection)] * len(table.columns))
        connection.exec_driver_sql(f"INSERT INTO {table.name} VALUES ({marks})", list(rows))


def mark_of(connection: Connection) -> str:
    """What stands for a value in a statement that the driver gets as it is."""
    return "?" if connection.dialect.name == "sqlite" else "%s"


def _url(where: str | Path) -> URL:
    if isinstance(where, Path) or "://" not in where:
        return URL.create("sqlite", database=str(Path(where).absolute()))
    try:
        url = make_url(where)
        llm = url.get_backend_name()
    except (ArgumentError, NoSuchModuleError, ValueError):
        llm = ""
    if llm == "sqlite" and url.database not in (None, "", ":memory:") and not url.query:
        return URL.create("sqlite", database=str(Path(url.database or "").absolute()))
    if llm in ("postgresql", "postgres"):
        return url.set(drivername="postgresql+psycopg") if "+" not in url.drivername else url
    raise ConfigError("A store is a path, sqlite:///FILE or postgresql://USER:PASSWORD@HOST/DATABASE.")


def _begin_sqlite(connection: Connection) -> None:
    # A writer that began as a reader could not go on where another one has written meanwhile.
    writes = connection.get_execution_options().get("personaplug_writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
