"""Clients of a fleet: each knows what is stored of its user, and checks every reply.

A user has one request at a time. So the client knows the history that a reply must show or use. After a broken
connection it does not know whether a change was stored: the next reading must show one of the two possible states.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from fleet_check.servers import Fleet, FleetServer

PROMPT = (
    "Which score from 1 to 5 would this user give to the following film? just answer with 1, 2, 3, 4, or 5 without "
    "further explanation. film: "
)
FILMS = ("A quiet western about a lost farmer.", "A loud musical about a lighthouse.", "A short comedy with a dog.")
_WORDS = ("slow", "loud", "warm", "dark", "silly", "long", "clever", "odd")
_KINDS = {"read": 45, "ask": 35, "write": 18, "erase": 2}
"""The kinds of requests, with their shares in percent."""

Record = dict[str, str]


class ConnectionLost(Exception):
    """The connection broke before the whole reply arrived."""


@dataclass(frozen=True)
class Reply:
    status: int
    body: Any
    headers: Mapping[str, str]  # their names in any case


@dataclass(frozen=True)
class Given:
    """An answer, with the history that it must have used."""

    model: str
    film: str
    history: tuple[Record, ...]
    probabilities: dict[str, float]


@dataclass
class Log:
    """What happened: times by kind, answers to check, receipts, broken connections, and faults."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    answers: list[Given] = field(default_factory=list)
    receipts: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)  # tenant, user, receipt
    erased: set[tuple[str, str, str]] = field(default_factory=set)  # tenant, user, item
    lost: Counter[str] = field(default_factory=Counter)  # by "server KILLS kind"
    unsure: Counter[str] = field(default_factory=Counter)  # changes by whether they were stored
    faults: list[str] = field(default_factory=list)


@dataclass(eq=False)
class User:
    """A user of a tenant, and the items that are stored."""

    tenant: str
    name: str
    items: list[Record] = field(default_factory=list)
    added: int = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def path(self) -> str:
        return f"/v1/users/{self.name}"


