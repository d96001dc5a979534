"""Probabilities of labels through a vLLM server: what it is asked, and what its replies add up to."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from live_server import engine_request, running
from vllm_stand_in import WIDTH, StandIn, label_logprob, read_embeds

from personaplug.errors import EngineFailure, RequestError
from personaplug.llm.causal_lm import CausalLM
from personaplug.llm.soft_prompt import SoftPrompt
from personaplug.serving.engines.base import EngineReply, EngineRequest, EventStream
from personaplug.serving.engines.vllm import VLLMEngine
from personaplug.serving.engines.vllm_labels import LabelTree
from personaplug.serving.engines.vllm_requests import EmbeddingTable

LABELS = ("war", "western", "comedy")
SOFT_TOKENS = 3
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "review: x"}]}
ASKED: dict[str, Any] = {"personaplug": {"probabilities": True}, "logprobs": True, "top_logprobs": 2}


@pytest.fixture(scope="module")
def stand_in() -> StandIn:
    return StandIn()


@pytest.fixture(scope="module")
def engine(stand_in: StandIn, toy: CausalLM) -> Iterator[VLLMEngine]:
    table = EmbeddingTable(toy.embed.weight.detach(), toy.prompt_tokenizer.tokenizer)
    with running(stand_in.app) as url:
        yield VLLMEngine(url, table=table, width=WIDTH, placement="suffix")


def _request(fields: dict[str, Any], *, bias: Sequence[float] | None = None, labels: Sequence[str] = LABELS) -> Any:
    label_bias = None if bias is None else torch.tensor([bias])
    soft = SoftPrompt(torch.ones(1, SOFT_TOKENS, WIDTH), placement="suffix", label_bias=label_bias)
    request = engine_request("chat", CHAT | fields, soft)
    return EngineRequest(request.body, soft, choices=labels, id="1", tenant="shop")


def _respond(engine: VLLMEngine, request: EngineRequest) -> EngineReply:
    async def respond() -> EngineReply:
        try:
            return await engine.respond(request)
        finally:
            await engine.close()

    return asyncio.run(respond())


def _json(reply: EngineReply) -> Any:
    assert isinstance(reply.body, bytes)
    return json.loads(reply.body)


def _expected(engine: VLLMEngine, labels: Sequence[str] = LABELS) -> list[float]:
    """Return the scores of labels by the stand-in's rule; each token follows the soft tokens and earlier ones."""
    rows = [engine.table.texts.encode(label) for label in labels]
    return [sum(label_logprob(token, SOFT_TOKENS + count) for count, token in enumerate(ids)) for ids in rows]


def _probabilities(scores: Sequence[float]) -> list[float]:
    total = sum(map(math.exp, scores))
    return [math.exp(score) / total for score in scores]


