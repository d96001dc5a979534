"""The vLLM engine: requests it sends, requests it refuses, and reports of vLLM's failures."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from live_server import LABELS, engine_request, open_service, running, served
from vllm_stand_in import MAX_MODEL_LEN, WIDTH, StandIn, read_embeds

from personaplug.errors import ConfigError, EngineFailure, RequestError
from personaplug.infra.model_hub import read_embeddings
from personaplug.llm.causal_lm import CausalLM
from personaplug.llm.prompt_tokenizer import frame_of
from personaplug.llm.soft_prompt import SoftPrompt
from personaplug.llm.tiny import tiny_tokenizer
from personaplug.serving.app import create_app
from personaplug.serving.engines.base import EngineReply, EngineRequest
from personaplug.serving.engines.vllm import VLLMEngine
from personaplug.serving.engines.vllm_requests import EmbeddingTable, encode_embeds
from personaplug.serving.openai_protocol import Kind

SOFT = torch.randn(1, 3, WIDTH, generator=torch.Generator().manual_seed(0))
START_REQUESTS = 11  # with a body: one checks the width, two compare a text and its embeddings, eight compare users
CHAT_BODY = {"messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}], "top_k": 7}


@pytest.fixture
def table(toy: CausalLM) -> EmbeddingTable:
    return EmbeddingTable(toy.embed.weight.detach(), toy.prompt_tokenizer.tokenizer)


def _engine(
    address: str,
    table: EmbeddingTable,
    *,
    placement: str = "suffix",
    timeout_s: float = 120,
    answer_s: float = 600,
    **settings: Any,
) -> VLLMEngine:
    engine = VLLMEngine(address, table=table, width=WIDTH, placement=placement, **settings)
    engine.timeout_s, engine.answer_s = timeout_s, answer_s
    return engine


def _ask(engine: VLLMEngine, *requests: EngineRequest) -> list[Any]:
    async def run() -> list[Any]:
        await engine.start()
        try:
            replies = []
            for request in requests:
                reply = await engine.respond(request)
                replies.append(reply.body if isinstance(reply.body, bytes) else [chunk async for chunk in reply.body])
            return replies
        finally:
            await engine.close()

    return asyncio.run(run())


def _soft(placement: str = "suffix") -> SoftPrompt:
    return SoftPrompt(SOFT, placement=placement)


def test_chat_with_suffix_sends_soft_tokens_as_the_beginning_of_the_answer(
    stand_in: StandIn, address: str, table: EmbeddingTable
) -> None:
    _ask(_engine(address, table, key="k"), engine_request("chat", CHAT_BODY, _soft(), id="r1"))
    sent = stand_in.bodies[-1]
    assert sent["messages"][:2] == CHAT_BODY["messages"]
    (part,) = sent["messages"][2]["content"]
    assert (sent["messages"][2]["role"], part["type"]) == ("assistant", "prompt_embeds")
    torch.testing.assert_close(read_embeds(part["data"]), SOFT[0].bfloat16())
    assert (sent["continue_final_message"], sent["add_generation_prompt"]) == (True, False)
    assert (sent["top_k"], sent["model"]) == (7, "small")
    assert stand_in.headers[-1]["x-request-id"] == "r1"
    assert stand_in.headers[-1]["authorization"] == "Bearer k"


def test_chat_with_prefix_sends_soft_tokens_before_the_last_users_text(
    stand_in: StandIn, address: str, table: EmbeddingTable
) -> None:
    _ask(_engine(address, table, placement="prefix"), engine_request("chat", CHAT_BODY, _soft("prefix")))
    content = stand_in.bodies[-1]["messages"][1]["content"]
    assert [part["type"] for part in content] == ["prompt_embeds", "text"]
    assert content[1]["text"] == "hello"
    assert "continue_final_message" not in stand_in.bodies[-1]


def test_request_without_a_persona_is_sent_with_only_its_fields(
    stand_in: StandIn, address: str, table: EmbeddingTable
) -> None:
    harmless = {"user": "ann", "metadata": {"user_id": "ann"}, "store": True, "n": None}
    _ask(_engine(address, table), engine_request("chat", CHAT_BODY | harmless, None))
    sent = stand_in.bodies[-1]
    assert sent.pop("cache_salt")
    assert sent == {**CHAT_BODY, "model": "small"}


@pytest.mark.parametrize("placement", ["prefix", "suffix"])
def test_completion_is_sent_as_embeddings(
    stand_in: StandIn, address: str, table: EmbeddingTable, placement: str
) -> None:
    _ask(_engine(address, table), engine_request("completion", {"prompt": "abc", "max_tokens": 3}, _soft(placement)))
    sent = stand_in.bodies[-1]
    assert "prompt" not in sent
    text = table.embed("abc")
    whole = [text, SOFT[0]] if placement == "suffix" else [SOFT[0], text]
    torch.testing.assert_close(read_embeds(sent["prompt_embeds"]), torch.cat(whole))


@pytest.mark.parametrize("placement", ["prefix", "suffix"])
def test_completion_places_soft_tokens_after_the_bos_token(
    stand_in: StandIn, address: str, toy: CausalLM, placement: str
) -> None:
    table = EmbeddingTable(toy.embed.weight.detach(), _framing_tokenizer())
    request = engine_request("completion", {"prompt": "abc", "max_tokens": 3}, _soft(placement))
    _ask(_engine(address, table, placement=placement), request)
    bos, a, b, c, eos = table.embed("abc").unsqueeze(1)
    whole = [bos, SOFT[0], a, b, c, eos] if placement == "prefix" else [bos, a, b, c, eos, SOFT[0]]
    torch.testing.assert_close(read_embeds(stand_in.bodies[-1]["prompt_embeds"]), torch.cat(whole))


def _framing_tokenizer() -> Any:
    """Return a tokenizer that adds one token before a text and one after it."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{end} $A {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    return tokenizer


