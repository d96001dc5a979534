"""Random requests to the server cause no 5xx and no hang, and their content is not logged."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live_server import LABELS, open_service, running, served
from schemathesis.schemas import BaseSchema
from schemathesis.specs.openapi import checks
from vllm_stand_in import WIDTH, StandIn

from personaplug.llm.causal_lm import CausalLM
from personaplug.serving.engines.vllm import VLLMEngine
from personaplug.serving.engines.vllm_requests import EmbeddingTable
from personaplug.serving.middleware import RequestLimits

MARKER = "a-users-own-words"
QUICK = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@pytest.fixture(scope="module")
def url(toy: CausalLM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder: Path = tmp_path_factory.mktemp("fuzz")
    with served(open_service(toy, folder), limits=RequestLimits(body_bytes=100_000)) as base_url:
        yield base_url


@pytest.fixture(scope="module")
def vllm_url(toy: CausalLM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder: Path = tmp_path_factory.mktemp("fuzz")
    table = EmbeddingTable(toy.embed.weight.detach(), toy.prompt_tokenizer.tokenizer)
    with running(StandIn().app) as address:
        engine = VLLMEngine(address, table=table, width=WIDTH, placement="suffix")
        with served(open_service(toy, folder, engine=engine), limits=RequestLimits(body_bytes=100_000)) as base_url:
            yield base_url


ROUTES = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model}"),
    ("GET", "/v1/task"),
    ("GET", "/v1/users"),
    ("GET", "/v1/personas"),
    ("POST", "/v1/users/{user}/history"),
    ("GET", "/v1/users/{user}/history"),
    ("DELETE", "/v1/users/{user}/history/{item}"),
    ("GET", "/v1/users/{user}/history/{item}/picture"),
    ("DELETE", "/v1/users/{user}/feedback/{request}"),
    ("PUT", "/v1/users/{user}/preferences"),
    ("GET", "/v1/users/{user}/preferences"),
    ("DELETE", "/v1/users/{user}/preferences"),
    ("GET", "/v1/users/{user}/export"),
    ("DELETE", "/v1/users/{user}"),
    ("POST", "/v1/users/{user}/explain"),
    ("GET", "/v1/users/{user}/drift"),
    ("GET", "/health"),
    ("GET", "/ready"),
    ("GET", "/metrics"),
]


def test_openapi_has_exactly_these_routes(url: str) -> None:
    paths = httpx.get(f"{url}/openapi.json").json()["paths"]
    assert {(method.upper(), path) for path, methods in paths.items() for method in methods} == set(ROUTES)


@pytest.fixture(scope="module")
def document(url: str) -> BaseSchema:
    return schemathesis.openapi.from_url(f"{url}/openapi.json")


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_responses_conform_to_the_openapi_document(document: BaseSchema, method: str, path: str) -> None:
    operation = document[path][method]

    @given(case=operation.as_strategy())
    @QUICK
    def holds(case: Any) -> None:
        # A schema cannot express all rules, such as the fields of the task's items and the model names.
        case.call_and_validate(timeout=30, excluded_checks=[checks.positive_data_acceptance])

    holds()


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30) | st.just(MARKER),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)
turns = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool", "x"])}, optional={"content": anything}
    ),
    max_size=4,
)
NAMES = ["messages", "prompt", "user", "stream", "model", "max_tokens", "temperature", "top_p", "seed", "stop", "n"]
NAMES += ["metadata", "safety_identifier", "logprobs", "top_logprobs", "tool_choice", "max_completion_tokens", "tools"]
NAMES += ["presence_penalty", "frequency_penalty", "logit_bias"]
NAMES += ["personaplug", "stream_options", "response_format", "items", "request_id", "answer", "id", "text", "score"]
fields = st.fixed_dictionaries({}, optional=dict.fromkeys(NAMES, anything))


@given(
    path=st.sampled_from(["/v1/chat/completions", "/v1/completions", "/v1/users/u/history", "/v1/users/u/explain"]),
    body=fields,
    messages=turns,
)
@settings(QUICK, max_examples=50)
def test_body_of_any_shape_never_causes_a_5xx(
    url: str, vllm_url: str, path: str, body: dict[str, Any], messages: list[Any]
) -> None:
    content = json.dumps({"messages": messages, "max_tokens": 4} | body).encode()
    for base_url in (url, vllm_url):
        reply = httpx.post(
            f"{base_url}{path}", content=content, headers={"content-type": "application/json"}, timeout=30
        )
        assert reply.status_code < 500, reply.text


@given(
    prompt=st.text(max_size=20),
    answer=st.sampled_from(LABELS) | st.text(min_size=1, max_size=300),
    times=st.integers(0, 3000),
)
@QUICK
def test_explain_of_any_length_never_causes_a_5xx(url: str, prompt: str, answer: str, times: int) -> None:
    items = [{"id": str(number), "text": "a film", "score": "4"} for number in range(5)]
    httpx.post(f"{url}/v1/users/known/history", json={"items": items}, timeout=30).raise_for_status()
    body = {"prompt": f"review: {prompt * times}"[:50_000], "answer": (answer * max(1, times))[:40_000]}
    reply = httpx.post(f"{url}/v1/users/known/explain", json=body, timeout=30)
    assert reply.status_code < 500, reply.text


@given(
    body=st.binary(max_size=200), kind=st.sampled_from(["application/json", "text/plain", "multipart/form-data", ""])
)
@settings(QUICK, max_examples=25)
def test_body_of_random_bytes_gets_a_4xx(url: str, body: bytes, kind: str) -> None:
    for path in ("/v1/chat/completions", "/v1/users/u/history"):
        reply = httpx.post(f"{url}{path}", content=body, headers={"content-type": kind}, timeout=30)
        assert 400 <= reply.status_code < 500


@given(user=st.text(min_size=1, max_size=300), item=st.text(min_size=1, max_size=20))
@QUICK
def test_id_of_any_characters_never_causes_a_5xx(url: str, user: str, item: str) -> None:
    user_url = f"{url}/v1/users/{quote(user, safe='')}"
    for reply in (
        httpx.post(f"{user_url}/history", json={"items": [{"id": item, "text": "x", "score": "1"}]}, timeout=30),
        httpx.get(f"{user_url}/history", timeout=30),
        httpx.delete(f"{user_url}/history/{quote(item, safe='')}", timeout=30),
        httpx.delete(user_url, timeout=30),
    ):
        assert reply.status_code < 500, reply.text


def test_refused_body_is_not_logged(url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    for body in ({"messages": MARKER}, {"messages": [{"role": MARKER, "content": {MARKER: 1}}]}, {"user": [MARKER]}):
        httpx.post(f"{url}/v1/chat/completions", json=body)
        httpx.post(f"{url}/v1/users/{MARKER}/history", json=body)
    records = [
        record for record in caplog.records if not record.name.startswith(("httpx", "httpcore"))
    ]  # records of the test client
    assert not [record for record in records if MARKER in record.getMessage()]
