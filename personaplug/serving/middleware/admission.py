"""Middlewares that let requests in: keys, places, bodies. No body is read before its caller holds a place."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from urllib.parse import quote

from prometheus_client import Gauge
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from personaplug.errors import RequestError
from personaplug.serving.api_keys import ApiKeys, KeyOwner
from personaplug.serving.middleware.base import HttpMiddleware, is_api_path, overloaded, state_of

_TENANT_TIMES_FREE = 4  # so many times what is free a tenant may hold


@dataclass(eq=False)
class ApiKeyMiddleware(HttpMiddleware):
    """Requires an API key for /v1/ and sets `request.state.tenant` and, of a user's own key, `request.state.user`."""

    api_keys: ApiKeys

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if is_api_path(scope):
            owner = self.api_keys.owner_of(Headers(scope=scope).get("authorization"))
            if owner is None:
                message = "Give a key of this server: `Authorization: Bearer KEY`."
                raise RequestError(message, http_status=401, code="invalid_key")
            _check_user(scope["path"], owner)
            state_of(scope).update(tenant=owner.tenant, user=owner.user)
        await self.app(scope, receive, send)


def _check_user(path: str, owner: KeyOwner) -> None:
    """Refuse the path of another user to a user's own key."""
    _, _, room, *rest = path.split("/")  # of /v1/…
    if owner.user is not None and room == "users" and rest[:1] != [quote(owner.user, safe="")]:
        message = "This key belongs to another user; give that user's key, or the tenant's."
        raise RequestError(message, http_status=403, code="user")


@dataclass(eq=False)
class Budget:
    """An amount that tenants share: one may hold four times what is free, so that another still gets some.

    Alone a tenant gets four fifths, two get four ninths each. With `is_shared` false, one may hold all.
    """

    total: int
    is_shared: bool
    _held: Counter[str] = field(default_factory=Counter)

    def take(self, tenant: str, amount: int) -> None:
        """Take an amount; RequestError 429 if the tenant holds too much already."""
        free = self.total - self._held.total() - amount
        held = self._held[tenant] + amount
        if free < 0 or (self.is_shared and held > _TENANT_TIMES_FREE * max(free, 1)):
            raise overloaded()
        self._held[tenant] += amount

    def give_back(self, tenant: str, amount: int) -> None:
        self._held[tenant] -= amount
        if not self._held[tenant]:
            del self._held[tenant]


@dataclass(eq=False)
class Place:
    """What a request to /v1/ holds: one of the places, and memory for its body and its reply."""

    tenant: str
    memory: Budget
    bytes: int = 0

    def add_bytes(self, count: int) -> None:
        """Count memory that the request holds; RequestError 429 if its tenant holds too much."""
        self.memory.take(self.tenant, count)
        self.bytes += count


@dataclass(eq=False)
class PlacesMiddleware(HttpMiddleware):
    """Bounds the requests to /v1/ at once, in all and for each tenant; sets `request.state.place`."""

    places: Budget
    memory: Budget
    running: Gauge

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not is_api_path(scope):
            await self.app(scope, receive, send)
            return
        state = state_of(scope)
        place = state["place"] = Place(state["tenant"], self.memory)
        self.places.take(place.tenant, 1)
        connection = state.get("connection")
        try:
            if connection is not None:
                connection.holds_place = True
            with self.running.track_inprogress():
                await self.app(scope, receive, send)
        finally:
            self.places.give_back(place.tenant, 1)
            self.memory.give_back(place.tenant, place.bytes)
            if connection is not None:
                connection.holds_place = False


@dataclass(eq=False)
class BodyMiddleware(HttpMiddleware):
    """Reads the whole body of a request that holds a place, within bounds of size, memory and time.

    Other requests have no use for a body, and theirs is not read.
    """

    max_bytes: int
    timeout_s: float

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        body: bytes | None = b""
        place: Place | None = state_of(scope).get("place")
        if place is not None:
            try:
                async with asyncio.timeout(self.timeout_s):
                    body = await self._read_body(receive, place)
            except TimeoutError:
                raise RequestError("The body did not come in time.", http_status=408, code="timeout") from None
        if body is None:
            return
        state_of(scope)["body_read"] = place is not None
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def next_message() -> Message:
            return messages.pop() if messages else await receive()

        await self.app(scope, next_message, send)

    async def _read_body(self, receive: Receive, place: Place) -> bytes | None:
        """Return the body, or None if the caller leaves before it is complete."""
        body = bytearray()
        while (message := await receive())["type"] != "http.disconnect":
            piece = message.get("body", b"")
            if len(body) + len(piece) > self.max_bytes:
                limit = f"A body has at most {self.max_bytes} bytes."
                raise RequestError(limit, http_status=413, code="body_too_long")
            place.add_bytes(len(piece))
            body += piece
            if not message.get("more_body", False):
                return bytes(body)
        return None
