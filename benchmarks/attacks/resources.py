"""Attacks on the server's time, memory and places: nobody may take what others need."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import httpx

from attacks import Verdict, case
from attacks.lab import Lab, Server

_OTHERS_WAIT_S = 5.0  # longest wait of another caller that counts as right


def at_once(calls: Sequence[Callable[[], httpx.Response]]) -> list[int]:
    """Make calls at the same time; return their statuses, 0 for a connection that was closed."""

    def status(call: Callable[[], httpx.Response]) -> int:
        try:
            return call().status_code
        except httpx.TransportError:
            return 0

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(status, calls))


def timed(call: Callable[[], httpx.Response]) -> tuple[int, float]:
    """Return a call's status and its seconds."""
    began = time.monotonic()
    (status,) = at_once([call])
    return status, time.monotonic() - began


@case("dates of an item that take long to match")
def slow_dates(lab: Lab, verdict: Verdict) -> None:
    hostile = ["2024-01-01" + " " * 32_000 + "\nx", "2024-01-01T" + "0" * 500_000 + "x", "1" * 1_000_000, "-" * 500_000]
    with lab.serve() as server:
        for number, date in enumerate(hostile):
            status, seconds = timed(lambda d=date: server.add([{**lab.items(1)[0], "date": d}]))  # type: ignore[misc]
            verdict.expect(
                status in (400, 422) and seconds < _OTHERS_WAIT_S, f"date {number}: {status} after {seconds:.1f} s"
            )


@case("prompts that a pattern takes long to match")
def slow_patterns(lab: Lab, verdict: Verdict) -> None:
    start, between = 'without explanation. [1]: "', '" [2]: "'
    hostile = [start * 500 + between * 500 + "x", start + between * 5_000, ('[1]: "' * 4_000) + ('" [2]: "' * 4_000)]
    with lab.serve(task="choice") as server:
        for number, prompt in enumerate(hostile):
            status, seconds = timed(lambda p=prompt: server.chat(p))  # type: ignore[misc]
            is_right = status in (200, 400) and seconds < _OTHERS_WAIT_S
            verdict.expect(is_right, f"prompt {number}: {status} after {seconds:.1f} s")


@case("prompts of 3.8 MB, four at once")
def long_prompts(lab: Lab, verdict: Verdict) -> None:
    question = lab.question()["input"]
    with lab.serve() as server:
        server.add(lab.items(20), user="eve").raise_for_status()
        server.add(lab.items(20), tenant="b").raise_for_status()
        long = question + " very" * 760_000
        with ThreadPoolExecutor(5) as pool:
            attacks = [pool.submit(timed, lambda: server.chat(long, user="eve")) for _ in range(4)]
            time.sleep(0.5)
            status, seconds = timed(lambda: server.chat(question, tenant="b"))
            verdict.expect(status == 200 and seconds < _OTHERS_WAIT_S, f"another user: {status} after {seconds:.1f} s")
            for attack in attacks:
                verdict.expect(attack.result()[0] in (400, 413, 429), f"the long prompt: {attack.result()[0]}")
        path = "/v1/users/eve/explain"
        status, seconds = timed(lambda: server.call("POST", path, json={"prompt": long, "answer": "5"}))
        verdict.expect(status in (400, 404, 413) and seconds < _OTHERS_WAIT_S, f"explain: {status} in {seconds:.1f} s")
        verdict.note(f"another user waits {seconds:.2f} s")


@case("512 half bodies from strangers")
def half_bodies(lab: Lab, verdict: Verdict) -> None:
    head = (
        b"POST /nowhere HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"
    )
    with lab.serve() as server, contextlib.ExitStack() as stack:
        for _ in range(512):
            with contextlib.suppress(OSError):
                stack.enter_context(server.open_socket()).sendall(head)
        time.sleep(0.5)
        _expect_service(server, verdict, question=lab.question()["input"])


@case("300 half headers with 256 open files")
def half_headers(lab: Lab, verdict: Verdict) -> None:
    with lab.serve(files=256) as server, contextlib.ExitStack() as stack:
        for _ in range(300):
            with contextlib.suppress(OSError):
                stack.enter_context(server.open_socket(timeout=5)).sendall(b"GET /health HTTP/1.1\r\nHost: 127.0")
        time.sleep(0.5)
        _expect_service(server, verdict, question=lab.question()["input"])


