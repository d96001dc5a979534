"""The server on a real socket, called by OpenAI's client and by plain HTTP."""

from __future__ import annotations

import asyncio
import json
import logging
import random
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
from live_server import CONFIG, ENCODER, LABELS, open_service, served

from personaplug.data.records import HistoryItem
from personaplug.data.task import Task
from personaplug.errors import ConfigError, MissingData
from personaplug.llm.base import GenerationConfig, PromptBatch
from personaplug.llm.causal_lm import CausalLM
from personaplug.serving.api_keys import ApiKeys, create_key
from personaplug.serving.engines.base import EngineReply, EngineRequest
from personaplug.serving.middleware import RequestLimits
from personaplug.serving.service import Service
from personaplug.store.history_store import HistoryStore

PROMPT = "How would the user rate this? review: a film about tea"
SECRET = "a-marker-of-a-users-own-words"


def _item(number: int, score: str = "4", text: str = "a film") -> dict[str, Any]:
    return {"id": f"i{number}", "text": f"{text} {number}", "score": score}


@pytest.fixture
def service(toy: CausalLM, tmp_path: Path) -> Service:
    return open_service(toy, tmp_path)


@pytest.fixture
def url(service: Service) -> Iterator[str]:
    with served(service) as base_url:
        yield base_url


