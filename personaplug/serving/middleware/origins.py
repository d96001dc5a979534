"""Middlewares against web pages that make a browser send requests, and for the pages that may."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from personaplug.errors import ConfigError, RequestError
from personaplug.serving.api_keys import is_loopback
from personaplug.serving.middleware.base import HttpMiddleware, is_api_path

CORS_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE")
CORS_HEADERS = ("*",)  # clients add many of their own, as `x-stainless-lang`, and only chosen origins may send them
EXPOSED_HEADERS = (
    *("Retry-After", "X-Request-Id", "X-Personaplug-Persona", "X-Personaplug-Items", "X-Personaplug-Persona-Scale"),
    *("X-Personaplug-Reason", "X-Personaplug-Max-Tokens"),
)


class LoopbackHostMiddleware(HttpMiddleware):
    """Requires a Host header that names this machine, so that no web page can make a browser reach an open server."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        host = Headers(scope=scope).get("host", "")
        name = host if host.endswith("]") else host.rpartition(":")[0] or host  # without the port
        if not is_loopback(name):
            message = "Without keys this server answers to names of its own machine."
            raise RequestError(message, http_status=403, code="host")
        await self.app(scope, receive, send)


@dataclass(eq=False)
class OriginMiddleware(HttpMiddleware):
    """Refuses requests to /v1/ that a page of another site makes a browser send, unless its origin may call."""

    allowed: Collection[str]

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        if origin is None:
            is_foreign = headers.get("sec-fetch-site") == "cross-site"
        else:
            is_own = origin.partition("://")[2].lower() == headers.get("host", "").lower() != ""
            is_foreign = not is_own and origin not in self.allowed
        if is_foreign and is_api_path(scope):
            message = "Web pages of other origins may not call this server; `--allow-origin` names those that may."
            raise RequestError(message, http_status=403, code="origin")
        await self.app(scope, receive, send)


class JsonOnlyMiddleware(HttpMiddleware):
    """Refuses bodies that do not say that they are JSON: a browser sends such ones for any page, without asking."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = Headers(scope=scope).get("content-type", "").partition(";")[0].strip().lower()
        if scope["method"] in ("POST", "PUT") and kind != "application/json":
            message = "A body is JSON: send the header `Content-Type: application/json`."
            raise RequestError(message, http_status=415, code="content_type")
        await self.app(scope, receive, send)


def check_origin(origin: str) -> str:
    """Return an origin as browsers send it; ConfigError if it is none."""
    scheme, separator, host = origin.partition("://")
    if not separator or not scheme or not host or set(host) & set("/?#@ *") or not origin.isascii():
        raise ConfigError(f"An origin is a scheme and a host, as https://app.example.org; found {origin!r}.")
    return origin.lower()
