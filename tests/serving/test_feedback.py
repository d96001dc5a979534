"""Feedback by request id: accepted, edited, rejected and rated answers become items. The last feedback counts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_server import CONFIG, LABELS, TASK, open_service, served

from personaplug.data.task import Task
from personaplug.data.task_registry import CHAT
from personaplug.errors import RequestError
from personaplug.llm.causal_lm import CausalLM
from personaplug.serving import recent_requests, reply_texts
from personaplug.serving.engines.base import EventStream
from personaplug.serving.openai_protocol import DONE, Choice, ReplyFormatter, event, to_json
from personaplug.serving.recent_requests import RecentRequests
from personaplug.serving.reply_texts import WatchedStream, text_of_reply
from personaplug.store.tickets import Ticket

STYLE = replace(CONFIG, answer_channel="style", label_prior="none")
TWEETS = Task("Tweets", "text", ("text",), None, ("rouge_1",), query_after="tweet: ")


@pytest.fixture(scope="module")
def url(toy: CausalLM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(open_service(toy, tmp_path_factory.mktemp("chat"), task=CHAT, config=STYLE)) as base_url:
        yield base_url


def _ask(url: str, user: str, prompt: str = "What is tea?", **fields: Any) -> tuple[str, str]:
    """Return the id of a request and its answer."""
    body = {"messages": [{"role": "user", "content": prompt}], "user": user, "max_tokens": 6, "temperature": 0}
    reply = httpx.post(f"{url}/v1/chat/completions", json=body | fields, timeout=30)
    text = "" if fields.get("stream") else reply.json()["choices"][0]["message"]["content"].strip()
    return reply.headers["x-request-id"], text


def _say(url: str, user: str, request: str, **feedback: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/users/{user}/history", json={"request_id": request, **feedback})


def _items(url: str, user: str) -> list[tuple[str, str]]:
    """Return the kinds and the answers of a user's items."""
    items = httpx.get(f"{url}/v1/users/{user}/history").json()["items"]
    assert all(item.get("question", "What is tea?") == "What is tea?" for item in items)
    return [(item["kind"], item.get("answer", item.get("rejected"))) for item in items]


def _code(reply: httpx.Response) -> tuple[int, str]:
    return reply.status_code, reply.json()["error"]["code"]


def test_feedback_becomes_items_and_replaces_earlier_feedback(url: str) -> None:
    request, own = _ask(url, "ann")
    assert own
    for feedback, expected, counts in (
        ({"answer": own}, [("answer", own)], (1, 0, 0, 0)),
        ({"rating": "up"}, [("answer", own)], (0, 0, 1, 0)),
        ({"answer": "A drink.", "rejected": own}, [("answer", "A drink."), ("rejection", own)], (1, 1, 0, 0)),
        ({"rejected": own}, [("rejection", own)], (0, 0, 1, 1)),
        ({"rating": "down"}, [("rejection", own)], (0, 0, 1, 0)),
        ({"rejected": "Tea??"}, [("rejection", "Tea??")], (0, 1, 0, 0)),
        ({"answer": "A drink."}, [("answer", "A drink.")], (1, 0, 0, 1)),
    ):
        reply = _say(url, "ann", request, **feedback)
        assert reply.status_code == 200, reply.text
        assert reply.json() == dict(zip(("new", "replaced", "same", "removed"), counts, strict=True))
        assert _items(url, "ann") == expected


def test_feedback_items_are_deleted_together_or_one_by_one(url: str) -> None:
    request, own = _ask(url, "bob")
    endpoint = f"{url}/v1/users/bob"
    for _ in range(2):
        _say(url, "bob", request, answer="A drink.", rejected=own)
        assert httpx.delete(f"{endpoint}/feedback/{request}").json() == {"deleted": True}
        assert _items(url, "bob") == []
    assert httpx.delete(f"{endpoint}/feedback/{request}").status_code == 404
    _say(url, "bob", request, answer="A drink.", rejected=own)
    assert httpx.delete(f"{endpoint}/history/{request}-rejected").status_code == 200
    assert _items(url, "bob") == [("answer", "A drink.")]
    assert httpx.delete(f"{endpoint}/history/{request}").status_code == 200
    assert _items(url, "bob") == []


