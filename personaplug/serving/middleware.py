"""ASGI middlewares between the network and the routes; each has one job. `guards` puts them in order."""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from abc import ABC, abstractmethod
from dataclasses import dataclass

from prometheus_client import Gauge
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from personaplug.serving.api_keys import ApiKeys, is_loopback
from personaplug.serving.error_responses import error_response
from personaplug.serving.telemetry import Telemetry

logger = logging.getLogger(__name__)

_BODIES_PER_REQUEST = 2  # bodies that may be on their way for every request that may run


@dataclass(frozen=True)
class RequestLimits:
    """What requests may take.

    Attributes:
        body_bytes: longest body.
        body_seconds: time until the body has arrived.
        requests: requests to /v1/ that run at once; the next gets a 429.
        items: items that one request may add to a history.
    """

    body_bytes: int = 4 * 2**20
    body_seconds: float = 30
    requests: int = 256
    items: int = 1000


def guards(api_keys: ApiKeys, limits: RequestLimits, *, telemetry: Telemetry) -> list[Middleware]:
    """The middlewares of a server, outermost first: a request is refused before it costs anything."""
    return [
        Middleware(MetricsMiddleware, telemetry=telemetry),
        Middleware(ErrorMaskingMiddleware),
        *([Middleware(LoopbackHostMiddleware)] if api_keys.is_open else []),
        Middleware(ApiKeyMiddleware, api_keys=api_keys),
        Middleware(
            BodyLimitMiddleware,
            max_bytes=limits.body_bytes,
            timeout_s=limits.body_seconds,
            max_bodies=_BODIES_PER_REQUEST * limits.requests,
        ),
        Middleware(ConcurrencyLimitMiddleware, max_requests=limits.requests, running=telemetry.running),
        Middleware(DisconnectMiddleware),
    ]


class _HttpMiddleware(ABC):
    """Handles HTTP requests and passes every other scope on."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await (self.handle if scope["type"] == "http" else self.app)(scope, receive, send)

    @abstractmethod
    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one HTTP request."""


class _StartTracker:
    """Passes messages on to `send` and notes whether the response has started."""

    def __init__(self, send: Send) -> None:
        self._send, self.started = send, False

    async def __call__(self, message: Message) -> None:
        self.started |= message["type"] == "http.response.start"
        await self._send(message)


class MetricsMiddleware(_HttpMiddleware):
    """Counts responses by route and status, and measures the time to the first byte of their bodies."""

    def __init__(self, app: ASGIApp, *, telemetry: Telemetry) -> None:
        super().__init__(app)
        self.telemetry = telemetry

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        arrived, timed = time.perf_counter(), False

        async def count_and_send(message: Message) -> None:
            nonlocal timed
            route = getattr(scope.get("route"), "path", "other")  # set by the router
            if message["type"] == "http.response.start":
                self.telemetry.requests.labels(route, str(message["status"])).inc()
            elif not timed and (message.get("body") or not message.get("more_body")):
                timed = True
                self.telemetry.seconds.labels(route).observe(time.perf_counter() - arrived)
            await send(message)

        await self.app(scope, receive, count_and_send)


class ErrorMaskingMiddleware(_HttpMiddleware):
    """Answers unexpected errors with 500, and requests that the stopping server cancels with 503.

    An error's message may quote the request, so it is neither logged nor passed to the server above.
    """

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        tracker = _StartTracker(send)
        try:
            await self.app(scope, receive, tracker)
        except asyncio.CancelledError:
            if tracker.started:
                raise
            await error_response(503, "The server is stopping.", code="stopping")(scope, receive, send)
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            logger.error("%s at %s:%s", type(error).__name__, frames[-1].filename, frames[-1].lineno)
            if not tracker.started:
                response = error_response(500, "The server failed on this request.", code="internal")
                await response(scope, receive, send)