@case("a header of 60 MB")
def endless_header(lab: Lab, verdict: Verdict) -> None:
    with lab.serve() as server, server.open_socket() as connection:
        sent = 0
        with contextlib.suppress(OSError):
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Long: ")
            for _ in range(600):
                connection.sendall(b"a" * 100_000)
                sent += 100_000
        verdict.expect(sent < 5_000_000, f"{sent / 1e6:.0f} MB were taken")
        verdict.note(f"cut after {sent / 1e6:.1f} MB")


@case("headers that come a byte at a time")
def dripped_headers(lab: Lab, verdict: Verdict) -> None:
    with lab.serve() as server, contextlib.ExitStack() as stack:
        slow, blank = (stack.enter_context(server.open_socket()) for _ in range(2))
        slow.sendall(b"GET /health HTTP/1.1\r\nX-A: ")
        is_open = True
        for _ in range(300):
            with contextlib.suppress(OSError):
                blank.sendall(b"\r\n")
            try:
                slow.sendall(b"a")
            except OSError:
                is_open = False
            time.sleep(0.1)
        verdict.expect(not is_open, "a header of 30 seconds is taken")


@case("20,000 requests in advance on one connection")
def pipelined(lab: Lab, verdict: Verdict) -> None:
    with lab.serve() as server, server.open_socket(timeout=15) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(_get("/metrics", server.keys["a"]) * 20_000)
        _expect_service(server, verdict, question=lab.question()["input"])


@case("60 MB of chunk extensions")
def chunk_extensions(lab: Lab, verdict: Verdict) -> None:
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    with lab.serve() as server, server.open_socket() as connection:
        sent = 0
        with contextlib.suppress(OSError):
            connection.sendall(f"{head}Authorization: Bearer {server.keys['a']}\r\n".encode())
            connection.sendall(b"Transfer-Encoding: chunked\r\n\r\n")
            for _ in range(60):
                connection.sendall(b"1;" + b"a" * 2**20 + b"\r\nx\r\n")
                sent += 1
        verdict.expect(sent < 60, "all of it was taken")
        verdict.note(f"cut after {sent} MB")


def _expect_service(server: Server, verdict: Verdict, *, question: str) -> None:
    """Expect that those with a key and the health check are served."""
    for path in ("/health", "/ready", "/metrics"):
        status, seconds = timed(lambda p=path: server.call("GET", p, tenant="b"))  # type: ignore[misc]
        verdict.expect(status == 200 and seconds < _OTHERS_WAIT_S, f"{path}: {status} after {seconds:.1f} s")
    status, seconds = timed(lambda: server.chat(question, tenant="b"))
    verdict.expect(status == 200 and seconds < _OTHERS_WAIT_S, f"with a key: {status} after {seconds:.1f} s")


@case("bodies with very many parts")
def many_parts(lab: Lab, verdict: Verdict) -> None:
    message = {"role": "user", "content": "x"}
    bodies: list[dict[str, Any]] = [
        {"messages": [message] * 85_000},
        {"messages": [message]} | {f"f{number}": 1 for number in range(150_000)},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * 85_000}]},
        {"messages": [message], "stop": ["x"] * 300_000},
        {"messages": [message], "metadata": {f"m{number}": "x" for number in range(150_000)}},
    ]
    with lab.serve() as server:
        for number, body in enumerate(bodies):
            status, _ = timed(lambda b=body: server.call("POST", "/v1/chat/completions", json=b))  # type: ignore[misc]
            verdict.expect(status in (400, 413, 422), f"body {number}: {status}")
        items = [{"id": str(number), "text": "x", "score": "4"} for number in range(60_000)]
        verdict.expect(server.add(items).status_code in (400, 413, 422), "60,000 items")
        raw = [b"[" + b"[]," * 1_300_000 + b"[]]", b"[" * 4_000_000, b"]" * 4_000_000, b'"' * 4_000_000]
        raw += [b'{"a": "' + b"\\" * 4_000_000 + b'"}', b'{"a":' * 700_000, b'{"messages":' + b"9" * 4_000_000 + b"}"]
        paths = ("/v1/chat/completions", "/v1/users/ann/history")
        calls = [
            partial(server.call, "POST", paths[number % 2], content=raw[number % len(raw)], headers=_JSON)
            for number in range(64)
        ]
        for status in at_once(calls):
            verdict.expect(status in (400, 413, 422, 429, 0), f"a hostile body: {status}")


