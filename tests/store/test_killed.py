"""After kill -9 at any moment, all acknowledged items are stored, and no batch is stored in part."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sqlite3
import threading
import time
from multiprocessing.connection import Connection

import numpy as np
import pytest
from stores import ENCODER, Place, add_encoded, encoded, vector_of

from personaplug.store.history_store import HistoryStore
from personaplug.store.vector_codec import encode_vectors

USERS = 5


def write_until_killed(place: Place, sender: Connection, number: int) -> None:
    """Add, replace and erase until killed; send the acknowledged items."""
    store, lock = place.open(keep_text=False), threading.Lock()

    def add(thread: int) -> None:
        for i in range(1_000_000):
            users = [f"u{(i + j) % USERS}" for j in range(1 + i % 4)]
            names = [f"{number}-{thread}-{i}-{j}" for j in range(len(users))]
            add_encoded(store, "t", encoded(users, names))
            with lock:
                sender.send(list(zip(users, names, strict=True)))

    def erase() -> None:
        for i in range(1_000_000):
            add_encoded(store, "t", encoded(["passing"] * 3, [f"{i}-{j}" for j in range(3)]))
            store.erase_user("t", "passing")

    threads = [threading.Thread(target=add, args=(i,)) for i in range(2)] + [threading.Thread(target=erase)]
    for thread in threads:
        thread.start()


def kill_one(place: Place, number: int, *, after_s: float) -> list[tuple[str, str]]:
    """Start a writer, kill it `after_s` after its first message, and return the acknowledged items."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=write_until_killed, args=(place, sender, number))
    process.start()
    sender.close()
    acknowledged: list[tuple[str, str]] = receiver.recv()
    time.sleep(after_s)
    assert process.pid
    os.kill(process.pid, signal.SIGKILL)
    try:
        while True:
            acknowledged += receiver.recv()
    except (EOFError, OSError):  # the last message may be incomplete
        process.join()
    return acknowledged


def check(store: HistoryStore, acknowledged: list[tuple[str, str]]) -> None:
    """Check that all acknowledged items are stored, each with its vector."""
    stored = set[tuple[str, str]]()
    for user in [f"u{i}" for i in range(USERS)]:
        names = [each.id for each in store.list_items("t", user)]
        history = store.load_history("t", user)
        stored |= {(user, name) for name in names}
        assert len(history) == len(names) == len(set(names))
        if names:
            expected = np.stack([vector_of(name) for name in names]).astype(np.float16)
            np.testing.assert_array_equal(history.vectors, expected)
    assert set(acknowledged) <= stored
    assert len(store.load_history("t", "passing")) in (0, 3), "a batch is stored in part"


def check_database(place: Place) -> None:
    if place.server is None:
        with sqlite3.connect(place.where) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def kill_often(place: Place, *, times: int) -> None:
    rng, acknowledged = random.Random(0), list[tuple[str, str]]()
    place.open(keep_text=False).close()
    for number in range(times):
        acknowledged += kill_one(place, number, after_s=rng.uniform(0, 0.3))
        store = place.open(keep_text=False)
        if number % 10 == 9 or number == times - 1:
            check_database(place)
            check(store, acknowledged)
        store.close()
    assert len(acknowledged) > times


def test_kill_loses_no_acknowledged_item(place: Place) -> None:
    kill_often(place, times=8)


@pytest.mark.slow
def test_two_hundred_kills_lose_no_acknowledged_item(place: Place) -> None:
    kill_often(place, times=200)


def test_check_detects_loss_and_damage(place: Place) -> None:
    store = place.open(keep_text=False)
    add_encoded(store, "t", encoded(["u0", "u0"], ["a", "b"]))
    check(store, [("u0", "a")])
    with pytest.raises(AssertionError):
        check(store, [("u0", "c")])
    wrong = encoded(["u0"], ["c"])
    wrong.vectors[0, 5] += 0.5
    add_encoded(store, "t", wrong)
    with pytest.raises(AssertionError):
        check(store, [])
    assert encode_vectors(wrong.vectors, width=ENCODER.width)