class LoopbackHostMiddleware(_HttpMiddleware):
    """Requires a Host header that names this machine, so that no web page can make a browser reach an open server."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        host = Headers(scope=scope).get("host", "")
        name = host if host.endswith("]") else host.rpartition(":")[0] or host  # without the port
        if is_loopback(name):
            await self.app(scope, receive, send)
        else:
            message = "Without keys this server answers to names of its own machine."
            await error_response(403, message, code="host")(scope, receive, send)


class ApiKeyMiddleware(_HttpMiddleware):
    """Requires an API key for /v1/ and sets `request.state.tenant`."""

    def __init__(self, app: ASGIApp, *, api_keys: ApiKeys) -> None:
        super().__init__(app)
        self.api_keys = api_keys

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if is_api_path(scope):
            tenant = self.api_keys.tenant_of(Headers(scope=scope).get("authorization"))
            if tenant is None:
                message = "Give a key of this server: `Authorization: Bearer KEY`."
                await error_response(401, message, code="invalid_key")(scope, receive, send)
                return
            scope.setdefault("state", {})["tenant"] = tenant
        await self.app(scope, receive, send)


class BodyLimitMiddleware(_HttpMiddleware):
    """Reads the whole body before the request goes on, within bounds of size, time and bodies at once."""

    def __init__(self, app: ASGIApp, *, max_bytes: int, timeout_s: float, max_bodies: int) -> None:
        super().__init__(app)
        self.max_bytes, self.timeout_s, self.max_bodies = max_bytes, timeout_s, max_bodies
        self._bodies = 0

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._bodies >= self.max_bodies:
            await _overloaded()(scope, receive, send)
            return
        self._bodies += 1
        try:
            async with asyncio.timeout(self.timeout_s):
                body = await self._read_body(receive)
        except TimeoutError:
            await error_response(408, "The body did not come in time.", code="timeout")(scope, receive, send)
            return
        except _BodyTooLong:
            message = f"A body has at most {self.max_bytes} bytes."
            await error_response(413, message, code="body_too_long")(scope, receive, send)
            return
        finally:
            self._bodies -= 1
        if body is not None:
            await self.app(scope, _replay(body, receive), send)

    async def _read_body(self, receive: Receive) -> bytes | None:
        """Return the body, or None if the caller leaves before it is complete."""
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size, more = size + len(parts[-1]), message.get("more_body", False)
            if size > self.max_bytes:
                raise _BodyTooLong
        return b"".join(parts)


class _BodyTooLong(Exception):
    pass


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body that was read already, then whatever comes next."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return messages.pop() if messages else await receive()

    return receive_again


class ConcurrencyLimitMiddleware(_HttpMiddleware):
    """Bounds the requests to /v1/ that run at once. Health checks and metrics are not bounded."""

    def __init__(self, app: ASGIApp, *, max_requests: int, running: Gauge) -> None:
        super().__init__(app)
        self.max_requests, self.running = max_requests, running
        self._api_requests = 0

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        counted = int(is_api_path(scope))
        if counted and self._api_requests >= self.max_requests:
            await _overloaded()(scope, receive, send)
            return
        self._api_requests += counted
        try:
            with self.running.track_inprogress():
                await self.app(scope, receive, send)
        finally:
            self._api_requests -= counted


class DisconnectMiddleware(_HttpMiddleware):
    """Cancels the work on a request when its caller leaves before the response starts.

    A response that has started receives `http.disconnect` instead and ends itself.
    """

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        messages: asyncio.Queue[Message] = asyncio.Queue()

        async def watch() -> None:
            while True:
                message = await receive()
                messages.put_nowait(message)
                if message["type"] == "http.disconnect":
                    return

        async def next_message() -> Message:
            message = await messages.get()
            if message["type"] == "http.disconnect":
                messages.put_nowait(message)  # whoever asks again gets it again
            return message

        tracker = _StartTracker(send)
        work = asyncio.ensure_future(self.app(scope, next_message, tracker))
        disconnect = asyncio.ensure_future(watch())
        try:
            await asyncio.wait({work, disconnect}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done() and not tracker.started:
                work.cancel()
            await asyncio.wait({work})
            if not work.cancelled():
                work.result()
        finally:
            disconnect.cancel()
            work.cancel()


def is_api_path(scope: Scope) -> bool:
    """Whether a request is for the API, in contrast to health checks, metrics and docs."""
    return str(scope["path"]).startswith("/v1/")


def _overloaded() -> ASGIApp:
    return error_response(429, "Too many requests are being answered.", code="overloaded")
