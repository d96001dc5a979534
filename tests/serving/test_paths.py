"""Paths, methods and origins, sent to a real server byte by byte."""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
import pytest
from live_server import open_service, served

from personaplug.errors import ConfigError
from personaplug.llm.causal_lm import CausalLM
from personaplug.serving.middleware.origins import check_origin

PAGE = "https://app.example.org"
ITEM = {"text": "a film", "score": "4"}


@pytest.fixture(scope="module")
def url(toy: CausalLM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(open_service(toy, tmp_path_factory.mktemp("paths")), allow_origins=[PAGE]) as base_url:
        yield base_url


def _send(url: str, method: str, path: str, value: Any = None, **headers: str) -> tuple[int, Any]:
    """Send a path without normalizing it; return the status and the body of the reply."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
    body = None if value is None else json.dumps(value).encode()
    connection.putrequest(method, path, skip_accept_encoding=True)
    for name, text in {"Content-Type": "application/json", **headers}.items():
        connection.putheader(name, text)
    connection.putheader("Content-Length", str(len(body or b"")))
    connection.endheaders(body)
    reply = connection.getresponse()
    content = reply.read()
    connection.close()
    is_json = reply.headers.get_content_type() == "application/json" and content
    return reply.status, json.loads(content) if is_json else content


def _count(url: str, user: str) -> int:
    return int(httpx.get(f"{url}/v1/users/{quote(user, safe='')}/history").json()["count"])


def _add(url: str, user: str, item: str = "1") -> None:
    reply = httpx.post(f"{url}/v1/users/{quote(user, safe='')}/history", json={"id": item, **ITEM})
    assert reply.status_code == 200, reply.text


@pytest.mark.parametrize("name", ["J%FCrgen", "J%E4rgen", "a%FF", "a%ED%A0%80", "a%C0%AFb", "a%", "a%2", "a%zz"])
def test_path_that_is_not_utf8_is_refused(url: str, name: str) -> None:
    for method, path in (("GET", "history"), ("POST", "history"), ("GET", "export"), ("DELETE", "history/1")):
        status, reply = _send(
            url, method, f"/v1/users/{name}/{path}", {"id": "1", **ITEM} if method == "POST" else None
        )
        assert (status, reply["error"]["code"]) == (422, "invalid_path")
    assert _send(url, "DELETE", f"/v1/users/{name}")[0] == 422
    assert _send(url, "GET", f"/v1/users/a/drift?since={name}&until=2024-01-01")[0] == 422


@pytest.mark.parametrize("name", ["%00", "a%0Ab", "a%EF%BF%BDb", "a%E2%80%AEb", "a%C2%85b", "%20", ".", "..", "%2E%2e"])
def test_invalid_id_in_a_path_is_refused(url: str, name: str) -> None:
    for method, path in (("GET", "/history"), ("GET", "/export"), ("DELETE", ""), ("DELETE", "/history/1")):
        assert _send(url, method, f"/v1/users/{name}{path}")[0] == 422


def test_encoded_slash_is_part_of_an_id(url: str) -> None:
    for user in ("a", "a/history", "a/history/1", "a/b", "a%2Fhistory", "%", "a%252F"):
        _add(url, user)
        assert _count(url, user) == 1
    assert httpx.get(f"{url}/v1/users/a%2Fb/export").json()["user"] == "a/b"
    _add(url, "b", "1/2")
    assert httpx.delete(f"{url}/v1/users/b/history/1%2F2").json() == {"deleted": True}
    assert _send(url, "DELETE", "/v1/users/a%2Fhistory")[1]["items"] == 1
    assert _send(url, "DELETE", "/v1/users/a%2Fhistory%2F1")[1]["items"] == 1
    for user in ("a", "a/b", "a%2Fhistory", "%", "a%252F"):
        assert _count(url, user) == 1, user


def test_different_percent_encodings_name_the_same_user(url: str) -> None:
    _add(url, "Jürgen")
    for spelling in ("J%C3%BCrgen", "%4A%c3%bcrgen"):
        assert _send(url, "GET", f"/v1/users/{spelling}/history")[1]["count"] == 1
    assert _send(url, "GET", "/%761/users/J%C3%BCrgen/%68istory")[1]["count"] == 1


UNKNOWN_PATHS = ["/v1/users/a/", "/v1/users/a/history/", "/v1/users//history", "/v1//users/a/history", "/v1/users/a%2F"]
UNKNOWN_PATHS += [
    "/v1/users/a/history/1/",
    "/v1/users/a/history/1/2",
    "/v1/users/a/../b",
    "/V1/users/a",
    "/v1/users/a/b/c",
]
UNKNOWN_PATHS += [
    "/v1",
    "/v1/",
    "/",
    "//",
    "/v1/users/",
    "/v1/personas/",
    "/docs/",
    "/redoc",
    "/docs/oauth2-redirect",
    "/v1/nothing",
]


@pytest.mark.parametrize("path", UNKNOWN_PATHS)
def test_path_without_a_route_changes_nothing(url: str, path: str) -> None:
    _add(url, "kept", "1")
    path = path.replace("/a", "/kept")
    is_user = path == "/v1/users/kept%2F"  # a valid path of an unknown user
    for method in ("GET", "POST", "DELETE", "PUT", "PATCH", "HEAD", "OPTIONS"):
        assert _send(url, method, path)[0] in ((404, 405, 204) if is_user else (404,))
    assert _count(url, "kept") == 1


def test_unsupported_method_is_answered_with_the_supported_methods(url: str) -> None:
    for method in ("PUT", "PATCH", "TRACE"):
        reply = httpx.request(method, f"{url}/v1/users/a/history", headers={"content-type": "application/json"})
        assert (reply.status_code, reply.headers["allow"]) == (405, "GET, HEAD, OPTIONS, POST")
    reply = httpx.options(f"{url}/v1/users/a/history")
    assert (reply.status_code, reply.headers["allow"]) == (204, "GET, HEAD, OPTIONS, POST")


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/docs", "/openapi.json", "/v1/models"])
def test_head_is_get_without_the_body(url: str, path: str) -> None:
    get, head = httpx.get(f"{url}{path}"), httpx.head(f"{url}{path}")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == get.headers["content-type"]
    assert httpx.head(f"{url}/v1/users/nobody/export").status_code == 404
    assert httpx.head(f"{url}/v1/users/nobody/history").status_code == 200


def test_model_name_may_contain_a_slash(url: str) -> None:
    assert _send(url, "GET", "/v1/models/toy")[0] == 200
    for name in ("org/toy", "org%2Ftoy"):
        status, reply = _send(url, "GET", f"/v1/models/{name}")
        assert (status, reply["error"]["code"]) == (404, "model_not_found")


FOREIGN = [
    {"Origin": "https://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://localhost:1"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Origin": PAGE + ".evil.example"},
]


@pytest.mark.parametrize("headers", FOREIGN)
def test_request_from_another_origin_is_refused(url: str, headers: dict[str, str]) -> None:
    status, reply = _send(url, "POST", "/v1/users/foreign/history", {"id": "1", **ITEM}, **headers)
    assert (status, reply["error"]["code"]) == (403, "origin")
    assert _send(url, "GET", "/v1/users/foreign/history", **headers)[0] == 403
    assert _count(url, "foreign") == 0


def test_requests_from_allowed_and_own_origins_are_answered(url: str) -> None:
    body = {"id": "1", **ITEM}
    for headers in ({"Origin": PAGE, "Sec-Fetch-Site": "cross-site"}, {"Origin": url}, {"Sec-Fetch-Site": "none"}):
        assert _send(url, "POST", "/v1/users/a/history", body, **headers)[0] == 200
    preflight = {"Origin": PAGE, "Access-Control-Request-Method": "DELETE"}
    preflight["Access-Control-Request-Headers"] = "authorization, content-type, x-stainless-lang"
    reply = httpx.options(f"{url}/v1/users/a", headers=preflight)
    assert reply.status_code == 200
    assert "x-stainless-lang" in reply.headers["access-control-allow-headers"]
    assert reply.headers["access-control-allow-origin"] == PAGE
    assert "DELETE" in reply.headers["access-control-allow-methods"]
    reply = httpx.get(f"{url}/v1/users/a/drift", headers={"Origin": PAGE})
    assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (
        422,
        PAGE,
    )  # so that the page can read the error
    assert "X-Request-Id" in reply.headers["access-control-expose-headers"]
    refused = httpx.options(f"{url}/v1/users/a", headers=preflight | {"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in refused.headers


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", None])
def test_body_without_a_json_content_type_is_refused(url: str, kind: str | None) -> None:
    content = json.dumps({"id": "1", **ITEM}).encode()
    headers = {} if kind is None else {"content-type": kind}
    user = f"kind-{str(kind).replace('/', '-')}"
    for path in (f"/v1/users/{user}/history", "/v1/chat/completions", f"/v1/users/{user}/explain"):
        reply = httpx.post(f"{url}{path}", content=content, headers=headers)
        assert (reply.status_code, reply.json()["error"]["code"]) == (415, "content_type")
    assert _count(url, user) == 0
    kind = "Application/JSON; charset=utf-8"
    assert (
        httpx.post(f"{url}/v1/users/{user}/history", content=content, headers={"content-type": kind}).status_code == 200
    )


@pytest.mark.parametrize("origin", ["app.example.org", "https://", "https://a/b", "*", "https://*.a.org", "https://ü"])
def test_invalid_origin_is_refused(origin: str) -> None:
    with pytest.raises(ConfigError, match=r"https://app\.example\.org"):
        check_origin(origin)


def test_documentation_loads_no_external_resources(url: str) -> None:
    reply = httpx.get(f"{url}/docs")
    assert reply.headers["content-security-policy"].startswith("default-src 'none'")
    assert not re.findall(r"<script|<link|<img|<iframe|@import|url\(|https?://", reply.text)
    for text in ("/v1/chat/completions", "/v1/users/{user}/history", "ChatRequest", "messages", "/openapi.json"):
        assert text in reply.text


@pytest.mark.parametrize("header", ["X-Personaplug-User", "Authorization", "Content-Type", "Origin"])
def test_duplicate_header_is_refused(url: str, header: str) -> None:
    value = {"Content-Type": "application/json", "Origin": PAGE}.get(header, "ann")
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}
    for values, status in ([value], 200), ([value, "other"], 400):
        headers = [(header, text) for text in values]
        headers += [] if header == "Content-Type" else [("Content-Type", "application/json")]
        reply = httpx.post(f"{url}/v1/chat/completions", content=json.dumps(body), headers=headers)
        assert reply.status_code == status
    assert header.lower() in reply.json()["error"]["message"]
