"""Access SQLite or PostgreSQL through SQLAlchemy. Error messages contain no user text."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from personaplug.errors import ConfigError, MissingExtra, StorageError
from personaplug.infra.atomic_io import storage_errors
from personaplug.store.private_files import create_private, ensure_private, make_private_folder, restrict
from personaplug.store.row_checksums import damaged

try:
    import sqlalchemy as sa
    from sqlalchemy import event
    from sqlalchemy.engine import URL, Connection, Engine, make_url
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError
except ImportError as error:
    raise MissingExtra("the store of histories", extra="serve") from error

__all__ = ["Connection", "Database", "SQLAlchemyError", "WAIT_S", "execute", "for_update", "insert_rows"]
__all__ += ["lock_table", "sa"]

_Parameters = Mapping[str, Any] | Sequence[Mapping[str, Any]]

_RETRY_PAUSE_S = 0.01
WAIT_S = 10.0
_LOCK_MARGIN_S = 2.0  # added to `wait_s`, after which the server itself ends a wait for a lock
_REST_S = 2.0  # how long calls fail at once after the server did not answer
_PAGE_SIZE = "page_size=8192"
_PRAGMAS = (
    _PAGE_SIZE,
    "cell_size_check=ON",  # detects damaged pages
    "journal_mode=WAL",
    "wal_autocheckpoint=1",  # after each commit, so that a copy of the main file lacks as few rows as possible
    "synchronous=FULL",  # in WAL mode, a lower level may lose acknowledged commits
    "secure_delete=ON",  # overwrites removed rows and freed pages
    "temp_store=MEMORY",  # keeps user data out of temporary files
)


class Database:
    """A database shared by threads and processes. All methods raise StorageError if it cannot be used.

    Args:
        location: a path or `sqlite:///…` URL of a file, or a `postgresql://…` URL.
        connections: largest number of open connections. They are opened on demand. A forked process opens new ones.
        wait_s: seconds to wait for a connection, a lock, or an answer of the PostgreSQL server.
    Attributes:
        file: SQLite's file; None for PostgreSQL.
    """

    def __init__(self, location: str | Path, *, connections: int = 8, wait_s: float = WAIT_S) -> None:
        self.url = _parse_url(location)
        self.file = Path(self.url.database or "") if self.url.get_backend_name() == "sqlite" else None
        self.wait_s, self._connections = wait_s, connections
        self._pid, self._engine = os.getpid(), self._create_engine()
        self._inherited: list[Engine] = []
        self._file_id: tuple[int, int] | None = None  # device and inode of SQLite's file when it was first opened
        self._silent_until = 0.0

    @property
    def secret_file(self) -> Path | None:
        """The default file of the store's secret, beside SQLite's file."""
        return self.file and self.file.with_name(f"{self.file.name}.secret")

    @contextlib.contextmanager
    def read_transaction(self) -> Iterator[Connection]:
        """Open a transaction that sees one snapshot, without later commits."""
        options: dict[str, Any] = {} if self.file else {"isolation_level": "REPEATABLE READ"}
        with self._connect(options) as connection, connection.begin():
            yield connection

    @contextlib.contextmanager
    def write_transaction(self) -> Iterator[Connection]:
        """Open a transaction that is on disk when the block ends; an error rolls it back."""
        with self._connect({"personaplug_writes": True}) as connection, connection.begin():
            yield connection

    def indexes_fit(self, table: str) -> bool:
        """Return whether the indexes of a SQLite table match its rows, in 3 µs per row. Return True for PostgreSQL."""
        if self.file is None:
            return True
        with self.read_transaction() as connection:
            return bool(connection.exec_driver_sql(f"PRAGMA integrity_check('{table}')").scalar_one() == "ok")

    def autocommit(self) -> contextlib.AbstractContextManager[Connection]:
        """Open a connection for statements that cannot run in a transaction."""
        return self._connect({"isolation_level": "AUTOCOMMIT"}, is_patient=True)

    def ping(self, *, timeout_s: float = 3) -> None:
        """Query the database over a new connection; raise StorageError if it does not answer in time."""
        try:
            if self.file:
                self._check_file(self.file)
                with contextlib.closing(sqlite3.connect(f"{self.file.as_uri()}?mode=rw", timeout_s, uri=True)) as file:
                    file.execute("SELECT format FROM history_store").fetchone()
            else:
                _ping_postgres(self.url, timeout_s=timeout_s)
        except StorageError:
            raise
        except Exception as error:
            raise StorageError(f"The store {self} does not answer ({type(error).__name__}).") from None

    def close(self) -> None:
        """Close idle connections."""
        self.engine().dispose()

    def __str__(self) -> str:
        return self.url.render_as_string(hide_password=True)

    @contextlib.contextmanager
    def _connect(self, options: dict[str, Any], *, is_patient: bool = False) -> Iterator[Connection]:
        if time.monotonic() < self._silent_until:
            raise StorageError(f"The store {self} did not answer a moment ago. Try again in a few seconds.")
        try:
            with (
                self._file_errors(),
                self.engine().connect() as connection,
                self._limited_waits(connection, is_patient=is_patient),
            ):
                yield connection.execution_options(**options)
        except SQLAlchemyError as error:
            raise self._storage_error(error) from None  # the driver's message quotes rows
        except UnicodeDecodeError:  # SQLite's message about a damaged schema quotes its bytes
            raise damaged("its schema") from None

    @contextlib.contextmanager
    def _file_errors(self) -> Iterator[None]:
        """Convert errors of SQLite's file to StorageError; before the first opening, make the file private."""
        if self.file is None:
            yield
            return
        if self._file_id is None:
            make_private_folder(self.file.parent)
            if not self.file.exists():
                _create_file(self.file)
            ensure_private(self.file)
            for ending in ("-wal", "-shm"):  # SQLite creates them with the permissions of the main file
                with contextlib.suppress(FileNotFoundError):
                    restrict(self.file.with_name(self.file.name + ending))
        self._check_file(self.file)
        with storage_errors(self.file):
            yield

    def _check_file(self, file: Path) -> None:
        """Check that the path still has the file that was first opened.

        SQLite continues to use a file after it is removed or replaced. Its writes would be lost, and erased users would
        stay in the new file.
        """
        try:
            status = file.stat()
        except OSError as error:
            raise StorageError(f"The store {self} cannot be opened ({type(error).__name__}).") from None
        file_id = status.st_dev, status.st_ino
        self._file_id = self._file_id or file_id
        if file_id != self._file_id:
            raise StorageError(
                f"The file of the store {self} was replaced while the store was open. Restart the server, or open the "
                f"store again."
            )

    @contextlib.contextmanager
    def _limited_waits(self, connection: Connection, *, is_patient: bool) -> Iterator[None]:
        """Limit the time that a connection to PostgreSQL waits for a silent server.

        With `is_patient`, a long statement may take longer if the server still answers other connections.
        """
        if self.file:
            yield
            return
        driver: Any = connection.connection.dbapi_connection
        default = driver.silence_s
        driver.silence_s, driver.is_patient = (default if is_patient else self.wait_s + _LOCK_MARGIN_S), is_patient
        try:
            yield
        finally:
            driver.silence_s, driver.is_patient = default, False

    def _storage_error(self, error: SQLAlchemyError) -> StorageError:
        cause = getattr(error, "orig", None)
        if type(cause).__name__ in ("ServerSilent", "ConnectionTimeout"):
            self._silent_until = time.monotonic() + _REST_S
            return StorageError(f"The store {self} does not answer. Start its server, or try again.")
        name = getattr(cause, "sqlite_errorname", None) or getattr(cause, "sqlstate", None) or type(error).__name__
        if name in ("SQLITE_BUSY", "SQLITE_LOCKED", "55P03", "TimeoutError"):
            advice = f"It was locked for more than {self.wait_s:g} s: try again"
        elif name in ("SQLITE_CORRUPT", "SQLITE_NOTADB"):
            advice = "It is damaged: restore it from a backup"
        else:
            advice = "Free disk space, check the permissions or start the server; then try again"
        return StorageError(f"The store {self} failed ({name}). {advice}. The change was not written.")

    def engine(self) -> Engine:
        """Return the engine of this process. A forked child must neither use nor close its parent's connections."""
        if self._pid != os.getpid():
            self._inherited.append(self._engine)
            self._pid, self._engine = os.getpid(), self._create_engine()
        return self._engine

    def _create_engine(self) -> Engine:
        options: dict[str, Any] = {"connect_args": {"timeout": self.wait_s}} if self.file else {"pool_pre_ping": True}
        options |= {"pool_size": self._connections, "max_overflow": 0, "pool_timeout": self.wait_s}
        try:
            engine = sa.create_engine(self.url, hide_parameters=True, **options)
        except ImportError as error:
            raise MissingExtra("a store in PostgreSQL", extra="postgres") from error
        event.listen(engine, "connect", self._prepare_sqlite if self.file else self._prepare_postgres)
        if self.file:
            event.listen(engine, "begin", _begin_sqlite)
        else:
            event.listen(engine, "do_connect", _connect_postgres)
        return engine

    def _prepare_sqlite(self, connection: Any, _: object) -> None:
        connection.isolation_level = None  # the driver starts no transactions; `_begin_sqlite` does
        deadline = time.monotonic() + self.wait_s
        for pragma in _PRAGMAS:
            _run_pragma(connection, pragma, deadline=deadline)

    def _prepare_postgres(self, connection: Any, _: object) -> None:
        connection.execute(f"SET lock_timeout = {int(self.wait_s * 1000)}")
        connection.commit()