@pytest.fixture(scope="module")
def shared_url(toy: CausalLM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server for all requests that store nothing."""
    with served(open_service(toy, tmp_path_factory.mktemp("shared"))) as base_url:
        yield base_url


def _client(url: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


def _post(url: str, user: str, *items: dict[str, Any], **headers: str) -> httpx.Response:
    return httpx.post(f"{url}/v1/users/{user}/history", json={"items": items}, headers=headers)


def _chat(url: str, user: str | None = None, *, prompt: str = PROMPT, key: str = "none", **fields: Any) -> Any:
    user_field = {"user": user} if user else {}
    turns: Any = [{"role": "user", "content": prompt}]
    client: Any = _client(url, key)  # untyped, because its overloads require literal values
    return client.chat.completions.with_raw_response.create(model="toy", messages=turns, **user_field, **fields)


def _expected(service: Service, llm: CausalLM, items: list[dict[str, Any]], *, tokens: int) -> str:
    """Return the model's answer with the persona that an evaluation computes."""
    history = [HistoryItem(i["id"], (("text", i["text"]), ("score", i["score"])), "score") for i in items]
    personalizer = service.personas.personalizer
    soft = personalizer.persona("a film about tea", personalizer.encode(history, encoder=ENCODER))
    return llm.generate(PromptBatch([PROMPT], soft), GenerationConfig(max_new_tokens=tokens))[0].text


FREE: dict[str, Any] = {"temperature": 0, "max_tokens": 12, "extra_body": {"personaplug": {"free": True}}}


def test_chat_uses_the_persona_of_its_user(service: Service, url: str, toy: CausalLM) -> None:
    histories = {"ann": [_item(1, "1"), _item(2, "2")], "bob": [_item(1, "5", "a walk")]}
    answers = {}
    for user, items in histories.items():
        assert _post(url, user, *items).json() == {"new": len(items), "replaced": 0, "same": 0}
        raw = _chat(url, user, **FREE)
        answers[user] = raw.parse().choices[0].message.content.strip()
        assert raw.headers["x-personaplug-persona"] == "user"
        assert raw.headers["x-personaplug-items"] == str(len(items))
        assert answers[user] == _expected(service, toy, items, tokens=12)
    assert answers["ann"] != answers["bob"]


def test_stream_has_the_same_text_as_a_whole_reply(url: str) -> None:
    _post(url, "ann", _item(1))
    reply = _chat(url, "ann", **FREE).parse()
    stream = _client(url).chat.completions.create(
        model="toy",
        messages=[{"role": "user", "content": PROMPT}],
        user="ann",
        stream=True,
        stream_options={"include_usage": True},
        **FREE,
    )
    events = list(stream)
    assert "".join(e.choices[0].delta.content or "" for e in events if e.choices) == reply.choices[0].message.content
    assert events[-1].usage == reply.usage


def test_streamed_completion_equals_the_whole_completion(url: str) -> None:
    _post(url, "ann", _item(1))
    client = _client(url)
    answer = client.completions.create(model="toy", prompt=PROMPT, user="ann", **FREE)
    stream = client.completions.create(model="toy", prompt=PROMPT, user="ann", stream=True, **FREE)
    assert "".join(event.choices[0].text for event in stream) == answer.choices[0].text
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 12


def test_answer_on_task_is_one_of_the_labels(url: str) -> None:
    _post(url, "ann", _item(1))
    for seed in range(8):
        assert _chat(url, "ann", seed=seed, temperature=2.0).parse().choices[0].message.content in LABELS


def test_prompt_off_task_is_answered_by_the_plain_model(url: str, toy: CausalLM) -> None:
    _post(url, "ann", _item(1))
    raw = _chat(url, "ann", prompt="hello there", temperature=0, max_tokens=12)
    plain = toy.generate(PromptBatch(["hello there"]), GenerationConfig(max_new_tokens=12))[0].text
    assert raw.parse().choices[0].message.content.strip() == plain
    assert raw.headers["x-personaplug-persona"] == "plain"


def test_user_without_history_gets_the_population_persona(url: str) -> None:
    for user in (None, "nobody"):
        headers = _chat(url, user).headers
        assert (headers["x-personaplug-persona"], headers["x-personaplug-items"]) == ("population", "0")


def test_persona_scale_zero_is_the_plain_model(url: str, toy: CausalLM) -> None:
    _post(url, "ann", _item(1))
    body = {"personaplug": {"free": True, "persona_scale": 0}}
    raw = _chat(url, "ann", temperature=0, max_tokens=12, extra_body=body)
    plain = toy.generate(PromptBatch([PROMPT]), GenerationConfig(max_new_tokens=12))[0].text
    assert raw.parse().choices[0].message.content.strip() == plain
    assert raw.headers["x-personaplug-persona"] == "plain"


def test_history_routes_add_list_delete_and_erase(url: str) -> None:
    user_url = f"{url}/v1/users/ann"
    assert httpx.post(f"{user_url}/history", json={**_item(1), "date": "2024-05-01"}).json()["new"] == 1
    assert _post(url, "ann", _item(1), _item(2)).json() == {"new": 1, "replaced": 1, "same": 0}  # the date was removed
    assert _post(url, "ann", _item(1), _item(2)).json() == {"new": 0, "replaced": 0, "same": 2}
    history = httpx.get(f"{user_url}/history").json()
    assert [item["id"] for item in history["items"]] == ["i1", "i2"]
    first = history["items"][0]
    assert (first["text"], first["score"], first["date"]) == ("a film 1", "4", None)
    assert httpx.post(f"{user_url}/history", json=first).json()["same"] == 1  # a listed item can be added again
    assert httpx.get(f"{user_url}/history", params={"latest": 1}).json()["items"][0]["id"] == "i2"
    assert httpx.delete(f"{user_url}/history/i1").json() == {"deleted": True}
    assert httpx.delete(f"{user_url}/history/i1").status_code == 404
    assert len(httpx.get(f"{user_url}/export").json()["items"][0]["vector"]) == 32
    receipt = httpx.delete(user_url).json()
    assert (receipt["items"], receipt["tenant"]) == (1, "default")
    assert httpx.delete(user_url).status_code == 404
    assert httpx.get(f"{user_url}/history").json()["count"] == 0
    assert _chat(url, "ann").headers["x-personaplug-persona"] == "population"


def test_feedback_becomes_history(service: Service, url: str) -> None:
    raw = _chat(url, "ann")
    request = raw.headers["x-request-id"]
    assert raw.parse()._request_id == request
    endpoint = f"{url}/v1/users/ann/history"
    assert httpx.post(endpoint, json={"request_id": request, "answer": "2"}).json()["new"] == 1
    assert httpx.post(endpoint, json={"request_id": request, "answer": "2"}).json()["same"] == 1
    item = httpx.get(endpoint).json()["items"][0]
    assert (item["id"], item["text"], item["score"]) == (request, "a film about tea", "2")
    assert _chat(url, "ann").headers["x-personaplug-items"] == "1"
    assert httpx.post(endpoint, json={"request_id": request, "answer": "9"}).status_code == 400
    other = httpx.post(f"{url}/v1/users/bob/history", json={"request_id": request, "answer": "2"})
    assert (other.status_code, other.json()["error"]["code"]) == (404, "unknown_request")
    httpx.delete(f"{url}/v1/users/ann")
    assert httpx.post(endpoint, json={"request_id": request, "answer": "2"}).status_code == 404
    assert len(service.recent_requests) == 0


def test_feedback_after_an_erasure_by_another_process_is_refused(service: Service, url: str, tmp_path: Path) -> None:
    _post(url, "ann", _item(1))
    request = _chat(url, "ann").headers["x-request-id"]
    other = HistoryStore.open(tmp_path / "histories.db")
    other.erase_user("default", "ann")
    other.close()
    reply = httpx.post(f"{url}/v1/users/ann/history", json={"request_id": request, "answer": "2"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "unknown_request")
    assert httpx.get(f"{url}/v1/users/ann/history").json()["count"] == 0


def test_only_an_erasure_drops_a_cached_persona_immediately(service: Service, url: str) -> None:
    _post(url, "ann", _item(1), _item(2))
    _chat(url, "ann")
    _post(url, "ann", _item(3))
    httpx.delete(f"{url}/v1/users/ann/history/i1")
    assert service.personas.cached_users == 1
    assert _chat(url, "ann").headers["x-personaplug-items"] == "2"  # the current items of the store
    httpx.delete(f"{url}/v1/users/ann")
    assert service.personas.cached_users == 0


@pytest.mark.parametrize("name", [".", "..", "a\nb", "a\u202eb", "a\ufffdb", "a\u0085b"])
def test_ambiguous_id_is_refused(shared_url: str, name: str) -> None:
    _post(shared_url, "one-item", _item(1))
    assert _post(shared_url, "one-item", {**_item(2), "id": name}).status_code == 400
    history = f"{shared_url}/v1/users/one-item/history"
    assert httpx.delete(f"{history}/").status_code == 404  # no redirect to the user's path
    body = {"messages": [{"role": "user", "content": PROMPT}], "user": name}
    assert httpx.post(f"{shared_url}/v1/chat/completions", json=body).status_code == 422
    assert httpx.get(history).json()["count"] == 1


@pytest.mark.parametrize("length", [150, 6_000, 200_000])
def test_explain_measures_long_answers_or_refuses_them(url: str, length: int) -> None:
    _post(url, "ann", *[_item(number) for number in range(5)])
    body = {"prompt": PROMPT, "answer": "z" * length}
    reply = httpx.post(f"{url}/v1/users/ann/explain", json=body, timeout=60)
    code = reply.json().get("error", {}).get("code")
    assert (reply.status_code, code) in ((200, None), (400, "max_tokens"), (400, "context_length_exceeded"))
    assert (reply.status_code == 400) == (length > 150)
    long = httpx.post(f"{url}/v1/users/ann/explain", json={"prompt": PROMPT + " z" * 1000, "answer": "5"}, timeout=60)
    assert (long.status_code, long.json()["error"]["code"]) == (400, "context_length_exceeded")


@pytest.mark.parametrize(
    ("host", "status"), [("LOCALHOST:80", 200), ("127.0.0.2", 200), ("[::1]:9", 200), ("a.b", 403)]
)
def test_server_without_keys_accepts_only_loopback_hosts(shared_url: str, host: str, status: int) -> None:
    assert httpx.get(f"{shared_url}/health", headers={"host": host}).status_code == status


def test_feedback_on_a_text_task_becomes_an_item(toy: CausalLM, tmp_path: Path) -> None:
    tasks = {
        Task("Titles", "text", ("text", "title"), "title", ("rouge_1",), query_after="article: "): {
            "text": "on tea",
            "title": "Tea!",
        },
        Task("Tweets", "text", ("text",), None, ("rouge_1",), query_after="article: "): {"text": "Tea!"},
    }
    for number, (task, fields) in enumerate(tasks.items()):
        (folder := tmp_path / str(number)).mkdir()
        service = open_service(
            toy, folder, task=task, config=replace(CONFIG, answer_channel="style", label_prior="none")
        )
        with served(service) as url:
            raw = _chat(url, "ann", prompt="write. article: on tea", max_tokens=4)
            endpoint = f"{url}/v1/users/ann/history"
            reply = httpx.post(endpoint, json={"request_id": raw.headers["x-request-id"], "answer": "Tea!"})
            assert reply.json()["new"] == 1
            assert fields.items() <= httpx.get(endpoint).json()["items"][0].items()


def test_explain_lists_items_with_weights_and_effects(service: Service, url: str, toy: CausalLM) -> None:
    items = [_item(n, LABELS[n % 5]) for n in range(6)]
    _post(url, "ann", *items)
    endpoint = f"{url}/v1/users/ann/explain"
    weights = httpx.post(endpoint, json={"prompt": PROMPT}).json()
    assert weights["items_used"] == 6
    assert sum(item["weight"] for item in weights["items"]) == pytest.approx(weights["own_share"])
    explanation = httpx.post(endpoint, json={"prompt": PROMPT, "answer": "4", "most": 2}).json()
    assert len(explanation["items"]) == 2
    top = explanation["items"][0]

    def likelihood(rest: list[dict[str, Any]], scale: float = 1) -> float:
        history = [HistoryItem(i["id"], (("text", i["text"]), ("score", i["score"])), "score") for i in rest]
        personalizer = service.personas.personalizer
        encoded = personalizer.encode(history, encoder=ENCODER)
        soft = personalizer.persona("a film about tea", encoded, persona_scale=scale)
        return -float(toy.loss(PromptBatch([PROMPT], soft), ["4"], labels=LABELS)[0])

    assert explanation["log_likelihood"]["with_persona"] == pytest.approx(likelihood(items), abs=1e-3)
    assert explanation["log_likelihood"]["with_population"] == pytest.approx(likelihood([]), abs=1e-3)
    without = likelihood([item for item in items if item["id"] != top["id"]])
    assert top["effect"] == pytest.approx(likelihood(items) - without, abs=2e-3)
    twice = httpx.post(endpoint, json={"prompt": PROMPT, "answer": "4", "persona_scale": 2}).json()["log_likelihood"]
    assert twice["with_persona"] == pytest.approx(likelihood(items, scale=2), abs=1e-3)
    assert abs(twice["with_persona"] - explanation["log_likelihood"]["with_persona"]) > 0.01
    assert httpx.post(endpoint, json={"prompt": PROMPT, "persona_scale": 0}).status_code == 422
    assert httpx.post(f"{url}/v1/users/nobody/explain", json={"prompt": PROMPT}).status_code == 404


def test_drift_compares_two_days(url: str) -> None:
    _post(url, "ann", *[{**_item(n, "1" if n < 3 else "5"), "date": f"2024-0{n + 1}-01"} for n in range(6)])
    endpoint = f"{url}/v1/users/ann/drift"
    changed = httpx.get(endpoint, params={"since": "2024-03-15", "until": "2024-12-31"}).json()
    still = httpx.get(endpoint, params={"since": "2024-03-15", "until": "2024-03-20"}).json()
    before = httpx.get(endpoint, params={"since": "2023-03-15", "until": "2024-03-20"}).json()
    assert (changed["items_before"], changed["items_after"]) == (3, 6)
    assert changed["moved"] > 0 == still["moved"]
    assert still["cosine"] == pytest.approx(1)
    assert before["moved"] is None


def test_api_keys_separate_tenants(service: Service, tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    shop, bank = (create_key(keys, tenant) for tenant in ("shop", "bank"))
    assert shop not in keys.read_text()
    with served(service, api_keys=ApiKeys.load(keys)) as url:
        endpoint = f"{url}/v1/users/ann/history"
        assert httpx.get(endpoint).status_code == 401
        assert httpx.get(endpoint, headers={"Authorization": "Bearer pp-wrong"}).status_code == 401
        assert httpx.get(endpoint, headers={"Authorization": f"Basic {shop}"}).status_code == 401
        _post(url, "ann", _item(1), Authorization=f"Bearer {shop}")
        assert httpx.get(endpoint, headers={"Authorization": f"Bearer {shop}"}).json()["count"] == 1
        assert httpx.get(endpoint, headers={"Authorization": f"Bearer {bank}"}).json()["count"] == 0
        assert _chat(url, "ann", key=shop).headers["x-personaplug-persona"] == "user"
        assert _chat(url, "ann", key=bank).headers["x-personaplug-persona"] == "population"
        with pytest.raises(openai.AuthenticationError, match="Bearer KEY"):
            _chat(url, "ann", key="pp-none")
        assert httpx.get(f"{url}/health").json() == {"status": "ok"}


def test_server_without_keys_listens_to_this_machine_only(tmp_path: Path) -> None:
    for host in ("0.0.0.0", "192.168.1.5", "::", "example.org"):
        with pytest.raises(ConfigError, match="personaplug create-key"):
            ApiKeys().check_address(host)
    for host in ("127.0.0.1", "::1", "localhost"):
        ApiKeys().check_address(host)
    keys = tmp_path / "keys.json"
    create_key(keys, "shop")
    ApiKeys.load(keys).check_address("0.0.0.0")
    for broken in ("[]", '{"short": "shop"}', "no json"):
        keys.write_text(broken)
        with pytest.raises(MissingData):
            ApiKeys.load(keys)
    with pytest.raises(MissingData, match="personaplug create-key"):
        ApiKeys.load(tmp_path / "none.json")


INVALID_REQUESTS: list[tuple[str, str, Any, int]] = [
    ("POST", "/v1/chat/completions", {"messages": []}, 422),
    ("POST", "/v1/chat/completions", {"messages": "hello"}, 422),
    ("POST", "/v1/chat/completions", {"messages": [{"content": "x"}]}, 422),
    ("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": 3}]}, 422),
    ("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "user": ""}, 422),
    ("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "user": "x" * 300}, 422),
    ("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "stream": "yes"}, 422),
    ("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "n": 30}, 400),
    ("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "model": "other"}, 404),
    ("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "x " * 9000}]}, 400),
    (
        "POST",
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "x"}], "personaplug": {"persona_scale": 99}},
        422,
    ),
    ("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "personaplug": {"x": 1}}, 422),
    ("POST", "/v1/completions", {"prompt": ["a", "b"]}, 422),
    ("POST", "/v1/completions", {"prompt": ""}, 400),
    ("POST", "/v1/users/ann/history", {}, 422),
    ("POST", "/v1/users/ann/history", {"items": [], "request_id": "x", "answer": "y"}, 422),
    ("POST", "/v1/users/ann/history", {"request_id": "x"}, 422),
    ("POST", "/v1/users/ann/history", {"items": [{"id": "1", "text": "x"}]}, 400),
    ("POST", "/v1/users/ann/history", {"items": [{"text": "x"}]}, 400),
    ("POST", "/v1/users/ann/history", {"items": [{"id": "1", "text": {}, "score": "1"}]}, 400),
    ("POST", "/v1/users/ann/history", {"items": [{"id": "1", "text": "x", "score": "1", "date": "soon"}]}, 400),
    ("POST", "/v1/users/ann/history", {"items": [{"id": "x" * 300, "text": "x", "score": "1"}]}, 400),
    ("POST", "/v1/users/ann/history", {"items": [{"id": str(n), "text": "x", "score": "1"} for n in range(1001)]}, 400),
    ("POST", "/v1/users/ann/explain", {"prompt": ""}, 422),
    ("GET", "/v1/users/ann/drift?since=x&until=2024-01-01", None, 422),
    ("GET", "/v1/users/ann/history?latest=0", None, 422),
    ("GET", "/v1/nothing", None, 404),
    ("PUT", "/v1/models", None, 405),
]


@pytest.mark.parametrize(("method", "path", "body", "status"), INVALID_REQUESTS)
def test_invalid_request_gets_a_4xx_in_openais_format(
    shared_url: str, method: str, path: str, body: Any, status: int
) -> None:
    reply = httpx.request(method, f"{shared_url}{path}", json=body)
    assert reply.status_code == status
    assert reply.json()["error"]["message"]
    assert reply.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"\xff\xfe",
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": NaN}',
        b"[" * 100_000,
        b'{"messages": ' + b"9" * 5000 + b"}",
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "x"}], "user": "a\\u0000b"}',
    ],
)
def test_malformed_body_gets_a_4xx(shared_url: str, body: bytes) -> None:
    for path in ("/v1/chat/completions", "/v1/users/ann/history"):
        reply = httpx.post(f"{shared_url}{path}", content=body, headers={"content-type": "application/json"})
        assert 400 <= reply.status_code < 500
        assert reply.json()["error"]["message"]


