"""Middlewares that admit requests: API keys, concurrency limits, bodies.

A place is a slot for one concurrent request. A body is read only after its request has taken a place.
"""

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

_TENANT_TIMES_FREE = 4  # a tenant may hold at most this multiple of the free amount


@dataclass(eq=False)
class ApiKeyMiddleware(HttpMiddleware):
    """Requires an API key for /v1/ and sets `request.state.tenant` and `request.state.user` to the key's owner."""

    api_keys: ApiKeys

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if is_api_path(scope):
            owner = self.api_keys.owner_of(Headers(scope=scope).get("authorization"))
            if owner is None:
                message = "The API key is missing or unknown. Send the header `Authorization: Bearer KEY`."
                raise RequestError(message, http_status=401, code="invalid_key")
            _check_user(scope["path"], owner)
            state_of(scope).update(tenant=owner.tenant, user=owner.user)
        await self.app(scope, receive, send)


def _check_user(path: str, owner: KeyOwner) -> None:
    """Refuse another user's path if the key belongs to a single user."""
    _, _, collection, *rest = path.split("/")  # of /v1/…
    if owner.user is not None and collection == "users" and rest[:1] != [quote(owner.user, safe="")]:
        message = "This key belongs to another user. Use a key of the user in the path, or of the tenant."
        raise RequestError(message, http_status=403, code="user")


@dataclass(eq=False)
class Budget:
    """A budget that tenants share. A tenant may hold at most four times the free amount, so that others get some.

    One tenant gets at most four fifths, two get four ninths each. If `is_shared` is false, one tenant may hold all.
    """

    total: int
    is_shared: bool
    _held: Counter[str] = field(default_factory=Counter)

    def take(self, tenant: str, amount: int) -> None:
        """Take an amount; RequestError 429 if the tenant already holds too much."""
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
    """The resources of a request to /v1/: one place, and memory for its body and its reply."""

    tenant: str
    memory: Budget
    bytes: int = 0

    def add_bytes(self, count: int) -> None:
        """Take memory for the request; RequestError 429 if its tenant already holds too much."""
        self.memory.take(self.tenant, count)
        self.bytes += count


@dataclass(eq=False)
class PlacesMiddleware(HttpMiddleware):
    """Limits concurrent requests to /v1/, in total and per tenant; sets `request.state.place`."""

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
    """Reads the whole body of a request that holds a place, within limits of size, memory and time.

    Bodies of other requests are not read, because no route uses them.
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
                message = f"The body did not arrive within {self.timeout_s:g} seconds. Send it again."
                raise RequestError(message, http_status=408, code="timeout") from None
        if body is None:
            return
        state_of(scope)["body_read"] = place is not None
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def next_message() -> Message:
            return messages.pop() if messages else await receive()

        await self.app(scope, next_message, send)

    async def _read_body(self, receive: Receive, place: Place) -> bytes | None:
        """Return the body, or None if the client disconnects before the body is complete."""
        body = bytearray()
        while (message := await receive())["type"] != "http.disconnect":
            piece = message.get("body", b"")
            if len(body) + len(piece) > self.max_bytes:
                refusal = f"A body may have at most {self.max_bytes:,} bytes. Send a smaller one."
                raise RequestError(refusal, http_status=413, code="body_too_long")
            place.add_bytes(len(piece))
            body += piece
            if not message.get("more_body", False):
                return bytes(body)
        return None
