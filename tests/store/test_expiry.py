"""Expired items are never read, and their bytes are removed from the files."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import pytest
from stores import LABELS, Place, add, item, item_ids

from personaplug.store.database import execute
from personaplug.store.history_store import HistoryStore, Retention
from personaplug.store.schema import Shard, StoreSettings

TODAY = datetime.now(UTC).date()
OLD = TODAY - timedelta(days=40)
LIMIT = Retention(max_days=30)
TEXT = "the text of the old item"


def filled(place: Place) -> HistoryStore:
    """Return a store that keeps everything, with an old and a new item of user u, and an old item of another user."""
    store = place.open(settings=StoreSettings(labels=LABELS, keep_text=True, shards=2))
    add(store, "t", "u", [item("old", TEXT, day=OLD), item("new", day=TODAY)])
    add(store, "t", "gone-user-id", [item("old", TEXT, day=OLD)])
    return store


def rows(store: HistoryStore, kind: str) -> int:
    tables = [getattr(Shard(number), kind) for number in range(store.settings.shards)]
    with store.database.read_transaction() as connection:
        return sum(execute(connection, f"SELECT count(*) FROM {table}").scalar_one() for table in tables)


def test_old_items_are_not_read_before_they_are_removed(place: Place) -> None:
    store = filled(place)
    store.retention = LIMIT  # as if the items had expired today
    assert item_ids(store) == ["new"]
    assert [each.id for each in store.list_items("t", "u", latest=5)] == ["new"]
    assert (
        len(store.load_history("t", "u")) == len(store.load_history("t", "u", latest=5)) == store.count("t", "u") == 1
    )
    assert [each["id"] for each in json.loads("".join(store.export("t", "u")))["items"]] == ["new"]
    assert len(store.load_history("t", "gone-user-id")) == store.count("t", "gone-user-id") == 0
    assert rows(store, "items") == 3


def test_open_removes_old_items_and_their_bytes(place: Place) -> None:
    store = filled(place)
    version, trace = store.version("t", "u"), TEXT.encode()
    assert trace in place.files()
    store.close()
    store = place.open(retention=LIMIT)
    assert (rows(store, "items"), rows(store, "texts"), rows(store, "users")) == (1, 1, 1)
    assert store.version("t", "u") > version
    assert store.version("t", "gone-user-id") == 0
    assert trace not in place.files()
    assert b"gone-user-id" not in place.files()
    assert item_ids(store) == ["new"]
    assert add(store, "t", "gone-user-id", [item("again")]) == (1, 0, 0)


def test_maintenance_removes_items_that_have_become_old(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    store = filled(place)
    store.retention = Retention(max_days=50)
    store.maintain()
    assert rows(store, "items") == 3
    later = datetime.now(UTC).timestamp() + 20 * 86_400
    monkeypatch.setattr("personaplug.store.schema.now_in_microseconds", lambda: round(later * 1e6))
    store.maintain()
    assert (rows(store, "items"), item_ids(store)) == (1, ["new"])
    assert TEXT.encode() not in place.files()


def test_interrupted_removal_is_finished_at_open(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    store = filled(place)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("personaplug.store.expiry.rewrite_shard", killed)
        with pytest.raises(KeyboardInterrupt):
            place.open(retention=LIMIT)
    place.open()
    assert TEXT.encode() not in place.files()
    assert rows(store, "items") == 1


def test_removal_with_a_time_limit_continues_at_the_next_call(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("personaplug.store.expiry._USERS_PER_TRANSACTION", 1)
    store = place.open()
    for number in range(5):
        add(store, "t", f"u{number}", [item("old", day=OLD)])
    store.retention = LIMIT
    for remaining in (4, 3, 2, 1, 0):
        store.remove_expired(seconds=0)
        assert rows(store, "users") == remaining


def test_retention_stays_with_the_store(place: Place) -> None:
    place.open(retention=LIMIT).close()
    assert place.open().retention == LIMIT
    assert place.open(encoder=None).retention == LIMIT
    place.open(retention=Retention()).close()
    assert place.open().retention == Retention()


def test_old_items_that_are_added_leave_no_bytes(place: Place) -> None:
    store = place.open(retention=LIMIT)
    store.maintain()  # completes the removal of this day
    add(store, "t", "gone-user-id", [item("old", TEXT, day=OLD)])
    add(store, "t", "u", [item("old", TEXT, day=OLD), item("new", day=TODAY)])
    assert (rows(store, "items"), rows(store, "texts"), rows(store, "users")) == (1, 1, 1)
    assert (store.version("t", "gone-user-id"), item_ids(store)) == (0, ["new"])
    store.maintain()
    assert TEXT.encode() not in place.files()
    assert b"gone-user-id" not in place.files()
