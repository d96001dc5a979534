"""What the vLLM engine sends, what it refuses to send, and what becomes of vLLM's failures."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from live_server import LABELS, open_service, running, served
from vllm_stand_in import WIDTH, StandIn, read_embeds

from personaplug.backends.decoder_only import DecoderOnlyBackend
from personaplug.engines.base import Question
from personaplug.engines.vllm import EmbeddingTable, VLLMEngine
from personaplug.errors import BadConfig, EngineFailure, RequestError
from personaplug.soft_prompt import SoftPrompt
from personaplug.weights import read_embeddings

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
def table(toy: DecoderOnlyBackend) -> EmbeddingTable:
    return EmbeddingTable(toy.embed.weight.detach(), toy.renderer.tokenizer)


def _engine(address: str, table: EmbeddingTable, *, placement: str = "suffix", **settings: Any) -> VLLMEngine:
    return VLLMEngine(address, table=table, width=WIDTH, placement=placement, **settings)


def _ask(engine: VLLMEngine, *questions: Question) -> list[Any]:
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
    _ask(_engine(address, table, key="k"), Question("chat", ASKED, _soft(), id="r1"))
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
    _ask(_engine(address, table, placement="prefix"), Question("chat", ASKED, _soft("prefix")))
    asked = theirs.bodies[-1]["messages"][1]["content"]
    assert [part["type"] for part in asked] == ["prompt_embeds", "text"]
    assert asked[1]["text"] == "hello"
    assert "continue_final_message" not in theirs.bodies[-1]


def test_without_a_persona_a_request_goes_as_it_came(theirs: StandIn, address: str, table: EmbeddingTable) -> None:
    _ask(_engine(address, table), Question("chat", ASKED, None))
    assert theirs.bodies[-1] == {**ASKED, "model": "small"}


@pytest.mark.parametrize("placement", ["prefix", "suffix"])
def test_a_completion_goes_embedded(theirs: StandIn, address: str, table: EmbeddingTable, placement: str) -> None:
    _ask(_engine(address, table), Question("completion", {"prompt": "abc", "max_tokens": 3}, _soft(placement)))
    sent = theirs.bodies[-1]
    assert "prompt" not in sent
    text = table.embedded("abc")
    whole = [text, SOFT[0]] if placement == "suffix" else [SOFT[0], text]
    torch.testing.assert_close(read_embeds(sent["prompt_embeds"]), torch.cat(whole))


def test_a_closed_set_constrains_unless_the_request_does(theirs: StandIn, address: str, table: EmbeddingTable) -> None:
    form = {"response_format": {"type": "json_object"}}
    _ask(
        _engine(address, table),
        Question("chat", ASKED, _soft(), ("1", "2")),
        Question("chat", {**ASKED, "temperature": 0.5}, _soft(), ("1", "2")),
        Question("chat", ASKED | form, _soft(), ("1", "2")),
    )
    first, warm, formed = theirs.bodies[-3:]
    assert first["structured_outputs"] == {"choice": ["1", "2"]}
    assert (first["temperature"], warm["temperature"]) == (0, 0.5)
    assert "structured_outputs" not in formed


def test_what_brings_vllm_down_is_not_sent(theirs: StandIn, address: str, table: EmbeddingTable) -> None:
    spoiled = SOFT.clone()
    spoiled[0, 1, 2] = float("nan")
    for question, error in (
        (Question("completion", {"prompt": "so <prompt_embeds> it is"}, None), RequestError),
        (Question("chat", {**ASKED, "echo": True}, _soft()), RequestError),
        (Question("chat", {**ASKED, "prompt_logprobs": 1}, _soft()), RequestError),
        (Question("chat", {**ASKED, "continue_final_message": True}, _soft()), RequestError),
        (Question("chat", ASKED, SoftPrompt(spoiled, placement="suffix")), EngineFailure),
    ):
        before = len(theirs.bodies)
        with pytest.raises(error):
            _ask(_engine(address, table), question)
        assert len(theirs.bodies) == before + 3  # those of the start


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"flag": False}, "--enable-prompt-embeds"),
        ({"width": 64}, "another width"),
        ({"embeds_say": "coffee"}, "differently"),
        ({"template_adds": 2}, "--chat-template"),
    ],
)
def test_a_server_that_does_not_fit_is_refused_at_the_start(
    theirs: StandIn, address: str, table: EmbeddingTable, wrong: dict[str, Any], said: str
) -> None:
    for name, value in wrong.items():
        setattr(theirs, name, value)
    with pytest.raises(BadConfig, match=said):
        _ask(_engine(address, table))


def test_no_server_is_said_so(table: EmbeddingTable) -> None:
    engine = _engine("http://127.0.0.1:9", table)
    with pytest.raises(EngineFailure, match="no vLLM server"):
        _ask(engine)

    async def ready() -> bool:
        return await _engine("http://127.0.0.1:9", table).ready()

    assert not asyncio.run(ready())


def test_a_stream_comes_as_it_is(theirs: StandIn, address: str, table: EmbeddingTable) -> None:
    (events,) = _ask(_engine(address, table), Question("chat", {**ASKED, "stream": True}, _soft()))
    assert b"".join(events).endswith(b"data: [DONE]\n\n")


def test_likelihoods_are_not_to_be_had(address: str, table: EmbeddingTable) -> None:
    with pytest.raises(RequestError, match="personaplug explain"):
        asyncio.run(_engine(address, table).likelihoods("a", "b", softs=[None]))


def test_failures_are_told_apart_and_end_when_they_end(
    theirs: StandIn, address: str, table: EmbeddingTable, toy: DecoderOnlyBackend, tmp_path: Path
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
        theirs.status = 500
        with pytest.raises(openai.InternalServerError) as failed:
            chat()
        assert failed.value.status_code == 502
        assert "SECRET" not in str(failed.value)
        theirs.status, theirs.breaks = 200, True
        with pytest.raises(openai.APIError, match="broke off"):
            list(chat(stream=True))
        theirs.breaks = False
        assert chat().choices[0].message.content == "tea"
        assert theirs.bodies[-1]["structured_outputs"] == {"choice": list(LABELS)}
        assert httpx.get(f"{url}/ready").json() == {"status": "ready"}


def test_a_server_that_goes_and_comes_back(
    theirs: StandIn, table: EmbeddingTable, toy: DecoderOnlyBackend, tmp_path: Path
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


def _started(address: str, table: EmbeddingTable) -> VLLMEngine:
    """An engine as it is after its start, whose server has gone since."""
    engine = _engine(address, table, model="small")

    async def nothing() -> None:
        return None

    engine.start = nothing  # type: ignore[method-assign]
    return engine


def test_embeddings_are_read_out_of_a_models_files(toy: DecoderOnlyBackend, tmp_path: Path) -> None:
    toy.model.save_pretrained(tmp_path)
    torch.testing.assert_close(read_embeddings(tmp_path), toy.embed.weight.detach())
