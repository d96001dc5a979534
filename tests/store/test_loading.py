"""Loads of one store: at the same time, and killed at any step. Nothing is lost, doubled or stored in part."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from stores import ENCODER, SECRET, Place, add, item

from personaplug.data.records import HistoryItem
from personaplug.encoders import HashEncoder
from personaplug.encoders.base import Vectors, encode_items
from personaplug.store.history_store import HistoryStore
from personaplug.store.loading import LoadResult, load_histories

FORK = multiprocessing.get_context("fork")
ITEMS = 3
WAIT_S = 120  # on a busy machine, a process with a lock may get no time for long


def histories(count: int, *, first: int = 0) -> dict[str, list[HistoryItem]]:
    """Return dated and undated items of users, with the ids of a file's rows."""
    return {
        f"u{user}": [
            item(f"row-{user * ITEMS + n}", f"text {n} of {user}", day=date(2024, 1, 9 - n) if user % 2 else None)
            for n in range(ITEMS)
        ]
        for user in range(first, first + count)
    }


def open_store(place: Place) -> HistoryStore:
    """Open or create the store; a store in SQLite also creates its secret."""
    return place.open(secret=SECRET if place.server else None, wait_s=WAIT_S)


def load(place: Place, rows: Mapping[str, Sequence[HistoryItem]]) -> LoadResult:
    with closing(open_store(place)) as store:
        return load_histories(store, "t", rows)


def contents(place: Place) -> dict[str, list[tuple[str, bytes]]]:
    """Return the ids and vectors of each user's items, in their order."""
    with closing(open_store(place)) as store:
        stored = {}
        for user in histories(200):
            items, history = store.list_items("t", user), store.load_history("t", user)
            assert len({each.id for each in items}) == len(items) == len(history)
            if items:
                vectors = [vector.tobytes() for vector in np.asarray(history.vectors)]
                stored[user] = list(zip([dict(each.fields)["text"] for each in items], vectors, strict=True))
        return stored


def expected(rows: Mapping[str, Sequence[HistoryItem]]) -> dict[str, list[tuple[str, bytes]]]:
    """Return the contents of a store with the rows: by date, then by the order of the rows."""
    stored = {}
    for user, items in rows.items():
        ordered = sorted(items, key=lambda each: each.date or date.max)
        vectors = encode_items(ENCODER, [each.encoded(with_answer=True) for each in ordered]).astype(np.float16)
        texts = [dict(each.fields)["text"] for each in ordered]
        stored[user] = [(text, vector.tobytes()) for text, vector in zip(texts, vectors, strict=True)]
    return stored


def load_in_process(place: Place, rows: Mapping[str, Sequence[HistoryItem]], start: Any, results: Any) -> None:
    start.wait()
    results.put(load(place, rows))


def load_at_once(place: Place, *parts: Mapping[str, Sequence[HistoryItem]]) -> list[LoadResult]:
    """Load each part in a process of its own, all at the same time."""
    start, results = FORK.Barrier(len(parts)), FORK.SimpleQueue()
    processes = [FORK.Process(target=load_in_process, args=(place, part, start, results)) for part in parts]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * len(parts)
    return [results.get() for _ in parts]


def test_loads_of_a_new_store_at_once_store_each_item_once(place: Place) -> None:
    rows = histories(150)
    backwards = dict(reversed(rows.items()))
    results = load_at_once(place, rows, backwards, rows)
    for result in results:
        assert (result.users, result.items.new + result.items.same, result.items.replaced) == (150, 450, 0)
    assert sum(result.items.new for result in results) == 450
    assert contents(place) == expected(rows)
    assert load(place, rows).items == (0, 0, 450)


def test_loads_of_overlapping_logs_at_once_store_all_items(place: Place) -> None:
    early, late = histories(120), histories(120, first=80)
    results = load_at_once(place, early, late)
    assert sum(result.items.new for result in results) == 200 * ITEMS
    assert contents(place) == expected(early | late)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Countdown:
    """Kills the process at the nth call."""

    def __init__(self, calls: int) -> None:
        self.calls = calls

    def __call__(self) -> None:
        self.calls -= 1
        if not self.calls:
            kill()


class KilledEncoder(HashEncoder):
    """An encoder with the identity of the stores', which counts down at each call."""

    def __init__(self, countdown: Countdown) -> None:
        super().__init__(ENCODER.width)
        self._countdown = countdown

    def encode(self, texts: Sequence[str], *, batch_size: int = 64) -> Vectors:
        self._countdown()
        return super().encode(texts, batch_size=batch_size)


def load_until_killed(place: Place, rows: Mapping[str, Sequence[HistoryItem]], step: str, calls: int) -> None:
    """Load the rows, and kill the process before the nth step of a kind."""
    countdown, encoder = Countdown(calls), ENCODER

    def before_statement(_: object, __: object, sql: str, *___: object) -> None:
        if step in sql:
            countdown()

    if step == "link":
        link: Callable[..., None] = os.link

        def counted_link(*paths: str) -> None:
            countdown()
            link(*paths)

        vars(os)["link"] = counted_link
    elif step == "encode":
        encoder = KilledEncoder(countdown)
    elif step == "commit":
        sa.event.listen(sa.engine.Engine, "commit", lambda _: countdown())
    else:
        sa.event.listen(sa.engine.Engine, "before_cursor_execute", before_statement)
    with closing(place.open(encoder, secret=SECRET if place.server else None, wait_s=WAIT_S)) as store:
        load_histories(store, "t", rows)


@pytest.mark.parametrize(
    ("step", "calls"),
    [
        ("link", 1),  # of the secret
        ("link", 2),  # of the database
        ("CREATE TABLE", 1),
        ("CREATE TABLE", 6),
        ("INSERT INTO users", 1),
        ("INSERT INTO items", 1),
        ("INSERT INTO items", 4),  # in the second shard of the second batch
        ("INSERT INTO texts", 3),
        ("UPDATE users", 4),
        ("commit", 2),
        ("commit", 4),
        ("encode", 2),
    ],
)
def test_a_repeated_load_finishes_a_killed_one(place: Place, step: str, calls: int) -> None:
    if step == "link" and place.server:
        pytest.skip("PostgreSQL has no file to create")
    rows = histories(150)
    process = FORK.Process(target=load_until_killed, args=(place, rows, step, calls))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    everything, found = expected(rows), contents(place)
    assert found == {user: everything[user] for user in found}, "a user is stored in part"
    assert len(found) in (0, 64, 128), "a batch is stored in part"
    result = load(place, rows)
    assert result.items == (450 - ITEMS * len(found), 0, ITEMS * len(found))
    assert contents(place) == everything
    assert load(place, rows).items == (0, 0, 450)


def test_a_killed_load_leaves_items_of_others_unchanged(place: Place) -> None:
    with closing(open_store(place)) as store:
        add(store, "t", "u0", [item("own", "text of a request", day=date(2023, 1, 1))])
    rows = histories(100)
    process = FORK.Process(target=load_until_killed, args=(place, rows, "UPDATE users", 1))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [text for text, _ in contents(place)["u0"]] == ["text of a request"]
    assert load(place, rows).items == (300, 0, 0)
    assert [text for text, _ in contents(place)["u0"]] == ["text of a request", *(f"text {n} of 0" for n in range(3))]


def test_processes_that_create_a_store_at_once_open_the_same_store(tmp_path: Path) -> None:
    for number in range(10):
        place = Place(str(tmp_path / f"{number}.db"))
        results = load_at_once(place, *[histories(1)] * 3)
        assert sum(result.items.new for result in results) == ITEMS
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []
