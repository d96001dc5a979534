"""ASGI middlewares between the network and the routes. To refuse a request, they raise RequestError."""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from prometheus_client import Gauge
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from personaplug.errors import PersonaPlugError, RequestError
from personaplug.serving.api_keys import ApiKeys, is_loopback
from personaplug.serving.error_responses import error_response
from personaplug.serving.telemetry import Telemetry

logger = logging.getLogger(__name__)

_BODIES_PER_REQUEST = 2  # bodies that may be on their way for every request that may run

# Replace the messages of errors with these statuses, which may name paths or settings.
_SERVER_MESSAGES = {
    500: "The server is not set up for this request.",
    503: "The store of histories cannot be used now; try again.",
}


@dataclass(frozen=True)
class RequestLimits:
    """What requests may take."""

    body_bytes: int = 4 * 2**20
    body_seconds: float = 30  # until the body has arrived
    requests: int = 256  # to /v1/ at once
    items: int = 1000  # that one request may add to a history


def guards(api_keys: ApiKeys, limits: RequestLimits, *, telemetry: Telemetry) -> list[Middleware]:
    """The middlewares of a server, outermost first: a request is refused before it costs anything."""
    bodies = _BODIES_PER_REQUEST * limits.requests
    return [
        Middleware(MetricsMiddleware, telemetry=telemetry),
        Middleware(ErrorMiddleware),
        *([Middleware(LoopbackHostMiddleware)] if api_keys.is_open else []),
        Middleware(ApiKeyMiddleware, api_keys=api_keys),
        Middleware(BodyLimitMiddleware, max_bytes=limits.body_bytes, timeout_s=limits.body_seconds, max_bodies=bodies),
        Middleware(ConcurrencyLimitMiddleware, max_requests=limits.requests, running=telemetry.running),
        Middleware(DisconnectMiddleware),
    ]


@dataclass(eq=False)
class _HttpMiddleware(ABC):
    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await (self.handle if scope["type"] == "http" else self.app)(scope, receive, send)

    @abstractmethod
    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None: ...


class _StartTracker:
    """Passes messages on to `send` and notes whether the response has started."""

    def __init__(self, send: Send) -> None:
        self._send, self.started = send, False

    async def __call__(self, message: Message) -> None:
        self.started |= message["type"] == "http.response.start"
        await self._send(message)


@dataclass(eq=False)
class MetricsMiddleware(_HttpMiddleware):
    """Counts responses by route and status, and measures the time to the first byte of their bodies."""

    telemetry: Telemetry

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        arrived, is_timed = time.perf_counter(), False

        async def count_and_send(message: Message) -> None:
            nonlocal is_timed
            route = getattr(scope.get("route"), "path", "other")  # set by the router
            if message["type"] == "http.response.start":
                self.telemetry.requests.labels(route, str(message["status"])).inc()
            elif not is_timed and (message.get("body") or not message.get("more_body")):
                is_timed = True
                self.telemetry.seconds.labels(route).observe(time.perf_counter() - arrived)
            await send(message)

        await self.app(scope, receive, count_and_send)


class ErrorMiddleware(_HttpMiddleware):
    """Answers the package's errors with their status, other errors with 500, and requests cut off by a stop with 503.

    The message of an unexpected error may quote the request, so it is neither logged nor passed to the server above.
    """

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        tracker = _StartTracker(send)
        try:
            await self.app(scope, receive, tracker)
            return
        except asyncio.CancelledError:
            if tracker.started:
                raise
            response = error_response(503, "The server is stopping.", code="stopping")
        except PersonaPlugError as error:
            if error.http_status >= 500:
                logger.error("%s: %s", type(error).__name__, error.code)
            message = _SERVER_MESSAGES.get(error.http_status, str(error))
            response = error_response(error.http_status, message, code=error.code)
        except Exception as error:
            origin = traceback.extract_tb(error.__traceback__)[-1]
            logger.error("%s at %s:%s", type(error).__name__, origin.filename, origin.lineno)
            response = error_response(500, "The server failed on this request.", code="internal")
        if not tracker.started:
            await response(scope, receive, send)


class LoopbackHostMiddleware(_HttpMiddleware):
    """Requires a Host header that names this machine, so that no web page can make a browser reach an open server."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        host = Headers(scope=scope).get("host", "")
        name = host if host.endswith("]") else host.rpartition(":")[0] or host  # without the port
        if not is_loopback(name):
            message = "Without keys this server answers to names of its own machine."
            raise RequestError(message, http_status=403, code="host")
        await self.app(scope, receive, send)


@dataclass(eq=False)
class ApiKeyMiddleware(_HttpMiddleware):
    """Requires an API key for /v1/ and sets `request.state.tenant`."""

    api_keys: ApiKeys

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if _is_api_path(scope):
            tenant = self.api_keys.tenant_of(Headers(scope=scope).get("authorization"))
            if tenant is None:
                message = "Give a key of this server: `Authorization: Bearer KEY`."
                raise RequestError(message, http_status=401, code="invalid_key")
            scope.setdefault("state", {})["tenant"] = tenant
        await self.app(scope, receive, send)


@dataclass(eq=False)
class BodyLimitMiddleware(_HttpMiddleware):
    """Reads the whole body before the request goes on, within bounds of size, time and bodies at once."""

    max_bytes: int
    timeout_s: float
    max_bodies: int
    _bodies: int = field(default=0, init=False)

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._bodies >= self.max_bodies:
            raise _overloaded()
        self._bodies += 1
        try:
            async with asyncio.timeout(self.timeout_s):
                body = await self._read_body(receive)
        except TimeoutError:
            raise RequestError("The body did not come in time.", http_status=408, code="timeout") from None
        finally:
            self._bodies -= 1
        if body is None:
            return
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def next_message() -> Message:
            return messages.pop() if messages else await receive()

        await self.app(scope, next_message, send)

    async def _read_body(self, receive: Receive) -> bytes | None:
        """Return the body, or None if the caller leaves before it is complete."""
        body = bytearray()
        while (message := await receive())["type"] != "http.disconnect":
            body += message.get("body", b"")
            if len(body) > self.max_bytes:
                limit = f"A body has at most {self.max_bytes} bytes."
                raise RequestError(limit, http_status=413, code="body_too_long")
            if not message.get("more_body", False):
                return bytes(body)
        return None


@dataclass(eq=False)
class ConcurrencyLimitMiddleware(_HttpMiddleware):
    """Bounds the requests to /v1/ that run at once. Health checks and metrics are not bounded."""

    max_requests: int
    running: Gauge
    _api_requests: int = field(default=0, init=False)

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        count = int(_is_api_path(scope))
        if count and self._api_requests >= self.max_requests:
            raise _overloaded()
        self._api_requests += count
        try:
            with self.running.track_inprogress():
                await self.app(scope, receive, send)
        finally:
            self._api_requests -= count


class DisconnectMiddleware(_HttpMiddleware):
    """Cancels the work on a request when its caller leaves before the response starts.

    A response that has started receives `http.disconnect` instead and ends itself.
    """

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        messages: asyncio.Queue[Message] = asyncio.Queue()

        async def watch() -> None:
            while (message := await receive())["type"] != "http.disconnect":
                messages.put_nowait(message)
            messages.put_nowait(message)

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
                work.result()  # raises its error
        finally:
            disconnect.cancel()
            work.cancel()


def _is_api_path(scope: Scope) -> bool:
    return str(scope["path"]).startswith("/v1/")


def _overloaded() -> RequestError:
    return RequestError("Too many requests are being answered.", http_status=429, code="overloaded")
