"""Data from before an erasure is not stored after the erasure, in any thread, process or server."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from cheap_encoder import CheapEncoder
from stores import ENCODER, Place, add, add_encoded, encoded, item, item_ids, vector_of

from personaplug.errors import MissingData, UserErased, UserError
from personaplug.store.database import execute
from personaplug.store.history_store import EncodedItems, HistoryStore
from personaplug.store.tickets import TICKET_LIFE_S
from personaplug.store.writes import write_items


def erase(store: HistoryStore) -> None:
    with suppress(MissingData):  # the user had no rows
        store.erase_user("t", "u")


def count_rows(store: HistoryStore, table: str) -> int:
    with store.database.read_transaction() as connection:
        return int(execute(connection, f"SELECT count(*) FROM {table}").scalar_one())


@pytest.mark.parametrize("has_rows", [True, False])
def test_add_with_a_ticket_from_before_the_erasure_is_refused(place: Place, has_rows: bool) -> None:
    store, other_store = place.open(), place.open()
    if has_rows:
        add(store, "t", "u", [item("a")])
    ticket, other_ticket = store.admit("t", "u"), store.admit("t", "other")
    erase(other_store)
    for _ in range(2):
        with pytest.raises(UserErased):
            store.add(ticket, [item("late")])
        with pytest.raises(UserErased):
            store.check(ticket)
    assert store.version("t", "u") == 0
    assert store.add(other_ticket, [item("b")]) == (1, 0, 0)
    assert add(store, "t", "u", [item("new")]) == (1, 0, 0)
    with pytest.raises(UserErased):
        store.add(ticket, [item("late")])
    assert item_ids(store) == ["new"]


def test_each_erasure_invalidates_earlier_tickets(place: Place) -> None:
    store = place.open()
    for number in range(4):
        ticket = store.admit("t", "u")
        if number % 2:
            store.add(ticket, [item("a")])
        erase(store)
        with pytest.raises(UserErased):
            store.add(ticket, [item("a")])


def test_batch_with_one_erased_user_stores_nothing(place: Place) -> None:
    store = place.open(keep_text=False)
    users = [f"u{number}" for number in range(9)]
    ticket = store.admit("t", *users)
    with pytest.raises(MissingData):
        store.erase_user("t", "u4")
    with pytest.raises(UserErased):
        store.add_encoded(ticket, encoded(users, users))
    assert {store.version("t", user) for user in users} == {0}


def test_refused_add_leaves_no_id_in_files(place: Place) -> None:
    store = place.open()
    ticket = store.admit("t", "erased-user-id")
    with pytest.raises(MissingData):
        store.erase_user("t", "erased-user-id")
    with pytest.raises(UserErased):
        store.add(ticket, [item("late-item-id")])
    files = place.files()
    assert b"erased-user-id" not in files
    assert b"late-item-id" not in files


def test_items_are_refused_if_the_user_is_erased_during_encoding(place: Place) -> None:
    class Slow(CheapEncoder):
        started, may_end = threading.Event(), threading.Event()

        def encode(self, texts: Sequence[str], *, batch_size: int = 64) -> npt.NDArray[np.float32]:
            self.started.set()
            assert self.may_end.wait(60)
            return super().encode(texts)

    store, other_store = place.open(Slow()), place.open(CheapEncoder())
    with ThreadPoolExecutor(1) as pool:
        adding = pool.submit(add, store, "t", "u", [item("a")])
        assert Slow.started.wait(60)
        erase(other_store)
        Slow.may_end.set()
        assert isinstance(adding.exception(timeout=60), UserErased)
    assert other_store.version("t", "u") == 0


def test_erasure_of_user_without_rows_waits_for_running_addition(place: Place) -> None:
    store = place.open()
    late = EncodedItems(["u"], [item("b")], np.stack([vector_of("b")]), ENCODER.identity)
    shard, ticket = store.shard_of("t", "u"), store.admit("t", "u")
    with store.database.write_transaction() as connection:
        write_items(connection, shard, store.pack(late), ticket=ticket, retention=store.retention)
        eraser = threading.Thread(target=erase, args=(store,))
        eraser.start()
        time.sleep(0.3)
    eraser.join()
    assert store.version("t", "u") == 0
    assert store.erased_at("t", "u") is not None


def test_no_earlier_item_is_stored_after_an_erasure(place: Place) -> None:
    store, stop, failures = place.open(keep_text=False), threading.Event(), list[BaseException]()
    admitted = [0]  # number of erasures at the time of the last ticket

    def work() -> None:
        try:
            while not stop.is_set():
                ticket, number = store.admit("t", "u"), admitted[0]
                try:
                    store.add_encoded(ticket, encoded(["u"], [f"{number} {time.monotonic_ns()}"]))
                except UserErased:
                    continue
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        admitted[0] += 1  # items with this number may be stored after the erasure
        erase(store)
        assert not [name for name in item_ids(store) if int(name.split()[0]) < admitted[0] - 1]
        time.sleep(0.05)
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures


def test_old_ticket_is_refused(place: Place) -> None:
    store = place.open()
    ticket = store.admit("t", "u")
    with pytest.raises(UserErased):
        store.add(replace(ticket, taken_at=ticket.taken_at - TICKET_LIFE_S - 1), [item("a")])
    assert store.add(ticket, [item("a")]) == (1, 0, 0)


def test_ticket_of_other_users_is_refused(place: Place) -> None:
    store = place.open(keep_text=False)
    with pytest.raises(UserError, match="ticket does not include"):
        store.add_encoded(store.admit("t", "v"), encoded(["u"], ["a"]))
    with pytest.raises(UserError, match="one user; found 2"):
        store.add(store.admit("t", "u", "v"), [item("a")])


def test_erasures_of_unknown_users_take_one_row_and_are_deleted_later(place: Place) -> None:
    store = place.open()
    for _ in range(3):
        erase(store)
    add(store, "t", "v", [item("a")])
    store.erase_user("t", "v")
    store.maintain()
    assert count_rows(store, "history_erasures") == 2
    with store.database.write_transaction() as connection:
        execute(connection, "UPDATE history_erasures SET erased_at = '2020-01-01T00:00:00+00:00'")
    store.maintain()
    assert count_rows(store, "history_erasures") == 1, "an erasure with a receipt is kept"
    ticket = store.admit("t", "u")
    erase(store)
    with pytest.raises(UserErased):
        store.check(ticket)


def test_erasures_of_many_users_are_read_in_parts(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("personaplug.store.tickets._USERS_PER_QUERY", 5)
    store, users = place.open(keep_text=False), [f"u{number}" for number in range(12)]
    add_encoded(store, "t", encoded(users, users))
    ticket = store.admit("t", *users)
    store.erase_user("t", "u11")
    with pytest.raises(UserErased):
        store.add_encoded(ticket, encoded(users, ["b"] * 12))
    assert store.add_encoded(ticket, encoded(users[:11], ["b"] * 11)) == (11, 0, 0)
