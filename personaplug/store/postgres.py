"""Connections to PostgreSQL with timeouts.

A stopped or unreachable server sends no error, and the kernel keeps its connections open. So the client must limit the
time that it waits.
"""

from __future__ import annotations

import select
import time
from collections.abc import Generator
from typing import Any

import psycopg

ANSWER_S = 5.0
"""Seconds in which a running server opens a connection and answers a statement that waits for no lock."""

_LONGEST_S = 600.0  # the longest time of a statement on a patient connection


class ServerSilent(psycopg.OperationalError):
    """The server did not answer in time."""


class BoundedConnection(psycopg.Connection[Any]):
    """A connection that raises ServerSilent if the server does not answer in time.

    Attributes:
        silence_s: seconds without data from the server before the connection is closed.
        is_patient: whether a statement may take longer if the server still answers a new connection.
    """

    silence_s = ANSWER_S
    is_patient = False

    def wait(self, gen: Generator[Any, Any, Any], *_: Any, **__: Any) -> Any:
        """Wait like `psycopg.Connection.wait`, but with a timeout."""
        started = time.monotonic()
        try:
            wanted = next(gen)
            while True:
                ready = _poll(self.pgconn.socket, wanted, self.silence_s)
                if not ready and not self._may_continue(started):
                    raise ServerSilent(f"no answer within {self.silence_s:g} s")
                wanted = gen.send(ready) if ready else wanted
        except StopIteration as stop:
            return stop.value
        except (ServerSilent, KeyboardInterrupt):
            self.pgconn.finish()  # else a late answer could be read as the answer to another statement
            raise

    def _may_continue(self, started: float) -> bool:
        if not self.is_patient or time.monotonic() > started + _LONGEST_S:
            return False
        try:
            ping(self.info.dsn, password=self.info.password)
        except psycopg.OperationalError:
            return False
        return True


def ping(dsn: str, *, password: str = "", timeout_s: float = ANSWER_S) -> None:
    """Query a server over a new connection; raise OperationalError if it does not answer in time."""
    options: dict[str, Any] = {"password": password} if password else {}
    with BoundedConnection.connect(dsn, connect_timeout=max(2, round(timeout_s)), **options) as connection:
        connection.silence_s = timeout_s
        connection.execute("SELECT 1")


def _poll(descriptor: int, wanted: int, timeout_s: float) -> int:
    """Wait until the socket can be read (1) or written (2), whichever is in `wanted`; return 0 after the timeout."""
    poll = select.poll()
    poll.register(descriptor, (select.POLLIN if wanted & 1 else 0) | (select.POLLOUT if wanted & 2 else 0))
    events = poll.poll(timeout_s * 1000)
    if not events:
        return 0
    event = events[0][1]
    if event & ~(select.POLLIN | select.POLLOUT):  # the socket is closed; the next read reports this
        return wanted
    return (1 if event & select.POLLIN else 0) | (2 if event & select.POLLOUT else 0)