def test_tokenizer_that_splits_a_text_is_refused() -> None:
    def odd(text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1, 2] if add_special_tokens else [3]}

    with pytest.raises(ConfigError, match="changes the tokens of the text"):
        frame_of(odd)


@dataclass
class _Watch:
    """The texts that a table has tokenized, and the threads that did so."""

    texts: list[str] = field(default_factory=list)
    threads: set[int] = field(default_factory=set)


def _watched(table: EmbeddingTable) -> _Watch:
    watch, encode = _Watch(), table.texts.encode

    def watched(text: str, *, inside: bool = False) -> list[int]:
        watch.texts.append(text)
        watch.threads.add(threading.get_ident())
        return encode(text, inside=inside)

    table.texts.encode = watched  # type: ignore[method-assign]
    return watch


def test_long_prompt_is_refused_before_it_is_embedded(stand_in: StandIn, address: str, toy: CausalLM) -> None:
    table = EmbeddingTable(toy.embed.weight.detach(), _framing_tokenizer())
    watch = _watched(table)
    too_many_characters, too_many_tokens = "a" * (MAX_MODEL_LEN * table.longest_token + 1), "b" * MAX_MODEL_LEN
    for prompt in (too_many_characters, too_many_tokens):
        request = engine_request("completion", {"prompt": prompt}, _soft())
        assert _not_sent(stand_in, _engine(address, table), request).code == "context_length_exceeded"
    assert too_many_characters not in watch.texts
    assert too_many_tokens in watch.texts
    fits = "b" * (MAX_MODEL_LEN - SOFT.shape[1] - 2)
    _ask(_engine(address, table), engine_request("completion", {"prompt": fits}, _soft()))
    assert len(read_embeds(stand_in.bodies[-1]["prompt_embeds"])) == MAX_MODEL_LEN