def test_body_beyond_the_limit_is_not_read(service: Service) -> None:
    with served(service, limits=RequestLimits(body_bytes=10_000)) as url:
        assert _post(url, "ann", _item(1, text="x" * 9_000)).status_code == 200
        reply = _post(url, "ann", _item(1, text="x" * 20_000))
        assert (reply.status_code, reply.json()["error"]["code"]) == (413, "body_too_long")

        def endless() -> Iterator[bytes]:
            while True:
                yield b"x" * 4096

        with httpx.Client() as client:
            headers = {"content-type": "application/json"}
            reply = client.post(f"{url}/v1/chat/completions", content=endless(), headers=headers)
            assert reply.status_code == 413


def test_requests_beyond_the_limit_are_refused_until_running_ones_end(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    resume, answer = threading.Event(), service.engine.respond

    async def slow(question: EngineRequest) -> EngineReply:
        await asyncio.to_thread(resume.wait, 30)
        return await answer(question)

    monkeypatch.setattr(service.engine, "respond", slow)
    with served(service, limits=RequestLimits(requests=2)) as url, ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(_chat, url, "ann") for _ in range(2)]
        while "personaplug_running_requests 2.0" not in httpx.get(f"{url}/metrics").text:
            assert not any(future.done() for future in futures), "a request for metrics takes no place"
            time.sleep(0.01)
        with pytest.raises(openai.RateLimitError) as refused:
            _chat(url, "bob")
        assert refused.value.response.headers["retry-after"] == "1"
        assert httpx.get(f"{url}/health").status_code == 200
        resume.set()
        assert all(future.result().parse().choices[0].message.content for future in futures)
        assert _chat(url, "bob").parse().choices[0].message.content