@pytest.mark.parametrize(
    "feedback",
    [
        {},
        {"rating": "sideways"},
        {"rating": 5},
        {"rating": "up", "answer": "x"},
        {"rating": "down", "rejected": "x"},
        {"answer": True},
        {"rating": ["up"]},
        {"answer": "x", "question": "y"},
        {"rejected": "x" * 100_001},
        {"items": []},
    ],
)
def test_malformed_feedback_is_refused(url: str, feedback: dict[str, Any]) -> None:
    request, _ = _ask(url, "carl")
    assert _say(url, "carl", request, **feedback).status_code == 422
    assert _items(url, "carl") == []


def test_feedback_of_another_user_and_contradictory_feedback_are_refused(url: str) -> None:
    request, own = _ask(url, "dora")
    for feedback in ({"rating": "up"}, {"rejected": "x"}, {"answer": "x"}):
        assert _code(_say(url, "emil", request, **feedback)) == (404, "unknown_request")
    assert _code(_say(url, "dora", request, answer=own, rejected=own)) == (400, "feedback")
    assert _items(url, "dora") == []
    _say(url, "dora", request, rating="down")
    httpx.delete(f"{url}/v1/users/dora")
    assert _code(_say(url, "dora", request, rating="up")) == (404, "unknown_request")
    assert _items(url, "dora") == []


@pytest.mark.parametrize("feedback", [{"answer": " "}, {"rejected": ""}, {"answer": "Tea.", "rejected": "\n"}])
def test_feedback_without_text_is_refused_and_nothing_is_stored(url: str, feedback: dict[str, str]) -> None:
    request, _ = _ask(url, "fay")
    assert _code(_say(url, "fay", request, **feedback)) == (400, "answer")
    assert _code(_say(url, "fay", request, answer="Tea.", rejected=" Tea.\n")) == (400, "feedback")
    assert _items(url, "fay") == []


def test_rejected_item_can_be_added_without_a_request(url: str) -> None:
    item = {"question": "What is tea?", "rejected": "Tea??"}
    assert httpx.post(f"{url}/v1/users/fred/history", json=item).json()["new"] == 1
    accepted = {"question": "What is tea?", "answer": "Tea??"}
    assert httpx.post(f"{url}/v1/users/fred/history", json={"items": [item, accepted]}).json()["new"] == 1
    assert sorted(_items(url, "fred")) == [("answer", "Tea??"), ("rejection", "Tea??")]


def test_rating_stores_the_label_as_answer_or_rejection(toy: CausalLM, tmp_path: Path) -> None:
    with served(open_service(toy, tmp_path)) as url:
        request, label = _ask(url, "ann", "review: a film")
        assert label in LABELS
        for rating, name in (("up", "score"), ("down", "rejected")):
            assert _say(url, "ann", request, rating=rating).json()["new"] == 1
            (item,) = httpx.get(f"{url}/v1/users/ann/history").json()["items"]
            assert (item[name], item["text"]) == (label, "a film")
        free, _ = _ask(url, "ann", "review: a film", personaplug={"free": True})
        assert _code(_say(url, "ann", free, rating="up")) == (400, "answer")
        assert _code(_say(url, "ann", request, answer="4", rejected="nine")) == (400, "answer")


def test_a_number_is_no_reply_of_a_chat(url: str) -> None:
    request, own = _ask(url, "gus")
    for feedback in ({"answer": 4}, {"rejected": 2.5}, {"answer": own, "rejected": 4}):
        assert _code(_say(url, "gus", request, **feedback)) == (400, "answer")
    for item in ({"question": "Tea?", "answer": 4}, {"question": "Tea?", "rejected": 4.5}):
        reply = httpx.post(f"{url}/v1/users/gus/history", json={"items": [item]})
        assert _code(reply) == (400, "item")
        assert "is a number" in reply.json()["error"]["message"]
    assert _items(url, "gus") == []
    assert _say(url, "gus", request, answer="4").status_code == 200


def test_task_without_an_answer_field_refuses_rejections(toy: CausalLM, tmp_path: Path) -> None:
    with served(open_service(toy, tmp_path, task=TWEETS, config=STYLE)) as url:
        request, own = _ask(url, "ann", "write. tweet: on tea")
        assert _code(_say(url, "ann", request, rating="down")) == (400, "feedback")
        assert _say(url, "ann", request, rating="up").json()["new"] == 1
        assert httpx.get(f"{url}/v1/users/ann/history").json()["items"][0]["text"] == own