def test_prompt_is_embedded_outside_the_event_loop(address: str, toy: CausalLM) -> None:
    table = EmbeddingTable(toy.embed.weight.detach(), _framing_tokenizer())
    watch = _watched(table)

    async def scenario() -> None:
        engine = _engine(address, table)
        await engine.start()
        watch.threads.clear()
        await engine.respond(engine_request("completion", {"prompt": "abc"}, _soft()))
        await engine.close()

    asyncio.run(scenario())
    assert watch.threads
    assert threading.get_ident() not in watch.threads


def test_choices_constrain_the_answer_unless_the_request_does(
    stand_in: StandIn, address: str, table: EmbeddingTable
) -> None:
    form = {"response_format": {"type": "json_object"}}
    _ask(
        _engine(address, table),
        engine_request("chat", CHAT_BODY, _soft(), ("1", "2")),
        engine_request("chat", {**CHAT_BODY, "temperature": 0.5}, _soft(), ("1", "2")),
        engine_request("chat", CHAT_BODY | form, _soft(), ("1", "2")),
    )
    first, warm, formed = stand_in.bodies[-3:]
    assert first["structured_outputs"] == {"choice": ["1", "2"]}
    assert (first["temperature"], warm["temperature"]) == (0, 0.5)
    assert "structured_outputs" not in formed


def test_label_bias_is_sent_with_the_choices(
    stand_in: StandIn, toy: CausalLM, address: str, table: EmbeddingTable
) -> None:
    soft = replace(_soft(), label_bias=torch.tensor([[0.25, -300.0]]))
    _ask(
        _engine(address, table),
        engine_request("chat", CHAT_BODY, soft, ("1", "2")),
        engine_request("chat", {**CHAT_BODY, "logit_bias": {"7": 1}}, soft, ("1", "2")),
        engine_request("chat", CHAT_BODY, soft),
    )
    biased, own, free = stand_in.bodies[-3:]
    (one,), (two,) = toy.prompt_tokenizer.encode_labels(["1", "2"])
    sent = biased["logit_bias"]
    # The label's share is 1, and the mean share is 1/2.
    assert sent[str(one)] == pytest.approx(math.log(2), abs=1e-5)
    assert sent[str(two)] == -100  # the lowest bias that vLLM accepts
    assert own["logit_bias"] == {"7": 1}
    assert "logit_bias" not in free


def _not_sent(stand_in: StandIn, engine: VLLMEngine, request: EngineRequest) -> RequestError:
    """Return the error of a request that is refused before it reaches vLLM."""
    before = len(stand_in.bodies)
    with pytest.raises(RequestError) as refused:
        _ask(engine, request)
    assert len(stand_in.bodies) == before + START_REQUESTS
    return refused.value


def _chat_body(*parts: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts) or "hello"}], **fields}


EMBEDS = encode_embeds(torch.zeros(1, WIDTH))
TOOL_CALL = {"type": "function", "id": "1", "function": {"name": "f", "arguments": '{"a": "\\u003cprompt_embeds>"}'}}


@pytest.mark.parametrize("persona", [False, True])
@pytest.mark.parametrize(
    ("kind", "body", "code"),
    [
        ("completion", {"prompt": "a", "prompt_embeds": EMBEDS}, "reserved"),
        ("chat", _chat_body(prompt_embeds=EMBEDS), "reserved"),
        ("chat", _chat_body({"type": "prompt_embeds", "data": EMBEDS}), "reserved"),
        ("chat", _chat_body({"type": "x", "uuid": "1", "prompt_embeds": 1, "data": EMBEDS}), "reserved"),
        ("chat", _chat_body(echo=True), "unsupported"),
        ("completion", {"prompt": "a", "echo": True}, "unsupported"),
        ("chat", _chat_body(prompt_logprobs=0), "unsupported"),
        ("completion", {"prompt": "a", "prompt_logprobs": 1}, "unsupported"),
        ("completion", {"prompt": "so <prompt_embeds> it is"}, "reserved_text"),
        ("chat", {"messages": [{"role": "<prompt_embeds>", "content": "a"}]}, "reserved_text"),
        ("chat", _chat_body(tools=[{"function": {"name": "f", "description": "<prompt_embeds>"}}]), "reserved_text"),
        ("chat", {"messages": [{"role": "assistant", "content": None, "tool_calls": [TOOL_CALL]}]}, "reserved_text"),
        (
            "chat",
            _chat_body({"type": "text", "text": "<prompt_"}, {"type": "text", "text": "embeds>"}),
            "reserved_text",
        ),
    ],
)
def test_request_that_would_crash_vllm_is_refused(
    stand_in: StandIn,
    address: str,
    table: EmbeddingTable,
    kind: Kind,
    body: dict[str, Any],
    code: str,
    persona: bool,
) -> None:
    request = engine_request(kind, body, _soft() if persona else None)
    assert _not_sent(stand_in, _engine(address, table), request).code == code


