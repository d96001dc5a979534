"""Erasures: the raw files contain no data of an erased user."""

from __future__ import annotations

import hashlib
import random
import sqlite3
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from postgres_server import PostgresServer
from stores import ENCODER, LABELS, Place, add, add_encoded, encoded, item, vector_of

from personaplug.errors import MissingData, StorageError
from personaplug.store.database import execute
from personaplug.store.history_store import EncodedItems
from personaplug.store.schema import StoreSettings
from personaplug.store.secure_delete import rewrite_shard
from personaplug.store.vector_codec import encode_vectors
from personaplug.store.writes import write_items


def noise(name: str, size: int) -> str:
    """Return incompressible text that differs for each name."""
    return hashlib.shake_256(name.encode()).hexdigest(size // 2 + 1)[:size]


def planted(name: str) -> str:
    """Return a text with searchable parts at its beginning, middle and end."""
    sizes = (40, 3000, 40, 5000, 40)
    return " ".join(noise(f"{name}/{i}", size) for i, size in enumerate(sizes))


def traces(name: str) -> list[bytes]:
    """Return the bytes to search for an item with the planted text."""
    vectors = ENCODER.encode([item(name, planted(name)).text])
    return [*encode_vectors(vectors, width=32), *(noise(f"{name}/{i}", 40).encode() for i in (0, 2, 4))]


def search(place: Place, names: list[str], *, log: bool = True) -> list[bool]:
    """Return for each trace of the items whether it is in the files."""
    files = place.files(log=log)
    return [trace in files for name in names for trace in traces(name)]


def test_erased_at_returns_last_erasure(place: Place) -> None:
    store, before = place.open(), datetime.now(UTC).replace(microsecond=0)
    assert store.erased_at("t", "ann") is None
    for _ in range(2):
        add(store, "t", "ann", [item("1", "a film")])
        receipt = store.erase_user("t", "ann")
    erased_at = store.erased_at("t", "ann")
    assert erased_at is not None
    assert erased_at.isoformat() == datetime.fromisoformat(receipt.erased_at).isoformat()
    assert before <= erased_at <= datetime.now(UTC)
    assert store.erased_at("another", "ann") is None


def test_erase_user_leaves_nothing_in_files(place: Place) -> None:
    store = place.open(settings=StoreSettings(labels=LABELS, keep_text=True, shards=2))
    for user in ("kept", "erased-user-id", "also kept"):
        add(store, "t", user, [item(f"{user}-{i}", planted(f"{user}-{i}")) for i in range(8)])
    if place.server:
        place.server.execute("ANALYZE")  # the server's statistics contain sampled values of columns
    erased, others = [f"erased-user-id-{i}" for i in range(8)], [f"kept-{i}" for i in range(8)]
    assert all(search(place, [*erased, *others])), "the search finds stored items"
    assert b"erased-user-id" in place.files()

    receipt = store.erase_user("t", "erased-user-id")

    assert not any(search(place, erased))
    assert b"erased-user-id" not in place.files()
    assert all(search(place, others))
    assert (receipt.items, receipt.wiped) == (8, ("tables", "log"))
    assert len(store.load_history("t", "kept")) == 8
    assert store.list_items("t", "erased-user-id") == []


def test_erase_user_clears_earlier_replaced_and_deleted_items(place: Place) -> None:
    store = place.open(settings=StoreSettings(labels=LABELS, keep_text=True, shards=1))
    add(store, "t", "kept", [item("k", planted("k"))])
    add(store, "t", "u", [item("a", planted("first")), item("b", planted("deleted"))])
    add(store, "t", "u", [item("a", planted("second"))])
    store.delete_item("t", "u", "b")
    store.erase_user("t", "u")
    assert not any(search(place, ["first", "second", "deleted"]))
    assert all(search(place, ["k"]))


def test_erase_user_clears_deleted_items_of_others_in_shard(place: Place) -> None:
    store = place.open(settings=StoreSettings(labels=LABELS, keep_text=True, shards=1))
    add(store, "t", "other", [item("a", planted("a")), item("b", planted("b"))])
    add(store, "t", "u", [item("c", planted("c"))])
    store.delete_item("t", "other", "a")
    store.erase_user("t", "u")
    assert not any(search(place, ["a", "c"]))
    assert all(search(place, ["b"]))


@pytest.mark.parametrize("seed", [2, 3])
def test_erase_user_clears_copies_in_split_pages(place: Place, seed: int) -> None:
    # Users get items in turn, so that SQLite splits pages and moves rows. It leaves copies of some rows, which a
    # deletion does not overwrite. With these seeds, the files have copies of rows of the users who are erased below.
    rng, own_texts = random.Random(seed), dict[str, list[bytes]]()
    store = place.open(settings=StoreSettings(labels=LABELS, keep_text=True, shards=1))
    for turn in range(60):
        users = [f"u{rng.randrange(40)}" for _ in range(30)]
        items = [item(f"{turn}-{i}", noise(f"t{seed}-{turn}-{i}", rng.randrange(60, 1900))) for i in range(30)]
        vectors = np.stack([vector_of(each.id) for each in items])
        add_encoded(store, "t", EncodedItems(users, items, vectors, encoder=ENCODER.identity))
        for user, new_item in zip(users, items, strict=True):
            own_texts.setdefault(user, []).append(new_item.fields[0][1].encode())
    store.close()
    before = place.files(log=place.server is None)
    copied = [user for user, texts in own_texts.items() if any(before.count(text[-40:]) > 1 for text in texts)]
    erased = copied[:6] or list(own_texts)[:3]
    for user in erased:
        store.erase_user("t", user)
    after = place.files(log=place.server is None)
    assert sum(text[-40:] in after or text[:40] in after for user in erased for text in own_texts[user]) == 0
    kept = sorted(own_texts.keys() - set(erased))
    assert all(text[-40:] in after for user in kept for text in own_texts[user])
    for user in kept:
        assert [stored.fields[0][1].encode() for stored in store.list_items("t", user)] == own_texts[user]
        assert len(store.load_history("t", user)) == len(own_texts[user])


def test_erase_user_keeps_the_schema(tmp_path: Path) -> None:
    place = Place(str(tmp_path / "store.db"))
    store = place.open()
    add(store, "t", "kept", [item("k")])
    add(store, "t", "u", [item("a")])

    def schema() -> list[tuple[str, ...]]:
        with sqlite3.connect(place.where) as connection:
            rows = connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY 1, 2").fetchall()
        return [(*row[:3], str(row[3]).replace('"', "").split("(", 1)[-1]) for row in rows]

    before = schema()
    store.erase_user("t", "u")
    assert schema() == before
    assert add(store, "t", "u", [item("a")]) == (1, 0, 0)


def test_open_finishes_interrupted_erasure(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    store = place.open()
    add(store, "t", "u", [item("a", planted("a"))])

    def killed(*_: object) -> tuple[str, ...]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("personaplug.store.secure_delete.rewrite_shard", killed)
        with pytest.raises(KeyboardInterrupt):
            store.erase_user("t", "u")
    assert store.list_items("t", "u") == []
    place.open()
    assert not any(search(place, ["a"]))
    with pytest.raises(MissingData):
        store.erase_user("t", "u")


def test_erase_user_with_old_reader_raises_until_it_ends(place: Place) -> None:
    store = place.open(wait_s=0.5)
    add(store, "t", "u", [item("a", planted("a"))])
    with store.database.read_transaction() as connection:
        connection.exec_driver_sql("SELECT count(*) FROM users_0000")  # starts the reader's snapshot
        with pytest.raises(StorageError, match="erase the same user again"):
            place.open(wait_s=0.5).erase_user("t", "u")
    receipt = store.erase_user("t", "u")
    assert store.has_issued(receipt, user="u")
    assert receipt.items == 1
    assert not any(search(place, ["a"]))


def test_erase_user_during_other_writes_loses_no_items(place: Place) -> None:
    store = place.open(keep_text=False)
    add_encoded(store, "t", encoded([f"u{i}" for i in range(8)], ["a"] * 8))
    stop, failures = threading.Event(), list[Exception]()

    def work() -> None:
        for i in range(10_000):
            if stop.is_set():
                return
            try:
                add_encoded(store, "t", encoded(["busy", f"new {i}"], [f"{i}", f"{i}"]))
                assert len(store.load_history("t", "busy")) == i + 1
            except Exception as error:
                failures.append(error)
                return

    thread = threading.Thread(target=work)
    thread.start()
    for i in range(8):
        store.erase_user("t", f"u{i}")
    stop.set()
    thread.join()
    assert failures == []


def test_items_added_after_the_deletion_survive_the_rewrite(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    store = place.open()
    add(store, "t", "u", [item("a", planted("a"))])

    def add_and_rewrite(*args: object) -> tuple[str, ...]:
        add(store, "t", "u", [item("b", planted("b"))])
        return rewrite_shard(*args)  # type: ignore[arg-type]

    monkeypatch.setattr("personaplug.store.secure_delete.rewrite_shard", add_and_rewrite)
    store.erase_user("t", "u")
    assert not any(search(place, ["a"]))
    assert [stored.id for stored in store.list_items("t", "u")] == ["b"]


def test_receipt_names_only_tables_without_the_right_to_clear_the_log(postgres: PostgresServer) -> None:
    url = postgres.new_database()
    name = url.split("?")[0].rsplit("/", 1)[-1]
    postgres.execute(f"CREATE ROLE plain_{name} LOGIN")
    postgres.execute(f"ALTER DATABASE {name} OWNER TO plain_{name}")
    place = Place(url.replace("postgres@", f"plain_{name}@"), postgres)
    store = place.open()
    add(store, "t", "u", [item("a", planted("a"))])
    receipt = store.erase_user("t", "u")
    assert receipt.wiped == ("tables",)
    assert not any(search(place, ["a"], log=False))
    assert any(search(place, ["a"])), "the log still contains the item, and the receipt does not claim otherwise"


def test_erase_user_waits_for_running_addition(place: Place) -> None:
    store = place.open(settings=StoreSettings(labels=LABELS, keep_text=True, shards=1))
    add(store, "t", "u", [item("a", planted("a"))])
    late = EncodedItems(["u"], [item("b")], np.stack([vector_of("b")]), ENCODER.identity)
    shard, ticket = store.shard_of("t", "u"), store.admit("t", "u")
    with store.database.write_transaction() as connection:
        write_items(connection, shard, store.pack(late), ticket=ticket, retention=store.retention)
        eraser = threading.Thread(target=store.erase_user, args=("t", "u"))
        eraser.start()
        time.sleep(0.5)
    eraser.join()
    with store.database.read_transaction() as connection:
        tables = (shard.users, shard.items, shard.texts)
        counts = [execute(connection, f"SELECT count(*) FROM {table}").scalar() for table in tables]
    assert counts == [0, 0, 0]