def test_scores_of_labels_add_up_along_their_tokens(engine: VLLMEngine) -> None:
    reply = _json(_respond(engine, _request(ASKED)))
    expected = _probabilities(_expected(engine))
    found = reply["personaplug"]["probabilities"]
    assert [found[label] for label in LABELS] == pytest.approx(expected, abs=1e-5)
    best = LABELS[expected.index(max(expected))]
    assert reply["choices"][0]["message"]["content"] == best
    (position,) = reply["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in position["top_logprobs"]] == sorted(LABELS, key=found.get, reverse=True)[:2]
    assert math.exp(position["logprob"]) == pytest.approx(found[best], abs=1e-5)
    tokens = len(engine.table.texts.encode(best))
    assert reply["usage"] == {
        "prompt_tokens": 3 + SOFT_TOKENS,
        "completion_tokens": tokens,
        "total_tokens": 3 + SOFT_TOKENS + tokens,
    }


def test_label_bias_is_added_to_the_scores(engine: VLLMEngine) -> None:
    bias = [0.0, 3.0, -1.0]
    found = _json(_respond(engine, _request(ASKED, bias=bias)))["personaplug"]["probabilities"]
    expected = _probabilities([score + shift for score, shift in zip(_expected(engine), bias, strict=True)])
    assert [found[label] for label in LABELS] == pytest.approx(expected, abs=1e-5)


def test_each_beginning_of_a_label_is_sent_behind_the_soft_tokens(engine: VLLMEngine, stand_in: StandIn) -> None:
    stand_in.bodies.clear()
    _respond(engine, _request(ASKED))
    queries, sent = LabelTree.of(LABELS, engine.table).queries, list[tuple[tuple[int, ...], torch.Tensor]]()
    assert len(stand_in.bodies) == len(queries)
    for body in stand_in.bodies:
        (part,) = body["messages"][-1]["content"]
        embeds = read_embeds(part["data"]).float()
        assert torch.equal(embeds[:SOFT_TOKENS], torch.ones(SOFT_TOKENS, WIDTH))
        assert (body["max_tokens"], body["continue_final_message"], "structured_outputs" in body) == (1, True, False)
        sent.append((tuple(body["logprob_token_ids"]), embeds[SOFT_TOKENS:]))
    for query in queries:
        rows = engine.table.rows[list(query.beginning)].to(torch.bfloat16).float()
        assert any(tokens == query.tokens and torch.equal(embeds, rows) for tokens, embeds in sent)


def test_stream_has_the_events_of_one_answer(engine: VLLMEngine) -> None:
    async def events() -> list[bytes]:
        reply = await engine.respond(_request(ASKED | {"stream": True, "stream_options": {"include_usage": True}}))
        assert isinstance(reply.body, EventStream)
        collected = [chunk async for chunk in reply.body]
        await engine.close()
        return collected

    *chunks, done = asyncio.run(events())
    assert done == b"data: [DONE]\n\n"
    role, label, end, usage = (json.loads(chunk[6:]) for chunk in chunks)
    assert role["choices"][0]["delta"]["role"] == "assistant"
    assert label["choices"][0]["delta"]["content"] in label["personaplug"]["probabilities"]
    assert end["choices"][0]["finish_reason"] == "stop"
    assert usage["usage"]["prompt_tokens"] == 3 + SOFT_TOKENS


def test_more_tokens_than_vllm_takes_at_once_are_split() -> None:
    tree = LabelTree(tuple(map(str, range(200))), tuple((token,) for token in range(200)))
    assert [len(query.tokens) for query in tree.queries] == [128, 72]
    assert [token for query in tree.queries for token in query.tokens] == list(range(200))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": 0.5}, "temperature=0"),
        ({"n": 2}, "no effect"),
        ({"logit_bias": {"5": 1}}, "no effect"),
        ({"top_logprobs": 21}, "from 0 to 20"),
        ({"continue_final_message": True}, "Labels follow the prompt"),
        ({"response_format": {"type": "json_object"}}, "free text"),
    ],
)
def test_field_that_excludes_probabilities_is_refused(engine: VLLMEngine, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as refused:
        _respond(engine, _request(ASKED | fields))
    assert refused.value.http_status == 400


def test_labels_that_vllm_cannot_score_are_refused(engine: VLLMEngine) -> None:
    with pytest.raises(RequestError, match="one label begins another"):
        _respond(engine, _request(ASKED, labels=("war", "war film")))
    with pytest.raises(RequestError, match="requests to vLLM, more than 64"):
        _respond(engine, _request(ASKED, labels=("x" * 40, "y" * 40)))


def test_completion_and_prefix_placement_are_refused(engine: VLLMEngine) -> None:
    body = engine_request("completion", {"prompt": "x", "personaplug": {"probabilities": True}}, None).body
    with pytest.raises(RequestError, match="in chats only"):
        asyncio.run(engine.prepare(body, choices=LABELS))
    other = VLLMEngine(engine.url, table=engine.table, width=WIDTH, placement="prefix")
    with pytest.raises(RequestError, match="placement=suffix"):
        asyncio.run(other.prepare(_request(ASKED).body, choices=LABELS))


@pytest.mark.parametrize("logprob", [None, math.nan, -math.inf])
def test_reply_without_log_probabilities_is_a_failure_of_the_engine(
    engine: VLLMEngine, stand_in: StandIn, logprob: float | None
) -> None:
    choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": "tea"}}
    if logprob is not None:
        top = [{"token": f"token_id:{token}", "logprob": logprob} for token in range(257)]
        choice["logprobs"] = {"content": [{"top_logprobs": top}]}
    stand_in.instead["/v1/chat/completions"] = (200, json.dumps({"choices": [choice]}).encode())
    try:
        with pytest.raises(EngineFailure, match=r"vLLM 0\.30"):
            _respond(engine, _request(ASKED))
    finally:
        stand_in.instead.clear()
