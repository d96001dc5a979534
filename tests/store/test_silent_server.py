"""If PostgreSQL is stopped or does not answer, each call raises an error in bounded time."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from postgres_server import PostgresServer
from stores import ENCODER, Place, add, item, item_ids

from personaplug.errors import StorageError
from personaplug.store.history_store import HistoryStore
from personaplug.store.postgres import BoundedConnection

WAIT_S = 1.0
LONGEST_S = 12  # the sum of the timeouts of a ping, a new connection and a statement


@pytest.fixture
def place(postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.setattr(BoundedConnection, "silence_s", 1.0)
    monkeypatch.setattr("personaplug.store.postgres.ANSWER_S", 2.0)
    yield Place(postgres.cleaned_database(), postgres)
    postgres.resume()


def seconds(work: Callable[[], object]) -> float:
    """Return how long a call takes until it raises StorageError."""
    started = time.monotonic()
    with pytest.raises(StorageError, match=r"does not answer|did not answer|was locked"):
        work()
    return time.monotonic() - started


def test_every_call_ends_if_the_server_is_stopped(place: Place, postgres: PostgresServer) -> None:
    store = place.open(wait_s=WAIT_S)
    ticket = store.admit("t", "u")
    store.add(ticket, [item("a")])
    postgres.pause()
    calls: list[Callable[[], object]] = [
        lambda: store.version("t", "u"),
        lambda: store.load_history("t", "u"),
        lambda: store.list_items("t", "u"),
        lambda: store.admit("t", "u"),
        lambda: store.add(ticket, [item("b")]),
        lambda: store.erase_user("t", "u"),
        lambda: list(store.export("t", "u")),
        lambda: store.ping(timeout_s=1),
        lambda: place.open(wait_s=WAIT_S),
    ]
    with ThreadPoolExecutor(len(calls)) as pool:
        assert max(pool.map(seconds, calls)) < LONGEST_S
    postgres.resume()
    time.sleep(2.1)  # until then, calls fail without a query to the server
    store.ping()
    assert item_ids(store) == ["a"]
    assert store.add(ticket, [item("b")]) == (1, 0, 0)
    assert store.erase_user("t", "u").items == 2


def test_many_waiting_calls_end_in_bounded_time(place: Place, postgres: PostgresServer) -> None:
    store = place.open(wait_s=WAIT_S)
    postgres.pause()
    started = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: seconds(lambda: store.version("t", "u")), range(200)))
    assert time.monotonic() - started < LONGEST_S


def test_running_statement_ends_when_the_server_stops(place: Place, postgres: PostgresServer) -> None:
    store = place.open(wait_s=WAIT_S)

    def pause_soon() -> None:
        time.sleep(0.3)
        postgres.pause()

    def sleep_in_server() -> None:
        with store.database.read_transaction() as connection:
            connection.exec_driver_sql("SELECT pg_sleep(60)")

    thread = threading.Thread(target=pause_soon)
    thread.start()
    assert seconds(sleep_in_server) < LONGEST_S
    thread.join()


def test_long_maintenance_statement_may_exceed_the_limit(place: Place) -> None:
    store = place.open(wait_s=WAIT_S)
    with store.database.autocommit() as connection:
        connection.exec_driver_sql("SELECT pg_sleep(2.5)")  # the server answers other connections


def test_call_waits_for_a_lock_and_then_raises(place: Place) -> None:
    store, other = place.open(wait_s=WAIT_S), place.open()
    with other.database.write_transaction() as connection:
        connection.exec_driver_sql("LOCK TABLE users_0000, users_0001 IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(StorageError, match="locked for more than 1 s"):
            add(store, "t", "u", [item("a")])
    assert add(store, "t", "u", [item("a")]) == (1, 0, 0)


def test_silent_address_raises_in_bounded_time(place: Place) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"postgresql://me:hidden@127.0.0.1:{silent.getsockname()[1]}/x"
        assert seconds(lambda: HistoryStore.open(url, ENCODER, secret=b"0" * 16)) < LONGEST_S