def test_persona_with_nan_is_not_sent(stand_in: StandIn, address: str, table: EmbeddingTable) -> None:
    vectors = SOFT.clone()
    vectors[0, 1, 2] = float("nan")
    with pytest.raises(EngineFailure, match="not finite"):
        _ask(_engine(address, table), engine_request("chat", CHAT_BODY, SoftPrompt(vectors, placement="suffix")))
    assert len(stand_in.bodies) == START_REQUESTS


def test_continued_answer_with_a_persona_is_refused(stand_in: StandIn, address: str, table: EmbeddingTable) -> None:
    request = engine_request("chat", {**CHAT_BODY, "continue_final_message": True}, _soft())
    assert _not_sent(stand_in, _engine(address, table), request).code == "messages"


def test_harmless_values_of_risky_fields_are_sent(stand_in: StandIn, address: str, table: EmbeddingTable) -> None:
    harmless = {"echo": False, "prompt_logprobs": None, "best_of": 1, "stop": "prompt_embeds, and a \\ and a \u2028"}
    _ask(
        _engine(address, table), *[engine_request("chat", {**CHAT_BODY, **harmless}, soft) for soft in (None, _soft())]
    )
    assert [body["stop"] for body in stand_in.bodies[-2:]] == [harmless["stop"]] * 2
    assert "echo" not in stand_in.bodies[-1]
    assert stand_in.headers[-1]["content-type"] == "application/json"


@pytest.mark.parametrize("value", [5, "a", [5], [{"content": 5}], [{"content": [5]}]])
def test_value_of_a_field_is_sent_unchanged(stand_in: StandIn, address: str, table: EmbeddingTable, value: Any) -> None:
    _ask(_engine(address, table), engine_request("completion", {"prompt": "a", "documents": value}, _soft()))
    assert stand_in.bodies[-1]["documents"] == value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "\ud800", {"deep": ["\udfff"]}])
@pytest.mark.parametrize("persona", [False, True])
def test_value_that_json_cannot_represent_is_refused(
    stand_in: StandIn, address: str, table: EmbeddingTable, value: Any, persona: bool
) -> None:
    with pytest.raises(RequestError) as refused:
        engine_request("chat", {**CHAT_BODY, "top_p": value}, _soft() if persona else None)
    assert refused.value.http_status == 400


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"flag": False}, "--enable-prompt-embeds"),
        ({"width": 64}, "do not have the plug's width"),
        ({"embeds_say": "coffee"}, "different answers"),
        ({"template_adds": 2}, "--chat-template"),
        ({"instead": {"/tokenize": (404, b'{"detail":"Not Found"}')}}, "found status 404"),
        ({"instead": {"/tokenize": (200, b'{"tokens": []}')}}, "found no tokens"),
        ({"instead": {"/v1/models": (401, b"{}")}}, "another key"),
    ],
)
def test_start_refuses_a_server_that_does_not_fit(
    stand_in: StandIn, address: str, table: EmbeddingTable, wrong: dict[str, Any], message: str
) -> None:
    for name, value in wrong.items():
        setattr(stand_in, name, value)
    engine = _engine(address, table)

    async def start_twice() -> None:
        for _ in range(2):  # after a failure, `start` checks again
            with pytest.raises(ConfigError, match=message):
                await engine.start()
        assert engine.models == ()
        await engine.close()

    asyncio.run(start_twice())