_JSON = {"Content-Type": "application/json"}


@case("exports and lists of 10,000 items, 64 at once")
def long_histories(lab: Lab, verdict: Verdict) -> None:
    with lab.hashed().serve("--keep-text") as server:
        for start in range(10):
            server.add(lab.items(1000, words=10, prefix=f"p{start}-")).raise_for_status()
        user = "/v1/users/ann"
        verdict.expect(len(server.call("GET", f"{user}/export").json()["items"]) == 10_000, "the export is not whole")
        statuses = at_once([lambda: server.call("GET", f"{user}/export")] * 8)
        statuses += at_once([lambda: server.call("GET", f"{user}/history?latest=1")] * 64)
        statuses += at_once([lambda: server.call("GET", f"{user}/history?latest=10000")] * 16)
        for status in statuses:
            verdict.expect(status in (200, 429), f"status {status}")
        verdict.note(f"{statuses.count(200)} of {len(statuses)} answered, the others 429")


@case("twelve readers that never read")
def silent_readers(lab: Lab, verdict: Verdict) -> None:
    with lab.hashed().serve("--keep-text") as server, contextlib.ExitStack() as stack:
        for start in range(10):
            server.add(lab.items(1000, words=200, prefix=f"p{start}-")).raise_for_status()
        before = server.memory()
        for _ in range(12):
            connection = stack.enter_context(server.open_socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(_get("/v1/users/ann/export", server.keys["a"]))
        time.sleep(10)
        grown = (server.memory() - before) / 2**20
        verdict.expect(grown < 150, f"{grown:.0f} MB are held")
        verdict.note(f"{grown:.0f} MB more")


def _get(path: str, key: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {key}\r\n\r\n".encode()


@case("twelve long adds of one tenant, one item of another")
def unfair_adds(lab: Lab, verdict: Verdict) -> None:
    with lab.serve() as server, ThreadPoolExecutor(12) as pool:
        status, alone = timed(lambda: server.add(lab.items(150, words=80, prefix="alone"), user="first"))
        adds = [
            pool.submit(timed, lambda n=number: server.add(lab.items(150, words=80, prefix=f"n{n}-"), user=f"u{n}"))  # type: ignore[misc]
            for number in range(12)
        ]
        time.sleep(0.5)
        status, seconds = timed(lambda: server.add(lab.items(1), tenant="b"))
        verdict.expect(status == 200 and seconds < 3 * alone + 1, f"the other tenant: {status} after {seconds:.1f} s")
        verdict.note(f"an add takes {alone:.1f} s alone; the other tenant waits {seconds:.1f} s")
        for add in adds:
            verdict.expect(add.result()[0] in (200, 429), f"a long add: {add.result()[0]}")


@case("500 callers at once")
def many_callers(lab: Lab, verdict: Verdict) -> None:
    question = lab.question()["input"]
    with lab.serve() as server:
        server.add(lab.items(20)).raise_for_status()
        statuses = at_once([lambda: server.chat(question)] * 500)
        for status in statuses:
            verdict.expect(status in (200, 429), f"status {status}")
        verdict.expect(statuses.count(200) >= 100, "few are answered")
        verdict.note(f"{statuses.count(200)} of 500 answered, the others 429")


@case("slow and silent callers")
def slow_callers(lab: Lab, verdict: Verdict) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "x"}]}).encode()
    with lab.serve() as server, contextlib.ExitStack() as stack:
        connections = [stack.enter_context(server.open_socket()) for _ in range(200)]
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {server.keys['a']}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        for number, connection in enumerate(connections[:100]):  # the other hundred say nothing
            connection.sendall(head.encode() + body[: number % len(body)])
        for byte in range(5):
            for connection in connections[:100]:
                with contextlib.suppress(OSError):
                    connection.sendall(body[byte : byte + 1])
            time.sleep(0.5)
        _expect_service(server, verdict, question=lab.question()["input"])
