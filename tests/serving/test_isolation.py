"""Users of several tenants send concurrent requests in random order. No user gets another user's history.

Every item has a marker of its user and tenant. Every persona is compared with the persona of the user's items.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
from pathlib import Path

import pytest
from live_server import ENCODER, LABELS, open_service

from personaplug.data.records import HistoryItem
from personaplug.errors import MissingData
from personaplug.llm.causal_lm import CausalLM
from personaplug.llm.soft_prompt import SoftPrompt
from personaplug.serving.engines.base import Engine, EngineReply, EngineRequest
from personaplug.serving.openai_protocol import ChatRequest
from personaplug.serving.service import Service

Who = tuple[str, str]
TENANTS = ("shop", "bank", "school", "press")


class _DigestEngine(Engine):
    """An engine that yields to other requests, then answers with a digest of the soft tokens."""

    models = ("digest",)

    async def respond(self, request: EngineRequest) -> EngineReply:
        await asyncio.sleep(0)
        return EngineReply(_digest(request.soft))


def _digest(soft: SoftPrompt | None) -> bytes:
    # Rounded, because the last digits of sums depend on the order of a batch.
    values = soft.vectors.mul(1000).round().int().numpy().tobytes() if soft else b"none"
    return hashlib.blake2b(values, digest_size=12).hexdigest().encode()


class _Client:
    """A user with the history that the server should have."""

    def __init__(self, service: Service, who: Who) -> None:
        self.service, self.who = service, who
        self.items: dict[str, HistoryItem] = {}
        self.added, self.lock = 0, asyncio.Lock()
        self.expected = b""

    async def do(self, kind: str, draw: random.Random) -> None:
        """Send one request and check its reply."""
        tenant, user = self.who
        async with self.lock:  # one request of a user at a time, concurrent with those of other users
            if kind == "ask":
                turns = [{"role": "user", "content": "review: a film"}]
                request = ChatRequest.model_validate({"messages": turns, "user": user})
                result = await self.service.respond(request, tenant=tenant)
                assert result.reply.body == self.expected, self.who
                assert result.persona.items == len(self.items)
            elif kind == "add":
                self.added += 1
                record = {"id": f"i{self.added}", "text": self._marker(self.added), "score": draw.choice(LABELS)}
                await self.service.add_records(tenant, user, records=[record])
                fields = (("text", record["text"]), ("score", record["score"]))
                self.items[record["id"]] = HistoryItem(record["id"], fields, "score")
                self._expect()
            elif kind == "list":
                store = self.service.store
                listed = [
                    self.service.item_fields(item) for item in await asyncio.to_thread(store.list_items, tenant, user)
                ]
                assert [item["id"] for item in listed] == list(self.items)
                assert f"{tenant}/{user}/" in json.dumps(listed) or not self.items
                assert all(item["text"].startswith(f"{tenant}/{user}/") for item in listed)
            elif kind == "delete" and self.items:
                name = draw.choice(list(self.items))
                await asyncio.to_thread(self.service.store.delete_item, tenant, user, name)
                del self.items[name]
                self._expect()
            elif kind == "erase":
                if self.added:
                    await self.service.erase_user(tenant, user)
                else:
                    with pytest.raises(MissingData):
                        await self.service.erase_user(tenant, user)
                self.items, self.added = {}, 0
                self._expect()

    def _marker(self, number: int) -> str:
        return f"{self.who[0]}/{self.who[1]}/{number} likes {'tea ' * (number % 3)}and number {number}"

    def _expect(self) -> None:
        personalizer = self.service.personas.personalizer
        history = personalizer.encode(list(self.items.values()), encoder=ENCODER)
        self.expected = _digest(personalizer.persona("a film", history))


async def _send_random_requests(service: Service, *, users: int, requests: int, concurrency: int) -> None:
    draw = random.Random(0)
    clients = [_Client(service, (TENANTS[n % 4], f"user {n // 4}")) for n in range(users)]
    for client in clients:
        client._expect()
        await client.do("add", draw)
    assert len({client.expected for client in clients}) > 0.99 * users  # almost all personas differ
    kinds = random.Random(1).choices(["ask", "add", "list", "delete", "erase"], [84, 8, 5, 2.5, 0.5], k=requests)
    remaining = iter(kinds)

    async def worker() -> None:
        for kind in remaining:
            await draw.choice(clients).do(kind, draw)

    await asyncio.gather(*(worker() for _ in range(concurrency)))
    for client in clients:
        await client.do("ask", draw)


@pytest.mark.parametrize(("users", "requests"), [(40, 1_500), pytest.param(1_000, 100_000, marks=pytest.mark.slow)])
def test_mixed_requests_never_show_another_users_history(
    toy: CausalLM, tmp_path: Path, users: int, requests: int
) -> None:
    # The cache has room for a tenth of the users, so it evicts entries.
    service = open_service(toy, tmp_path, engine=_DigestEngine(), cache_bytes=users * 400)
    asyncio.run(_send_random_requests(service, users=users, requests=requests, concurrency=32))
    assert service.personas.cached_users < users
