"""A real PostgreSQL for the tests: from the wheel `pgserver` or as installed on the machine, in a folder of its own."""

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
    "fsync": "off",  # the machine is not going to lose power, only clients are killed
    "wal_recycle": "off",  # as docs/store.md asks for: old log files are removed, not kept for reuse
    "max_connections": "60",
    "shared_buffers": "32MB",
}


class NoServer(Exception):
    """None could be started; says which were tried, and what each said."""


class PostgresServer:
    """A running server.

    Attributes:
        folder: its data.
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
        """How a database is reached."""
        return f"postgresql://postgres@/{database}?host={self.folder.parent}"

    def cleaned_database(self) -> str:
        """The URL of the first database, empty again: a database for every test would be tens of thousands of files."""
        others = "pid <> pg_backend_pid() AND backend_type = 'client backend'"
        self.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}")
        self.execute("DROP SCHEMA public CASCADE")
        self.execute("CREATE SCHEMA public")
        return self.url()

    def new_database(self) -> str:
        """The URL of an empty database."""
        self._databases += 1
        name = f"test_{self._databases}"
        self.execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def number_of(self, url: str) -> int:
        """The number that names a database's folder."""
        import psycopg

        with psycopg.connect(url) as connection:
            row = connection.execute(
                "SELECT oid::bigint FROM pg_database WHERE datname = current_database()"
            ).fetchone()
        assert row
        return int(row[0])

    def execute(self, statement: str) -> None:
        """Run a statement as the superuser, outside of a transaction."""
        import psycopg

        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(statement.encode())

    def pause(self) -> None:
        """Stop all its processes: connections stay open, and nothing is answered."""
        for process in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):  # one that was about to end
                process.suspend()

    def resume(self) -> None:
        """Let them go on."""
        for process in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()

    def _processes(self) -> list[psutil.Process]:
        main = psutil.Process(self._process.pid)
        return [main, *main.children(recursive=True)]

    def stop(self) -> None:
        """End it, and its data."""
        self._process.send_signal(signal.SIGQUIT)  # at once: nobody wants the data
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
        NoServer: if there is none that starts here.
    """
    failures = []
    for programs in _candidates():
        # A socket's path may have 107 characters, fewer than pytest's own folders need.
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
    """Folders of PostgreSQL's programs."""
    # Not imported: the package itself would add a user to the machine where root runs the tests.
    if spec := importlib.util.find_spec("pgserver"):
        yield from (Path(folder) / "pginstall" / "bin" for folder in spec.submodule_search_locations or ())
    if on_path := shutil.which("postgres"):
        yield Path(on_path).resolve().parent
    yield from sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)


def _unprivileged() -> dict[str, int]:
    """Who runs the server: PostgreSQL refuses root, so it is nobody then."""
    if os.geteuid() != 0:
        return {}
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid}
