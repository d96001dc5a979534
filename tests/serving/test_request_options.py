"""OpenAI's options of free text, with OpenAI's client: n, log-probabilities, penalties, biases and JSON."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pytest
import torch
from live_server import engine_request, open_service, run_engine, served
from pydantic import BaseModel, ConfigDict, Field

from personaplug.llm import json_grammar
from personaplug.llm.causal_lm import CausalLM
from personaplug.llm.token_bytes import TokenBytes
from personaplug.serving.engines.in_process import InProcessEngine

CLOSED = "review: a film about tea"  # answered with a label
FREE: dict[str, Any] = {"free": True}


class Drink(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: Literal["tea", "coffee"]
    cups: int = Field(ge=1, le=20)
    notes: list[Literal["hot", "iced"]] = Field(max_length=2)


SCHEMA: dict[str, Any] = {"type": "json_schema", "json_schema": {"name": "drink", "schema": Drink.model_json_schema()}}


@pytest.fixture(scope="module")
def url(toy: CausalLM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(open_service(toy, tmp_path_factory.mktemp("options"))) as base_url:
        items = [{"id": "1", "text": "a film about coffee", "score": "4"}]
        httpx.post(f"{base_url}/v1/users/ann/history", json={"items": items}).raise_for_status()
        yield base_url


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def _ask(client: openai.OpenAI, text: str = "hello", **fields: Any) -> Any:
    settings: dict[str, Any] = {"max_tokens": 24, "temperature": 0} | fields
    return client.chat.completions.create(model="toy", messages=[{"role": "user", "content": text}], **settings)


def _text(client: openai.OpenAI, text: str = "hello", **fields: Any) -> str:
    return str(_ask(client, text, **fields).choices[0].message.content)


def _ids(toy: CausalLM, tokens: Sequence[bytes]) -> list[int]:
    """Return the ids of tokens; the toy model has one for each byte."""
    bytes_of = TokenBytes(toy.prompt_tokenizer.tokenizer).of
    id_by_bytes = {bytes_of(token): token for token in range(257)}
    return [id_by_bytes[token] for token in tokens]


def _expected_log_probs(toy: CausalLM, prompt: Sequence[int], ids: Sequence[int]) -> torch.Tensor:
    """Return the log-probabilities at each token of an answer, (L, V), from one pass over prompt and answer."""
    logits: torch.Tensor = toy.model(torch.tensor([[*prompt, *ids]])).logits[0].detach()
    return torch.log_softmax(logits[len(prompt) - 1 : -1].double(), dim=-1)


# Penalties and biases


def test_penalties_and_biases_change_the_answer(client: openai.OpenAI, toy: CausalLM) -> None:
    plain = _text(client)
    (letter,) = toy.prompt_tokenizer.encode_target("q", end=False)
    assert _text(client, logit_bias={str(letter): 100}, max_tokens=5) == "qqqqq"
    assert _text(client, presence_penalty=2, frequency_penalty=2) != plain
    assert _text(client, presence_penalty=0, frequency_penalty=0.0, logit_bias={}) == plain
    assert _text(client, logit_bias={str(letter): 0}) == plain
    penalized = _text(client, presence_penalty=2, frequency_penalty=2, logit_bias={str(letter): 9}, max_tokens=40)
    assert 1 < penalized.count("q") < 20, "the penalty grows with each occurrence"


def test_options_work_in_completions(client: openai.OpenAI, toy: CausalLM) -> None:
    (letter,) = toy.prompt_tokenizer.encode_target("q", end=False)
    settings: dict[str, Any] = {"model": "toy", "prompt": "abc", "temperature": 0, "max_tokens": 3}
    assert client.completions.create(**settings, logit_bias={str(letter): 100}).choices[0].text == "qqq"
    forced = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": 7}}}
    reply = client.completions.create(**settings, n=2, extra_body={"response_format": forced})
    assert [(choice.index, choice.text, choice.finish_reason) for choice in reply.choices] == [
        (0, "7", "stop"),
        (1, "7", "stop"),
    ]


# Log-probabilities


def test_logprobs_of_a_chat_equal_those_of_a_full_pass(client: openai.OpenAI, toy: CausalLM) -> None:
    choice = _ask(client, logprobs=True, top_logprobs=4, presence_penalty=1.0).choices[0]
    answer = [bytes(token.bytes) for token in choice.logprobs.content]
    assert b"".join(answer).decode(errors="replace") == choice.message.content
    ids = _ids(toy, answer)
    expected = _expected_log_probs(toy, toy.prompt_tokenizer.encode_prompt("hello").ids, ids)
    assert len(ids) > 10
    for token, token_id, log_probs in zip(choice.logprobs.content, ids, expected, strict=True):
        assert token.logprob == pytest.approx(float(log_probs[token_id]), abs=1e-4)
        values = [other.logprob for other in token.top_logprobs]
        assert values == pytest.approx(log_probs.topk(4).values.tolist(), abs=1e-4)
    assert choice.logprobs.refusal is None


def test_logprobs_of_a_completion_have_the_older_form(client: openai.OpenAI, toy: CausalLM) -> None:
    letters = _ids(toy, [bytes([letter]) for letter in b"abcdefgh"])
    settings: dict[str, Any] = {"model": "toy", "prompt": "abc", "temperature": 1.5, "seed": 3, "max_tokens": 12}
    settings["logit_bias"] = {str(letter): 50 for letter in letters}  # so each token is a character
    found: Any = client.completions.create(**settings, logprobs=2).choices[0]
    text, found = found.text, found.logprobs
    assert "".join(found.tokens) == text
    assert found.text_offset == list(range(12))
    ids = _ids(toy, [token.encode() for token in found.tokens])
    expected = _expected_log_probs(toy, toy.prompt_tokenizer.encode_plain("abc").ids, ids)
    values = [float(row[token]) for row, token in zip(expected, ids, strict=True)]
    assert found.token_logprobs == pytest.approx(values, abs=1e-4)
    for token, logprob, top, row in zip(found.tokens, found.token_logprobs, found.top_logprobs, expected, strict=True):
        assert top[token] == logprob
        assert len(top) in (2, 3), "the token itself is added to the likeliest ones"
        assert max(top.values()) == pytest.approx(float(row.max()), abs=1e-4)
    without: Any = client.completions.create(**settings, logprobs=0).choices[0].logprobs
    assert [list(top) for top in without.top_logprobs] == [[token] for token in found.tokens]


@pytest.mark.parametrize("stop", [None, "cut"])
def test_stream_has_the_same_logprobs(client: openai.OpenAI, stop: str | None) -> None:
    settings: dict[str, Any] = {"temperature": 1.3, "seed": 5, "max_tokens": 60, "logprobs": True, "top_logprobs": 2}
    free = _text(client, **settings)
    settings |= {"stop": free[9:12]} if stop else {}
    whole = _ask(client, **settings).choices[0]
    chunks = [chunk.choices[0] for chunk in _ask(client, stream=True, **settings)]
    pieces = [chunk for chunk in chunks if chunk.logprobs is not None]
    assert [token for chunk in pieces for token in chunk.logprobs.content] == whole.logprobs.content
    assert "".join(chunk.delta.content or "" for chunk in chunks) == whole.message.content
    text = b"".join(bytes(token.bytes) for token in whole.logprobs.content)
    assert text.decode(errors="replace") == whole.message.content, "the tokens of a stop text are not reported"
    assert whole.message.content == (free[: free.index(free[9:12])] if stop else free)


def test_parts_of_a_character_are_escaped_and_their_bytes_given(client: openai.OpenAI, toy: CausalLM) -> None:
    ids = toy.prompt_tokenizer.encode_target('"☕"', end=False)
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": "☕"}}}
    choice = _ask(client, response_format=schema, logprobs=True).choices[0]
    tokens = choice.logprobs.content
    assert [token.token for token in tokens] == ['"', "\\xe2", "\\x98", "\\x95", '"']
    assert bytes(byte for token in tokens for byte in token.bytes).decode() == choice.message.content
    assert len(tokens) == len(ids)
    assert all(token.logprob <= 0 and token.top_logprobs == [] for token in tokens)


# Several answers


def test_answers_differ_are_reproducible_and_begin_with_the_single_one(client: openai.OpenAI) -> None:
    settings: dict[str, Any] = {"temperature": 1.2, "seed": 11}
    single = _ask(client, **settings)
    reply, again = (_ask(client, n=4, **settings) for _ in range(2))
    texts = [choice.message.content for choice in reply.choices]
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert len(set(texts)) == 4
    assert {choice.finish_reason for choice in reply.choices} == {"length"}
    assert texts == [choice.message.content for choice in again.choices]
    assert texts[0] == single.choices[0].message.content
    assert reply.usage.prompt_tokens == single.usage.prompt_tokens
    assert reply.usage.completion_tokens == 4 * 24, "none ends early"
    assert texts[1] != _text(client, temperature=1.2, seed=12)


def test_streamed_answers_have_their_index(client: openai.OpenAI) -> None:
    settings: dict[str, Any] = {"temperature": 1.2, "seed": 11, "n": 3}
    whole = _ask(client, **settings)
    texts, reasons, usage = ["", "", ""], {}, None
    for chunk in _ask(client, stream=True, stream_options={"include_usage": True}, **settings):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
    assert usage == whole.usage


@pytest.mark.parametrize("stream", [False, True])
def test_rating_of_one_of_several_answers_is_refused(url: str, stream: bool) -> None:
    body = {"model": "toy", "messages": [{"role": "user", "content": CLOSED}], "user": "ann", "n": 2, "stream": stream}
    reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30).raise_for_status()
    rated = {"request_id": reply.headers["x-request-id"], "rating": "up"}
    refused = httpx.post(f"{url}/v1/users/ann/history", json=rated)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "unknown_answer")


def test_labels_can_be_sampled_several_times(client: openai.OpenAI) -> None:
    reply = _ask(client, CLOSED, n=8, temperature=2, seed=1, logprobs=True)
    labels = [choice.message.content for choice in reply.choices]
    assert set(labels) <= set("12345")
    assert len(set(labels)) > 1
    assert [choice.logprobs.content[0].token for choice in reply.choices] == labels


def _request(**fields: Any) -> Any:
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "temperature": 0} | fields
    return engine_request("chat", body, None, id="r1")


@pytest.mark.parametrize("read", [0, 1, 7])
def test_closed_stream_frees_all_its_rows(toy: CausalLM, read: int) -> None:
    async def ask(engine: InProcessEngine) -> bytes:
        for _ in range(4):
            reply = await engine.respond(_request(n=5, max_tokens=4000, stream=True))
            assert not isinstance(reply.body, bytes)
            for _ in range(read):
                await anext(reply.body)
            await reply.body.aclose()
        # With three rows, this is answered in time only if the closed streams have freed theirs.
        answered = await asyncio.wait_for(engine.respond(_request()), 5)
        assert isinstance(answered.body, bytes)
        assert len(asyncio.all_tasks()) == 2, "this one and the scheduler's"
        return answered.body

    assert run_engine(toy, ask, max_rows=3, max_new_tokens=4000)


def test_more_answers_than_rows_are_made_in_turn(toy: CausalLM) -> None:
    async def ask(engine: InProcessEngine) -> list[str]:
        reply = await engine.respond(_request(n=8, temperature=1.5, seed=1))
        assert isinstance(reply.body, bytes)
        return [choice["message"]["content"] for choice in json.loads(reply.body)["choices"]]

    assert run_engine(toy, ask, max_rows=3) == run_engine(toy, ask, max_rows=16)


# JSON


def test_answer_follows_a_schema(client: openai.OpenAI) -> None:
    turns: Any = [{"role": "user", "content": "What do you drink?"}]
    for settings in ({"temperature": 0}, {"temperature": 2, "seed": 1}, {"temperature": 1, "user": "ann"}):
        reply = client.chat.completions.parse(
            model="toy", messages=turns, response_format=Drink, max_tokens=90, **settings
        )
        assert isinstance(reply.choices[0].message.parsed, Drink)
        assert reply.choices[0].finish_reason == "stop"
    with client.chat.completions.stream(
        model="toy", messages=turns, response_format=Drink, max_tokens=90, temperature=0
    ) as stream:
        streamed = stream.get_final_completion().choices[0].message
    assert isinstance(streamed.parsed, Drink)
    assert streamed.content == _text(client, "What do you drink?", response_format=SCHEMA, max_tokens=90)


def test_personal_answer_of_a_task_with_labels_follows_a_schema(client: openai.OpenAI) -> None:
    text = _text(client, CLOSED, response_format=SCHEMA, max_tokens=90, extra_body={"personaplug": FREE}, user="ann")
    assert Drink.model_validate_json(text)
    with pytest.raises(openai.BadRequestError, match="response_format has no effect"):
        _ask(client, CLOSED, response_format=SCHEMA)


def test_any_object_is_json(client: openai.OpenAI) -> None:
    reply = _ask(client, response_format={"type": "json_object"}, n=8, temperature=2, seed=1, max_tokens=200)
    finished = [choice for choice in reply.choices if choice.finish_reason == "stop"]
    assert finished
    assert all(isinstance(json.loads(choice.message.content), dict) for choice in finished)


def test_cut_json_is_reported_as_such(client: openai.OpenAI) -> None:
    choice = _ask(client, response_format=SCHEMA, max_tokens=5).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("length", '{"nam')
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(
            model="toy", messages=[{"role": "user", "content": "x"}], response_format=Drink, max_tokens=5
        )


def _deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "objekt"}, "objekt"),
        ({"type": "object", "properties": {"a": {"not": {}}}}, "not"),
        ({"enum": ["x" * 1000] * 40}, "32768 bytes"),
        (_deep(40), "32 levels"),
        ({"$ref": "http://127.0.0.1:1/secret"}, "secret"),
    ],
)
def test_schema_without_support_is_refused_with_a_reason(
    client: openai.OpenAI, schema: dict[str, Any], reason: str
) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    with pytest.raises(openai.BadRequestError, match=reason) as refused:
        _ask(client, response_format=form)
    assert refused.value.code == "response_format"


_COMPLEX = "^[ab]{0,9}a[ab]{40}$"


@pytest.mark.parametrize("stream", [False, True])
def test_schema_that_proves_too_complex_in_an_answer_is_refused(
    client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    monkeypatch.setitem(json_grammar._LIMITS, "max_lexer_states", 50)
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "string", "pattern": _COMPLEX}}}
    with pytest.raises(openai.APIError, match="too complex") as refused:
        list(_ask(client, response_format=form, max_tokens=90, stream=stream))
    assert refused.value.code == "response_format"
    if not stream:
        assert isinstance(refused.value, openai.BadRequestError)
    monkeypatch.undo()
    assert _text(client)  # later answers are not affected


def test_json_without_the_extra_is_refused_with_its_name(
    toy: CausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)  # an import fails
    with served(open_service(toy, tmp_path)) as base_url:
        client = openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.BadRequestError, match=r"personaplug\[structured\]"):
            _ask(client, response_format={"type": "json_object"})
        assert _text(client)


# Isolation


def test_options_of_one_request_do_not_change_another(client: openai.OpenAI) -> None:
    plain: dict[str, Any] = {"logprobs": True, "top_logprobs": 3, "max_tokens": 40}
    others: list[dict[str, Any]] = [
        {"logit_bias": {"7": 100}},
        {"presence_penalty": 2, "frequency_penalty": 2, "user": "ann"},
        {"response_format": SCHEMA, "max_tokens": 90},
        {"response_format": {"type": "json_object"}, "n": 3, "temperature": 2},
        {"n": 4, "temperature": 1.5, "logprobs": True, "top_logprobs": 20},
        {"stop": "a", "temperature": 1},
    ]
    alone = _ask(client, **plain).choices[0]
    with ThreadPoolExecutor(8) as threads:
        running = [threads.submit(_ask, client, f"other {number}", **fields) for number, fields in enumerate(others)]
        beside = [threads.submit(_ask, client, **plain) for _ in range(4)]
        choices = [future.result().choices[0] for future in beside]
        assert all(future.result().choices for future in running)
    for choice in choices:
        assert choice.message.content == alone.message.content
        for token, expected in zip(choice.logprobs.content, alone.logprobs.content, strict=True):
            assert token.logprob == pytest.approx(expected.logprob, abs=1e-4)
            assert [other.token for other in token.top_logprobs] == [other.token for other in expected.top_logprobs]