def test_logs_and_metrics_contain_no_user_text_or_id(
    service: Service,
    url: str,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.DEBUG, logger="personaplug")
    _post(url, SECRET, _item(1, text=SECRET))
    _post(url, SECRET, {"id": "1", "text": SECRET})
    _chat(url, SECRET, prompt=f"{PROMPT} {SECRET}")
    httpx.post(f"{url}/v1/chat/completions", json={"messages": SECRET, "user": SECRET})

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise ValueError(SECRET)

    monkeypatch.setattr(service.store, "version", broken)
    with pytest.raises(openai.InternalServerError) as failed:
        _chat(url, SECRET, prompt=f"{PROMPT} {SECRET}")
    assert SECRET not in str(failed.value)
    assert "ValueError at" in caplog.text
    output = capfd.readouterr()
    for text in (caplog.text, output.out, output.err, httpx.get(f"{url}/metrics").text):
        assert SECRET not in text


def test_metrics_count_requests_and_personas(url: str) -> None:
    _post(url, "ann", _item(1))
    _chat(url, "ann")
    _chat(url, "ann")
    text = httpx.get(f"{url}/metrics").text
    assert 'personaplug_requests_total{model="toy",route="/v1/chat/completions",status="200"} 2.0' in text
    assert 'personaplug_personas_total{applied="user",cached="true",model="toy"} 1.0' in text
    assert 'personaplug_cached_users{model="toy"} 1.0' in text


