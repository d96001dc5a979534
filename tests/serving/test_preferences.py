"""The routes of stated preferences."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from live_server import open_service, served
from plugs import head_of

from personaplug.errors import UserErased
from personaplug.llm.causal_lm import CausalLM
from personaplug.serving.service import Service
from personaplug.store.history_store import HistoryStore
from personaplug.store.writes import MAX_PREFERENCES

ITEM = {"id": "i", "text": "a film", "score": "4"}


@pytest.fixture(scope="module")
def url(toy: CausalLM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(open_service(toy, tmp_path_factory.mktemp("preferences"))) as base_url:
        yield base_url


def _put(url: str, user: str, *sentences: object, **fields: Any) -> httpx.Response:
    body = {"preferences": list(sentences)} | fields
    return httpx.put(f"{url}/v1/users/{user}/preferences", json=body)


def _counts(reply: httpx.Response) -> dict[str, int]:
    """Return the counts of a replacement. The plug of these tests reads no preferences."""
    counts: dict[str, int] = reply.json()
    assert counts.pop("used") is False
    return counts


def _get(url: str, user: str) -> list[dict[str, Any]]:
    reply = httpx.get(f"{url}/v1/users/{user}/preferences").json()
    assert reply["count"] == len(reply["preferences"])
    assert reply["user"] == user
    preferences: list[dict[str, Any]] = reply["preferences"]
    return preferences


def _post(url: str, user: str, *items: dict[str, Any]) -> httpx.Response:
    return httpx.post(f"{url}/v1/users/{user}/history", json={"items": items})


def test_preferences_are_replaced_listed_and_removed(url: str) -> None:
    assert _put(url, "ann", "No horror.", "Old films").json() == {
        "new": 2,
        "replaced": 0,
        "same": 0,
        "removed": 0,
        "used": False,
    }
    assert _put(url, "ann", "Old films", "No spoilers").json() == {
        "new": 1,
        "replaced": 0,
        "same": 1,
        "removed": 1,
        "used": False,
    }
    first, second = _get(url, "ann")
    assert (first["preference"], second["preference"]) == ("Old films", "No spoilers")
    assert first.keys() == {"id", "date", "arrived", "kind", "preference"}
    assert _post(url, "ann", ITEM).json()["new"] == 1
    listed = httpx.get(f"{url}/v1/users/ann/history").json()
    assert (listed["count"], [item["kind"] for item in listed["items"]]) == (3, ["preference", "preference", "answer"])
    assert _post(url, "ann", *listed["items"]).json()["same"] == 3, "a listed item can be added again"
    exported = httpx.get(f"{url}/v1/users/ann/export").json()["items"]
    assert exported[0]["fields"] == [["preference", "Old films"]]
    assert httpx.delete(f"{url}/v1/users/ann/history/{first['id']}").json() == {"deleted": True}
    assert httpx.delete(f"{url}/v1/users/ann/preferences").json()["removed"] == 1
    assert httpx.delete(f"{url}/v1/users/ann/preferences").json()["removed"] == 0
    assert (_get(url, "ann"), httpx.get(f"{url}/v1/users/ann/history").json()["count"]) == ([], 1)


def test_same_sentence_is_one_preference_on_all_routes(url: str) -> None:
    assert _post(url, "bob", {"preference": "No horror.", "date": "2024-01-01"}, ITEM).json()["new"] == 2
    assert httpx.post(f"{url}/v1/users/bob/history", json={"preference": "No horror."}).json()["replaced"] == 1
    assert _put(url, "bob", "No horror.", "No horror.").json() == {
        "new": 0,
        "replaced": 0,
        "same": 2,
        "removed": 0,
        "used": False,
    }
    assert len(_get(url, "bob")) == 1
    assert _put(url, "bob").json()["removed"] == 1


def test_unknown_user_has_no_preferences(url: str) -> None:
    assert _counts(_put(url, "nobody")) == {"new": 0, "replaced": 0, "same": 0, "removed": 0}
    assert _get(url, "nobody") == []
    assert httpx.delete(f"{url}/v1/users/nobody").status_code == 404


@pytest.mark.parametrize(
    "sentences", [[""], [5], [None], ["x" * 100_001], [f"{n}" for n in range(101)], "No horror.", [["a"]], ["\ud800"]]
)
def test_invalid_preferences_are_refused_and_change_nothing(url: str, sentences: Any) -> None:
    _put(url, "carl", "No horror.")
    content, headers = json.dumps({"preferences": sentences}), {"content-type": "application/json"}
    reply = httpx.put(f"{url}/v1/users/carl/preferences", content=content, headers=headers)
    assert reply.status_code == 422
    assert [each["preference"] for each in _get(url, "carl")] == ["No horror."]


def test_blank_preference_and_preference_with_an_answer_are_refused(url: str) -> None:
    assert (_put(url, "dora", "ok", " \n ").status_code, _get(url, "dora")) == (400, [])
    mixed = _post(url, "dora", {"preference": "No horror.", "text": "a film", "score": "4"})
    assert (mixed.status_code, mixed.json()["error"]["code"]) == (400, "item")
    assert httpx.put(f"{url}/v1/users/dora/preferences", json={"preferences": [], "user": "ann"}).status_code == 422
    plain = httpx.put(f"{url}/v1/users/dora/preferences", content="{}", headers={"content-type": "text/plain"})
    assert plain.status_code == 415


def test_white_space_around_a_preference_is_ignored(url: str) -> None:
    assert _put(url, "gil", "No horror.", " No horror.\n").json()["new"] == 1
    assert [each["preference"] for each in _get(url, "gil")] == ["No horror."]


def test_history_route_limits_the_number_of_preferences(url: str) -> None:
    many = [{"preference": f"number {number}"} for number in range(MAX_PREFERENCES + 1)]
    refused = _post(url, "emil", *many)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "item")
    assert _post(url, "emil", *many[1:]).json()["new"] == MAX_PREFERENCES
    assert _post(url, "emil", many[0]).status_code == 400


@pytest.mark.parametrize("is_trained", [True, False])
def test_preference_gives_a_new_user_a_persona_if_the_plug_reads_preferences(
    is_trained: bool, toy: CausalLM, tmp_path: Path
) -> None:
    service = open_service(toy, tmp_path)
    kinds = head_of(service.personas.plug).projector.kind
    assert kinds is not None
    if is_trained:
        torch.nn.init.normal_(kinds)
    body = {"messages": [{"role": "user", "content": "review: a film about tea"}], "user": "fred"}
    personas = []
    with served(service) as url:
        for sentences in ([], ["No horror."], []):
            _put(url, "fred", *sentences)
            reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30)
            personas.append((reply.headers["x-personaplug-persona"], reply.headers["x-personaplug-items"]))
    stated = ("user", "1") if is_trained else ("population", "0")
    assert personas == [("population", "0"), stated, ("population", "0")]


def test_store_without_texts_lists_only_ids_and_dates(toy: CausalLM, tmp_path: Path) -> None:
    with served(open_service(toy, tmp_path, keep_text=False)) as url:
        _put(url, "ann", "No horror.")
        (stated,) = _get(url, "ann")
        assert (set(stated), stated["kind"]) == ({"id", "date", "arrived", "kind"}, "preference")
        assert _put(url, "ann", "No horror.").json()["same"] == 1
    content = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"No horror" not in content


def test_preferences_sent_before_an_erasure_are_refused(toy: CausalLM, tmp_path: Path) -> None:
    service: Service = open_service(toy, tmp_path)
    elsewhere = HistoryStore.open(tmp_path / "histories.db")

    async def work() -> None:
        await service.state_preferences("shop", "ann", preferences=["No horror."])
        ticket = await service.admit("shop", "ann")
        elsewhere.erase_user("shop", "ann")
        with pytest.raises(UserErased):
            service._state_preferences(ticket, ["No spoilers"])
        with pytest.raises(UserErased):
            service._state_preferences(ticket, [])
        assert service.store.list_preferences("shop", "ann") == []
        await service.close()

    asyncio.run(work())
