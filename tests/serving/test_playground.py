"""The playground: its files, the list of users, the map of the personas, and the page in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from browser import check_accessibility, open_browser, open_page
from live_server import open_service, served

from personaplug.llm.causal_lm import CausalLM
from personaplug.serving import api_keys
from personaplug.serving.api_keys import ApiKeys
from personaplug.serving.persona_map import Plane

FILMS = ["a quiet drama", "a loud musical", "a long western", "a short comedy"]


@pytest.fixture(scope="module")
def url(toy: CausalLM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(open_service(toy, tmp_path_factory.mktemp("playground")), has_playground=True) as base_url:
        for user, scores in (("ann", "5515"), ("bob", "1141"), ("cleo", "1141")):
            _rate(base_url, user, scores)
        yield base_url


def _rate(url: str, user: str, scores: str, **headers: str) -> None:
    items = [{"text": film, "score": score} for film, score in zip(FILMS, scores, strict=False)]
    httpx.post(f"{url}/v1/users/{user}/history", json={"items": items}, headers=headers).raise_for_status()


def _map(url: str, **parameters: Any) -> dict[str, Any]:
    reply: dict[str, Any] = httpx.get(f"{url}/v1/personas", params=parameters).raise_for_status().json()
    return reply


def _points(found: dict[str, Any]) -> dict[str, tuple[float, float]]:
    return {point["user"]: (point["x"], point["y"]) for point in found["users"]}


def test_page_and_its_files_allow_only_resources_of_this_server(url: str) -> None:
    page = httpx.get(f"{url}/")
    assert page.headers["content-type"].startswith("text/html")
    for name in ("style.css", "main.js", "icon.svg"):
        assert f"playground/{name}" in page.text
        assert httpx.get(f"{url}/playground/{name}").headers["content-security-policy"].startswith("default-src 'none'")
    policy = page.headers["content-security-policy"]
    assert "unsafe" not in policy
    assert "http" not in policy
    missing = httpx.get(f"{url}/playground/nothing.js")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    assert httpx.get(f"{url}/playground/..%2fapp.py").status_code == 404


def test_server_without_playground_has_no_page(toy: CausalLM, tmp_path: Path) -> None:
    with served(open_service(toy, tmp_path)) as base_url:
        assert httpx.get(f"{base_url}/").status_code == 404
        assert httpx.get(f"{base_url}/playground/main.js").status_code == 404


def test_users_are_listed_up_to_a_limit(url: str) -> None:
    listed = httpx.get(f"{url}/v1/users").json()
    assert [(row["user"], row["items"]) for row in listed["users"]] == [("ann", 4), ("bob", 4), ("cleo", 4)]
    assert listed["more"] is False
    some = httpx.get(f"{url}/v1/users", params={"limit": 2}).json()
    assert len(some["users"]) == 2
    assert some["more"] is True
    assert httpx.get(f"{url}/v1/users", params={"limit": 0}).status_code == 422


def test_equal_histories_are_one_point_of_the_map(url: str) -> None:
    points = _points(_map(url))
    assert points["bob"] == pytest.approx(points["cleo"], abs=1e-4)
    assert np.hypot(*np.subtract(points["ann"], points["bob"])) > 0.5


def test_trail_leads_from_no_items_to_the_users_point(url: str) -> None:
    found = _map(url, trail="ann")
    assert list(found["trails"]) == ["ann"]
    trail = found["trails"]["ann"]
    assert [point["items"] for point in trail] == [0, 1, 2, 3, 4]
    end = trail[-1]
    assert (end["x"], end["y"]) == pytest.approx(_points(found)["ann"], abs=1e-6)
    for user, point in _points(_map(url)).items():
        assert _points(found)[user] == pytest.approx(point), "a trail does not move the users"
    assert list(_map(url, trail=["bob", "nobody", "ann"])["trails"]) == ["bob", "ann"]
    assert httpx.get(f"{url}/v1/personas", params={"trail": ["a"] * 11}).status_code == 422


def test_erased_user_leaves_the_map(url: str) -> None:
    _rate(url, "dave", "3333")
    assert "dave" in _points(_map(url))
    httpx.delete(f"{url}/v1/users/dave").raise_for_status()
    assert "dave" not in _points(_map(url))


def test_key_of_one_user_sees_no_other_users(toy: CausalLM, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    keys = {user: api_keys.create_key(path, "shop", user=user) for user in (None, "ann")}
    other_tenant = api_keys.create_key(path, "school")
    with served(open_service(toy, tmp_path), api_keys=ApiKeys.load(path), has_playground=True) as base_url:
        assert httpx.get(f"{base_url}/").status_code == 200  # the page asks for the key

        def get(route: str, key: str) -> httpx.Response:
            return httpx.get(f"{base_url}/v1/{route}", headers={"Authorization": f"Bearer {key}"})

        for user in ("ann", "bob"):
            _rate(base_url, user, "5432", Authorization=f"Bearer {keys[None]}")
        for route in ("users", "personas"):
            assert [row["user"] for row in get(route, keys[None]).json()["users"]] == ["ann", "bob"]
            assert get(route, other_tenant).json()["users"] == []
            assert get(route, keys["ann"]).status_code == 403
            assert get(route, "pp-unknown").status_code == 401


def test_plane_shows_the_directions_of_the_largest_variance() -> None:
    random = np.random.default_rng(0)
    spread = np.array([5.0, 2.0, 0.1, 0.1])
    features = random.normal(size=(200, 4)) * spread
    plane = Plane.fit(features, np.ones((200, 3)))  # the second group is the same for all
    points = plane.project(features, np.ones((200, 3)))
    assert abs(np.corrcoef(points[:, 0], features[:, 0])[0, 1]) > 0.99
    assert abs(np.corrcoef(points[:, 1], features[:, 1])[0, 1]) > 0.99
    assert plane.explained[0] == pytest.approx(25 / 29, abs=0.05)
    assert plane.explained.sum() == pytest.approx(1, abs=0.01)


def test_groups_of_a_plane_count_alike_whatever_their_units() -> None:
    random = np.random.default_rng(1)
    tokens, biases = random.normal(size=(50, 3)), random.normal(size=(50, 2))
    points = Plane.fit(tokens, biases).project(tokens, biases)
    scaled = Plane.fit(1000 * tokens, biases).project(1000 * tokens, biases)
    assert scaled == pytest.approx(points)


def test_rounding_is_no_difference_between_users() -> None:
    features = 30 + 1e-7 * np.random.default_rng(2).normal(size=(20, 6))
    assert np.abs(Plane.fit(features).project(features)).max() == 0


@pytest.mark.parametrize("count", [1, 3])
def test_plane_of_equal_users_is_one_point(count: int) -> None:
    features = np.ones((count, 4))
    plane = Plane.fit(features, features)
    assert plane.project(features, features).tolist() == [[0, 0]] * count
    assert plane.explained.tolist() == [0, 0]


def test_page_shows_three_answers_in_a_browser(url: str) -> None:
    with open_browser() as browser, open_page(browser, f"{url}/") as page:
        page.locator("#examples button").first.wait_for()
        page.get_by_role("button", name="Ask all three").click()
        page.get_by_role("table").nth(2).wait_for()
        assert page.locator("table").count() == 3  # of probabilities
        page.locator(".first").get_by_role("button", name="Why this answer?").click()
        page.locator(".first .effects li").first.wait_for()
        check_accessibility(page)


def test_page_asks_for_a_key_and_shows_what_the_key_allows(toy: CausalLM, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    whole, own = (api_keys.create_key(path, "shop", user=user) for user in (None, "ann"))
    with served(open_service(toy, tmp_path), api_keys=ApiKeys.load(path), has_playground=True) as base_url:
        for user in ("ann", "bob"):
            _rate(base_url, user, "5432" if user == "ann" else "1112", Authorization=f"Bearer {whole}")
        with open_browser() as browser:
            with open_page(browser, f"{base_url}/") as page:
                page.get_by_label("API key").fill("pp-wrong")
                page.get_by_role("button", name="Use this key").click()
                page.get_by_text("The API key is missing or unknown.").wait_for()
                check_accessibility(page)
                page.get_by_label("API key").fill(whole)
                page.get_by_role("button", name="Use this key").click()
                page.locator("#map svg").wait_for()
                page.reload()
                page.locator("#map svg").wait_for()  # the tab still has the key
            with open_page(browser, f"{base_url}/") as page:
                page.get_by_label("API key").fill(own)
                page.get_by_role("button", name="Use this key").click()
                column = page.locator(".column.first")
                column.get_by_label("User: choose one").fill("ann")
                column.get_by_label("User: choose one").press("Tab")
                column.get_by_text("History (4 items)").wait_for()
                assert not page.locator("#map").is_visible()
                column.get_by_label("User: choose one").fill("bob")
                column.get_by_label("User: choose one").press("Tab")
                column.get_by_text("This key belongs to another user.").first.wait_for()
