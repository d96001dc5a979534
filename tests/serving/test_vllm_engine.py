"""What the vLLM engine sends, what it refuses to send, and what becomes of vLLM's failures."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from live_server import LABELS, open_service, running, served
from vllm_stand_in import MAX_MODEL_LEN, WIDTH, StandIn, read_embeds

from personaplug.errors import ConfigError, EngineFailure, RequestError
from personaplug.infra.model_hub import read_embeddings
from personaplug.llm.causal_lm import CausalLM
from personaplug.llm.soft_prompt import SoftPrompt
from personaplug.serving.app import create_app
from personaplug.serving.engines.base import EngineReply, EngineRequest
from personaplug.serving.engines.vllm import VLLMEngine
from personaplug.serving.engines.vllm_requests import EmbeddingTable, encoded
from personaplug.serving.openai_protocol import Kind

SOFT = torch.randn(1, 3, WIDTH, generator=torch.Generator().manual_seed(0))
ASKED = {"messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}], "top_k": 7}


@pytest.fixture
def theirs() -> StandIn:
    return StandIn()


@pytest.fixture
def address(theirs: StandIn) -> Iterator[str]:
    with running(theirs.app) as url:
        yield url


@pytest.fixture
def table(toy: CausalLM) -> EmbeddingTable:
    return EmbeddingTable(toy.embed.weight.detach(), toy.prompt_tokenizer.tokenizer)


def _engine(address: str, table: EmbeddingTable, *, placement: str = "suffix", **settings: Any) -> VLLMEngine:
    return VLLMEngine(address, table=table, width=WIDTH, placement=placement, **settings)


def _ask(engine: VLLMEngine, *questions: EngineRequest) -> list[Any]:
    async def whole() -> list[Any]:
        await engine.start()
        try:
            found = []
            for question in questions:
                reply = await engine.answer(question)
                found.append(reply.body if isinstance(reply.body, bytes) else [chunk async for chunk in reply.body])
            return found
        finally:
            await engine.close()

    return asyncio.run(whole())


def _soft(placement: str = "suffix") -> SoftPrompt:
    return SoftPrompt(SOFT, placement=placement)


def test_a_chat_gets_soft_tokens_as_the_beginning_of_its_answer(
    theirs: StandIn, address: str, table: EmbeddingTable
) -> None:
    _ask(_engine(address, table, key="k"), EngineRequest("chat", ASKED, _soft(), id="r1"))
    sent = theirs.bodies[-1]
    assert sent["messages"][:2] == ASKED["messages"]
    (part,) = sent["messages"][2]["content"]
    assert (sent["messages"][2]["role"], part["type"]) == ("assistant", "prompt_embeds")
    torch.testing.assert_close(read_embeds(part["data"]), SOFT[0].bfloat16())
    assert (sent["continue_final_message"], sent["add_generation_prompt"]) == (True, False)
    assert (sent["top_k"], sent["model"]) == (7, "small")
    assert theirs.headers[-1]["x-request-id"] == "r1"
    assert theirs.headers[-1]["authorization"] == "Bearer k"


def test_with_prefix_they_stand_before_the_last_users_text(
    theirs: StandIn, address: str, table: EmbeddingTable
) -> None:
    _ask(_engine(address, table, placement="prefix"), EngineRequest("chat", ASKED, _soft("prefix")))
    asked = theirs.bodies[-1]["messages"][1]["content"]
    assert [part["type"] for part in asked] == ["prompt_embeds", "text"]
    assert asked[1]["text"] == "hello"
    assert "continue_final_message" not in theirs.bodies[-1]


def test_without_a_persona_a_request_goes_as_it_came(theirs: StandIn, address: str, table: EmbeddingTable) -> None:
    _ask(_engine(address, table), EngineRequest("chat", ASKED, None))
    assert theirs.bodies[-1] == {**ASKED, "model": "small"}


@pytest.mark.parametrize("placement", ["prefix", "suffix"])
def test_a_completion_goes_embedded(theirs: StandIn, address: str, table: EmbeddingTable, placement: str) -> None:
    _ask(_engine(address, table), EngineRequest("completion", {"prompt": "abc", "max_tokens": 3}, _soft(placement)))
    sent = theirs.bodies[-1]
    assert "prompt" not in sent
    text = table.embedded("abc")
    whole = [text, SOFT[0]] if placement == "suffix" else [SOFT[0], text]
    torch.testing.assert_close(read_embeds(sent["prompt_embeds"]), torch.cat(whole))


@pytest.mark.parametrize("placement", ["prefix", "suffix"])
def test_soft_tokens_stand_behind_the_tokenizers_bos(
    theirs: StandIn, address: str, toy: CausalLM, placement: str
) -> None:
    framing = _Framing(toy.prompt_tokenizer.tokenizer)
    table = EmbeddingTable(toy.embed.weight.detach(), framing)
    question = EngineRequest("completion", {"prompt": "abc", "max_tokens": 3}, _soft(placement))
    _ask(_engine(address, table, placement=placement), question)
    bos, a, b, c, eos = table.embedded("abc").unsqueeze(1)
    whole = [bos, SOFT[0], a, b, c, eos] if placement == "prefix" else [bos, a, b, c, eos, SOFT[0]]
    torch.testing.assert_close(read_embeds(theirs.bodies[-1]["prompt_embeds"]), torch.cat(whole))


class _Framing:
    """A tokenizer that puts a token in front of a text and another behind."""

    def __init__(self, bare: Any) -> None:
        self.bare = bare

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = list(self.bare(text)["input_ids"])
        return {"input_ids": [1, *ids, 2] if add_special_tokens else ids}


def test_a_tokenizer_that_cuts_into_texts_is_refused(toy: CausalLM) -> None:
    def odd(text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1, 2] if add_special_tokens else [3]}

    with pytest.raises(ConfigError, match="one piece"):
        EmbeddingTable(toy.embed.weight.detach(), odd)


class _Counting(_Framing):
    """Counts what it reads, and notes in which thread."""

    def __init__(self, bare: Any) -> None:
        super().__init__(bare)
        self.texts: list[str] = []
        self.threads: set[int] = set()

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        self.texts.append(text)
        self.threads.add(threading.get_ident())
        return super().__call__(text, add_special_tokens=add_special_tokens)


def test_a_prompt_that_cannot_fit_is_refused_before_it_takes_memory(
    theirs: StandIn, address: str, toy: CausalLM
) -> None:
    tokenizer = _Counting(toy.prompt_tokenizer.tokenizer)
    table = EmbeddingTable(toy.embed.weight.detach(), tokenizer)
    many, more = "a" * (MAX_MODEL_LEN * 16 + 1), "b" * MAX_MODEL_LEN
    for prompt in (many, more):
        question = EngineRequest("completion", {"prompt": prompt}, _soft())
        assert _not_sent(theirs, _engine(address, table), question).code == "context_length_exceeded"
    assert many not in tokenizer.texts  # this one is not even tokenized
    assert more in tokenizer.texts
    fits = "b" * (MAX_MODEL_LEN - SOFT.shape[1] - 2)
    _ask(_engine(address, table), EngineRequest("completion", {"prompt": fits}, _soft()))
    assert len(read_embeds(theirs.bodies[-1]["prompt_embeds"])) == MAX_MODEL_LEN


def test_prompts_are_embedded_beside_the_event_loop(address: str, toy: CausalLM) -> None:
    tokenizer = _Counting(toy.prompt_tokenizer.tokenizer)
    table = EmbeddingTable(toy.embed.weight.detach(), tokenizer)

    async def whole() -> None:
        engine = _engine(address, table)
        await engine.start()
        tokenizer.threads.clear()
        await engine.answer(EngineRequest("completion", {"prompt": "abc"}, _soft()))
        await engine.close()

    asyncio.run(whole())
    assert tokenizer.threads
    assert threading.get_ident() not in tokenizer.threads


def test_a_closed_set_constrains_unless_the_request_does(theirs: StandIn, address: str, table: EmbeddingTable) -> None:
    form = {"response_format": {"type": "json_object"}}
    _ask(
        _engine(address, table),
        EngineRequest("chat", ASKED, _soft(), ("1", "2")),
        EngineRequest("chat", {**ASKED, "temperature": 0.5}, _soft(), ("1", "2")),
        EngineRequest("chat", ASKED | form, _soft(), ("1", "2")),
    )
    first, warm, formed = theirs.bodies[-3:]
    assert first["structured_outputs"] == {"choice": ["1", "2"]}
    assert (first["temperature"], warm["temperature"]) == (0, 0.5)
    assert "structured_outputs" not in formed


def test_what_is_known_of_the_labels_is_sent_with_them(
    theirs: StandIn, toy: CausalLM, address: str, table: EmbeddingTable
) -> None:
    soft = replace(_soft(), label_bias=torch.tensor([[0.25, -300.0]]))
    _ask(
        _engine(address, table),
        EngineRequest("chat", ASKED, soft, ("1", "2")),
        EngineRequest("chat", {**ASKED, "logit_bias": {"7": 1}}, soft, ("1", "2")),
        EngineRequest("chat", ASKED, soft),
    )
    biased, own, free = theirs.bodies[-3:]
    (one,), (two,) = toy.prompt_tokenizer.encode_labels(["1", "2"])
    sent = biased["logit_bias"]
    assert sent[str(one)] == pytest.approx(math.log(2), abs=1e-5)  # as they are one to nothing, the mean counting 1
    assert sent[str(two)] == -100  # as far as vLLM goes
    assert own["logit_bias"] == {"7": 1}
    assert "logit_bias" not in free


def _not_sent(theirs: StandIn, engine: VLLMEngine, question: EngineRequest) -> RequestError:
    """What a request is refused with that never reaches vLLM."""
    before = len(theirs.bodies)
    with pytest.raises(RequestError) as refused:
        _ask(engine, question)
    assert len(theirs.bodies) == before + 3  # those of the start
    return refused.value


def _said(*parts: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts) or "hello"}], **fields}


EMBEDS = encoded(torch.zeros(1, WIDTH))
CALLED = {"type": "function", "id": "1", "function": {"name": "f", "arguments": '{"a": "\\u003cprompt_embeds>"}'}}


@pytest.mark.parametrize("persona", [False, True])
@pytest.mark.parametrize(
    ("kind", "body", "code"),
    [
        ("completion", {"prompt": "a", "prompt_embeds": EMBEDS}, "reserved"),
        ("chat", _said(prompt_embeds=EMBEDS), "reserved"),
        ("chat", _said({"type": "prompt_embeds", "data": EMBEDS}), "reserved"),
        ("chat", _said({"type": "x", "uuid": "1", "prompt_embeds": 1, "data": EMBEDS}), "reserved"),
        ("chat", _said(echo=True), "unsupported"),
        ("completion", {"prompt": "a", "echo": True}, "unsupported"),
        ("chat", _said(prompt_logprobs=0), "unsupported"),
        ("completion", {"prompt": "a", "prompt_logprobs": 1}, "unsupported"),
        ("completion", {"prompt": "so <prompt_embeds> it is"}, "reserved_text"),
        ("chat", {"messages": [{"role": "<prompt_embeds>", "content": "a"}]}, "reserved_text"),
        ("chat", _said(tools=[{"function": {"name": "f", "description": "<prompt_embeds>"}}]), "reserved_text"),
        ("chat", {"messages": [{"role": "assistant", "content": None, "tool_calls": [CALLED]}]}, "reserved_text"),
        ("chat", _said({"type": "text", "text": "<prompt_"}, {"type": "text", "text": "embeds>"}), "reserved_text"),
    ],
)
def test_what_brings_vllm_down_is_not_sent(
    theirs: StandIn,
    address: str,
    table: EmbeddingTable,
    kind: Kind,
    body: dict[str, Any],
    code: str,
    persona: bool,
) -> None:
    question = EngineRequest(kind, body, _soft() if persona else None)
    assert _not_sent(theirs, _engine(address, table), question).code == code


def test_a_persona_that_is_no_numbers_is_not_sent(theirs: StandIn, address: str, table: EmbeddingTable) -> None:
    spoiled = SOFT.clone()
    spoiled[0, 1, 2] = float("nan")
    with pytest.raises(EngineFailure, match="no numbers"):
        _ask(_engine(address, table), EngineRequest("chat", ASKED, SoftPrompt(spoiled, placement="suffix")))
    assert len(theirs.bodies) == 3


def test_a_persona_has_no_place_behind_an_answer_that_goes_on(
    theirs: StandIn, address: str, table: EmbeddingTable
) -> None:
    question = EngineRequest("chat", {**ASKED, "continue_final_message": True}, _soft())
    assert _not_sent(theirs, _engine(address, table), question).code == "messages"


def test_what_asks_for_nothing_that_harms_is_sent(theirs: StandIn, address: str, table: EmbeddingTable) -> None:
    harmless = {"echo": False, "prompt_logprobs": None, "note": "prompt_embeds, and a \\ and a \u2028"}
    _ask(_engine(address, table), *[EngineRequest("chat", {**ASKED, **harmless}, soft) for soft in (None, _soft())])
    assert [body["note"] for body in theirs.bodies[-2:]] == [harmless["note"]] * 2
    assert theirs.headers[-1]["content-type"] == "application/json"


@pytest.mark.parametrize("odd", [5, None, "a", [5], [{"content": 5}], [{"content": [5]}]])
def test_fields_that_mean_nothing_to_a_completion_do_no_harm(
    theirs: StandIn, address: str, table: EmbeddingTable, odd: Any
) -> None:
    _ask(_engine(address, table), EngineRequest("completion", {"prompt": "a", "messages": odd}, _soft()))
    assert theirs.bodies[-1]["messages"] == odd


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "\ud800", {"deep": ["\udfff"]}])
@pytest.mark.parametrize("persona", [False, True])
def test_what_json_cannot_say_is_the_callers_mistake(
    theirs: StandIn, address: str, table: EmbeddingTable, value: Any, persona: bool
) -> None:
    question = EngineRequest("chat", {**ASKED, "top_p": value}, _soft() if persona else None)
    assert _not_sent(theirs, _engine(address, table), question).status == 400


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"flag": False}, "--enable-prompt-embeds"),
        ({"width": 64}, "another width"),
        ({"embeds_say": "coffee"}, "differently"),
        ({"template_adds": 2}, "--chat-template"),
        ({"instead": {"/tokenize": (404, b'{"detail":"Not Found"}')}}, "found status 404"),
        ({"instead": {"/tokenize": (200, b'{"tokens": []}')}}, "found no tokens"),
        ({"instead": {"/v1/models": (401, b"{}")}}, "another key"),
    ],
)
def test_a_server_that_does_not_fit_is_refused_at_the_start(
    theirs: StandIn, address: str, table: EmbeddingTable, wrong: dict[str, Any], said: str
) -> None:
    for name, value in wrong.items():
        setattr(theirs, name, value)
    engine = _engine(address, table)

    async def asked_twice() -> None:
        for _ in range(2):  # a refusal is no start
            with pytest.raises(ConfigError, match=said):
                await engine.start()
        assert engine.models == ()
        await engine.close()

    asyncio.run(asked_twice())


@pytest.mark.parametrize(
    ("path", "status", "said"),
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
def test_what_is_no_vllm_server_is_said_so(
    theirs: StandIn, address: str, table: EmbeddingTable, path: str, status: int, said: bytes
) -> None:
    theirs.instead = {path: (status, said)}
    with pytest.raises(EngineFailure, match=path):
        _ask(_engine(address, table))


def test_how_much_the_model_reads_is_learnt_at_the_start(address: str, table: EmbeddingTable) -> None:
    engine = _engine(address, table)
    _ask(engine)
    assert engine.max_model_len == MAX_MODEL_LEN


def test_no_server_is_said_so(table: EmbeddingTable) -> None:
    engine = _engine("http://127.0.0.1:9", table)
    with pytest.raises(EngineFailure, match="no vLLM server"):
        _ask(engine)

    async def ready() -> bool:
        return await _engine("http://127.0.0.1:9", table).ready()

    assert not asyncio.run(ready())


def test_a_stream_comes_as_it_is(theirs: StandIn, address: str, table: EmbeddingTable) -> None:
    (events,) = _ask(_engine(address, table), EngineRequest("chat", {**ASKED, "stream": True}, _soft()))
    assert b"".join(events).endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("breaks", [True, False])
def test_of_a_stream_that_breaks_off_only_whole_events_are_passed_on(
    theirs: StandIn, address: str, table: EmbeddingTable, breaks: bool
) -> None:
    theirs.breaks, theirs.halts = breaks, not breaks

    found = []

    async def whole() -> None:
        engine = _engine(address, table)
        await engine.start()
        reply = await engine.answer(EngineRequest("chat", {**ASKED, "stream": True}, _soft()))
        assert not isinstance(reply.body, bytes)
        async for events in reply.body:
            found.append(events)

    with pytest.raises(EngineFailure, match="broke off"):
        asyncio.run(whole())
    assert b"".join(found).count(b"data: ") == 1
    assert b"".join(found).endswith(b"\n\n")


@pytest.mark.parametrize("read", [0, 1])
def test_a_stream_that_is_closed_ends_at_vllm_too(
    theirs: StandIn, address: str, table: EmbeddingTable, read: int
) -> None:
    theirs.endless = True

    async def whole() -> None:
        engine = _engine(address, table)
        await engine.start()
        reply = await engine.answer(EngineRequest("chat", {**ASKED, "stream": True}, _soft()))
        assert not isinstance(reply.body, bytes)
        events = aiter(reply.body)
        for _ in range(read):
            await anext(events)
        await _until(lambda: theirs.running == 1)
        await reply.body.aclose()
        await reply.body.aclose()
        await _until(lambda: theirs.running == 0)
        with pytest.raises(StopAsyncIteration):
            await anext(events)
        await engine.close()

    asyncio.run(whole())


async def _until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not true():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("stream", [True, False])
def test_a_reply_that_breaks_amid_its_framing_is_not_waited_for(table: EmbeddingTable, stream: bool) -> None:
    async def broken(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabc\n\n\r\n")
        await writer.drain()
        await asyncio.sleep(0.2)
        writer.write(b"no length\r\n")
        await asyncio.sleep(30)

    async def whole() -> None:
        server = await asyncio.start_server(broken, "127.0.0.1", 0)
        address = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        engine = _started(address, table, timeout_s=1, answer_s=1)
        async with asyncio.timeout(10):
            assert not await engine.ready()
            with pytest.raises(EngineFailure):  # noqa: PT012
                reply = await engine.answer(EngineRequest("chat", {**ASKED, "stream": stream}, _soft()))
                assert not isinstance(reply.body, bytes)
                async for _ in reply.body:
                    pass
        await engine.close()
        server.close()

    asyncio.run(whole())


@pytest.mark.parametrize("url", ["127.0.0.1:80", "ftp://here", "http://", "http://me:word@here"])
def test_an_address_that_is_none_is_said(url: str, table: EmbeddingTable) -> None:
    with pytest.raises(ConfigError) as failed:
        _engine(url, table)
    assert "word" not in str(failed.value).replace("password", "")


def test_what_nothing_can_be_sent_with_is_a_failure(address: str, table: EmbeddingTable) -> None:
    for engine in (_engine(address, table, key="a\nb"), _engine("http://a..b", table)):
        with pytest.raises(EngineFailure, match="no vLLM server"):
            _ask(engine)
    assert _ask(_engine(address, table, key="a key of a file\n")) == []


def test_a_stream_counts_from_its_first_event(
    theirs: StandIn, address: str, table: EmbeddingTable, toy: CausalLM, tmp_path: Path
) -> None:
    theirs.silent_s = 1
    body = {"messages": [{"role": "user", "content": "review: x"}], "stream": True}
    with served(open_service(toy, tmp_path, engine=_engine(address, table))) as url:
        assert httpx.post(f"{url}/v1/chat/completions", json=body).status_code == 200
        told = httpx.get(f"{url}/metrics").text
    spent = next(line for line in told.splitlines() if line.startswith("personaplug_request_seconds_sum{"))
    assert float(spent.rpartition(" ")[2]) >= 1


def test_a_stream_may_be_silent_for_less_long_than_an_answer_in_one_piece(
    theirs: StandIn, address: str, table: EmbeddingTable
) -> None:
    theirs.silent_s = 2
    streamed, whole = (EngineRequest("chat", {**ASKED, "stream": stream}, _soft()) for stream in (True, False))
    with pytest.raises(EngineFailure, match="TimeoutError"):
        _ask(_engine(address, table, timeout_s=1), streamed)
    assert b"tea" in _ask(_engine(address, table, timeout_s=1), whole)[0]
    with pytest.raises(EngineFailure, match="TimeoutError"):
        _ask(_engine(address, table, answer_s=0.5), whole)


def _answered(engine: VLLMEngine, theirs: StandIn, status: int) -> EngineReply:
    async def whole() -> EngineReply:
        await engine.start()
        theirs.status = status
        try:
            return await engine.answer(EngineRequest("chat", ASKED, _soft()))
        finally:
            await engine.close()

    return asyncio.run(whole())


@pytest.mark.parametrize("status", [400, 413, 422, 429])
def test_what_vllm_says_of_a_request_reaches_its_caller(
    theirs: StandIn, address: str, table: EmbeddingTable, status: int
) -> None:
    reply = _answered(_engine(address, table), theirs, status)
    assert reply.status == status
    assert isinstance(reply.body, bytes)
    assert b"the text that was sent" in reply.body


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, "another key"),
        (403, "another key"),
        (404, "no longer knows the model small"),
        (405, "status 405"),
        (500, "status 500"),
        (501, "status 501"),
        (503, "status 503"),
    ],
)
def test_what_is_not_the_callers_fault_is_vllms_failure(
    theirs: StandIn, address: str, table: EmbeddingTable, status: int, said: str
) -> None:
    with pytest.raises(EngineFailure, match=said) as failed:
        _answered(_engine(address, table), theirs, status)
    assert "the text" not in str(failed.value)


def test_likelihoods_are_not_to_be_had(address: str, table: EmbeddingTable) -> None:
    with pytest.raises(RequestError, match="personaplug explain"):
        asyncio.run(_engine(address, table).likelihoods("a", "b", softs=[None]))


def test_failures_are_told_apart_and_end_when_they_end(
    theirs: StandIn, address: str, table: EmbeddingTable, toy: CausalLM, tmp_path: Path
) -> None:
    engine = _engine(address, table)
    with served(open_service(toy, tmp_path, engine=engine)) as url:
        client: Any = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

        def chat(**fields: Any) -> Any:
            turns = [{"role": "user", "content": "review: SECRET"}]
            return client.chat.completions.create(model="small", messages=turns, user="ann", **fields)

        assert chat().choices[0].message.content == "tea"
        theirs.status = 400
        with pytest.raises(openai.BadRequestError, match="the text that was sent"):
            chat()  # their own words, to the caller alone
        theirs.status = 429
        with pytest.raises(openai.RateLimitError) as busy:
            chat()
        assert busy.value.response.headers["retry-after"] == "1"
        theirs.status = 500
        with pytest.raises(openai.InternalServerError) as failed:
            chat()
        assert failed.value.status_code == 502
        assert "SECRET" not in str(failed.value)
        theirs.status, theirs.breaks = 200, True
        with pytest.raises(openai.APIError, match="broke off"):
            list(chat(stream=True))  # amid an event, yet OpenAI's client can read what it is told
        theirs.breaks = False
        assert chat().choices[0].message.content == "tea"
        assert theirs.bodies[-1]["structured_outputs"] == {"choice": list(LABELS)}
        assert httpx.get(f"{url}/ready").json() == {"status": "ready"}


def test_a_server_that_goes_and_comes_back(
    theirs: StandIn, table: EmbeddingTable, toy: CausalLM, tmp_path: Path
) -> None:
    with running(theirs.app) as address:
        pass  # it has gone, and its port is free
    engine = _started(address, table)
    service = open_service(toy, tmp_path, engine=engine)
    body = {"messages": [{"role": "user", "content": "review: x"}]}
    with served(service) as url:
        gone = httpx.post(f"{url}/v1/chat/completions", json=body)
        assert (gone.status_code, gone.json()["error"]["code"]) == (502, "engine")
        assert httpx.get(f"{url}/ready").status_code == 502
        with running(theirs.app, port=int(address.rpartition(":")[2])):
            assert httpx.post(f"{url}/v1/chat/completions", json=body).status_code == 200
            assert httpx.get(f"{url}/ready").status_code == 200


def test_what_a_stopping_server_cannot_finish_is_told(
    theirs: StandIn, address: str, table: EmbeddingTable, toy: CausalLM, tmp_path: Path
) -> None:
    theirs.silent_s = 30
    service = open_service(toy, tmp_path, engine=_engine(address, table))
    body = {"messages": [{"role": "user", "content": "review: x"}]}
    with ThreadPoolExecutor(1) as pool:
        with running(create_app(service), patience_s=1) as url:
            asked = pool.submit(httpx.post, f"{url}/v1/chat/completions", json=body, timeout=20)
            while not theirs.bodies or "messages" not in theirs.bodies[-1]:
                time.sleep(0.01)
        told = asked.result()
    assert (told.status_code, told.json()["error"]["code"], told.headers["retry-after"]) == (503, "stopping", "1")


def _started(address: str, table: EmbeddingTable, **settings: Any) -> VLLMEngine:
    """An engine as it is after its start, whose server has gone since."""
    engine = _engine(address, table, model="small", **settings)

    async def nothing() -> None:
        return None

    engine.start = nothing  # type: ignore[method-assign]
    return engine


def test_embeddings_are_read_out_of_a_models_files(toy: CausalLM, tmp_path: Path) -> None:
    toy.model.save_pretrained(tmp_path)
    torch.testing.assert_close(read_embeddings(tmp_path), toy.embed.weight.detach())
