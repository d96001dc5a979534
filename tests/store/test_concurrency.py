"""Threads and processes that share one store."""

from __future__ import annotations

import multiprocessing
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from stores import Place, add, add_encoded, encoded, item, item_ids, vector_of

from personaplug.errors import StorageError
from personaplug.store.database import Database
from personaplug.store.history_store import HistoryStore
from personaplug.store.schema import StoreSettings

STORES: list[HistoryStore] = []


def test_threads_adding_to_shared_user_lose_nothing(place: Place) -> None:
    store = place.open(keep_text=False, connections=2)

    def work(number: int) -> None:
        for i in range(8):
            add_encoded(store, "t", encoded(["shared", f"own {number}"], [f"{number}-{i}", f"{i}"]))
            assert len(store.load_history("t", f"own {number}")) == i + 1

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    history, names = store.load_history("t", "shared"), item_ids(store, user="shared")
    assert sorted(names) == sorted(f"{n}-{i}" for n in range(6) for i in range(8))
    np.testing.assert_array_equal(history.vectors, np.stack([vector_of(name) for name in names]).astype(np.float16))


def test_overlapping_batches_do_not_deadlock(place: Place) -> None:
    store = place.open(keep_text=False)
    users = [f"u{i}" for i in range(60)]

    def work(number: int) -> None:
        ordered = users if number % 2 else users[::-1]
        for i in range(5):
            add_encoded(store, "t", encoded(ordered, [f"{number}-{i}"] * len(ordered)))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert {len(store.load_history("t", user)) for user in users} == {20}


def test_same_item_added_by_threads_is_new_once(place: Place) -> None:
    store, barrier = place.open(keep_text=False), threading.Barrier(4)

    def work(_: int) -> tuple[int, int, int]:
        barrier.wait()
        return add_encoded(store, "t", encoded(["u"], ["a"]))

    with ThreadPoolExecutor(4) as pool:
        results = sorted(pool.map(work, range(4)))
    assert results == [(0, 0, 1)] * 3 + [(1, 0, 0)]


def test_store_survives_fork(place: Place) -> None:
    store = place.open(keep_text=False)
    add_encoded(store, "t", encoded(["u"], ["before"]))
    STORES[:] = [store]
    with multiprocessing.get_context("fork").Pool(3) as pool:
        results = pool.map_async(add_in_child, range(3))
        for i in range(10):
            add_encoded(store, "t", encoded(["u"], [f"parent-{i}"]))
        assert max(results.get(timeout=120)) >= 6
    assert len(store.load_history("t", "u")) == 1 + 15 + 10


def test_processes_switching_to_wal_wait_for_each_other(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        for i in range(30):
            tasks = [(tmp_path / f"{i}.db", time.time() + 0.02)] * 4
            assert pool.map_async(begin_at, tasks, chunksize=1).get(timeout=120) == [True] * 4


def test_locked_database_raises_and_writes_nothing(tmp_path: Path) -> None:
    place = Place(str(tmp_path / "store.db"))
    store = place.open(wait_s=0.2)
    with sqlite3.connect(place.where, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StorageError, match="try again"):
            add(store, "t", "u", [item("a")])
        assert store.load_history("t", "u").version == 0, "a writer does not block readers"
        other.execute("ROLLBACK")
    assert add(store, "t", "u", [item("a")]) == (1, 0, 0)


def test_connections_are_limited(place: Place) -> None:
    store = place.open(connections=2, wait_s=0.2)
    with (
        store.database.read_transaction(),
        store.database.read_transaction(),
        pytest.raises(StorageError, match="TimeoutError"),
    ):
        store.version("t", "u")
    assert store.version("t", "u") == 0


def test_load_history_uses_indexes(tmp_path: Path) -> None:
    place, statements = Place(str(tmp_path / "store.db")), list[tuple[str, Any]]()
    store = place.open(settings=StoreSettings(shards=1))
    add(store, "t", "u", [item("a")])

    def record(_: object, __: object, sql: str, parameters: Any, *___: object) -> None:
        statements.append((sql, parameters))

    sa.event.listen(store.database.engine(), "before_cursor_execute", record)
    store.load_history("t", "u")
    plans: list[str] = []
    with sqlite3.connect(place.where) as connection:
        for sql, parameters in statements:
            if sql.startswith("SELECT"):
                plans += [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {sql}", parameters)]
    assert len(plans) == 2
    assert all(step.startswith("SEARCH") for step in plans), plans


def add_in_child(number: int) -> int:
    (store,) = STORES  # the parent's object with its connections, which the fork inherits
    for i in range(5):
        add_encoded(store, "t", encoded(["u"], [f"{number}-{i}"]))
    return len(store.load_history("t", "u"))


def begin_at(task: tuple[Path, float]) -> bool:
    path, start = task
    while time.time() < start:
        pass
    with Database(path).write_transaction() as connection:
        return bool(connection.exec_driver_sql("SELECT 1").scalar())
