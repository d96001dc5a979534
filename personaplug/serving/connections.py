"""Connection limits: number of connections, size and arrival time of headers, and time that a reply stays unread.

Only a connection whose request holds a place is protected, and a place requires an API key. Other connections,
including idle ones, are closed to make room for new ones, so that a health check always gets through.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from personaplug.errors import ConfigError
from personaplug.serving.openai_protocol import error_reply, to_json

logger = logging.getLogger(__name__)
_errors = logging.getLogger(f"{__name__}.uvicorn")
_errors.setLevel(logging.ERROR)  # uvicorn would log each malformed request

_LOG_INTERVAL_S = 10
_MAX_PIPELINED = 16  # requests that wait on one connection for an earlier reply
_MAX_FIELDS = 100  # header fields of a request
_RESERVED_FILES = 64  # for the store, the keys and the engine
_MIN_CONNECTIONS = 32
_UNPROTECTED_CONNECTIONS = 16  # reserved for health checks and new connections
_BYTES_PER_BODY_BYTE = 8  # framing overhead of the smallest chunks


@dataclass(frozen=True)
class ConnectionLimits:
    """Limits of connections."""

    connections: int = 1024
    backlog: int = 1024  # connections that wait to be accepted; beyond it, a client's system retries after a second
    header_bytes: int = 64 * 2**10
    header_seconds: float = 10  # to receive a complete header
    stall_seconds: float = 20  # that a client may leave a full reply buffer unread
    body_bytes: int = 4 * 2**20

    @property
    def requests(self) -> int:
        """Maximum number of connections that requests to /v1/ may hold."""
        return self.connections - _UNPROTECTED_CONNECTIONS

    @classmethod
    def of_process(cls, **limits: Any) -> ConnectionLimits:
        """Return limits that fit the process's limit of open files; ConfigError if this limit is too low."""
        allowed, used = _file_limits()
        backlog = max(8, min(cls.backlog, allowed // 8))
        connections = min(cls.connections, allowed - used - backlog - _RESERVED_FILES)
        if connections < _MIN_CONNECTIONS:
            raise ConfigError(
                f"The process may open {allowed} files and has {used} open. This leaves too few for connections. "
                f"Raise the limit to {used + backlog + _RESERVED_FILES + _MIN_CONNECTIONS} or more (`ulimit -n`)."
            )
        return cls(connections=connections, backlog=backlog, **limits)


@dataclass(eq=False)
class ConnectionGuard:
    """Tracks the connections of a server, and closes connections beyond the limit."""

    limits: ConnectionLimits
    on_drop: Callable[[str], None] = lambda reason: None
    _connections: dict[GuardedProtocol, str] = field(default_factory=dict)  # oldest first, with their addresses
    _dropped: Counter[str] = field(default_factory=Counter)
    _last_log: float = -_LOG_INTERVAL_S

    def add(self, connection: GuardedProtocol, address: str) -> None:
        """Register a connection. If there are too many, close one that holds no place."""
        self._connections[connection] = address
        if len(self._connections) > self.limits.connections:
            self._drop_one()

    def discard(self, connection: GuardedProtocol) -> None:
        self._connections.pop(connection, None)

    def note_drop(self, reason: str) -> None:
        """Count a closed connection, and log the counts every few seconds."""
        self.on_drop(reason)
        self._dropped[reason] += 1
        if time.monotonic() - self._last_log >= _LOG_INTERVAL_S:
            counts = ", ".join(f"{count} {reason}" for reason, count in self._dropped.items())
            logger.warning("closed connections: %s; %d are open", counts, len(self._connections))
            self._dropped.clear()
            self._last_log = time.monotonic()

    def _drop_one(self) -> None:
        """Close the oldest connection without a place, from the address with the most such connections."""
        candidates = [(c, address) for c, address in self._connections.items() if not c.holds_place]
        counts = Counter(address for _, address in candidates)
        busiest = max(counts, key=counts.__getitem__)
        oldest = next(connection for connection, address in candidates if address == busiest)
        self.discard(oldest)
        oldest.abort("beyond the limit")


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with the limits of a guard. The application reads it from `scope["state"]["connection"]`."""

    guard: ConnectionGuard  # set by `guarded_protocol`

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.logger = _errors
        self.holds_place = False
        self._is_refused = self._has_header = self._has_begun = False
        self._running: RequestResponseCycle | None = None  # pipelined requests may wait behind it
        self._body_bytes = 0
        self._bare_bytes = 0  # of the current request, without its body and its first chunk
        self._header_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_header()
        self.guard.add(self, self.client[0] if self.client else "")

    def connection_lost(self, exc: Exception | None) -> None:
        self.guard.discard(self)
        self._stop_header_timer()
        self._stop_stall_timer()
        self._end_reply()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_refused or self.transport.is_closing():
            return
        body_bytes, self._has_begun = self._body_bytes, False
        super().data_received(data)
        bare_bytes = len(data) - (self._body_bytes - body_bytes)
        self._bare_bytes = 0 if self._has_begun else self._bare_bytes + bare_bytes
        limits = self.guard.limits
        limit = limits.header_bytes + (_BYTES_PER_BODY_BYTE * limits.body_bytes if self._has_header else 0)
        if self._bare_bytes > limit:
            self._refuse("a header that is too long")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._has_begun, self._has_header = True, False
        self.scope["state"]["connection"] = self

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._has_header:  # not a trailer
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > self.guard.limits.header_bytes or len(self.headers) > _MAX_FIELDS:
            self._refuse("a header that is too long")
        elif len(self.pipeline) >= _MAX_PIPELINED:
            self._refuse("too many requests in advance")
        if not self._is_refused:
            self._stop_header_timer()
            self._has_header = True
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        if not self._is_refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._is_refused:
            super().on_message_complete()

    def on_response_complete(self) -> None:
        is_body_unread = not self.pipeline and self.cycle.more_body
        super().on_response_complete()
        if is_body_unread:
            self.transport.close()
        elif not self.pipeline:
            self._await_header()
        self._watch_reader()  # also if the connection is closing: unread data would keep it open

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stop_stall_timer()
        self._watch_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_stall_timer()
        if self._is_idle:
            self._watch_reader()

    def send_400_response(self, msg: str) -> None:
        self._refuse("a malformed request", status=400)

    def _unsupported_upgrade_warning(self) -> None:
        """Log nothing: the upgrade is ignored, and the request is answered over HTTP."""

    def abort(self, reason: str) -> None:
        """Close the connection at once, and drop unread data."""
        self.guard.note_drop(reason)
        self._end_reply()
        self.transport.abort()

    def _refuse(self, reason: str, *, status: int = 431) -> None:
        if self._is_refused or self.transport.is_closing():
            return
        self._is_refused = True
        self.guard.note_drop(reason)
        if self._is_idle:
            body = to_json(error_reply(f"The connection was closed: {reason}.", code="connection", status=status))
            head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
            self.transport.write(b"HTTP/1.1 %d \r\n%s%s" % (status, head.encode(), body))
        self._end_reply()
        self.transport.close()
        self._watch_reader()

    @property
    def _is_idle(self) -> bool:
        return self._running is None or self._running.response_complete

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def _end_reply(self) -> None:
        """Tell a running reply that the client has disconnected."""
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
        self.flow.resume_writing()

    def _await_header(self) -> None:
        self._stop_header_timer()
        self._header_timer = self.loop.call_later(self.guard.limits.header_seconds, self._miss_header)

    def _miss_header(self) -> None:
        if self.headers is not None and not self._has_header:
            self._refuse("a header that did not come in time", status=408)
        elif not self.transport.is_closing():
            self.transport.close()  # idle

    def _watch_reader(self) -> None:
        if self._stall_timer is None and self.transport.get_write_buffer_size():
            self._stall_timer = self.loop.call_later(self.guard.limits.stall_seconds, self._check_reader)

    def _check_reader(self) -> None:
        self._stall_timer = None
        if (self.flow.write_paused or self._is_idle) and self.transport.get_write_buffer_size():
            self.abort("a reply that was not read")

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _stop_stall_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None


def guarded_protocol(guard: ConnectionGuard) -> type[GuardedProtocol]:
    """Return a protocol class for `uvicorn.Config(http=...)`."""
    return type("GuardedProtocol", (GuardedProtocol,), {"guard": guard})


def _file_limits() -> tuple[int, int]:
    """Return how many files the process may open, and how many are open."""
    try:
        import resource

        allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return (allowed if allowed != resource.RLIM_INFINITY else 2**20), len(os.listdir("/dev/fd"))
    except (ImportError, OSError):  # Windows
        return 2**20, 0
