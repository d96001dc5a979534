"""Gate: what stands between the network and the routes. Keys, sizes, numbers of requests, callers who leave."""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from dataclasses import dataclass

from fastapi.responses import JSONResponse, Response
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from personaplug.serving.api_keys import ApiKeys, is_loopback
from personaplug.serving.openai_protocol import error_reply
from personaplug.serving.telemetry import Telemetry

logger = logging.getLogger(__name__)

RETRY_AFTER = "1"  # seconds
TENANT = "personaplug.tenant"
"""Where a request's tenant is found in its scope."""

_READERS = 2  # bodies that may be on their way for every request that is answered


@dataclass(frozen=True)
class RequestLimits:
    """What one request, and all of them together, may take.

    Attributes:
        body_bytes: longest body.
        body_seconds: until it has arrived.
        requests: that are being answered at once; the next is refused with 429.
        items: that one request may add to a history.
    """

    body_bytes: int = 4 * 2**20
    body_seconds: float = 30
    requests: int = 256
    items: int = 1000


class Gate:
    """ASGI middleware that refuses a request before it costs anything, and cancels it when its caller has left.

    Args:
        app: what it guards.
        accounts: whose keys are let in to /v1/; an open server answers only to names of this machine, so that no web
            page can talk a browser into reaching it.
        limits: of bodies and requests.
        telemetry: counts.
    """

    def __init__(self, app: ASGIApp, *, accounts: ApiKeys, limits: RequestLimits, telemetry: Telemetry) -> None:
        self.app, self.accounts, self.limits, self.telemetry = app, accounts, limits, telemetry
        self._reading = self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        answer = _Answer(scope, send, telemetry=self.telemetry)
        refusal = self._refusal(scope)
        if refusal is None:
            body, refusal = await self._read(receive)
            if body is None and refusal is None:
                return  # the caller left before the request was whole
        await self._answered(scope, receive, answer, body=b"" if refusal else body or b"", refusal=refusal)

    def _refusal(self, scope: Scope) -> Response | None:
        """What can be said of a request without its body."""
        headers, guarded = Headers(scope=scope), scope["path"].startswith("/v1/")
        if self.accounts.open and not is_loopback(_host_of(headers.get("host", ""))):
            return refused(403, "Without keys this server answers to names of its own machine.", code="host")
        if guarded:
            scope[TENANT] = self.accounts.tenant_of(headers.get("authorization"))
            if scope[TENANT] is None:
                return refused(401, "Give a key of this server: `Authorization: Bearer KEY`.", code="invalid_key")
        if self._reading >= _READERS * self.limits.requests:
            return _too_many()
        return None

    async def _read(self, receive: Receive) -> tuple[bytes | None, Response | None]:
        """The whole body, or why it is refused; neither if the caller has left."""
        self._reading += 1
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                return await self._body(receive)
        except TimeoutError:
            return None, refused(408, "The body did not come in time.", code="timeout")
        finally:
            self._reading -= 1

    async def _body(self, receive: Receive) -> tuple[bytes | None, Response | None]:
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None, None
            part = message.get("body", b"")
            size += len(part)
            if size > self.limits.body_bytes:
                text = f"A body has at most {self.limits.body_bytes} bytes."
                return None, refused(413, text, code="body_too_long")
            parts.append(part)
            if not message.get("more_body"):
                return b"".join(parts), None

    async def _answered(
        self, scope: Scope, receive: Receive, answer: _Answer, *, body: bytes, refusal: Response | None
    ) -> None:
        counted = scope["path"].startswith("/v1/")  # whoever looks after the server takes no caller's place
        if refusal is None and counted and self._running >= self.limits.requests:
            refusal = _too_many()
        if refusal is not None:
            await refusal(scope, receive, answer.send)
            return
        self._running += counted
        self.telemetry.running.inc()
        try:
            await self._while_listened_to(scope, receive, answer, body=body)
        except asyncio.CancelledError:
            if answer.begun:
                raise
            # The server stops, and has waited for this answer as long as it may.
            await refused(503, "The server is stopping.", code="stopping")(scope, receive, answer.send)
        except Exception as error:
            # Whoever is above would log the error's sentence, which may hold the text that it failed on.
            logger.error("%s at %s", type(error).__name__, _place_of(error))
            if not answer.begun:
                await refused(500, "The server failed on this request.", code="internal")(scope, receive, answer.send)
        finally:
            self._running -= counted
            self.telemetry.running.dec()

    async def _while_listened_to(self, scope: Scope, receive: Receive, answer: _Answer, *, body: bytes) -> None:
        """Run the application until it is done, or nobody waits for its answer any more."""
        left, sent = asyncio.Event(), False

        async def again() -> Message:
            nonlocal sent
            if not sent:
                sent = True
                return {"type": "http.request", "body": body, "more_body": False}
            await left.wait()
            return {"type": "http.disconnect"}

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            left.set()

        working = asyncio.ensure_future(self.app(scope, again, answer.send))
        watching = asyncio.ensure_future(watch())
        try:
            await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done() and not answer.begun:
                working.cancel()  # one that has begun hears of it by `again`
            await asyncio.wait({working})
            if not working.cancelled():
                working.result()
        finally:
            watching.cancel()
            working.cancel()


class _Answer:
    """The sending side of a request, which notes when its answer begins."""

    def __init__(self, scope: Scope, send: Send, *, telemetry: Telemetry) -> None:
        self.begun, self._spoke = False, False
        self._send, self._scope, self._telemetry = send, scope, telemetry
        self._came = time.perf_counter()

    async def send(self, message: Message) -> None:
        """Send it on."""
        if message["type"] == "http.response.start":
            self.begun = True
            self._telemetry.requests.labels(self._route, str(message["status"])).inc()
        elif not self._spoke and (message.get("body") or not message.get("more_body")):
            self._spoke = True
            self._telemetry.seconds.labels(self._route).observe(time.perf_counter() - self._came)
        await self._send(message)

    @property
    def _route(self) -> str:
        return getattr(self._scope.get("route"), "path", "other")


def refused(status: int, message: str, *, code: str) -> Response:
    """An answer that says why there is none."""
    headers = retry_after(status)
    headers |= {"WWW-Authenticate": "Bearer"} if status == 401 else {}
    headers |= {"Connection": "close"} if status in (401, 403, 408, 413) else {}  # the body may not have been read
    return JSONResponse(error_reply(message, code=code, status=status), status, headers)


def retry_after(status: int) -> dict[str, str]:
    """The header that says when to come back, where a status asks for that."""
    return {"Retry-After": RETRY_AFTER} if status in (429, 503) else {}


def _too_many() -> Response:
    return refused(429, "Too many requests are being answered.", code="overloaded")


def _host_of(host: str) -> str:
    """A Host header without its port."""
    return host if host.endswith("]") else host.rpartition(":")[0] or host


def _place_of(error: Exception) -> str:
    """File and line that an error comes from."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "?"