@pytest.mark.parametrize(
    ("path", "status", "body"),
    [
        ("/v1/models", 200, b"<html>"),
        ("/v1/models", 200, b"{}"),
        ("/v1/models", 200, b'{"data": []}'),
        ("/v1/models", 200, b"[]"),
        ("/v1/models", 500, b"oh"),
        ("/v1/completions", 200, b"{}"),
        ("/v1/completions", 200, b'{"choices": [{"text": "tea", "logprobs": null}]}'),
        ("/v1/completions", 200, b'{"choices": [{"text": "tea", "logprobs": {"token_logprobs": [null]}}]}'),
        ("/tokenize", 200, b"\xff"),
    ],
)
def test_start_names_the_route_of_an_invalid_reply(
    stand_in: StandIn, address: str, table: EmbeddingTable, path: str, status: int, body: bytes
) -> None:
    stand_in.instead = {path: (status, body)}
    with pytest.raises(EngineFailure, match=path):
        _ask(_engine(address, table))


def test_start_reads_the_maximum_length_of_a_prompt(address: str, table: EmbeddingTable) -> None:
    engine = _engine(address, table)
    _ask(engine)
    assert engine.max_model_len == MAX_MODEL_LEN


def test_start_without_a_server_fails(table: EmbeddingTable) -> None:
    engine = _engine("http://127.0.0.1:9", table)
    with pytest.raises(EngineFailure, match="Cannot reach a vLLM server"):
        _ask(engine)

    async def ready() -> bool:
        return await _engine("http://127.0.0.1:9", table).is_ready()

    assert not asyncio.run(ready())


def test_stream_is_forwarded_unchanged(stand_in: StandIn, address: str, table: EmbeddingTable) -> None:
    (events,) = _ask(_engine(address, table), engine_request("chat", {**CHAT_BODY, "stream": True}, _soft()))
    assert b"".join(events).endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("breaks", [True, False])
def test_broken_stream_forwards_only_complete_events(
    stand_in: StandIn, address: str, table: EmbeddingTable, breaks: bool
) -> None:
    stand_in.breaks, stand_in.halts = breaks, not breaks

    events_received = []

    async def scenario() -> None:
        engine = _engine(address, table)
        await engine.start()
        reply = await engine.respond(engine_request("chat", {**CHAT_BODY, "stream": True}, _soft()))
        assert not isinstance(reply.body, bytes)
        async for events in reply.body:
            events_received.append(events)

    with pytest.raises(EngineFailure, match=r"stream (ended|was interrupted)"):
        asyncio.run(scenario())
    assert b"".join(events_received).count(b"data: ") == 1
    assert b"".join(events_received).endswith(b"\n\n")


