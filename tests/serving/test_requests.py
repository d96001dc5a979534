"""Requests: naming the user, the task's wording, probabilities, labels, feedback and limits."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_server import CONFIG, ENCODER, LABELS, TASK, open_service, served

from personaplug.data.records import HistoryItem
from personaplug.data.task import Task
from personaplug.data.wording import Wording
from personaplug.llm.base import PromptBatch
from personaplug.llm.causal_lm import CausalLM
from personaplug.serving.service import Service

WORDING = Wording("How would the user rate this? review: ", "", " Answer with one number.", is_fixed=True)
PROMPT = "How would the user rate this? review: a film about tea. Answer with one number."
ITEMS = [{"id": f"i{number}", "text": f"a film {number}", "score": LABELS[number]} for number in range(3)]


@pytest.fixture(scope="module")
def service(toy: CausalLM, tmp_path_factory: pytest.TempPathFactory) -> Service:
    return open_service(toy, tmp_path_factory.mktemp("requests"), wordings=[WORDING])


@pytest.fixture(scope="module")
def url(service: Service) -> Iterator[str]:
    with served(service) as base_url:
        _add(base_url, "ann", *ITEMS)
        yield base_url


def _add(url: str, user: str, *items: dict[str, Any]) -> httpx.Response:
    return httpx.post(f"{url}/v1/users/{user}/history", json={"items": items})


def _chat(url: str, prompt: str = PROMPT, *, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}]} | fields
    return httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=30)


def _complete(url: str, prompt: str = PROMPT, **fields: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/completions", json={"prompt": prompt} | fields, timeout=30)


def _code(reply: httpx.Response) -> tuple[int, str]:
    return reply.status_code, reply.json()["error"]["code"]


def _personal(reply: httpx.Response) -> tuple[str, str | None]:
    reply.raise_for_status()
    return reply.headers["x-personaplug-persona"], reply.headers.get("x-personaplug-reason")


def test_user_is_read_from_a_header_and_other_fields(url: str) -> None:
    for named in (
        {"headers": {"X-Personaplug-User": "ann"}},
        {"user": "ann"},
        {"safety_identifier": "ann"},
        {"metadata": {"user_id": "ann"}},
        {"personaplug": {"user": "ann"}},
    ):
        assert _personal(_chat(url, **named)) == ("user", None)
    assert _code(_chat(url, headers={"X-Personaplug-User": "bob"}, user="ann")) == (400, "user")
    assert _code(_chat(url, headers={"X-Personaplug-User": "a%00"})) == (422, "invalid_value")


def test_requests_without_a_user_are_logged_once(
    toy: CausalLM, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="personaplug")
    with served(open_service(toy, tmp_path)) as base_url:
        _chat(base_url, user="ann")
        assert "names no user" not in caplog.text
        for _ in range(3):
            assert _personal(_chat(base_url, "review: tea")) == ("population", "no-user")
    assert caplog.text.count("names no user") == 1


@pytest.mark.parametrize(
    "prompt",
    [
        "Summarise the plot of this review: Titanic",
        "review: a film about tea",
        "How would the user rate this? review: a film about tea",
        f"Tell me. {PROMPT}",
        "How would the user rate this? review:  Answer with one number.",
        "",
    ],
)
def test_prompt_with_only_the_marker_is_off_task(url: str, prompt: str) -> None:
    reply = _chat(url, prompt, user="ann", max_tokens=8, temperature=0)
    assert _personal(reply) == ("plain", "off-task")
    assert reply.json()["choices"][0]["message"]["content"] not in LABELS


def test_wording_is_recognized_with_white_space_around_it(url: str) -> None:
    assert _personal(_chat(url, f"\n {PROMPT} \n", user="ann")) == ("user", None)


def test_last_message_decides_the_task(url: str) -> None:
    task, system = {"role": "user", "content": PROMPT}, {"role": "system", "content": "Be kind."}
    for messages in ([system, task], [task, {"role": "assistant", "content": "4"}, task]):
        assert _personal(_chat(url, messages=messages, user="ann")) == ("user", None)
    for messages in ([task, {"role": "assistant", "content": "I would"}], [task, {"role": "user", "content": "why?"}]):
        reply = _chat(url, messages=messages, user="ann", max_tokens=4)
        assert _personal(reply) == ("plain", "off-task")


def test_reason_header_says_why_the_users_persona_is_not_applied(url: str) -> None:
    assert _personal(_chat(url, user="nobody")) == ("population", "no-history")
    assert _personal(_chat(url)) == ("population", "no-user")
    assert _personal(_chat(url, user="ann", personaplug={"persona_scale": 0})) == ("plain", "persona-scale")


def test_task_route_describes_the_task(url: str) -> None:
    about = httpx.get(f"{url}/v1/task").json()
    assert about["wordings"] == ["How would the user rate this? review: {query} Answer with one number."]
    assert (about["name"], about["kind"], about["labels"]) == ("Films", "rating", list(LABELS))
    assert (about["item_fields"], about["answer_field"]) == (["text", "score"], "score")
    assert about["item_kinds"] == ["answer"]


def _expected(service: Service, toy: CausalLM) -> list[float]:
    """Return the labels' probabilities that an evaluation computes."""
    history = [HistoryItem(i["id"], (("text", i["text"]), ("score", i["score"])), "score") for i in ITEMS]
    personalizer, query = service.personas.personalizer, PROMPT.split("review: ")[1]
    soft = personalizer.persona(query, personalizer.encode(history, encoder=ENCODER))
    return toy.score(PromptBatch([PROMPT], soft), LABELS)[0].softmax(dim=0).tolist()