def test_item_may_have_a_field_named_rating(toy: CausalLM, tmp_path: Path) -> None:
    with served(open_service(toy, tmp_path, task=replace(TASK, answer_field="rating"))) as url:
        endpoint = f"{url}/v1/users/ann/history"
        assert httpx.post(endpoint, json={"text": "a film", "rating": 4}).json()["new"] == 1
        assert httpx.post(endpoint, json={"items": [{"text": "a film", "rating": "4"}]}).json()["same"] == 1


@pytest.mark.parametrize("stream", [False, True])
def test_feedback_on_an_unstored_answer_needs_its_text(url: str, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    monkeypatch.setattr(reply_texts, "_MAX_CHARACTERS", 3)
    user = f"gina-{stream}"
    request, _ = _ask(url, user, stream=stream)
    assert _code(_say(url, user, request, rating="down")) == (400, "unknown_answer")
    assert _say(url, user, request, rejected="Tea is").json()["new"] == 1


# The text of a reply


def _formatter(kind: Any) -> ReplyFormatter:
    return ReplyFormatter(kind, model="toy", request_id="r")


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_reads_the_text_of_a_whole_reply(kind: Any) -> None:
    body = _formatter(kind).whole([Choice(" a < b ", "stop")], usage={})
    assert text_of_reply(to_json(body)) == "a < b"
    two = body | {"choices": [*body["choices"], body["choices"][0] | {"index": 1}]}
    others: list[dict[str, Any]] = [two, body | {"choices": []}, {"error": {}}, body | {"x": "y" * 2**20}]
    assert [text_of_reply(to_json(other)) for other in others] == [None] * 4
    empty = _formatter(kind).whole([Choice("  ", "stop")], usage={})
    long = _formatter(kind).whole([Choice("x" * 100_001, "stop")], usage={})
    assert [text_of_reply(body) for body in (to_json(empty), to_json(long), b"[]", b"", b"{")] == [None] * 5


def _watched(events: Sequence[bytes], *, read: int | None = None) -> list[str]:
    """Return the texts that WatchedStream reports for these events, if a caller reads the first `read` of them."""
    texts: list[str] = []
    closed: list[bool] = []

    async def generate() -> AsyncGenerator[bytes]:
        for chunk in events:
            yield chunk

    async def run() -> None:
        stream = EventStream(generate(), on_close=lambda: closed.append(True))
        watched = WatchedStream(stream, on_text=texts.append)
        passed = []
        for _ in events[:read]:
            passed.append(await anext(watched))
        assert passed == list(events[:read])
        await watched.aclose()

    asyncio.run(run())
    assert closed == [True]
    return texts


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_text_of_a_stream_is_reported_at_its_end(kind: Any) -> None:
    formatter = _formatter(kind)
    pieces = [event(formatter.chunk({"content": text})) for text in (" te", "a ")]
    end = event(formatter.chunk({}, reason="stop"))
    usage = event(formatter.usage_chunk({}))
    start = event(formatter.chunk({"role": "assistant", "content": ""}))
    assert _watched([start, *pieces, end, usage, DONE]) == ["tea"]
    assert _watched([*pieces, end, DONE], read=3) == []
    assert _watched([*pieces, event({"error": {"message": "x"}}), DONE]) == []
    assert _watched([*pieces, b"data: {broken\n\n", DONE]) == []
    other = json.loads(pieces[0].removeprefix(b"data: "))
    other["choices"][0]["index"] = 1
    assert _watched([pieces[0], event(other), DONE]) == []
    assert _watched([end, DONE]) == []
    assert _watched([event(formatter.chunk({"content": "x" * 60_000}))] * 2 + [DONE]) == []


def test_recent_requests_are_limited_and_can_be_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recent_requests, "_MAX_BYTES", 20_000)
    requests, ticket = RecentRequests(), Ticket("shop", {"ann": "hash"}, {})
    for number in range(10):
        requests.add(ticket, request_id=str(number), query="q", task=CHAT, answer="x" * 4_000)
    assert len(requests) == 4
    assert requests.find("shop", "ann", request_id="9").answer == "x" * 4_000
    with pytest.raises(RequestError, match="no recent request with this id"):
        requests.find("shop", "ann", request_id="0")
    requests.set_answer(ticket, request_id="9", answer="y" * 30_000)
    assert requests.find("shop", "ann", request_id="9").answer == "x" * 4_000, "too large to store"
    requests.set_answer(ticket, request_id="0", answer="late")
    requests.forget("shop", "ann")
    requests.set_answer(ticket, request_id="9", answer="late")
    requests.add(ticket, request_id="10", query="q", task=CHAT, answer="of a request from before")
    assert len(requests) == 0
