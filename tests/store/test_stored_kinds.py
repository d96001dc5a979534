"""Stated preferences and rejections in a store: reading, replacement, removal, export and copies."""

from __future__ import annotations

import json
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stores import ENCODER, LABELS, Place, add, item, item_ids

from personaplug.data.records import HistoryItem
from personaplug.encoders.base import encode_items
from personaplug.encoders.encoded_sample import PREFERENCE_KIND
from personaplug.errors import ItemError, MissingData, StorageError, UserErased, UserError
from personaplug.store.backup import back_up, restore, verify
from personaplug.store.history_store import HistoryStore, Retention
from personaplug.store.refill import open_target, refill
from personaplug.store.schema import StoreSettings
from personaplug.store.writes import MAX_PREFERENCES


def preference(text: str, *, name: str = "", day: date | None = None) -> HistoryItem:
    return HistoryItem(name or text, (("preference", text),), None, day, "preference")


def rejection(name: str, answer: str = "3") -> HistoryItem:
    return replace(item(name, answer=answer), kind="rejection")


def set_preferences(store: HistoryStore, *texts: str, user: str = "u") -> tuple[int, ...]:
    return store.replace_preferences(store.admit("t", user), [preference(text) for text in texts])


def preference_texts(store: HistoryStore, user: str = "u") -> list[str]:
    return [each.fields[0][1] for each in store.list_preferences("t", user)]


@pytest.fixture
def store(place: Place) -> HistoryStore:
    return place.open()


def test_items_of_all_kinds_round_trip(store: HistoryStore) -> None:
    items = [item("a"), rejection("b"), preference("short answers", day=date(2020, 1, 1))]
    add(store, "t", "u", items)
    history = store.load_history("t", "u")
    assert history.kind_ids.tolist() == [2, 0, 1]
    assert history.label_ids.tolist() == [-1, 1, -1], "a rejected label is not an answer of the user"
    listed = {each.id: (each.kind, each.fields, each.answer_name) for each in store.list_items("t", "u")}
    assert listed == {each.id: (each.kind, each.fields, each.answer_name) for each in items}
    exported = json.loads("".join(store.export("t", "u")))["items"]
    assert [each["kind"] for each in exported] == ["preference", "answer", "rejection"]


def test_an_item_of_another_kind_replaces_the_item(store: HistoryStore) -> None:
    add(store, "t", "u", [item("a", answer="3")])
    assert add(store, "t", "u", [rejection("a")]) == (0, 1, 0)
    assert store.load_history("t", "u").kind_ids.tolist() == [1]
    assert add(store, "t", "u", [preference("no", name="a")]) == (0, 1, 0)
    assert preference_texts(store) == ["no"]
    assert add(store, "t", "u", [item("a")]) == (0, 1, 0)
    assert preference_texts(store) == []


@pytest.mark.parametrize("count", [512, 600])
def test_preference_older_than_the_latest_items_is_used(store: HistoryStore, count: int) -> None:
    add(store, "t", "u", [preference("short answers", day=date(2001, 1, 1))])
    add(store, "t", "u", [item(str(number), f"film {number}", day=date(2020, 1, 1)) for number in range(count)])
    history, listed = store.load_history("t", "u", latest=512), store.list_items("t", "u", latest=512)
    assert history.kind_ids.tolist() == [PREFERENCE_KIND, *[0] * 511]
    assert [each.id for each in listed] == ["short answers", *map(str, range(count - 511, count))]
    vectors = encode_items(ENCODER, [each.encoded(with_answer=True) for each in listed]).astype(np.float16)
    np.testing.assert_array_equal(history.vectors, vectors)


def test_preferences_are_replaced_as_a_whole(store: HistoryStore) -> None:
    add(store, "t", "u", [item("a")])
    assert set_preferences(store, "short answers", "no emoji") == (2, 0, 0, 0)
    version = store.version("t", "u")
    assert set_preferences(store, "no emoji", "short answers", "no emoji") == (0, 0, 3, 0)
    assert store.version("t", "u") == version
    assert set_preferences(store, "no emoji", "in French") == (1, 0, 1, 1)
    assert store.version("t", "u") > version
    assert (preference_texts(store), store.count("t", "u")) == (["no emoji", "in French"], 3)
    assert set_preferences(store) == (0, 0, 0, 2)
    assert (preference_texts(store), item_ids(store)) == ([], ["a"])
    assert set_preferences(store) == (0, 0, 0, 0)
    verify(store)


def test_an_empty_replacement_for_an_unknown_user_creates_no_row(store: HistoryStore) -> None:
    assert set_preferences(store, user="nobody") == (0, 0, 0, 0)
    assert store.version("t", "nobody") == 0
    assert preference_texts(store, "nobody") == []
    with pytest.raises(MissingData):
        store.delete_item("t", "nobody", "a")


def test_too_many_preferences_change_nothing(store: HistoryStore) -> None:
    set_preferences(store, "short answers")
    many = [f"preference {number}" for number in range(MAX_PREFERENCES)]
    with pytest.raises(ItemError, match=f"at most {MAX_PREFERENCES}"):
        set_preferences(store, *many, "one more")
    with pytest.raises(ItemError, match=f"at most {MAX_PREFERENCES}"):
        add(store, "t", "u", list(map(preference, many)))
    assert preference_texts(store) == ["short answers"]
    assert set_preferences(store, *many) == (100, 0, 0, 1)


def test_replacement_after_an_erasure_is_refused(store: HistoryStore) -> None:
    set_preferences(store, "short answers")
    ticket = store.admit("t", "u")
    store.erase_user("t", "u")
    for items in ([preference("no emoji")], []):
        with pytest.raises(UserErased):
            store.replace_preferences(ticket, items)
    with pytest.raises(UserErased):
        store.replace_items(ticket, [item("a")], ids=["a"])
    assert store.count("t", "u") == 0


def test_concurrent_replacements_never_mix(store: HistoryStore) -> None:
    sets = [{f"{name} {number}" for number in range(5)} for name in "abc"]
    set_preferences(store, *sets[0])
    mixed: list[set[str]] = []

    def work(number: int) -> None:
        for turn in range(15):
            set_preferences(store, *sets[(number + turn) % 3])
            if (current := set(preference_texts(store))) not in sets:
                mixed.append(current)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert mixed == []
    assert store.count("t", "u") == 5
    verify(store)


def test_failed_replacement_keeps_the_preferences(store: HistoryStore) -> None:
    set_preferences(store, "short answers")
    with pytest.raises(ItemError):
        store.replace_preferences(store.admit("t", "u"), [preference("no emoji"), preference("x", name="a\nb")])
    store.encoder = None
    with pytest.raises(UserError, match="without an encoder"):
        set_preferences(store, "no emoji")
    assert preference_texts(store) == ["short answers"]
    assert set_preferences(store) == (0, 0, 0, 1), "removal needs no encoder"


def test_items_with_some_ids_are_replaced(store: HistoryStore) -> None:
    add(store, "t", "u", [item("a"), rejection("b"), item("c")])
    assert store.replace_items(store.admit("t", "u"), [item("a", "another")], ids=["a", "b", "z"]) == (0, 1, 0, 1)
    assert item_ids(store) == ["a", "c"]
    store.delete_item("t", "u", "a", "c", "z")
    assert item_ids(store) == []


def test_preferences_take_precedence_in_max_items_but_expire_after_max_days(place: Place) -> None:
    store = place.open(retention=Retention(max_items=3))
    add(store, "t", "u", [preference("short answers", day=date(2001, 1, 1))])
    add(store, "t", "u", [item(str(number)) for number in range(5)])
    assert item_ids(store) == ["short answers", "3", "4"]
    set_preferences(store, *"abcde")
    assert preference_texts(store) == item_ids(store) == ["c", "d", "e"]
    store.close()
    store = place.open(retention=Retention(max_days=30))
    add(store, "t", "v", [preference("short answers", day=date(2001, 1, 1)), preference("no emoji")])
    assert preference_texts(store, "v") == ["no emoji"]


def test_content_id_depends_on_kind_and_content(place: Place) -> None:
    store = place.open()
    items = [item("x", answer="3"), rejection("x"), item("x", answer="3", day=date(2020, 1, 1)), preference("a film")]
    ids = [store.content_id(each) for each in items]
    assert len(set(ids)) == 4
    assert [store.content_id(replace(each, id="y")) for each in items] == ids
    assert store.content_id(preference("a film", day=date(2020, 1, 1))) == ids[3]
    assert ids[3].startswith("preference-")
    store.close()


def test_content_ids_of_another_secret_differ(tmp_path: Path) -> None:
    stores = [Place(str(tmp_path / f"{number}.db")).open(secret=bytes([number] * 16)) for number in (1, 2)]
    assert stores[0].content_id(preference("no")) != stores[1].content_id(preference("no"))


def test_erased_preferences_leave_the_files(place: Place) -> None:
    marker = "a sentence that occurs nowhere else"
    store = place.open()
    set_preferences(store, marker)
    add(store, "t", "u", [replace(rejection("r"), fields=(("text", marker[::-1]), ("score", "3")))])
    assert store.erase_user("t", "u").items == 2
    assert preference_texts(store) == []
    store.close()
    files = place.files()
    assert marker.encode() not in files
    assert marker[::-1].encode() not in files


def test_backup_and_refill_keep_the_kinds(tmp_path: Path) -> None:
    with closing(Place(str(tmp_path / "a.db")).open(secret=None)) as store:
        add(store, "t", "u", [item("a"), rejection("b")])
        set_preferences(store, "short answers")
        back_up(store, tmp_path / "backup")
        settings = StoreSettings(labels=LABELS)
        with closing(open_target(store, tmp_path / "c.db", ENCODER, settings=settings, save_secret=True)) as target:
            assert refill(store, target) == 1
    restore(tmp_path / "backup", tmp_path / "b.db", secret=tmp_path / "a.db.secret", current=None)
    for name, secret in (("b", tmp_path / "a.db.secret"), ("c", None)):
        with closing(HistoryStore.open(tmp_path / f"{name}.db", secret=secret)) as copy:
            verify(copy)
            assert copy.load_history("t", "u").kind_ids.tolist() == [0, 1, 2]
            assert preference_texts(copy) == ["short answers"]


@pytest.mark.parametrize("read", ["load_history", "list_items"])
def test_changed_kind_is_detected(tmp_path: Path, read: str) -> None:
    place = Place(str(tmp_path / "store.db"))
    store = place.open(settings=StoreSettings(shards=1))
    add(store, "t", "u", [item("a"), rejection("b")])
    with closing(sqlite3.connect(place.where)) as connection, connection:
        connection.execute("UPDATE items_0000 SET kind_id = 0 WHERE item_id = 'b'")
    reading: Any = getattr(store, read)
    with pytest.raises(StorageError, match="damaged"):
        reading("t", "u")