def _connect_postgres(dialect: object, record: object, arguments: list[Any], options: dict[str, Any]) -> Any:
    from personaplug.store.postgres import ANSWER_S, BoundedConnection

    return BoundedConnection.connect(*arguments, **{"connect_timeout": round(ANSWER_S), **options})


def _ping_postgres(url: URL, *, timeout_s: float) -> None:
    from personaplug.store.postgres import ping

    ping(url.set(drivername="postgresql").render_as_string(hide_password=False), timeout_s=timeout_s)


def execute(
    connection: Connection, sql: str, parameters: _Parameters = (), *, expand: str = ""
) -> sa.CursorResult[Any]:
    """Run a statement with `:name` parameters, once for each set of parameters; `expand` names a list for `IN`."""
    return connection.execute(_statement(sql, expand), parameters or None)


@lru_cache(maxsize=10_000)
def _statement(sql: str, expand: str) -> sa.TextClause:
    statement = sa.text(sql)
    return statement.bindparams(sa.bindparam(expand, expanding=True)) if expand else statement


def lock_table(connection: Connection, table: str, *, alone: bool = False) -> None:
    """Lock a table until the transaction ends: against all other writers if `alone`, else against writers with `alone`.

    SQLite needs no lock, because it has one writer at a time.
    """
    if connection.dialect.name == "postgresql":
        execute(connection, f"LOCK TABLE {table} IN {'SHARE ROW EXCLUSIVE' if alone else 'ROW EXCLUSIVE'} MODE")