def test_probabilities_equal_those_of_an_evaluation(service: Service, url: str, toy: CausalLM) -> None:
    expected = _expected(service, toy)
    body = _chat(url, user="ann", personaplug={"probabilities": True}).json()
    assert list(body["personaplug"]["probabilities"].values()) == pytest.approx(expected, abs=1e-4)
    assert sum(body["personaplug"]["probabilities"].values()) == pytest.approx(1)
    mean = sum(float(label) * p for label, p in zip(LABELS, expected, strict=True))
    assert body["personaplug"]["mean"] == pytest.approx(mean, abs=1e-3)
    assert body["personaplug"]["median"] in LABELS
    likeliest = max(body["personaplug"]["probabilities"], key=body["personaplug"]["probabilities"].get)
    assert body["choices"][0]["message"]["content"] == likeliest


def test_logprobs_of_labels_have_openais_format(service: Service, url: str, toy: CausalLM) -> None:
    import math

    expected = dict(zip(LABELS, map(math.log, _expected(service, toy)), strict=True))
    (token,) = _chat(url, user="ann", logprobs=True, top_logprobs=3).json()["choices"][0]["logprobs"]["content"]
    assert token["logprob"] == pytest.approx(expected[token["token"]], abs=1e-3)
    assert token["bytes"] == list(token["token"].encode())
    assert [entry["token"] for entry in token["top_logprobs"]] == sorted(LABELS, key=lambda x: -expected[x])[:3]
    logprobs = _complete(url, user="ann", logprobs=5).json()["choices"][0]["logprobs"]
    assert (len(logprobs["top_logprobs"][0]), logprobs["text_offset"]) == (5, [0])
    assert sum(map(math.exp, logprobs["top_logprobs"][0].values())) == pytest.approx(1)
    assert logprobs["token_logprobs"][0] == max(logprobs["top_logprobs"][0].values())


def test_stream_contains_logprobs_and_probabilities(url: str) -> None:
    fields: dict[str, Any] = {"user": "ann", "logprobs": True, "personaplug": {"probabilities": True}}
    whole, text = _chat(url, **fields).json(), _chat(url, stream=True, **fields).text
    (event,) = [line for line in text.splitlines() if '"probabilities"' in line]
    chunk = httpx.Response(200, content=event.removeprefix("data: ")).json()
    assert chunk["personaplug"] == whole["personaplug"]
    assert chunk["choices"][0]["logprobs"] == whole["choices"][0]["logprobs"]


def test_probabilities_of_free_text_are_refused(url: str) -> None:
    fields: dict[str, Any] = {"probabilities": True}
    assert _code(_chat(url, "hello", user="ann", personaplug=fields)) == (400, "unsupported")
    assert _code(_chat(url, user="ann", personaplug=fields | {"free": True})) == (400, "unsupported")


@pytest.mark.parametrize("fields", [{"stop": list("1234")}, {"stop": "5"}, {"max_tokens": 1}])
def test_label_is_never_truncated(toy: CausalLM, tmp_path: Path, fields: dict[str, Any]) -> None:
    labels = ("10 stars", "20 stars", "5 stars")
    task = replace(TASK, kind="label", labels=labels)
    with served(open_service(toy, tmp_path, task=task)) as base_url:
        for stream in (False, True):
            reply = _chat(base_url, "review: tea", user="ann", stream=stream, temperature=1, **fields)
            assert any(f'"content":"{label}"' in reply.text for label in labels)
            assert '"finish_reason":"stop"' in reply.text
        assert _chat(base_url, "review: tea", **fields).json()["choices"][0]["message"]["content"] in labels