@pytest.mark.parametrize("read", [0, 1])
def test_closing_a_stream_ends_it_at_vllm(stand_in: StandIn, address: str, table: EmbeddingTable, read: int) -> None:
    stand_in.endless = True

    async def scenario() -> None:
        engine = _engine(address, table)
        await engine.start()
        reply = await engine.respond(engine_request("chat", {**CHAT_BODY, "stream": True}, _soft()))
        assert not isinstance(reply.body, bytes)
        events = aiter(reply.body)
        for _ in range(read):
            await anext(events)
        await _until(lambda: stand_in.running == 1)
        await reply.body.aclose()
        await reply.body.aclose()
        await _until(lambda: stand_in.running == 0)
        with pytest.raises(StopAsyncIteration):
            await anext(events)
        await engine.close()

    asyncio.run(scenario())


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("stream", [True, False])
def test_reply_with_broken_framing_fails_within_the_timeout(table: EmbeddingTable, stream: bool) -> None:
    async def broken(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabc\n\n\r\n")
        await writer.drain()
        await asyncio.sleep(0.2)
        writer.write(b"no length\r\n")
        await asyncio.sleep(30)

    async def scenario() -> None:
        server = await asyncio.start_server(broken, "127.0.0.1", 0)
        address = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        engine = _started(address, table, timeout_s=1, answer_s=1)
        async with asyncio.timeout(10):
            assert not await engine.is_ready()
            with pytest.raises(EngineFailure):  # noqa: PT012
                reply = await engine.respond(engine_request("chat", {**CHAT_BODY, "stream": stream}, _soft()))
                assert not isinstance(reply.body, bytes)
                async for _ in reply.body:
                    pass
        await engine.close()
        server.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("url", ["127.0.0.1:80", "ftp://here", "http://", "http://me:word@here"])
def test_invalid_address_is_refused(url: str, table: EmbeddingTable) -> None:
    with pytest.raises(ConfigError) as failed:
        _engine(url, table)
    assert "word" not in str(failed.value).replace("password", "")


def test_invalid_key_or_host_name_is_an_engine_failure(address: str, table: EmbeddingTable) -> None:
    for engine in (_engine(address, table, key="a\nb"), _engine("http://a..b", table)):
        with pytest.raises(EngineFailure, match="Cannot reach a vLLM server"):
            _ask(engine)
    assert _ask(_engine(address, table, key="a key of a file\n")) == []


def test_request_seconds_of_a_stream_end_at_its_first_event(
    stand_in: StandIn, address: str, table: EmbeddingTable, toy: CausalLM, tmp_path: Path
) -> None:
    stand_in.silent_s = 1
    body = {"messages": [{"role": "user", "content": "review: x"}], "stream": True}
    with served(open_service(toy, tmp_path, engine=_engine(address, table))) as url:
        assert httpx.post(f"{url}/v1/chat/completions", json=body).status_code == 200
        metrics = httpx.get(f"{url}/metrics").text
    spent = next(line for line in metrics.splitlines() if line.startswith("personaplug_request_seconds_sum{"))
    assert float(spent.rpartition(" ")[2]) >= 1


def test_timeouts_of_streams_and_whole_answers_differ(stand_in: StandIn, address: str, table: EmbeddingTable) -> None:
    stand_in.silent_s = 2
    streamed, in_one_piece = (
        engine_request("chat", {**CHAT_BODY, "stream": stream}, _soft()) for stream in (True, False)
    )
    with pytest.raises(EngineFailure, match="TimeoutError"):
        _ask(_engine(address, table, timeout_s=1), streamed)
    assert b"tea" in _ask(_engine(address, table, timeout_s=1), in_one_piece)[0]
    with pytest.raises(EngineFailure, match="TimeoutError"):
        _ask(_engine(address, table, answer_s=0.5), in_one_piece)


def _answered(engine: VLLMEngine, stand_in: StandIn, status: int) -> EngineReply:
    async def run() -> EngineReply:
        await engine.start()
        stand_in.status = status
        try:
            return await engine.respond(engine_request("chat", CHAT_BODY, _soft()))
        finally:
            await engine.close()

    return asyncio.run(run())


@pytest.mark.parametrize("status", [400, 413, 422, 429])
def test_refusal_by_vllm_reaches_the_caller(
    stand_in: StandIn, address: str, table: EmbeddingTable, status: int
) -> None:
    reply = _answered(_engine(address, table), stand_in, status)
    assert reply.status == status
    assert isinstance(reply.body, bytes)
    assert b"the text that was sent" in reply.body


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "another key"),
        (403, "another key"),
        (404, "no longer serves the model small"),
        (405, "status 405"),
        (500, "status 500"),
        (501, "status 501"),
        (503, "status 503"),
    ],
)
def test_failure_of_vllm_is_an_engine_failure(
    stand_in: StandIn, address: str, table: EmbeddingTable, status: int, message: str
) -> None:
    with pytest.raises(EngineFailure, match=message) as failed:
        _answered(_engine(address, table), stand_in, status)
    assert "the text" not in str(failed.value)


