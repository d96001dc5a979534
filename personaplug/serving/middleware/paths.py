"""Middlewares that check headers, decode paths, match routes before a body is read, and answer HEAD and OPTIONS."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote, unquote_to_bytes

from opentelemetry import trace
from starlette.responses import Response
from starlette.routing import BaseRoute, Match
from starlette.types import Message, Receive, Scope, Send

from personaplug.errors import RequestError
from personaplug.serving.error_responses import error_response
from personaplug.serving.middleware.base import HttpMiddleware
from personaplug.serving.openai_protocol import USER_HEADER

_BROKEN_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})")


_SINGLE_HEADERS = frozenset(
    (b"authorization", b"content-type", b"host", b"origin", b"sec-fetch-site", USER_HEADER.lower().encode())
)


class SingleHeadersMiddleware(HttpMiddleware):
    """Refuses duplicates of security-relevant headers, because a proxy may have read the other value."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        names = [name for name, _ in scope["headers"] if name in _SINGLE_HEADERS]
        if len(names) != len(set(names)):
            names = sorted(name.decode() for name in set(names) if names.count(name) > 1)
            message = f"The request repeats the header {', '.join(names)}. Send each header once."
            raise RequestError(message, code="headers")
        await self.app(scope, receive, send)


class PathMiddleware(HttpMiddleware):
    """Normalizes the percent-encoding of a path, so that an encoded slash stays part of an id; requires UTF-8.

    The router sees percent-encoded ids. `decode_segment` decodes them.
    """

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        raw_path = scope.get("raw_path") or quote(scope["path"]).encode()
        _decode(scope.get("query_string", b""))
        scope["path"] = "/".join(quote(_decode(segment), safe="") for segment in raw_path.split(b"/"))
        await self.app(scope, receive, send)


def decode_segment(segment: str) -> str:
    """Decode a segment of a path that PathMiddleware normalized."""
    return unquote_to_bytes(segment).decode()


@dataclass(eq=False)
class RouteMiddleware(HttpMiddleware):
    """Answers unknown paths, wrong methods and OPTIONS without reading the body. Answers HEAD as GET without a body."""

    routes: Sequence[BaseRoute]

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        methods = self._methods(scope)
        if not methods:
            raise RequestError(
                "This path does not exist. GET /docs lists the routes.", http_status=404, code="not_found"
            )
        allow = ", ".join(sorted(methods | {"OPTIONS"}))
        if scope["method"] == "OPTIONS":
            await Response(status_code=204, headers={"Allow": allow})(scope, receive, send)
        elif scope["method"] not in methods:
            message = f"This path does not support the method. Use one of {allow}."
            response = error_response(405, message, code="method", closes=True)
            response.headers["Allow"] = allow
            await response(scope, receive, send)
        elif scope["method"] == "HEAD":
            await self.app({**scope, "method": "GET"}, receive, _HeadOnly(send))
        else:
            await self.app(scope, receive, send)

    def _methods(self, scope: Scope) -> set[str]:
        """Return the methods of a path, and store its route for the metrics and in the request's span."""
        methods: set[str] = set()
        for route in self.routes:
            if route.matches(scope)[0] is not Match.NONE:
                scope["route"] = route
                methods |= getattr(route, "methods", None) or set()
                trace.get_current_span().set_attribute("http.route", getattr(route, "path", "other"))
        return methods | ({"HEAD"} if "GET" in methods else set())


class _HeadOnly:
    """Forwards the headers of a response and drops its body."""

    def __init__(self, send: Send) -> None:
        self._send, self._has_ended = send, False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.body":
            if self._has_ended:
                return
            self._has_ended, message = True, {"type": "http.response.body", "body": b""}
        await self._send(message)


def _decode(escaped: bytes) -> str:
    if _BROKEN_ESCAPE.search(escaped):
        raise _invalid_path()
    try:
        return unquote_to_bytes(escaped).decode()
    except UnicodeDecodeError:
        raise _invalid_path() from None


def _invalid_path() -> RequestError:
    message = "The path or the query is not percent-encoded UTF-8. Encode it again."
    return RequestError(message, http_status=422, code="invalid_path")
