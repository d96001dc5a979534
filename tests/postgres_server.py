"""A real PostgreSQL server for tests, from the wheel `pgserver` or from the machine, in a temporary folder."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

SETTINGS = {
    "listen_addresses": "",
    "fsync": "off",  # tests kill clients, but never cut the power
    "wal_recycle": "off",  # required by docs/store.md: old log files are removed, not reused
    "max_connections": "60",
    "shared_buffers": "32MB",
}


class NoServer(Exception):
    """No server could be started; the message lists the attempts and their errors."""


class PostgresServer:
    """A running server.

    Attributes:
        folder: folder with the server's data.
    """

    def __init__(self, programs: Path, folder: Path) -> None:
        self.folder, self._databases = folder, 0
        self._log = (folder.parent / "log").open("wb")
        options = [word for name, value in SETTINGS.items() for word in ("-c", f"{name}={value}")]
        command = [str(programs / "postgres"), "-D", str(folder), "-k", str(folder.parent), *options]
        self._process = subprocess.Popen(
            command, stdout=self._log, stderr=self._log, cwd=folder.parent, **_unprivileged()
        )  # type: ignore[call-overload]
        self._await()

    def url(self, database: str = "postgres") -> str:
        """Return the connection URL of a database."""
        return f"postgresql://postgres@/{database}?host={self.folder.parent}"

    def cleaned_database(self) -> str:
        """Empty the first database and return its URL. A database per test would create tens of thousands of files."""
        others = "pid <> pg_backend_pid() AND backend_type = 'client backend'"
        self.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}")
        self.execute("DROP SCHEMA public CASCADE")
        self.execute("CREATE SCHEMA public")
        return self.url()

    def new_database(self) -> str:
        """Return the URL of an empty database."""
        self._databases += 1
        name = f"test_{self._databases}"
        self.execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def number_of(self, url: str) -> int:
        """Return the number in the name of a database's folder."""
        import psycopg

        with psycopg.connect(url) as connection:
            row = connection.execute(
                "SELECT oid::bigint FROM pg_database WHERE datname = current_database()"
            ).fetchone()
        assert row
        return int(row[0])

    def execute(self, statement: str) -> None:
        """Run a statement as the superuser, outside a transaction."""
        import psycopg

        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(statement.encode())

    def pause(self) -> None:
        """Suspend all processes of the server: connections stay open, but get no response."""
        for process in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):  # the process has just ended
                process.suspend()

    def resume(self) -> None:
        """Resume the suspended processes."""
        for process in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()

    def _processes(self) -> list[psutil.Process]:
        main = psutil.Process(self._process.pid)
        return [main, *main.children(recursive=True)]

    def stop(self) -> None:
        """Stop the server and delete its data."""
        self._process.send_signal(signal.SIGQUIT)  # stop at once, because the data is not needed
        self._process.wait(timeout=60)
        self._log.close()

    def _await(self) -> None:
        import psycopg

        for _ in range(600):
            with contextlib.suppress(psycopg.OperationalError):
                psycopg.connect(self.url()).close()
                return
            if self._process.poll() is not None:
                break
            time.sleep(0.1)
        raise NoServer((self.folder.parent / "log").read_text(errors="replace")[-500:])


@contextlib.contextmanager
def postgres_server() -> Iterator[PostgresServer]:
    """Start a server for the block.

    Raises:
        NoServer: if no server can be started.
    """
    failures = []
    for programs in _candidates():
        # The path of a socket may have at most 107 characters; pytest's folders are longer.
        place = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))
        try:
            server = _started(programs, place)
        except (NoServer, OSError, subprocess.SubprocessError) as error:
            failures.append(f"{programs}: {error} {getattr(error, 'stderr', '') or ''}"[:500])
            shutil.rmtree(place, ignore_errors=True)
            continue
        try:
            yield server
        finally:
            server.stop()
            shutil.rmtree(place, ignore_errors=True)
        return
    raise NoServer("; ".join(failures) or "neither the package pgserver nor an installed PostgreSQL was found")


def _started(programs: Path, place: Path) -> PostgresServer:
    if user := _unprivileged().get("user"):
        os.chown(place, int(user), -1)
    words = ["-D", str(place / "data"), "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"]
    command = [str(programs / "initdb"), *words]
    subprocess.run(command, check=True, capture_output=True, text=True, cwd=place, timeout=120, **_unprivileged())  # type: ignore[call-overload]
    return PostgresServer(programs, place / "data")


def _candidates() -> Iterator[Path]:
    """Return folders with PostgreSQL's programs."""
    # Do not import the package: under root, it would add a user to the machine.
    if spec := importlib.util.find_spec("pgserver"):
        yield from (Path(folder) / "pginstall" / "bin" for folder in spec.submodule_search_locations or ())
    if on_path := shutil.which("postgres"):
        yield Path(on_path).resolve().parent
    yield from sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)


def _unprivileged() -> dict[str, int]:
    """Return the user that runs the server: `nobody` under root, because PostgreSQL refuses root."""
    if os.geteuid() != 0:
        return {}
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid}