def test_log_likelihoods_are_refused(address: str, table: EmbeddingTable) -> None:
    with pytest.raises(RequestError, match="personaplug explain"):
        asyncio.run(_engine(address, table).log_likelihoods("a", "b", softs=[None]))


def test_failures_of_vllm_are_distinguished_and_end_with_their_cause(
    stand_in: StandIn, address: str, table: EmbeddingTable, toy: CausalLM, tmp_path: Path
) -> None:
    engine = _engine(address, table)
    with served(open_service(toy, tmp_path, engine=engine)) as url:
        client: Any = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

        def chat(**fields: Any) -> Any:
            turns = [{"role": "user", "content": "review: SECRET"}]
            return client.chat.completions.create(model="small", messages=turns, user="ann", **fields)

        assert chat().choices[0].message.content == "tea"
        stand_in.status = 400
        with pytest.raises(openai.BadRequestError, match="the text that was sent"):
            chat()  # only the caller gets vLLM's message
        stand_in.status = 429
        with pytest.raises(openai.RateLimitError) as busy:
            chat()
        assert busy.value.response.headers["retry-after"] == "1"
        stand_in.status = 500
        with pytest.raises(openai.InternalServerError) as failed:
            chat()
        assert failed.value.status_code == 502
        assert "SECRET" not in str(failed.value)
        stand_in.status, stand_in.breaks = 200, True
        with pytest.raises(openai.APIError, match=r"stream (ended|was interrupted)"):
            list(chat(stream=True))  # the stream breaks within an event, but OpenAI's client can parse the error
        stand_in.breaks = False
        assert chat().choices[0].message.content == "tea"
        assert stand_in.bodies[-1]["structured_outputs"] == {"choice": list(LABELS)}
        assert httpx.get(f"{url}/ready").json() == {"status": "ready"}


def test_restarted_vllm_is_used_again(stand_in: StandIn, table: EmbeddingTable, toy: CausalLM, tmp_path: Path) -> None:
    with running(stand_in.app) as address:
        pass  # the server has stopped, so its port is free
    engine = _started(address, table)
    service = open_service(toy, tmp_path, engine=engine)
    body = {"messages": [{"role": "user", "content": "review: x"}]}
    with served(service) as url:
        gone = httpx.post(f"{url}/v1/chat/completions", json=body)
        assert (gone.status_code, gone.json()["error"]["code"]) == (502, "engine")
        assert httpx.get(f"{url}/ready").status_code == 502
        with running(stand_in.app, port=int(address.rpartition(":")[2])):
            assert httpx.post(f"{url}/v1/chat/completions", json=body).status_code == 200
            assert httpx.get(f"{url}/ready").status_code == 200


def test_request_cut_off_at_shutdown_gets_a_503(
    stand_in: StandIn, address: str, table: EmbeddingTable, toy: CausalLM, tmp_path: Path
) -> None:
    stand_in.silent_s = 30
    service = open_service(toy, tmp_path, engine=_engine(address, table))
    body = {"messages": [{"role": "user", "content": "review: x"}]}
    with ThreadPoolExecutor(1) as pool:
        with running(create_app(service), patience_s=1) as url:
            pending = pool.submit(httpx.post, f"{url}/v1/chat/completions", json=body, timeout=20)
            while not any("structured_outputs" in body for body in stand_in.bodies):
                time.sleep(0.01)
        reply = pending.result()
    assert (reply.status_code, reply.json()["error"]["code"], reply.headers["retry-after"]) == (503, "stopping", "1")


def _started(address: str, table: EmbeddingTable, **settings: Any) -> VLLMEngine:
    """Return an engine that skips the checks at start, so that it needs no server."""
    engine = _engine(address, table, model="small", **settings)

    async def nothing() -> None:
        return None

    engine.start = nothing  # type: ignore[method-assign]
    return engine


def test_embeddings_are_loaded_from_a_models_files(toy: CausalLM, tmp_path: Path) -> None:
    toy.model.save_pretrained(tmp_path)
    torch.testing.assert_close(read_embeddings(tmp_path), toy.embed.weight.detach())