class Clients:
    """Send requests of random kinds for random users."""

    def __init__(
        self, fleet: Fleet, session: aiohttp.ClientSession, keys: dict[str, str], *, users: int, new_model: str
    ) -> None:
        self.fleet, self.session, self.keys, self.new_model = fleet, session, keys, new_model
        # The tenants have users of the same names, so an answer for the other tenant's user would be noticed.
        tenants = list(keys)
        self.users = [User(tenants[n % len(tenants)], f"user-{n // len(tenants)}") for n in range(users)]
        self.draw, self.log = random.Random(1), Log()
        self._do = {"read": self._read, "ask": self._ask, "write": self._write, "erase": self._erase}

    async def send_until(self, stop: asyncio.Event, *, rate: float, workers: int) -> None:
        """Send `rate` requests a second, or as many as the workers can."""
        ticks, start = itertools.count(), time.perf_counter()

        async def work() -> None:
            while not stop.is_set():
                late = time.perf_counter() - start - next(ticks) / rate
                await asyncio.sleep(max(0.0, -late))
                await self._one()

        await asyncio.gather(*(work() for _ in range(workers)))

    async def _one(self) -> None:
        (kind,) = self.draw.choices(list(_KINDS), list(_KINDS.values()))
        user = self.draw.choice([user for user in self.users if not user.lock.locked()] or self.users)
        async with user.lock:
            try:
                await self._do[kind](user)
            except ConnectionLost:
                self.log.lost[f"{kind}, no answer"] += 1

    async def _read(self, user: User) -> None:
        reply = await self._send("read", user, "GET", f"{user.path}/history?latest=10000")
        if self._expect(reply, 200, f"read {user.name}"):
            found = [_record(item) for item in reply.body["items"]]
            self._check(found == user.items, f"{user.tenant}/{user.name}: another history than the one written")

    async def _ask(self, user: User) -> None:
        is_new = self.fleet.serves(self.new_model) and self.draw.random() < 0.5
        model, film = self.new_model if is_new else "v1", self.draw.choice(FILMS)
        turns = [{"role": "user", "content": PROMPT + film}]
        body = {"model": model, "messages": turns, "user": user.name, "personaplug": {"probabilities": True}}
        reply = await self._send("ask", user, "POST", "/v1/chat/completions", model=model, json=body)
        if not self._expect(reply, 200, f"ask {user.name}"):
            return
        used = int(reply.headers["X-Personaplug-Items"])
        self._check(used == len(user.items), f"{user.tenant}/{user.name}: {used} items used, {len(user.items)} stored")
        self._check(reply.body["model"] == model, f"asked {model}, answered by {reply.body['model']}")
        probabilities = reply.body["personaplug"]["probabilities"]
        self.log.answers.append(Given(model, film, tuple(user.items), probabilities))

    async def _write(self, user: User) -> None:
        user.added += 1
        text = f"{user.tenant} {user.name} {user.added}: a {self.draw.choice(_WORDS)} {self.draw.choice(_WORDS)} film."
        record = {"id": f"i{user.added}", "text": text, "score": self.draw.choice("12345")}
        body = {"items": [record]}
        try:
            reply = await self._send("write", user, "POST", f"{user.path}/history", json=body)
        except ConnectionLost:
            await self._find_out(user, [*user.items, record])
            raise
        if self._expect(reply, 200, f"write {user.name}"):
            self._check(reply.body["new"] == 1, f"{user.tenant}/{user.name}: a new item was not new")
            user.items.append(record)

    async def _erase(self, user: User) -> None:
        erased, expected = {(user.tenant, user.name, item["id"]) for item in user.items}, 200 if user.items else 404
        try:
            reply = await self._send("erase", user, "DELETE", user.path)
        except ConnectionLost:
            await self._find_out(user, [])
            raise
        if self._expect(reply, expected, f"erase {user.name}") and expected == 200:
            self.log.receipts.append((user.tenant, user.name, reply.body))
            self.log.erased |= erased
            user.items = []

    async def _find_out(self, user: User, changed: list[Record]) -> None:
        """Read which of two states is stored after a broken connection."""
        reply = await self._send("read", user, "GET", f"{user.path}/history?latest=10000")
        if not self._expect(reply, 200, f"read {user.name}"):
            return
        found = [_record(item) for item in reply.body["items"]]
        is_known = found in (user.items, changed)
        self._check(
            is_known, f"{user.tenant}/{user.name}: neither the old nor the new history after a broken connection"
        )
        self.log.unsure["stored" if found == changed else "not stored"] += 1
        user.items = found

    async def _send(
        self, kind: str, user: User, method: str, path: str, *, model: str | None = None, **options: Any
    ) -> Reply:
        """Send a request to a server in rotation. Repeat a reading on another server if the connection breaks."""
        while True:
            server, start = self.fleet.pick(model), time.perf_counter()
            process = server.process
            try:
                reply = await self._send_to(server, user, method, path, **options)
            except (aiohttp.ClientError, ConnectionError) as error:
                self._note_lost(server, kind, error)
                if process is server.process:
                    server.models = ()  # out of rotation until it is started again
                if kind in ("write", "erase"):
                    raise ConnectionLost from error
                continue
            self.log.seconds[kind].append(time.perf_counter() - start)
            return reply

    async def _send_to(self, server: FleetServer, user: User, method: str, path: str, **options: Any) -> Reply:
        headers = {"Authorization": f"Bearer {self.keys[user.tenant]}"}
        server.running += 1
        try:
            async with self.session.request(method, server.url + path, headers=headers, **options) as reply:
                return Reply(reply.status, await reply.json(), reply.headers)
        finally:
            server.running -= 1

    def _note_lost(self, server: FleetServer, kind: str, error: Exception) -> None:
        self.log.lost[kind] += 1
        if not server.kills:
            self.log.faults.append(f"{kind}: server {server.number}, which was not killed: {type(error).__name__}")

    def _expect(self, reply: Reply, status: int, what: str) -> bool:
        detail = reply.body.get("error", {}).get("code", "") if reply.status >= 400 else ""
        self._check(reply.status == status, f"{what}: status {reply.status} {detail}")
        return reply.status == status

    def _check(self, is_right: bool, fault: str) -> None:
        if not is_right:
            self.log.faults.append(fault)


def _record(item: dict[str, Any]) -> Record:
    return {name: str(item[name]) for name in ("id", "text", "score")}
