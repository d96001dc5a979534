"""Middlewares that refuse browser requests from web pages of other origins, unless the origin is allowed."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from personaplug.errors import ConfigError, RequestError
from personaplug.serving.api_keys import is_loopback
from personaplug.serving.middleware.base import HttpMiddleware, is_api_path

CORS_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE")
CORS_HEADERS = ("*",)  # clients add headers such as `x-stainless-lang`; only allowed origins may send any
EXPOSED_HEADERS = (
    *("Retry-After", "X-Request-Id", "X-Personaplug-Persona", "X-Personaplug-Items", "X-Personaplug-Persona-Scale"),
    *("X-Personaplug-Reason", "X-Personaplug-Concepts", "X-Personaplug-Copy-Head", "X-Personaplug-Max-Tokens"),
)


class LoopbackHostMiddleware(HttpMiddleware):
    """Requires a Host header that names this machine. This protects a server without keys from DNS rebinding."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        host = Headers(scope=scope).get("host", "")
        name = host if host.endswith("]") else host.rpartition(":")[0] or host  # without the port
        if not is_loopback(name):
            message = "A server without API keys accepts only requests to localhost. Start it with --keys to lift this."
            raise RequestError(message, http_status=403, code="host")
        await self.app(scope, receive, send)


@dataclass(eq=False)
class OriginMiddleware(HttpMiddleware):
    """Refuses browser requests to /v1/ from pages of other origins, unless the origin is allowed."""

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
            message = "This web page's origin is not allowed. Start the server with `--allow-origin` to allow it."
            raise RequestError(message, http_status=403, code="origin")
        await self.app(scope, receive, send)


class JsonOnlyMiddleware(HttpMiddleware):
    """Refuses bodies whose Content-Type is not JSON: browsers send these from any page without a CORS preflight."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = Headers(scope=scope).get("content-type", "").partition(";")[0].strip().lower()
        if scope["method"] in ("POST", "PUT") and kind != "application/json":
            message = "The body must be JSON. Send it with the header `Content-Type: application/json`."
            raise RequestError(message, http_status=415, code="content_type")
        await self.app(scope, receive, send)


def check_origin(origin: str) -> str:
    """Return a valid origin in lower case, as browsers send it; ConfigError if it is invalid."""
    scheme, separator, host = origin.partition("://")
    if not separator or not scheme or not host or set(host) & set("/?#@ *") or not origin.isascii():
        raise ConfigError(f"An origin must be a scheme and a host, such as https://app.example.org; found {origin!r}.")
    return origin.lower()