def test_server_finishes_running_streams_before_it_stops(toy: CausalLM, service: Service) -> None:
    with ThreadPoolExecutor(1) as pool:
        with served(service) as url:
            has_started = threading.Event()

            def read() -> str:
                body = {
                    "messages": [{"role": "user", "content": "long"}],
                    "max_tokens": 150,
                    "stream": True,
                    "temperature": 0,
                }
                with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=30) as stream:
                    lines = []
                    for line in stream.iter_lines():
                        lines.append(line)
                        has_started.set()
                    return "\n".join(lines)

            reading = pool.submit(read)
            assert has_started.wait(20)
        text = reading.result()
    assert text.rstrip().endswith("data: [DONE]")
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    streamed = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
    expected = toy.generate(PromptBatch(["long"]), GenerationConfig(max_new_tokens=150))[0].text
    assert streamed.strip() == expected


def test_concurrent_users_get_their_own_answers(toy: CausalLM, tmp_path: Path) -> None:
    """Users of two tenants with the same names send concurrent requests in random order."""
    service = open_service(toy, tmp_path)
    keys = tmp_path / "keys.json"
    tenants = {tenant: create_key(keys, tenant) for tenant in ("shop", "bank")}
    with served(service, api_keys=ApiKeys.load(keys)) as url:
        expected = {}
        for number in range(16):
            tenant, user = list(tenants)[number % 2], f"user {number // 2}"
            items = [_item(number * 10 + k, LABELS[(number + k) % 5]) for k in range(1 + number % 3)]
            _post(url, user, *items, Authorization=f"Bearer {tenants[tenant]}")
            expected[tenant, user] = _expected(service, toy, items, tokens=12)
        assert len(set(expected.values())) > 8  # the personas differ
        draw = random.Random(0)
        callers = [draw.choice(list(expected)) for _ in range(150)]

        def ask(who: tuple[str, str]) -> str:
            return str(_chat(url, who[1], key=tenants[who[0]], **FREE).parse().choices[0].message.content)

        with ThreadPoolExecutor(12) as pool:
            for who, answer in zip(callers, pool.map(ask, callers), strict=True):
                assert answer.strip() == expected[who]