def for_update(connection: Connection) -> str:
    """Return the clause that locks selected rows; SQLite locks the whole database for a writer."""
    return "" if connection.dialect.name == "sqlite" else " FOR UPDATE"


def insert_rows(connection: Connection, table: str, rows: Sequence[tuple[Any, ...]]) -> None:
    """Insert rows whose values are in the order of the table's columns."""
    if rows:
        marks = ", ".join(["?" if connection.dialect.name == "sqlite" else "%s"] * len(rows[0]))
        # The driver gets the rows directly, because SQLAlchemy's preparation takes longer than SQLite's insertion.
        connection.exec_driver_sql(f"INSERT INTO {table} VALUES ({marks})", list(rows))


def _create_file(file: Path) -> None:
    """Create an empty database with its first page, or leave the file that another process has created meanwhile.

    If the process is killed, the file has this page or does not exist: a file without it would be a damaged store.
    """
    temporary = file.with_name(f".{file.name}.{os.urandom(4).hex()}.tmp")
    with storage_errors(file):
        os.close(create_private(temporary))
        try:
            with contextlib.closing(sqlite3.connect(temporary)) as database:
                database.execute(f"PRAGMA {_PAGE_SIZE}")
                database.execute("PRAGMA journal_mode=WAL")  # writes the page
            with contextlib.suppress(FileExistsError):
                os.link(temporary, file)
        finally:
            temporary.unlink()


def _run_pragma(connection: Any, pragma: str, *, deadline: float) -> None:
    while True:
        try:
            connection.execute(f"PRAGMA {pragma}")
            return
        except sqlite3.OperationalError as error:
            # SQLite does not wait for other connections when it switches to WAL.
            if error.sqlite_errorname != "SQLITE_BUSY" or time.monotonic() > deadline:
                raise
            time.sleep(_RETRY_PAUSE_S)


def _parse_url(location: str | Path) -> URL:
    if isinstance(location, Path) or "://" not in location:
        return URL.create("sqlite", database=str(Path(location).absolute()))
    try:
        url = make_url(location)
        backend = url.get_backend_name()
    except (ArgumentError, NoSuchModuleError, ValueError):
        backend = ""
    if backend == "sqlite" and url.database not in (None, "", ":memory:") and not url.query:
        return URL.create("sqlite", database=str(Path(url.database or "").absolute()))
    if backend in ("postgresql", "postgres"):
        return url.set(drivername="postgresql+psycopg") if "+" not in url.drivername else url
    raise ConfigError("Name a store by a path, sqlite:///FILE or postgresql://USER:PASSWORD@HOST/DATABASE.")


def _begin_sqlite(connection: Connection) -> None:
    # A writer locks at once. If it started as a reader, it would fail when another process writes first.
    writes = connection.get_execution_options().get("personaplug_writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
