"""Each middleware in front of a small application."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from personaplug.errors import EngineFailure, MissingData, RequestError, RunConflict, StorageError
from personaplug.serving.api_keys import OPEN_TENANT, ApiKeys, create_key
from personaplug.serving.middleware.admission import ApiKeyMiddleware, BodyMiddleware, Budget, Place, PlacesMiddleware
from personaplug.serving.middleware.origins import JsonOnlyMiddleware, LoopbackHostMiddleware, OriginMiddleware
from personaplug.serving.middleware.paths import PathMiddleware, RouteMiddleware
from personaplug.serving.middleware.replies import DisconnectMiddleware, ErrorMiddleware, MetricsMiddleware
from personaplug.serving.telemetry import Telemetry

START: Message = {"type": "http.response.start", "status": 200, "headers": []}
END: Message = {"type": "http.response.body", "body": b"done"}
DISCONNECT: Message = {"type": "http.disconnect"}
SECRET = "a-users-own-words"


def _scope(path: str = "/v1/models", **headers: str) -> Scope:
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    return {"type": "http", "method": "GET", "path": path, "headers": pairs}


def _body(*parts: bytes) -> list[Message]:
    return [
        {"type": "http.request", "body": part, "more_body": number < len(parts)} for number, part in enumerate(parts, 1)
    ]


async def _call(app: ASGIApp, scope: Scope, *messages: Message) -> list[Message]:
    """Send a request whose client stays connected; return the messages of the response."""
    incoming, sent = list(messages), list[Message]()

    async def receive() -> Message:
        if incoming:
            return incoming.pop(0)
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent


def _run(app: ASGIApp, scope: Scope, *messages: Message) -> list[Message]:
    return asyncio.run(asyncio.wait_for(_call(app, scope, *(messages or _body(b""))), 10))


async def _hello(scope: Scope, receive: Receive, send: Send) -> None:
    await send(START)
    await send(END)


async def _echo(scope: Scope, receive: Receive, send: Send) -> None:
    message = await receive()
    await send(START)
    await send({"type": "http.response.body", "body": message["body"]})


def _raising(error: BaseException, *, start: bool = False) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if start:
            await send(START)
        raise error

    return app


@pytest.mark.parametrize(
    "guard",
    [
        lambda app: MetricsMiddleware(app, telemetry=Telemetry()),
        ErrorMiddleware,
        LoopbackHostMiddleware,
        lambda app: ApiKeyMiddleware(app, api_keys=ApiKeys({})),
        PathMiddleware,
        lambda app: OriginMiddleware(app, allowed=()),
        lambda app: RouteMiddleware(app, routes=[]),
        JsonOnlyMiddleware,
        lambda app: BodyMiddleware(app, max_bytes=0, timeout_s=0),
        lambda app: _places(app, 0),
        DisconnectMiddleware,
    ],
)
def test_middleware_forwards_lifespan_events(guard: Callable[[ASGIApp], ASGIApp]) -> None:
    assert _run(guard(_hello), {"type": "lifespan"}) == [START, END]


def test_metrics_count_responses_by_route_and_status() -> None:
    class Route:
        path = "/v1/things/{id}"

    async def routed(scope: Scope, receive: Receive, send: Send) -> None:
        scope["route"] = Route
        await _hello(scope, receive, send)

    telemetry = Telemetry()
    assert _run(MetricsMiddleware(routed, telemetry=telemetry), _scope("/v1/things/7")) == [START, END]
    text = telemetry.text().decode()
    assert 'personaplug_requests_total{model="",route="/v1/things/{id}",status="200"} 1.0' in text
    assert 'personaplug_request_seconds_count{model="",route="/v1/things/{id}"} 1.0' in text


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (RequestError("no", http_status=409, code="busy"), 409, b'"busy"'),
        (MissingData("no"), 404, b'"not_found"'),
        (EngineFailure("no"), 502, b'"engine"'),
        (StorageError("no"), 503, b'"store"'),
        (RunConflict("no"), 500, b'"internal"'),
        (ValueError("no"), 500, b'"internal"'),
    ],
)
def test_error_becomes_a_response_with_its_status(error: Exception, status: int, code: bytes) -> None:
    start, body = _run(ErrorMiddleware(_raising(error)), _scope())
    assert start["status"] == status
    assert code in body["body"]


def test_reason_of_a_store_failure_is_only_logged(caplog: pytest.LogCaptureFixture) -> None:
    _, body = _run(ErrorMiddleware(_raising(StorageError("The disk is full."))), _scope())
    assert "The disk is full." in caplog.text
    assert b"disk" not in body["body"]


@pytest.mark.parametrize("error", [ValueError(SECRET), RunConflict(SECRET)])
def test_message_of_a_server_error_is_neither_logged_nor_sent(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    _, body = _run(ErrorMiddleware(_raising(error)), _scope())
    assert SECRET not in caplog.text + body["body"].decode()
    assert type(error).__name__ in caplog.text


def test_error_after_the_response_has_started_ends_it() -> None:
    assert _run(ErrorMiddleware(_raising(ValueError(), start=True)), _scope()) == [START]


def test_request_cancelled_at_shutdown_gets_a_503() -> None:
    start, body = _run(ErrorMiddleware(_raising(asyncio.CancelledError())), _scope())
    assert (start["status"], b"stopping" in body["body"]) == (503, True)
    assert (b"retry-after", b"1") in start["headers"]
    with pytest.raises(asyncio.CancelledError):
        _run(ErrorMiddleware(_raising(asyncio.CancelledError(), start=True)), _scope())


@pytest.mark.parametrize(
    ("host", "is_allowed"),
    [("localhost:80", True), ("[::1]:9", True), ("[::1]", True), ("127.0.0.1", True), ("a.b:80", False), ("", False)],
)
def test_host_of_another_machine_is_refused(host: str, is_allowed: bool) -> None:
    app = LoopbackHostMiddleware(_hello)
    if is_allowed:
        assert _run(app, _scope(host=host)) == [START, END]
    else:
        with pytest.raises(RequestError) as refused:
            _run(app, _scope(host=host))
        assert (refused.value.http_status, refused.value.code) == (403, "host")


def test_api_key_sets_the_tenant(tmp_path: Any) -> None:
    key = create_key(tmp_path / "keys.json", "shop")
    scope = _scope(authorization=f"Bearer {key}")
    app = ApiKeyMiddleware(_hello, api_keys=ApiKeys.load(tmp_path / "keys.json"))
    assert _run(app, scope) == [START, END]
    assert scope["state"] == {"tenant": "shop", "user": None}
    for headers in ({}, {"authorization": "Bearer pp-other"}, {"authorization": f"Basic {key}"}):
        with pytest.raises(RequestError) as refused:
            _run(app, _scope(**headers))
        assert (refused.value.http_status, refused.value.code) == (401, "invalid_key")
    assert _run(app, _scope("/health")) == [START, END]
    scope = _scope()
    assert _run(ApiKeyMiddleware(_hello, api_keys=ApiKeys()), scope) == [START, END]
    assert scope["state"] == {"tenant": OPEN_TENANT, "user": None}


def _places(app: ASGIApp, total: int, *, is_shared: bool = False) -> PlacesMiddleware:
    memory = Budget(1000, is_shared=is_shared)
    return PlacesMiddleware(app, places=Budget(total, is_shared=is_shared), memory=memory, running=Telemetry().running)


def _placed(memory: int = 100) -> Scope:
    """Return the scope of a request that holds a place."""
    return {**_scope(), "state": {"place": Place("shop", Budget(memory, is_shared=False))}}


def _body_limit(*, timeout_s: float = 5) -> BodyMiddleware:
    return BodyMiddleware(_echo, max_bytes=6, timeout_s=timeout_s)


def test_body_within_the_limit_arrives_in_one_piece() -> None:
    scope = _placed()
    assert _run(_body_limit(), scope, *_body(b"abc", b"", b"def"))[1]["body"] == b"abcdef"
    assert scope["state"]["place"].bytes == 6


def test_body_without_a_place_is_not_read() -> None:
    assert _run(_body_limit(), _scope("/health"), *_body(b"abcdef"))[1]["body"] == b""


@pytest.mark.parametrize(("memory", "status", "code"), [(100, 413, "body_too_long"), (5, 429, "overloaded")])
def test_body_beyond_the_limit_is_refused_before_its_end(memory: int, status: int, code: str) -> None:
    parts = [{"type": "http.request", "body": b"abc"[: 1 + memory], "more_body": True}] * 3
    with pytest.raises(RequestError) as refused:
        _run(_body_limit(), _placed(memory), *parts)
    assert (refused.value.http_status, refused.value.code) == (status, code)


def test_body_that_does_not_arrive_is_refused() -> None:
    app = _body_limit(timeout_s=0.01)
    with pytest.raises(RequestError) as refused:
        _run(app, _placed(), {"type": "http.request", "body": b"a", "more_body": True})
    assert (refused.value.http_status, refused.value.code) == (408, "timeout")


def test_incomplete_body_of_a_disconnected_client_is_ignored() -> None:
    assert _run(_body_limit(), _placed(), {"type": "http.request", "body": b"a", "more_body": True}, DISCONNECT) == []


def test_concurrent_requests_beyond_the_limit_are_refused() -> None:
    resume = asyncio.Event()

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await resume.wait()
        await _hello(scope, receive, send)

    async def scenario() -> None:
        app = _places(slow, 1)
        scope = {**_scope(), "state": {"tenant": "shop"}}
        health, first = (asyncio.create_task(_call(app, request)) for request in (_scope("/health"), scope))
        await asyncio.sleep(0)
        with pytest.raises(RequestError) as refused:
            await _call(app, {**_scope(), "state": {"tenant": "shop"}})
        assert (refused.value.http_status, refused.value.code) == (429, "overloaded")
        resume.set()
        assert await first == await health == await _call(app, scope) == [START, END]

    asyncio.run(scenario())


def test_one_tenant_cannot_take_the_whole_budget() -> None:
    budget = Budget(100, is_shared=True)

    def fill(tenant: str) -> int:
        count = 0
        while True:
            try:
                budget.take(tenant, 1)
            except RequestError:
                return count
            count += 1

    assert fill("shop") == 80
    assert fill("bank") >= 10
    assert fill("club") >= 1
    budget.give_back("shop", 80)
    assert fill("club") >= 50
    Budget(100, is_shared=False).take("default", 100)


def _interrupted(app: Callable[[list[str]], ASGIApp]) -> tuple[list[Message], list[str]]:
    """Return the sent messages and the application's notes if the client disconnects after its request."""
    notes: list[str] = []
    return _run(DisconnectMiddleware(app(notes)), _scope(), *_body(b"a"), DISCONNECT), notes


def test_disconnect_before_the_start_cancels_the_work() -> None:
    def app(notes: list[str]) -> ASGIApp:
        async def endless(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                notes.append("cancelled")
                raise

        return endless

    assert _interrupted(app) == ([], ["cancelled"])


def test_disconnect_after_the_start_is_received_repeatedly() -> None:
    def app(notes: list[str]) -> ASGIApp:
        async def streaming(scope: Scope, receive: Receive, send: Send) -> None:
            await send(START)
            notes.extend([(await receive())["type"] for _ in range(3)])

        return streaming

    assert _interrupted(app) == ([START], ["http.request", "http.disconnect", "http.disconnect"])


@pytest.mark.parametrize("app", [_hello, _echo])
def test_work_is_finished_if_the_client_stays_connected(app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
    assert _run(DisconnectMiddleware(app), _scope(), *_body(b"done")) == [START, END]


def test_error_reaches_the_outer_middleware() -> None:
    with pytest.raises(ValueError, match="no"):
        _run(DisconnectMiddleware(_raising(ValueError("no"))), _scope())
