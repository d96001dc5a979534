"""Middlewares for metrics, errors and client disconnects."""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from personaplug.errors import PersonaPlugError, StorageError
from personaplug.serving.error_responses import error_response
from personaplug.serving.middleware.base import HttpMiddleware, StartTracker, state_of
from personaplug.serving.telemetry import Telemetry

logger = logging.getLogger(__name__)

# Replacement messages for errors with these statuses, because the original messages may name paths or settings.
_SERVER_MESSAGES = {
    500: "The server is not configured for this request. See the server's log.",
    503: "The history store is not available. Try again later.",
}


@dataclass(eq=False)
class MetricsMiddleware(HttpMiddleware):
    """Counts responses by route, status and model, and measures the time to the first byte of the body."""

    telemetry: Telemetry

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        arrived, is_timed = time.perf_counter(), False

        async def count_and_send(message: Message) -> None:
            nonlocal is_timed
            route = getattr(scope.get("route"), "path", "other")  # set by the router
            model = state_of(scope).get("model", "")  # set by the routes that generate text
            if message["type"] == "http.response.start":
                self.telemetry.requests.labels(route, str(message["status"]), model).inc()
            elif not is_timed and (message.get("body") or not message.get("more_body")):
                is_timed = True
                self.telemetry.seconds.labels(route, model).observe(time.perf_counter() - arrived)
            await send(message)

        await self.app(scope, receive, count_and_send)


class ErrorMiddleware(HttpMiddleware):
    """Answers the package's errors with their status, other errors with 500, and requests cut off at shutdown with 503.

    The message of an unexpected error may quote the request, so it is neither logged nor raised again.
    """

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        tracker = StartTracker(send)
        try:
            await self.app(scope, receive, tracker)
            return
        except asyncio.CancelledError:
            if tracker.started:
                raise
            status, message, code = 503, "The server is shutting down. Try again later.", "stopping"
        except PersonaPlugError as error:
            if error.http_status >= 500:
                # The caller does not see the reason. It may name files, but no user.
                reason = error if isinstance(error, StorageError) else error.code
                logger.error("%s: %s", type(error).__name__, reason)
            status, code = error.http_status, error.code
            message = _SERVER_MESSAGES.get(status, str(error))
        except Exception as error:
            origin = traceback.extract_tb(error.__traceback__)[-1]
            logger.error("%s at %s:%s", type(error).__name__, origin.filename, origin.lineno)
            status, message, code = 500, "The server failed on this request. See the server's log.", "internal"
        if not tracker.started:
            response = error_response(status, message, code=code, closes=_has_unread_body(scope))
            await response(scope, receive, send)


class DisconnectMiddleware(HttpMiddleware):
    """Cancels the work on a request if the client disconnects before the response starts.

    A response that has started receives `http.disconnect` and ends itself.
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
                messages.put_nowait(message)  # later calls get it again
            return message

        tracker = StartTracker(send)
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


def _has_unread_body(scope: Scope) -> bool:
    headers = Headers(scope=scope)
    has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
    return has_body and not state_of(scope).get("body_read", False)