def test_openapi_names_every_route(url: str) -> None:
    paths = httpx.get(f"{url}/openapi.json").json()["paths"]
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/users/{user}/history", "/health"} <= set(
        paths
    )


def test_ready_checks_the_store(url: str, tmp_path: Path) -> None:
    def wait_for(status: int) -> httpx.Response:
        deadline = time.monotonic() + 20
        while (reply := httpx.get(f"{url}/ready")).status_code != status:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        return reply

    assert wait_for(200).json() == {"status": "ready"}
    database = tmp_path / "histories.db"
    database.rename(tmp_path / "elsewhere.db")
    assert wait_for(503).json()["error"]["code"] == "store"
    assert httpx.get(f"{url}/health").status_code == 200
    (tmp_path / "elsewhere.db").rename(database)
    wait_for(200)


def test_small_requests_do_not_wait_for_large_ones_of_other_tenants_or_users(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = tmp_path / "keys.json"
    shop, bank = ({"Authorization": f"Bearer {create_key(keys, tenant)}"} for tenant in ("shop", "bank"))
    started, resume, store_add = list[str](), threading.Semaphore(0), service.store.add

    def add(ticket: Any, items: Any) -> Any:
        started.append(ticket.user)
        assert resume.acquire(timeout=30)
        return store_add(ticket, items)

    def wait_for(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    monkeypatch.setattr(service.store, "add", add)
    items = [_item(number) for number in range(50)]
    with served(service, api_keys=ApiKeys.load(keys)) as url, ThreadPoolExecutor(12) as pool:
        replies = [pool.submit(_post, url, f"large-{number}", *items, **shop) for number in range(6)]
        wait_for(lambda: len(started) == 2 and len(service.slow._tenants["shop"].waiting) == 4)
        replies.append(pool.submit(_post, url, "other-tenant", _item(1), **bank))
        wait_for(lambda: started[2:] == ["other-tenant"])
        replies.append(pool.submit(_post, url, "other-user", _item(1), **shop))
        wait_for(lambda: len(service.slow._tenants["shop"].waiting) == 5)
        resume.release(3)
        wait_for(lambda: len(started) > 3)
        assert started[3] == "other-user"
        resume.release(20)
        assert [reply.result().status_code for reply in replies] == [200] * 8
