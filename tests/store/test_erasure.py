"""Erasing: of an erased user nothing is left in the raw files, and there is a receipt that names nobody."""

from __future__ import annotations

import hashlib
import json
import random
import sqlite3
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa
from postgres_server import PostgresServer
from stores import ENCODER, LABELS, SECRET, Place, encoded, item, vector_of

from personaplug.errors import ConfigError, MissingData, StorageError, UserError
from personaplug.store.history_store import EncodedItems, HistoryStore
from personaplug.store.receipts import Receipt, Secret
from personaplug.store.schema import StoreSettings, read_state
from personaplug.store.secure_delete import wipe_shard
from personaplug.store.vector_codec import Precision, packed
from personaplug.store.writes import rows_of, write_rows


def noise(name: str, size: int) -> str:
    """A text that no database can shorten, and no other name has."""
    shake = hashlib.shake_256(name.encode()).hexdigest(size // 2 + 1)
    return shake[:size]


def planted(name: str) -> str:
    """A text with what is searched at its beginning, its middle and its end."""
    sizes = (40, 3000, 40, 5000, 40)
    return " ".join(noise(f"{name}/{place}", size) for place, size in enumerate(sizes))


def traces(name: str, *, precision: Precision = "float16") -> list[bytes]:
    """What is searched of an item with such a text."""
    vector = ENCODER.encode([item(name, planted(name)).text])
    texts = [noise(f"{name}/{place}", 40) for place in (0, 2, 4)]
    return [packed(vector, 32, precision=precision)[0], *(text.encode() for text in texts)]


def found(place: Place, names: list[str], *, log: bool = True, precision: Precision = "float16") -> list[bool]:
    files = place.files(log=log)
    return [trace in files for name in names for trace in traces(name, precision=precision)]


def test_it_is_known_when_somebody_was_erased_last(place: Place) -> None:
    store, before = place.open(), datetime.now(UTC).replace(microsecond=0)
    assert store.erased_at("t", "ann") is None
    for _ in range(2):
        store.add("t", "ann", [item("1", "a film")])
        receipt = store.erase_user("t", "ann")
    found = store.erased_at("t", "ann")
    assert found is not None
    assert found.isoformat() == datetime.fromisoformat(receipt.erased_at).isoformat()
    assert before <= found <= datetime.now(UTC)
    assert store.erased_at("another", "ann") is None


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_nothing_of_an_erased_user_is_in_the_files(place: Place, precision: Precision) -> None:
    store = place.open(settings=StoreSettings(labels=LABELS, keep_text=True, shards=2, precision=precision))
    for user in ("kept", "erased-user-id", "also kept"):
        store.add("t", user, [item(f"{user}-{i}", planted(f"{user}-{i}")) for i in range(8)])
    if place.server:
        place.server.execute("ANALYZE")  # statistics are samples of what columns hold
    own, others = [f"erased-user-id-{i}" for i in range(8)], [f"kept-{i}" for i in range(8)]
    assert all(found(place, [*own, *others], precision=precision)), "they are searched where they are"
    assert b"erased-user-id" in place.files()

    receipt = store.erase_user("t", "erased-user-id")

    assert not any(found(place, own, precision=precision))
    assert b"erased-user-id" not in place.files()
    assert all(found(place, others, precision=precision))
    assert (receipt.items, receipt.wiped) == (8, ("tables", "log"))
    assert len(store.read("t", "kept")) == 8
    assert store.list_items("t", "erased-user-id") == []


def test_what_was_replaced_or_deleted_before_goes_with_the_user(place: Place) -> None:
    store = place.open(settings=StoreSettings(labels=LABELS, keep_text=True, shards=1))
    store.add("t", "kept", [item("k", planted("k"))])
    store.add("t", "u", [item("a", planted("first")), item("b", planted("deleted"))])
    store.add("t", "u", [item("a", planted("second"))])
    store.delete_item("t", "u", "b")
    store.erase_user("t", "u")
    assert not any(found(place, ["first", "second", "deleted"]))
    assert all(found(place, ["k"]))


@pytest.mark.parametrize("seed", [2, 3])
def test_no_copy_of_a_row_is_left_in_a_page_that_it_was_moved_from(place: Place, seed: int) -> None:
    # Users grow in turn, so that pages are split and rows are moved. SQLite leaves a copy of a row now and then, which
    # deleting the row does not overwrite: with these seeds, of users who are erased below.
    chance, own = random.Random(seed), dict[str, list[bytes]]()
    store = place.open(settings=StoreSettings(labels=LABELS, keep_text=True, shards=1))
    for turn in range(60):
        users = [f"u{chance.randrange(40)}" for _ in range(30)]
        items = [item(f"{turn}-{i}", noise(f"t{seed}-{turn}-{i}", chance.randrange(60, 1900))) for i in range(30)]
        vectors = np.stack([vector_of(one.id) for one in items])
        store.add_encoded("t", EncodedItems(users, items, vectors, made_by=ENCODER.identity))
        for user, one in zip(users, items, strict=True):
            own.setdefault(user, []).append(one.fields[0][1].encode())
    store.close()
    before = place.files(log=place.server is None)
    twice = [user for user, texts in own.items() if any(before.count(text[-40:]) > 1 for text in texts)]
    erased = twice[:6] or list(own)[:3]
    for user in erased:
        store.erase_user("t", user)
    after = place.files(log=place.server is None)
    assert sum(text[-40:] in after or text[:40] in after for user in erased for text in own[user]) == 0
    kept = sorted(own.keys() - set(erased))
    assert all(text[-40:] in after for user in kept for text in own[user])
    for user in kept:
        assert [one.fields[0][1].encode() for one in store.list_items("t", user)] == own[user]
        assert len(store.read("t", user)) == len(own[user])


def test_wiping_clears_what_was_deleted(place: Place) -> None:
    store = place.open()
    store.add("t", "u", [item("a", planted("a")), item("b", planted("b"))])
    store.delete_item("t", "u", "a")
    store.wipe()
    assert not any(found(place, ["a"]))
    assert all(found(place, ["b"]))


def test_an_erased_user_is_erased_from_a_migration_too(place: Place) -> None:
    from personaplug.encoders import HashEncoder
    from personaplug.store import reencode as reencoding

    store, other = place.open(), HashEncoder(32, seed=1)
    store.add("t", "u", [item("a", planted("a"))])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(reencoding, "_switch", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            store.re_encode(other)
    (trace,) = packed(other.encode([item("a", planted("a")).text]), 32, precision="float16")
    assert trace in place.files()
    store.erase_user("t", "u")
    assert trace not in place.files()
    assert not any(found(place, ["a"]))


def test_the_tables_are_as_before_after_they_were_written_anew(tmp_path: Path) -> None:
    place = Place(str(tmp_path / "store.db"))
    store = place.open()
    store.add("t", "kept", [item("k")])
    store.add("t", "u", [item("a")])

    def described() -> list[tuple[str, ...]]:
        with sqlite3.connect(place.where) as connection:
            rows = connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY 1, 2").fetchall()
        return [(*row[:3], str(row[3]).replace('"', "").split("(", 1)[-1]) for row in rows]

    before = described()
    store.erase_user("t", "u")
    store.wipe()
    assert described() == before
    assert store.add("t", "u", [item("a")]) == (1, 0, 0)


# What stops an erasure, and how it goes on


def test_an_erasure_that_was_stopped_before_the_files_were_cleared_is_finished_by_opening(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = place.open()
    store.add("t", "u", [item("a", planted("a"))])

    def killed(*_: object) -> tuple[str, ...]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("personaplug.store.history_store.wipe_shard", killed)
        with pytest.raises(KeyboardInterrupt):
            store.erase_user("t", "u")
    assert store.list_items("t", "u") == []
    place.open()
    assert not any(found(place, ["a"]))
    with pytest.raises(MissingData):
        store.erase_user("t", "u")


def test_a_reader_that_holds_on_delays_the_receipt(place: Place) -> None:
    store = place.open(wait_s=0.5)
    store.add("t", "u", [item("a", planted("a"))])
    with store._database.reading() as connection:
        connection.exec_driver_sql("SELECT count(*) FROM users_0000")  # the state before is pinned from here on
        with pytest.raises(StorageError, match="erase the same user again"):
            place.open(wait_s=0.5).erase_user("t", "u")
    receipt = store.erase_user("t", "u")
    assert store.verify(receipt, user="u")
    assert receipt.items == 1
    assert not any(found(place, ["a"]))


def test_others_write_and_read_while_users_are_erased(place: Place) -> None:
    store = place.open(keep_text=False)
    store.add_encoded("t", encoded([f"u{i}" for i in range(8)], ["a"] * 8))
    stop, failures = threading.Event(), list[Exception]()

    def work() -> None:
        for i in range(10_000):
            if stop.is_set():
                return
            try:
                store.add_encoded("t", encoded(["busy", f"new {i}"], [f"{i}", f"{i}"]))
                assert len(store.read("t", "busy")) == i + 1
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


def test_a_user_who_comes_back_while_being_erased_is_kept(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    store = place.open()
    store.add("t", "u", [item("a", planted("a"))])

    def meanwhile(*given: object) -> tuple[str, ...]:
        store.add("t", "u", [item("b", planted("b"))])
        return wipe_shard(*given)  # type: ignore[arg-type]

    monkeypatch.setattr("personaplug.store.history_store.wipe_shard", meanwhile)
    store.erase_user("t", "u")
    assert not any(found(place, ["a"]))
    assert [one.id for one in store.list_items("t", "u")] == ["b"]


def test_a_role_that_may_not_touch_the_log_is_told_so(postgres: PostgresServer) -> None:
    url = postgres.new_database()
    name = url.split("?")[0].rsplit("/", 1)[-1]
    postgres.execute(f"CREATE ROLE plain_{name} LOGIN")
    postgres.execute(f"ALTER DATABASE {name} OWNER TO plain_{name}")
    place = Place(url.replace("postgres@", f"plain_{name}@"), postgres)
    store = place.open()
    store.add("t", "u", [item("a", planted("a"))])
    receipt = store.erase_user("t", "u")
    assert receipt.wiped == ("tables",)
    assert not any(found(place, ["a"], log=False))
    assert any(found(place, ["a"])), "the log still has it, as the receipt says"


def test_what_is_being_added_while_a_user_is_erased_is_erased_or_comes_anew(place: Place) -> None:
    store = place.open(settings=StoreSettings(labels=LABELS, keep_text=True, shards=1))
    store.add("t", "u", [item("a", planted("a"))])
    shard, late = (
        store._tables.shards[0],
        EncodedItems(["u"], [item("b")], np.stack([vector_of("b")]), ENCODER.identity),
    )
    with store._database.writing() as connection:
        state = read_state(connection)
        rows = rows_of(late, state, key=store._digest_key)
        write_rows(connection, shard, rows, tenant="t", state=state, retention=store.retention)
        eraser = threading.Thread(target=store.erase_user, args=("t", "u"))
        eraser.start()
        time.sleep(0.5)
    eraser.join()
    with store._database.reading() as connection:
        left = [connection.execute(sa.select(sa.func.count()).select_from(table)).scalar() for table in shard.tables]
    assert left == [0] * 5


# Receipts


@pytest.fixture
def receipt(tmp_path: Path) -> Receipt:
    store = Place(str(tmp_path / "store.db")).open()
    store.add("t", "u", [item("a")])
    return store.erase_user("t", "u")


def test_a_receipt_is_verified_by_the_store_that_gave_it(tmp_path: Path, receipt: Receipt) -> None:
    store = Place(str(tmp_path / "store.db")).open(encoder=None)
    assert store.verify(receipt)
    assert store.verify(receipt, tenant="t", user="u")
    assert not store.verify(receipt, user="v")
    assert not store.verify(receipt, tenant="other", user="u")
    assert store.verify(Receipt.from_dict(json.loads(json.dumps(receipt.to_dict()))))
    other = Place(str(tmp_path / "other.db")).open(secret=b"another secret, as long")
    assert not other.verify(receipt)


@pytest.mark.parametrize(
    "change",
    [
        {"tenant": "other"},
        {"user": "0" * 64},
        {"items": 2},
        {"erased_at": "2020-01-01T00:00:00+00:00"},
        {"wiped": ("tables",)},
        {"signature": "0" * 64},
        {"signature": ""},
        {"signature": "é"},
    ],
)
def test_a_changed_receipt_is_not_verified(tmp_path: Path, receipt: Receipt, change: dict[str, object]) -> None:
    store = Place(str(tmp_path / "store.db")).open(encoder=None)
    assert not store.verify(replace(receipt, **change))  # type: ignore[arg-type]


def test_a_receipt_does_not_name_the_user(receipt: Receipt) -> None:
    told = json.dumps(receipt.to_dict())
    plain = [
        hashlib.new(name, said).hexdigest() for name in ("sha256", "blake2b") for said in (b"u", b"tu", b'["t", "u"]')
    ]
    assert not any(value in told for value in plain), "a hash without a key could be guessed"
    assert receipt.user == Secret(SECRET).hashed("user", "t", "u")
    assert receipt.user != Secret(b"another secret, as long").hashed("user", "t", "u")
    assert receipt.user != Secret(SECRET).hashed("user", "other", "u")


def test_what_is_no_receipt() -> None:
    with pytest.raises(UserError, match="exactly these fields: tenant"):
        Receipt.from_dict({"tenant": "t"})
    with pytest.raises(UserError):
        Receipt.from_dict({"wiped": [], "more": 1})


def test_a_secret_is_not_shown_and_one_file_is_made_once(tmp_path: Path) -> None:
    first = Secret.of_file(tmp_path / "secret", create=True)
    again = Secret.of_file(tmp_path / "secret", create=True)
    assert first.hashed("x") == again.hashed("x")
    assert (tmp_path / "secret").read_text() not in repr(first)
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]
    (tmp_path / "secret").write_text("not hex")
    with pytest.raises(ConfigError, match="hex digits"):
        Secret.of_file(tmp_path / "secret", create=False)


def test_opening_makes_a_usable_store_whatever_was_there(tmp_path: Path) -> None:
    store = HistoryStore.open(tmp_path / "s.db", ENCODER)
    store.add("t", "u", [item("a")])
    assert store.verify(store.erase_user("t", "u"))
