"""The service and its store: erasures during requests, and a database that hangs."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from live_server import ENCODER, LABELS, TASK, open_service
from postgres_server import PostgresServer
from stores import SECRET

from personaplug.errors import MissingData, StorageError, UserErased
from personaplug.llm.causal_lm import CausalLM
from personaplug.serving.engines.base import Engine, EngineReply, EngineRequest
from personaplug.serving.feedback import Feedback
from personaplug.serving.openai_protocol import ChatRequest
from personaplug.serving.persona_cache import PersonaCache
from personaplug.serving.service import Service
from personaplug.store.history_store import HistoryStore
from personaplug.store.postgres import BoundedConnection

RECORD = {"id": "1", "text": "a film", "score": LABELS[0]}


class HookedEngine(Engine):
    """Calls `hook`, then answers."""

    models = ("hooked",)

    def __init__(self) -> None:
        self.hook: Callable[[], Awaitable[object]] = lambda: asyncio.sleep(0)

    async def respond(self, request: EngineRequest) -> EngineReply:
        await self.hook()
        return EngineReply(b"answer")


@pytest.fixture
def engine() -> HookedEngine:
    return HookedEngine()


@pytest.fixture
def service(toy: CausalLM, tmp_path: Path, engine: HookedEngine) -> Service:
    return open_service(toy, tmp_path, engine=engine)


def chat(user: str | None) -> ChatRequest:
    turns = [{"role": "user", "content": f"{TASK.query_after}a film"}]
    return ChatRequest.model_validate({"messages": turns, **({"user": user} if user else {})})


def run(service: Service, work: Callable[[], Awaitable[Any]]) -> Any:
    async def closing() -> Any:
        try:
            return await work()
        finally:
            await service.close()

    return asyncio.run(closing())


def test_items_encoded_during_an_erasure_are_refused(service: Service, tmp_path: Path) -> None:
    encoder, started, may_end = service.store.encoder, threading.Event(), threading.Event()

    class Slow:
        identity = ENCODER.identity

        def encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
            started.set()
            assert may_end.wait(60)
            assert encoder
            return encoder.encode(texts)

    async def work() -> None:
        service.store.encoder = Slow()  # type: ignore[assignment]
        adding = asyncio.create_task(service.add_records("shop", "ann", records=[RECORD]))
        await asyncio.to_thread(started.wait, 60)
        with pytest.raises(MissingData):  # nothing is stored yet
            await service.erase_user("shop", "ann")
        may_end.set()
        with pytest.raises(UserErased):
            await adding
        assert service.store.count("shop", "ann") == 0
        service.store.encoder = encoder
        assert (await service.add_records("shop", "ann", records=[RECORD])).new == 1

    run(service, work)


def test_reply_with_the_persona_of_an_erased_user_is_withheld(
    service: Service, engine: HookedEngine, tmp_path: Path
) -> None:
    elsewhere = HistoryStore.open(tmp_path / "histories.db")

    async def erase() -> None:
        elsewhere.erase_user("shop", "ann")

    async def work() -> None:
        await service.add_records("shop", "ann", records=[RECORD])
        assert (await service.respond(chat("ann"), tenant="shop")).persona.applied == "user"
        engine.hook = erase
        with pytest.raises(UserErased):
            await service.respond(chat("ann"), tenant="shop")
        engine.hook = lambda: asyncio.sleep(0)
        assert (await service.respond(chat("ann"), tenant="shop")).persona.applied == "population"

    run(service, work)


def test_persona_of_a_history_erased_meanwhile_is_neither_cached_nor_used(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere, personas = HistoryStore.open(tmp_path / "histories.db"), service.personas
    read = PersonaCache._read

    def read_then_erased(self: PersonaCache, ticket: Any) -> Any:
        history = read(self, ticket)
        elsewhere.erase_user("shop", "ann")
        return history

    async def work() -> None:
        await service.add_records("shop", "ann", records=[RECORD])
        monkeypatch.setattr(PersonaCache, "_read", read_then_erased)
        with pytest.raises(UserErased):
            await service.respond(chat("ann"), tenant="shop")
        assert personas.cached_users == 0

    run(service, work)


def test_request_before_an_erasure_by_another_process_cannot_become_history(service: Service, tmp_path: Path) -> None:
    elsewhere = HistoryStore.open(tmp_path / "histories.db")

    async def work() -> None:
        before = await service.respond(chat("ann"), tenant="shop")
        with pytest.raises(MissingData):
            elsewhere.erase_user("shop", "ann")
        after = await service.respond(chat("ann"), tenant="shop")
        with pytest.raises(Exception, match="no recent request with this id"):
            await service.add_feedback("shop", "ann", request_id=before.id, feedback=Feedback("1"))
        assert service.store.count("shop", "ann") == 0
        assert (await service.add_feedback("shop", "ann", request_id=after.id, feedback=Feedback("1"))).new == 1

    run(service, work)


@pytest.fixture
def stoppable(
    postgres: PostgresServer, service: Service, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Service, PostgresServer]]:
    """A service with a store in PostgreSQL, and the database server, which can be paused."""
    monkeypatch.setattr(BoundedConnection, "silence_s", 1.0)
    monkeypatch.setattr("personaplug.store.postgres.ANSWER_S", 2.0)
    place, settings = postgres.cleaned_database(), service.store.settings
    service.store.close()
    store = HistoryStore.open(place, ENCODER, settings=settings, secret=SECRET, wait_s=1)
    service.store = service.personas.store = store
    yield service, postgres
    postgres.resume()


def test_hanging_database_fails_only_requests_with_a_user(stoppable: tuple[Service, PostgresServer]) -> None:
    service, server = stoppable

    async def fails(work: Awaitable[object]) -> None:
        with pytest.raises(StorageError):
            await work

    async def work() -> None:
        await service.add_records("shop", "ann", records=[RECORD])
        server.pause()
        started = time.monotonic()
        waiting = [asyncio.create_task(fails(service.respond(chat(f"u{n}"), tenant="shop"))) for n in range(100)]
        waiting += [asyncio.create_task(fails(service.add_records("shop", "ann", records=[RECORD]))) for _ in range(9)]
        await asyncio.sleep(0.2)
        assert (await service.respond(chat(None), tenant="shop")).persona.applied == "population"
        assert not any(task.done() for task in waiting), "these requests still wait for the database"
        await asyncio.gather(*waiting)
        assert time.monotonic() - started < 15
        server.resume()
        await asyncio.sleep(2.1)
        assert (await service.respond(chat("ann"), tenant="shop")).persona.items == 1

    run(service, work)
