"""A vLLM server that sends invalid replies or mixes up users causes an engine failure."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from live_server import engine_request, open_service, running, served
from vllm_stand_in import WIDTH, StandIn

from personaplug.errors import ConfigError, EngineFailure, RequestError
from personaplug.llm.causal_lm import CausalLM
from personaplug.llm.soft_prompt import SoftPrompt
from personaplug.serving.engines import vllm_replies
from personaplug.serving.engines.vllm import VLLMEngine
from personaplug.serving.engines.vllm_requests import EmbeddingTable

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "review: x"}]},
    COMPLETION: {"prompt": "review: x"},
}


@pytest.fixture(scope="module")
def stand_in() -> StandIn:
    return StandIn()


@pytest.fixture(scope="module")
def address(stand_in: StandIn) -> Iterator[str]:
    with running(stand_in.app) as url:
        yield url


@pytest.fixture(scope="module")
def table(toy: CausalLM) -> EmbeddingTable:
    return EmbeddingTable(toy.embed.weight.detach(), toy.prompt_tokenizer.tokenizer)


def _engine(address: str, table: EmbeddingTable, *, timeout_s: float = 120, stream_s: float = 600) -> VLLMEngine:
    engine = VLLMEngine(address, table=table, width=WIDTH, placement="suffix")
    engine.timeout_s, engine.stream_s = timeout_s, stream_s
    return engine


@pytest.fixture(scope="module")
def url(toy: CausalLM, address: str, table: EmbeddingTable, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    engine = _engine(address, table, timeout_s=5)
    with served(open_service(toy, tmp_path_factory.mktemp("replies"), engine=engine)) as base_url:
        yield base_url


@pytest.fixture(autouse=True)
def _healthy(stand_in: StandIn) -> Iterator[None]:
    yield
    stand_in.instead, stand_in.events, stand_in.cache = {}, [], ""


INVALID_REPLIES = [
    b"<html>down for maintenance</html>",
    b'{"object": "error", "message": "SECRET"}',
    b'{"error": {"message": "SECRET"}}',
    b"",
    b"  ",
    b"null",
    b"[]",
    b'"tea"',
    b"{",
    b"\xff\xfe",
    b"[" * 100_000,
    b"{}",
    b'{"choices": null}',
    b'{"choices": []}',
    b'{"choices": {}}',
    b'{"choices": [null]}',
    b'{"choices": [{}]}',
    b'{"choices": [{"message": null, "text": null}]}',
    b'{"choices": [{"message": {"content": 5}, "text": 5}]}',
]


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
@pytest.mark.parametrize("body", INVALID_REPLIES, ids=range(len(INVALID_REPLIES)))
def test_status_200_without_an_answer_becomes_502(stand_in: StandIn, url: str, path: str, body: bytes) -> None:
    stand_in.instead = {path: (200, body)}
    for stream in (False, True):
        reply = httpx.post(f"{url}{path}", json=BODIES[path] | {"stream": stream}, timeout=30)
        assert (reply.status_code, reply.json()["error"]["code"]) == (502, "engine")
        assert "SECRET" not in reply.text


@pytest.mark.parametrize("status", [400, 413, 422, 429])
def test_refusal_without_json_gets_our_own_message(stand_in: StandIn, url: str, status: int) -> None:
    stand_in.instead = {CHAT: (status, b"<html>SECRET</html>")}
    reply = httpx.post(f"{url}{CHAT}", json=BODIES[CHAT], timeout=30)
    assert (reply.status_code, reply.json()["error"]["code"]) == (status, "refused")
    assert "SECRET" not in reply.text


def test_tool_call_without_text_is_an_answer(stand_in: StandIn, url: str) -> None:
    stand_in.instead = {CHAT: (200, b'{"choices": [{"message": {"content": null, "tool_calls": []}}]}')}
    assert httpx.post(f"{url}{CHAT}", json=BODIES[CHAT], timeout=30).status_code == 200


TEA = b'data: {"choices": [{"delta": {"content": "tea"}}]}'
BROKEN_STREAMS = [
    [b"data: <html>\n\n"],
    [TEA, b"\n\n", b"data: []\n\n"],
    [TEA, b"\n\n", b'data: {"choices": [{}]}\n\n'],
    [TEA, b"\n\n", b'data: {"object": "error"}\n\n'],
    [TEA, b"\n\n"],
    [TEA, b"\n\n", b"data: {"],
    [b"\n\n\n\n"],
]


@pytest.mark.parametrize("events", BROKEN_STREAMS, ids=range(len(BROKEN_STREAMS)))
def test_invalid_event_ends_a_stream_with_an_error_event(stand_in: StandIn, url: str, events: list[bytes]) -> None:
    stand_in.events = events
    reply = httpx.post(f"{url}{CHAT}", json=BODIES[CHAT] | {"stream": True}, timeout=30)
    *before, last = [event for event in reply.text.split("\n\n") if event]
    assert before == ([TEA.decode()] if TEA in events else [])
    assert '"code":"engine"' in last
    assert "[DONE]" not in reply.text


def test_stream_with_comments_and_other_line_ends_is_forwarded(stand_in: StandIn, url: str) -> None:
    error = b'data: {"error": {"message": "in the words of vLLM"}}'
    stand_in.events = [b": ping\n\n", TEA + b"\r\n", b"\r\n" + error[:9], error[9:] + b"\n\ndata: [DONE]\n\n"]
    reply = httpx.post(f"{url}{CHAT}", json=BODIES[CHAT] | {"stream": True}, timeout=30)
    assert reply.content == TEA + b"\n\n" + error + b"\n\ndata: [DONE]\n\n"


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, chunks: AsyncIterator[bytes]) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
    try:
        async for chunk in chunks:
            writer.write(chunk)
            await writer.drain()
    except ConnectionError:
        pass
    finally:
        writer.close()


async def _endless(chunk: bytes, *, pause_s: float = 0) -> AsyncIterator[bytes]:
    while True:
        yield chunk
        await asyncio.sleep(pause_s)


def _ask_raw(table: EmbeddingTable, chunk: bytes, *, stream: bool, pause_s: float = 0) -> int:
    """Send a request to a server that repeats a chunk; return the number of bytes that the server sent."""
    sent = itertools.count()

    async def counted() -> AsyncIterator[bytes]:
        async for piece in _endless(chunk, pause_s=pause_s):
            next(sent)
            yield piece

    async def scenario() -> None:
        server = await asyncio.start_server(lambda r, w: _answer(r, w, counted()), "127.0.0.1", 0)
        engine = _engine(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", table, timeout_s=0.5, stream_s=1)
        body = BODIES[CHAT] | {"stream": stream}
        try:
            async with asyncio.timeout(60):
                reply = await engine.respond(engine_request("chat", body, None))
                assert not isinstance(reply.body, bytes)
                async for _ in reply.body:
                    pass
        finally:
            await engine.close()
            server.close()

    with pytest.raises(EngineFailure):
        asyncio.run(scenario())
    return next(sent) * len(chunk)


def test_endless_bytes_without_an_event_are_limited(table: EmbeddingTable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_replies, "_MAX_EVENT_BYTES", 2**20)
    assert _ask_raw(table, b"x" * 2**16, stream=True) < 2**24


def test_endless_reply_in_one_piece_is_limited(table: EmbeddingTable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_replies.read_bounded, "__kwdefaults__", {"max_bytes": 2**20})
    assert _ask_raw(table, b"x" * 2**16, stream=False) < 2**24


@pytest.mark.parametrize("chunk", [b"x", b": ping\n\n", TEA + b"\n\n"])
def test_slow_stream_is_limited_in_time(table: EmbeddingTable, chunk: bytes) -> None:
    _ask_raw(table, chunk, stream=True, pause_s=0.05)


def _start(address: str, table: EmbeddingTable) -> VLLMEngine:
    engine = _engine(address, table)

    async def run() -> None:
        await engine.start()
        await engine.close()

    asyncio.run(run())
    return engine


def test_start_refuses_a_cache_whose_keys_ignore_embeds_and_salts(
    stand_in: StandIn, address: str, table: EmbeddingTable
) -> None:
    stand_in.cache = "salt"
    with pytest.raises(ConfigError, match="another user's soft tokens") as refused:
        _start(address, table)
    assert "--no-enable-prefix-caching" in str(refused.value)


def _salts(stand_in: StandIn, engine: VLLMEngine) -> list[str]:
    """Return the cache salts of two users of one tenant and of a user of another tenant."""

    async def run() -> None:
        await engine.start()
        for seed, tenant in ((0, "shop"), (1, "shop"), (1, "bank")):
            vectors = torch.randn(1, 3, WIDTH, generator=torch.Generator().manual_seed(seed))
            request = engine_request("chat", BODIES[CHAT], SoftPrompt(vectors, placement="suffix"))
            await engine.respond(type(request)(request.body, request.soft, tenant=tenant))
        await engine.close()

    asyncio.run(run())
    return [body["cache_salt"] for body in stand_in.bodies[-3:]]


def test_cache_whose_keys_ignore_embeds_gets_a_salt_per_persona(
    stand_in: StandIn, address: str, table: EmbeddingTable, caplog: pytest.LogCaptureFixture
) -> None:
    stand_in.cache = "embeds"
    assert len(set(_salts(stand_in, _engine(address, table)))) == 3
    assert "cache salt" in caplog.text


def test_users_of_a_tenant_share_a_correct_cache_but_tenants_do_not(
    stand_in: StandIn, address: str, table: EmbeddingTable
) -> None:
    ann, bob, stranger = _salts(stand_in, _engine(address, table))
    assert ann == bob != stranger


@pytest.mark.parametrize("fields", [{"guided_choice": ["a"]}, {"prompt_embeds": "x"}, {"cache_salt": "x"}, {"x": 1}])
def test_field_that_is_not_sent_to_vllm_is_refused(address: str, table: EmbeddingTable, fields: dict[str, Any]) -> None:
    engine = _engine(address, table)
    with pytest.raises(RequestError) as refused:
        asyncio.run(engine.prepare(engine_request("chat", BODIES[CHAT] | fields, None).body))
    assert refused.value.http_status == 400
    assert next(iter(fields)) in str(refused.value)


def test_label_request_ignores_stop_texts(stand_in: StandIn, url: str) -> None:
    body = BODIES[CHAT] | {"stop": "4", "max_tokens": 1, "presence_penalty": 2, "temperature": 0.5}
    assert httpx.post(f"{url}{CHAT}", json=body, timeout=30).status_code == 200
    sent = stand_in.bodies[-1]
    assert not {"stop", "max_tokens", "presence_penalty"} & sent.keys()
    assert (sent["temperature"], "structured_outputs" in sent) == (0.5, True)
    free = BODIES[CHAT] | {"logprobs": True, "stop": "4", "personaplug": {"free": True}}
    assert httpx.post(f"{url}{CHAT}", json=free, timeout=30).status_code == 200
    assert (stand_in.bodies[-1]["logprobs"], stand_in.bodies[-1]["stop"]) == (True, "4")


def test_long_prompt_is_refused_before_a_persona_is_computed(
    toy: CausalLM, address: str, table: EmbeddingTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = open_service(toy, tmp_path, engine=_engine(address, table))

    def unwanted(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a persona was computed")

    monkeypatch.setattr(service.personas, "persona", unwanted)
    monkeypatch.setattr(table.tokenizer, "__call__", unwanted, raising=False)
    long = "review: " + "tea " * 750_000
    with served(service) as base_url:
        turns = [{"role": "user", "content": long[:100_000]}] * 20
        for path, body in (
            (CHAT, {"messages": [{"role": "user", "content": long}]}),
            (CHAT, {"messages": [*turns, {"role": "user", "content": "review: x"}]}),
            (COMPLETION, {"prompt": long}),
            ("/v1/users/ann/explain", {"prompt": long}),
        ):
            reply = httpx.post(f"{base_url}{path}", json=body, timeout=30)
            assert (reply.status_code, reply.json()["error"]["code"]) == (400, "context_length_exceeded")
