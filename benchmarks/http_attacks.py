"""What one caller can do to a server of histories, over plain sockets, while others want `/health`.

    python benchmarks/http_attacks.py http://127.0.0.1:8000 --key KEY --fields text,score --labels 1,2,3

It prints, for each attack, the slowest and the failed health checks and what the server replied. The store of the
server fills with made-up histories: give it one for the purpose.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any
from urllib.parse import urlsplit

Attack = Callable[["Target"], "Counter[str]"]


@dataclass(frozen=True)
class Target:
    """A server, a key of it, and an item that its task takes (without an id)."""

    url: str
    key: str = "none"
    item: Mapping[str, Any] = field(default_factory=lambda: {"text": "a film", "score": "4"})
    hold_s: float = 15  # how long attacks that do nothing but wait go on

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.url)
        return parts.hostname or "127.0.0.1", parts.port or 80

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=60)

    def head(
        self, method: str, path: str, *, length: int | None = None, key: str | None = None, more: str = ""
    ) -> bytes:
        """The header of a request; with a length, of one with a JSON body."""
        body = f"Content-Type: application/json\r\nContent-Length: {length}\r\n" if length is not None else ""
        host = f"Host: {self.address[0]}:{self.address[1]}\r\nAuthorization: Bearer {key or self.key}\r\n"
        return f"{method} {path} HTTP/1.1\r\n{host}{body}{more}\r\n".encode()

    def send(self, method: str, path: str, value: Any = None, *, key: str | None = None) -> str:
        """Send a request on a connection of its own; the status of the reply, or the name of an error."""
        body = b"" if value is None else value if isinstance(value, bytes) else json.dumps(value).encode()
        try:
            with self.connect() as connection:
                with contextlib.suppress(ConnectionError):  # the reply may say why
                    connection.sendall(self.head(method, path, length=len(body) or None, key=key) + body)
                return status_of(connection)
        except OSError as error:
            return type(error).__name__


def status_of(connection: socket.socket) -> str:
    """Read a reply to its end; its status, or `closed`."""
    try:
        with connection.makefile("rb") as reply:
            line = reply.readline().split()
            length = 0
            while (header := reply.readline()) not in (b"\r\n", b"\n", b""):
                name, _, text = header.partition(b":")
                length = int(text) if name.lower() == b"content-length" else length
            reply.read(length)
            return line[1].decode() if len(line) > 1 else "closed"
    except OSError as error:
        return type(error).__name__


@dataclass
class HealthProbe:
    """Asks for `/health` over and over, each time on a new connection, from a process of its own."""

    target: Target
    pause_s: float = 0.05
    seconds: list[float] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)

    def __enter__(self) -> HealthProbe:
        context = multiprocessing.get_context("fork")
        self._stop = context.Event()
        self._results, sender = context.Pipe(duplex=False)
        self._process = context.Process(target=self._ask, args=(sender,), daemon=True)
        self._process.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self.seconds, self.failures = self._results.recv()
        self._process.join()

    @property
    def slowest_s(self) -> float:
        return max(self.seconds)

    def _ask(self, sender: Connection) -> None:
        seconds, failures, is_stopped = [], Counter[str](), False
        while not is_stopped:
            is_stopped = self._stop.wait(self.pause_s)
            start = time.perf_counter()
            status = self.target.send("GET", "/health")
            seconds.append(time.perf_counter() - start)
            if status != "200":
                failures[status] += 1
        sender.send((seconds, failures))


def half_headers(target: Target, *, count: int = 300) -> Counter[str]:
    """Connections that begin a header and never end it."""
    with _connections(target, count) as connections:
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-A: ")
        time.sleep(target.hold_s)
        return Counter(map(_read_now, connections))


def half_bodies(target: Target, *, count: int = 512, path: str = "/nothing", key: str = "none") -> Counter[str]:
    """Requests whose body never comes."""
    with _connections(target, count) as connections:
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.sendall(target.head("POST", path, length=1000, key=key) + b"{")
        time.sleep(target.hold_s)
        return Counter(map(_read_now, connections))


def endless_header(target: Target, *, megabytes: int = 60) -> Counter[str]:
    """One header without an end."""
    with target.connect() as connection:
        with contextlib.suppress(OSError):
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-A: ")
            for _ in range(megabytes):
                connection.sendall(b"a" * 2**20)
        return Counter([status_of(connection)])


def dripped_header(target: Target) -> Counter[str]:
    """A header that grows by a byte at a time, and one that begins with blank lines."""
    with _connections(target, 2) as (slow, blank):
        slow.sendall(b"GET /health HTTP/1.1\r\nX-A: ")
        for _ in range(int(target.hold_s * 10)):
            with contextlib.suppress(OSError):
                slow.sendall(b"a")
                blank.sendall(b"\r\n")
            time.sleep(0.1)
        return Counter(map(_read_now, (slow, blank)))


def pipelined(target: Target, *, count: int = 20_000) -> Counter[str]:
    """Thousands of requests on one connection, none of whose replies is read."""
    with target.connect() as connection:
        with contextlib.suppress(OSError):
            connection.settimeout(target.hold_s)
            connection.sendall(target.head("GET", "/metrics") * count)
        return Counter([status_of(connection)])


def chunk_extensions(target: Target, *, megabytes: int = 60) -> Counter[str]:
    """A body whose pieces carry long extensions, and no end of trailers."""
    with target.connect() as connection:
        more = "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n"
        with contextlib.suppress(OSError):
            connection.sendall(target.head("POST", "/v1/chat/completions", more=more))
            for _ in range(megabytes):
                connection.sendall(b"1;" + b"a" * 2**20 + b"\r\nx\r\n")
        return Counter([status_of(connection)])


def many_messages(target: Target, *, count: int = 85_000, callers: int = 4) -> Counter[str]:
    """Chats of very many turns."""
    return _at_once(target, callers, "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}] * count})


def unknown_fields(target: Target, *, count: int = 150_000, callers: int = 4) -> Counter[str]:
    """Bodies of very many fields."""
    body = {"messages": [{"role": "user", "content": "x"}]} | {f"f{number}": 1 for number in range(count)}
    return _at_once(target, callers, "/v1/chat/completions", body)


def many_values(target: Target, *, callers: int = 64) -> Counter[str]:
    """Bodies of the most values, of brackets, of quotes and of backslashes, in turn."""
    bodies = [b"[" + b"[]," * 1_300_000 + b"[]]", b"[" * 4_000_000, b"]" * 4_000_000, b'"' * 4_000_000]
    bodies += [b'{"a": "' + b"\\" * 4_000_000 + b'"}', b'{"a":' * 700_000, b'{"messages":' + b"9" * 4_000_000 + b"}"]
    with ThreadPoolExecutor(callers) as pool:
        paths = ("/v1/chat/completions", "/v1/users/a/history")
        jobs = [
            pool.submit(target.send, "POST", paths[number % 2], bodies[number % len(bodies)])
            for number in range(callers)
        ]
        return Counter(job.result() for job in jobs)


def long_texts(target: Target, *, callers: int = 4) -> Counter[str]:
    """Texts that regular expressions with backtracking read for a long time."""
    wording = 'without explanation. [1]: "' * 500 + '" [2]: "' * 500 + "x"
    chat = {"messages": [{"role": "user", "content": wording}], "user": "a"}
    item = {**target.item, "id": "1", "date": "2024-01-01" + " " * 32_000 + "\nx"}
    results = _at_once(target, callers, "/v1/chat/completions", chat)
    return results + _at_once(target, callers, "/v1/users/a/history", {"items": [item]})


def big_history(target: Target, *, items: int = 10_000, callers: int = 64) -> Counter[str]:
    """A long history, then listings of its last item and exports of it, many at once."""
    path, results = "/v1/users/large/history", Counter[str]()
    for start in range(0, items, 1000):
        batch = [{**target.item, "id": str(number)} for number in range(start, min(items, start + 1000))]
        results[target.send("POST", path, {"items": batch})] += 1
    with ThreadPoolExecutor(callers) as pool:
        paths = (f"{path}?latest=1", "/v1/users/large/export", f"{path}?latest=10000")
        jobs = [pool.submit(target.send, "GET", paths[number % 3]) for number in range(callers)]
        return results + Counter(job.result() for job in jobs)


def unread_exports(target: Target, *, count: int = 12) -> Counter[str]:
    """Readers of a long export who never read; needs the history of `big_history`."""
    with _connections(target, count, receive_buffer=4096) as connections:
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.sendall(target.head("GET", "/v1/users/large/export"))
        time.sleep(2 * target.hold_s)
        return Counter("open" if _is_open(connection) else "closed" for connection in connections)


def many_adds(target: Target, *, callers: int = 12, items: int = 1000) -> Counter[str]:
    """Large additions to histories, many at once."""
    with ThreadPoolExecutor(callers) as pool:
        jobs = []
        for caller in range(callers):
            batch = [{**target.item, "id": f"{caller} {number}"} for number in range(items)]
            jobs.append(pool.submit(target.send, "POST", f"/v1/users/flood-{caller}/history", {"items": batch}))
        return Counter(job.result() for job in jobs)


ATTACKS: dict[str, Attack] = {
    "300 half headers": half_headers,
    "512 half bodies without a key": half_bodies,
    "one endless header of 60 MB": endless_header,
    "dripped headers": dripped_header,
    "20,000 requests in advance": pipelined,
    "60 MB of chunk extensions": chunk_extensions,
    "4 chats of 85,000 messages": many_messages,
    "4 bodies of 150,000 fields": unknown_fields,
    "64 bodies of millions of values": many_values,
    "texts for regular expressions": long_texts,
    "64 readers of a history of 10,000 items": big_history,
    "12 exports that nobody reads": unread_exports,
    "12 additions of 1,000 items": many_adds,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("url")
    parser.add_argument("--key", default="none")
    parser.add_argument("--item", default='{"text": "a film", "score": "4"}', help="An item of the task, without id.")
    parser.add_argument("--only", default="", help="Part of the names of the attacks to run.")
    arguments = parser.parse_args()
    target = Target(arguments.url, arguments.key, json.loads(arguments.item))
    for name, attack in ATTACKS.items():
        if arguments.only in name:
            start = time.perf_counter()
            with HealthProbe(target) as probe:
                replies = attack(target)
            seconds = time.perf_counter() - start
            failures = f", failed {dict(probe.failures)}" if probe.failures else ""
            print(
                f"{name}: {seconds:.1f} s, health at most {probe.slowest_s:.2f} s{failures}, {dict(replies)}",
                flush=True,
            )


@contextlib.contextmanager
def _connections(target: Target, count: int, *, receive_buffer: int = 0) -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        connections = []
        for _ in range(count):
            connection = stack.enter_context(socket.socket())
            if receive_buffer:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            connection.settimeout(60)
            with contextlib.suppress(OSError):
                connection.connect(target.address)
            connections.append(connection)
        yield connections


def _read_now(connection: socket.socket) -> str:
    """What has come on a connection: a status, `closed`, or `open` if nothing has."""
    connection.settimeout(0.01)
    return status_of(connection).replace("TimeoutError", "open")


def _is_open(connection: socket.socket) -> bool:
    """Whether the other side still sends, after what it had sent before."""
    connection.settimeout(5)
    try:
        while connection.recv(2**20):
            pass
    except TimeoutError:
        return True
    except OSError:
        return False
    return False


def _at_once(target: Target, callers: int, path: str, body: Any) -> Counter[str]:
    content = json.dumps(body).encode()
    with ThreadPoolExecutor(callers) as pool:
        return Counter(pool.map(lambda _: target.send("POST", path, content), range(callers)))


if __name__ == "__main__":
    main()
