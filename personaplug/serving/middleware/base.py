"""The base class of the middlewares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from personaplug.errors import RequestError


@dataclass(eq=False)
class HttpMiddleware(ABC):
    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await (self.handle if scope["type"] == "http" else self.app)(scope, receive, send)

    @abstractmethod
    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None: ...


class StartTracker:
    """Forwards messages to `send` and records whether the response has started."""

    def __init__(self, send: Send) -> None:
        self._send, self.started = send, False

    async def __call__(self, message: Message) -> None:
        self.started |= message["type"] == "http.response.start"
        await self._send(message)


def state_of(scope: Scope) -> dict[str, Any]:
    """Return the state of a request that middlewares and routes share; routes read it as `request.state`."""
    state: dict[str, Any] = scope.setdefault("state", {})
    return state


def is_api_path(scope: Scope) -> bool:
    return str(scope["path"]).startswith("/v1/")


def overloaded() -> RequestError:
    return RequestError("The server has too many requests. Try again later.", http_status=429, code="overloaded")