def test_max_tokens_above_the_limit_is_clamped_and_reported(url: str) -> None:
    reply = _chat(url, "hello", max_tokens=100_000, temperature=0)
    assert (reply.status_code, reply.headers["x-personaplug-max-tokens"]) == (200, "200")
    assert reply.json()["usage"]["completion_tokens"] <= 200
    assert "x-personaplug-max-tokens" not in _chat(url, "hello", max_tokens=8).headers


def test_other_protocols_are_refused_with_the_supported_routes(url: str) -> None:
    for path in ("responses", "messages"):
        reply = httpx.post(f"{url}/v1/{path}", json={"input": "hello"})
        assert _code(reply) == (404, "unknown_route")
        assert "/v1/chat/completions" in reply.json()["error"]["message"]


def test_item_without_an_id_gets_one_from_its_content(url: str) -> None:
    item = {"text": "a walk", "score": 4.0}
    assert _add(url, "carl", item).json() == {"new": 1, "replaced": 0, "same": 0}
    assert _add(url, "carl", {**item, "id": None}, {**item, "score": "4"}).json()["new"] == 0
    assert _add(url, "carl", {**item, "score": "5"}, {**item, "date": "2024-01-01"}).json()["new"] == 2
    one = httpx.post(f"{url}/v1/users/carl/history", json=item)
    assert one.json()["same"] == 1


def test_two_different_items_with_one_id_are_refused(url: str) -> None:
    items = [{"id": "a", "text": "x", "score": "1"}, {"id": "a", "text": "y", "score": "1"}]
    reply = _add(url, "dora", *items)
    assert _code(reply) == (400, "item")
    assert "item 2 has the id of item 1" in reply.json()["error"]["message"]
    assert httpx.get(f"{url}/v1/users/dora/history").json()["count"] == 0
    assert _add(url, "dora", items[0], items[0]).status_code == 200


@pytest.mark.parametrize("score", [9, "banana", "", "4.5", 0])
def test_answer_outside_the_labels_is_refused_in_one_item_and_in_a_list(url: str, score: Any) -> None:
    item = {"id": "a", "text": "x", "score": score}
    for body in ({"items": [item]}, item):
        reply = httpx.post(f"{url}/v1/users/emil/history", json=body)
        assert _code(reply) == (400, "item")
        assert "1, 2, 3, 4, 5" in reply.json()["error"]["message"]
    assert httpx.get(f"{url}/v1/users/emil/history").json()["count"] == 0


def _feedback(url: str, user: str, reply: httpx.Response, answer: Any) -> httpx.Response:
    body = {"request_id": reply.headers["x-request-id"], "answer": answer}
    return httpx.post(f"{url}/v1/users/{user}/history", json=body)


@pytest.mark.parametrize("answer", [2, "2", 2.0, " 2 "])
def test_feedback_item_has_the_query_without_its_wording_and_the_label(url: str, answer: Any) -> None:
    user = f"fred-{answer!r}".replace("/", "")
    assert _feedback(url, user, _chat(url, user=user), answer).json()["new"] == 1
    (item,) = httpx.get(f"{url}/v1/users/{user}/history").json()["items"]
    assert (item["text"], item["score"]) == ("a film about tea.", "2")


def test_feedback_that_cannot_be_an_item_is_refused(url: str) -> None:
    assert _code(_feedback(url, "gina", _chat(url, user="gina"), 9)) == (400, "answer")
    assert _code(_feedback(url, "gina", _chat(url, user="gina"), "banana")) == (400, "answer")
    off_task = _chat(url, "review: hello", user="gina", max_tokens=4)
    assert _code(_feedback(url, "gina", off_task, "4")) == (400, "not_the_task")
    assert httpx.get(f"{url}/v1/users/gina/history").json()["count"] == 0


@pytest.mark.parametrize(
    "task",
    [
        Task("Cite", "label", ("title", "abstract"), None, ("accuracy",), labels=("[1]", "[2]"), query_after="cite: "),
        Task("Parts", "text", ("title", "text", "place"), "title", ("rouge_1",), query_after="cite: "),
    ],
)
def test_feedback_is_refused_if_the_item_needs_other_fields(toy: CausalLM, tmp_path: Path, task: Task) -> None:
    config = replace(CONFIG, answer_channel="text", label_prior="none")
    with served(open_service(toy, tmp_path, task=task, config=config)) as base_url:
        reply = _chat(base_url, "cite: a paper on tea", user="ann", max_tokens=4)
        assert _code(_feedback(base_url, "ann", reply, "[1]")) == (400, "feedback")
        assert httpx.get(f"{base_url}/v1/users/ann/history").json()["count"] == 0


