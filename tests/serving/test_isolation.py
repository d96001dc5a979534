"""Users of several tenants ask, write, delete and are erased in random order: none gets another's history.

Every item carries a marker of its user and tenant. Every persona is compared with that of the user's own items.
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
    """An engine that answers with a digest of its soft tokens, after other requests had their turn."""

    models = ("digest",)

    async def respond(self, request: EngineRequest) -> EngineReply:
        await asyncio.sleep(0)
        return EngineReply(_digest(request.soft))


def _digest(soft: SoftPrompt | None) -> bytes:
    # Rounded: sums of many items differ in the last digits with the order of a batch.
    values = soft.vectors.mul(1000).round().int().numpy().tobytes() if soft else b"none"
    return hashlib.blake2b(values, digest_size=12).hexdigest().encode()


class _Client:
    """A user who knows their own history."""

    def __init__(self, service: Service, who: Who) -> None:
        self.service, self.who = service, who
        self.items: dict[str, HistoryItem] = {}
        self.made, self.lock = 0, asyncio.Lock()
        self.expected = b""

    async def do(self, kind: str, draw: random.Random) -> None:
        """Send one request and check its reply."""
        tenant, user = self.who
        async with self.lock:  # requests of one user come one by one; those of others meanwhile
            if kind == "ask":
                turns = [{"role": "user", "content": "review: a film"}]
                request = ChatRequest.model_validate({"messages": turns, "user": user})
                answered = await self.service.respond(request, tenant=tenant)
                assert answered.reply.body == self.expected, self.who
                assert answered.persona.items == len(self.items)
            elif kind == "add":
                self.made += 1
                record = {"id": f"i{self.made}", "text": self._marker(self.made), "score": draw.choice(LABELS)}
                await self.service.add_records(tenant, user, records=[record])
                fields = (("text", record["text"]), ("score", record["score"]))
                self.items[record["id"]] = HistoryItem(record["id"], fields, "score")
                self._expect()
            elif kind == "list":
                store = self.service.store
                shown = [
                    self.service.item_fields(item) for item in await asyncio.to_thread(store.list_items, tenant, user)
                ]
                assert [item["id"] for item in shown] == list(self.items)
                assert f"{tenant}/{user}/" in json.dumps(shown) or not self.items
                assert all(item["text"].startswith(f"{tenant}/{user}/") for item in shown)
            elif kind == "delete" and self.items:
                name = draw.choice(list(self.items))
                await asyncio.to_thread(self.service.store.delete_item, tenant, user, name)
                del self.items[name]
                self._expect()
            elif kind == "erase":
                if self.made:
                    await self.service.erase_user(tenant, user)
                else:
                    with pytest.raises(MissingData):
                        await self.service.erase_user(tenant, user)
                self.items, self.made = {}, 0
                self._expect()

    def _marker(self, number: int) -> str:
        return f"{self.who[0]}/{self.who[1]}/{number} likes {'tea ' * (number % 3)}and number {number}"

    def _expect(self) -> None:
        personalizer = self.service.personas.personalizer
        history = personalizer.encode(list(self.items.values()), encoder=ENCODER)
        self.expected = _digest(personalizer.persona("a film", history))


async def _mixed(service: Service, *, users: int, requests: int, at_once: int) -> None:
    draw = random.Random(0)
    clients = [_Client(service, (TENANTS[n % 4], f"user {n // 4}")) for n in range(users)]
    for client in clients:
        client._expect()
        await client.do("add", draw)
    assert len({client.expected for client in clients}) > 0.99 * users  # the personas do tell users apart
    kinds = random.Random(1).choices(["ask", "add", "list", "delete", "erase"], [84, 8, 5, 2.5, 0.5], k=requests)
    coming = iter(kinds)

    async def worker() -> None:
        for kind in coming:
            await draw.choice(clients).do(kind, draw)

    await asyncio.gather(*(worker() for _ in range(at_once)))
    for client in clients:
        await client.do("ask", draw)


@pytest.mark.parametrize(("users", "requests"), [(40, 1_500), pytest.param(1_000, 100_000, marks=pytest.mark.slow)])
def test_mixed_requests_never_show_another_users_history(
    toy: CausalLM, tmp_path: Path, users: int, requests: int
) -> None:
    # A cache that holds a tenth of the users, so that they come and go in it too.
    service = open_service(toy, tmp_path, engine=_DigestEngine(), cache_bytes=users * 400)
    asyncio.run(_mixed(service, users=users, requests=requests, at_once=32))
    assert service.personas.cached_users < users
