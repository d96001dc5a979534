"""Misbehaving clients do not exhaust the connections of a real server."""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from live_server import open_service, served

from personaplug.errors import ConfigError
from personaplug.llm.causal_lm import CausalLM
from personaplug.serving import connections as connections_module
from personaplug.serving.api_keys import ApiKeys, create_key
from personaplug.serving.connections import ConnectionLimits
from personaplug.serving.middleware import RequestLimits

LIMITS = ConnectionLimits(connections=40, header_seconds=1, stall_seconds=1)
POST = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    return path, create_key(path, "shop")


@pytest.fixture(scope="module")
def url(toy: CausalLM, keys: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    service = open_service(toy, tmp_path_factory.mktemp("connections"))
    limits = RequestLimits(body_bytes=2**20, requests=24)
    with served(service, api_keys=ApiKeys.load(keys[0]), limits=limits, connections=LIMITS) as base_url:
        yield base_url


@contextlib.contextmanager
def _connections(url: str, count: int = 1) -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        parts = urlsplit(url)
        yield [
            stack.enter_context(socket.create_connection((parts.hostname, parts.port), timeout=20))
            for _ in range(count)
        ]


def _rest(connection: socket.socket) -> bytes:
    """Read a connection until it is closed."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(2**16):
            received += piece
    return received


def _is_healthy(url: str) -> bool:
    return httpx.get(f"{url}/health", timeout=10).status_code == 200


def test_connections_with_half_headers_are_closed_to_make_room(url: str, caplog: pytest.LogCaptureFixture) -> None:
    with _connections(url, 100) as connections:
        for connection in connections:
            connection.sendall(b"GET /health HTTP/1.1\r\nX-A: ")
        assert _is_healthy(url)
        endings = [_rest(connection) for connection in connections]
    assert sum(ending == b"" for ending in endings) >= 60  # beyond the limit
    assert sum(ending.startswith(b"HTTP/1.1 408 ") for ending in endings) >= 30
    assert any("closed connections" in record.getMessage() for record in caplog.records)
    assert 'closed_connections_total{reason="beyond the limit"}' in httpx.get(f"{url}/metrics").text


@pytest.mark.parametrize("piece", [b"a", b"\r\n"])
def test_connection_with_a_slow_header_is_closed(url: str, piece: bytes) -> None:
    with _connections(url) as (connection,):
        start = time.monotonic()
        connection.sendall(b"\r\n" if piece == b"\r\n" else b"GET / HTTP/1.1\r\nX-A: ")
        connection.settimeout(0.1)
        while time.monotonic() - start < 15:
            try:
                connection.sendall(piece)
                if connection.recv(1000) == b"":
                    break
            except TimeoutError:
                continue
            except ConnectionError:
                break
        assert time.monotonic() - start < 10


def test_connection_with_an_endless_header_is_closed(url: str) -> None:
    with _connections(url) as (connection,):
        sent = 0
        with contextlib.suppress(ConnectionError):
            connection.sendall(b"GET /health HTTP/1.1\r\nX-A: ")
            while sent < 60:
                connection.sendall(b"a" * 2**20)
                sent += 1
        assert sent < 30
    assert _is_healthy(url)


@pytest.mark.parametrize("header", [b"X: " + b"a" * 70_000, b"\r\n".join(b"X%d: a" % n for n in range(200))])
def test_header_that_is_too_large_gets_a_431(url: str, header: bytes) -> None:
    with _connections(url) as (connection,):
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + header + b"\r\n\r\n")
        assert _rest(connection).startswith(b"HTTP/1.1 431 ")


@pytest.mark.parametrize("path", [b"/nothing", b"/v1/chat/completions", b"/health", b"/v1/users/a/history"])
def test_body_of_an_unauthenticated_request_is_not_read(url: str, path: bytes) -> None:
    with _connections(url, 30) as connections:
        for connection in connections:
            connection.sendall(POST % path)
        status = {b"/nothing": b"404", b"/health": b"405"}.get(path, b"401")
        for connection in connections:
            reply = _rest(connection)  # returns, because the server closes the connection
            assert reply.startswith(b"HTTP/1.1 " + status)
            assert b"connection: close" in reply.lower()
        assert _is_healthy(url)


def test_incomplete_bodies_of_a_tenant_do_not_block_health_checks(url: str, keys: tuple[Path, str]) -> None:
    body = (POST % b"/v1/users/a/history").replace(b"\r\n\r\n", f"\r\nAuthorization: Bearer {keys[1]}\r\n\r\n".encode())
    with _connections(url, 40) as connections:
        for connection in connections:
            connection.sendall(body)
        assert _is_healthy(url)
        refused = httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {keys[1]}"})
        assert refused.status_code == 429
    deadline = time.monotonic() + 10
    while httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {keys[1]}"}).status_code != 200:
        assert time.monotonic() < deadline, "disconnected clients free their places"


def test_pipelined_requests_are_limited(url: str) -> None:
    with _connections(url) as (connection,), contextlib.suppress(ConnectionError):
        connection.sendall(b"GET /ready HTTP/1.1\r\nHost: localhost\r\n\r\n" * 3000)
        assert _rest(connection).count(b"HTTP/1.1 200") < 3000
    with _connections(url) as (connection,):
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 3)
        connection.settimeout(0.5)
        with contextlib.suppress(TimeoutError):
            assert _rest(connection).count(b"HTTP/1.1 200") == 3
    assert _is_healthy(url)


def test_unread_reply_is_dropped(toy: CausalLM, tmp_path: Path) -> None:
    service = open_service(toy, tmp_path)
    with served(service, connections=LIMITS) as url:
        for start in (0, 40):
            items = [{"id": str(start + n), "text": "x" * 88_000, "score": "1"} for n in range(40)]
            assert httpx.post(f"{url}/v1/users/a/history", json={"items": items}, timeout=60).status_code == 200
        with _connections(url, 4) as connections:
            for connection in connections:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                connection.sendall(b"GET /v1/users/a/export HTTP/1.1\r\nHost: localhost\r\n\r\n")
            deadline = time.monotonic() + 20
            while 'reason="a reply that was not read"} 4.0' not in httpx.get(f"{url}/metrics").text:
                assert time.monotonic() < deadline
                time.sleep(0.2)
            assert "personaplug_running_requests 0.0" in httpx.get(f"{url}/metrics").text
        export = httpx.get(f"{url}/v1/users/a/export", timeout=60).json()
        assert len(export["items"]) == 80


def test_malformed_requests_are_refused_and_not_logged_one_by_one(url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for _ in range(5):
        with _connections(url) as (connection,):
            connection.sendall(b"nothing like HTTP\r\n\r\n")
            assert _rest(connection).startswith(b"HTTP/1.1 400 ")
    assert len([record for record in caplog.records if record.name.startswith(("personaplug", "uvicorn"))]) <= 1


def test_protocol_upgrade_is_ignored(url: str) -> None:
    headers = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Key": "a", "Sec-WebSocket-Version": "13"}
    assert httpx.get(f"{url}/health", headers=headers).status_code == 200
    assert httpx.get(f"{url}/v1/models", headers=headers).status_code == 401


@pytest.mark.parametrize(("allowed", "used", "expected"), [(20_000, 50, 1024), (256, 50, 256 - 50 - 32 - 64)])
def test_connection_limit_fits_the_open_file_limit(
    allowed: int, used: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections_module, "_file_limits", lambda: (allowed, used))
    limits = ConnectionLimits.of_process()
    assert limits.connections == expected
    assert limits.requests == expected - 16


def test_low_open_file_limit_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections_module, "_file_limits", lambda: (128, 60))
    with pytest.raises(ConfigError, match="ulimit -n"):
        ConnectionLimits.of_process()
