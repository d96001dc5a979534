"""Connections to PostgreSQL that give up on a server that does not answer.

A stopped or unreachable server sends nothing, not even an error, and the kernel keeps its connections open. So the
client itself must limit the time that it waits.
"""

from __future__ import annotations

import select
import time
from collections.abc import Generator
from typing import Any

import psycopg

ANSWER_S = 5.0
"""Seconds within which a running server opens a connection, and answers statements that wait for no lock."""

_LONGEST_S = 600.0  # of a statement that may take long


class ServerSilent(psycopg.OperationalError):
    """The server did not answer in time."""


class BoundedConnection(psycopg.Connection[Any]):
    """A connection whose every wait for the server ends.

    Attributes:
        silence_s: how long the server may send nothing.
        is_patient: whether a statement may take longer, as long as the server opens other connections meanwhile.
    """

    silence_s = ANSWER_S
    is_patient = False

    def wait(self, gen: Generator[Any, Any, Any], *_: Any, **__: Any) -> Any:
        """Do what `psycopg.Connection.wait` does, for a limited time."""
        started = time.monotonic()
        try:
            wanted = next(gen)
            while True:
                ready = _poll(self.pgconn.socket, wanted, self.silence_s)
                if not ready and not self._may_go_on(started):
                    raise ServerSilent(f"no answer within {self.silence_s:g} s")
                wanted = gen.send(ready) if ready else wanted
        except StopIteration as stop:
            return stop.value
        except (ServerSilent, KeyboardInterrupt):
            self.pgconn.finish()  # an answer that comes later must not be taken for that of another statement
            raise

    def _may_go_on(self, started: float) -> bool:
        if not self.is_patient or time.monotonic() > started + _LONGEST_S:
            return False
        try:
            ping(self.info.dsn, password=self.info.password)
        except psycopg.OperationalError:
            return False
        return True


def ping(dsn: str, *, password: str = "", timeout_s: float = ANSWER_S) -> None:
    """Ask a server for an answer over a new connection; raise OperationalError if there is none in time."""
    options: dict[str, Any] = {"password": password} if password else {}
    with BoundedConnection.connect(dsn, connect_timeout=max(2, round(timeout_s)), **options) as connection:
        connection.silence_s = timeout_s
        connection.execute("SELECT 1")


def _poll(descriptor: int, wanted: int, timeout_s: float) -> int:
    """Wait until the socket can be read (1) or written (2), as `wanted` says; return which, or 0 after the timeout."""
    poll = select.poll()
    poll.register(descriptor, (select.POLLIN if wanted & 1 else 0) | (select.POLLOUT if wanted & 2 else 0))
    events = poll.poll(timeout_s * 1000)
    if not events:
        return 0
    happened = events[0][1]
    if happened & ~(select.POLLIN | select.POLLOUT):  # closed: reading reports it
        return wanted
    return (1 if happened & select.POLLIN else 0) | (2 if happened & select.POLLOUT else 0)