def test_numeric_answer_is_accepted_in_one_item_and_in_a_list(toy: CausalLM, tmp_path: Path) -> None:
    task = replace(TASK, item_fields=("text",), answer_field="answer")
    with served(open_service(toy, tmp_path, task=task)) as base_url:
        endpoint = f"{base_url}/v1/users/ann/history"
        assert httpx.post(endpoint, json={"id": "a", "text": "x", "answer": 4}).json()["new"] == 1
        assert httpx.post(endpoint, json={"items": [{"id": "a", "text": "x", "answer": 4}]}).json()["same"] == 1
        assert httpx.post(endpoint, json={"id": "b", "text": "x", "answer": True}).status_code == 422


def test_long_prompt_is_refused_before_tokenizer_and_encoder(
    service: Service, url: str, toy: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused by its characters or by its tokens, and the encoder never reads it."""
    tokenized: list[int] = []
    texts = toy.prompt_tokenizer.texts
    encode_many = texts.encode_many

    def counted(texts: Any, **options: Any) -> Any:
        tokenized.extend(map(len, texts))
        return encode_many(texts, **options)

    def unwanted(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a persona was computed")

    monkeypatch.setattr(texts, "encode_many", counted)
    monkeypatch.setattr(service.personas, "persona", unwanted)
    monkeypatch.setattr(service.personas.personalizer, "persona", unwanted)
    prompts = {"huge": "tea " * 750_000, "long": "tea " * 3000}
    for name, text in prompts.items():
        prompt = PROMPT.replace("tea", text)
        turns = [{"role": "user", "content": text[: len(text) // 8]}] * 8
        explained = {"prompt": prompt, "answer": "4"}
        for reply in (
            _chat(url, prompt, user="ann"),
            _complete(url, prompt, user="ann"),
            _chat(url, messages=[*turns, {"role": "user", "content": PROMPT}], user="ann"),
            httpx.post(f"{url}/v1/users/ann/explain", json=explained, timeout=30),
            httpx.post(f"{url}/v1/users/ann/explain", json=explained | {"prompt": prompt, "answer": None}, timeout=30),
        ):
            assert _code(reply) == (400, "context_length_exceeded")
        assert any(length > 1000 for length in tokenized) == (name == "long")


@pytest.mark.parametrize(
    "fields",
    [
        {"guided_choice": ["a"]},
        {"ignore_eos": True},
        {"chat_template": "x"},
        {"tool_choice": "required"},
        {"max_new_tokens": 3},
        {"reasoning_effort": "high"},
        {"stream_options": {"x": 1}},
        {"messages": [{"role": "user", "content": "x", "tool_call_id": "1"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "detail": "low"}]}]},
    ],
)
def test_field_that_would_have_no_effect_is_refused(url: str, fields: dict[str, Any]) -> None:
    assert _chat(url, "hello", **fields).status_code == 400


def test_harmless_fields_are_accepted(url: str) -> None:
    fields: dict[str, Any] = {
        "n": 1, "tool_choice": "none", "logprobs": False, "presence_penalty": 0, "store": True, "service_tier": "auto",
        "prompt_cache_key": "x", "metadata": {"a": "b"}, "guided_choice": None, "response_format": {"type": "text"},
        "prompt_cache_options": {"mode": "explicit"}, "prediction": {"type": "content", "content": "x"},
        "reasoning_effort": "none", "verbosity": "medium",
        "messages": [{"role": "user", "content": "hello", "name": "ann", "tool_calls": [], "refusal": None}],
    }  # fmt: skip
    assert _chat(url, max_tokens=2, **fields).status_code == 200
    part = {"type": "text", "text": "hello", "cache_control": {"type": "ephemeral"}}
    marked = [{"role": "user", "content": [part | {"prompt_cache_breakpoint": {"mode": "explicit"}}]}]
    plain = _chat(url, "hello", max_tokens=8, temperature=0).json()["choices"]
    assert _chat(url, messages=marked, max_tokens=8, temperature=0).json()["choices"] == plain


def test_too_many_messages_or_fields_are_refused(url: str) -> None:
    turn = {"role": "user", "content": "x"}
    assert _chat(url, messages=[turn] * 3000).status_code == 422
    many: dict[str, Any] = {f"x{number}": 1 for number in range(200)}
    assert _chat(url, **many).status_code == 400
