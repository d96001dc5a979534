"""HistoryStore: adding, loading, versions, export, deletion and retention, in SQLite and PostgreSQL."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta

import numpy as np
import pytest
from cheap_encoder import CheapEncoder
from stores import ENCODER, LABELS, Place, add, add_encoded, encoded, item, item_ids, vector_of

from personaplug.data.records import HistoryItem
from personaplug.encoders.style_features import FEATURES, text_style
from personaplug.errors import ConfigError, MissingData, UserErased
from personaplug.store import writes
from personaplug.store.history_store import HistoryStore, Retention
from personaplug.store.schema import StoreSettings


@pytest.fixture
def store(place: Place) -> Iterator[HistoryStore]:
    store = place.open()
    yield store
    store.close()


def test_load_history_after_add_returns_arrays(store: HistoryStore) -> None:
    items = [item("a", "A film!", answer="1"), item("b", "a book", answer=" 3 "), item("c", answer="other")]
    assert add(store, "t", "u", [*items, item("d", answer=None)]) == (4, 0, 0)
    history = store.load_history("t", "u")
    expected = ENCODER.encode([each.text for each in [*items, item("d", answer=None)]])
    assert history.vectors.dtype == history.style.dtype == np.float16
    assert history.vectors.shape == (4, 32)
    np.testing.assert_array_equal(history.vectors, expected.astype(np.float16))
    assert history.label_ids.dtype == np.int16
    assert history.label_ids.tolist() == [0, 2, -1, -1]
    np.testing.assert_array_equal(history.style[0], text_style("1"))
    assert len(history) == 4


def test_add_encodes_answers_false_ignores_answers(place: Place) -> None:
    store = place.open(settings=StoreSettings(encodes_answers=False, shards=1))
    add(store, "t", "u", [item("a", answer="1"), item("b", answer="2")])
    first, second = store.load_history("t", "u").vectors
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first, ENCODER.encode([item("a").content])[0].astype(np.float16))


def test_list_items_latest_returns_newest_oldest_first(store: HistoryStore) -> None:
    add(store, "t", "u", [item(name) for name in "abcde"])
    assert [each.id for each in store.list_items("t", "u", latest=2)] == ["d", "e"]
    assert [each.id for each in store.list_items("t", "u")] == list("abcde")
    assert store.list_items("t", "nobody", latest=2) == []


def test_load_history_unknown_user_is_empty(store: HistoryStore) -> None:
    history = store.load_history("t", "nobody")
    assert (history.vectors.shape, history.label_ids.shape, history.style.shape) == ((0, 32), (0,), (0, len(FEATURES)))
    assert history.version == 0 == store.version("t", "nobody")
    assert store.list_items("t", "nobody") == []


def test_list_items_order_is_by_date_then_arrival(store: HistoryStore) -> None:
    today = datetime.now(UTC).date()
    add(store, "t", "u", [item("undated 1"), item("late", day=date(2020, 3, 1)), item("early", day=date(2019, 1, 1))])
    add(store, "t", "u", [item("undated 2"), item("to come", day=today + timedelta(days=2))])
    add(store, "t", "u", [item("early too", day=date(2019, 1, 1)), item("long ago", day=date(1, 1, 1))])
    expected = ["long ago", "early", "early too", "late", "undated 1", "undated 2", "to come"]
    assert item_ids(store) == expected


def test_load_history_order_equals_list_items(store: HistoryStore) -> None:
    names = [f"{i}" for i in range(20)]
    add(
        store, "t", "u", [item(name, f"text {name}", day=date(2020, 1, 1 + i * 7 % 20)) for i, name in enumerate(names)]
    )
    texts = [f"text: text {name} score: 2" for name in item_ids(store)]
    np.testing.assert_array_equal(store.load_history("t", "u").vectors, ENCODER.encode(texts).astype(np.float16))


@pytest.mark.parametrize("latest", [0, 1, 3, 100, 2**63, 2**70])
def test_load_history_latest_returns_newest(store: HistoryStore, latest: int) -> None:
    add(store, "t", "u", [item(str(i), f"text {i}", answer=LABELS[i % 3]) for i in range(6)])
    full, history = store.load_history("t", "u"), store.load_history("t", "u", latest=latest)
    assert len(history) == min(latest, 6)
    np.testing.assert_array_equal(history.vectors, full.vectors[max(6 - latest, 0) :])
    np.testing.assert_array_equal(history.label_ids, full.label_ids[max(6 - latest, 0) :])


def test_add_same_item_is_neither_stored_nor_encoded(place: Place) -> None:
    encoder = CheapEncoder(32)
    store = place.open(encoder)
    items = [item(str(i), f"text {i}") for i in range(3)]
    add(store, "t", "u", items)
    version = store.version("t", "u")
    assert add(store, "t", "u", items[1:]) == (0, 0, 2)
    assert (encoder.calls, store.version("t", "u")) == ([3], version)
    assert add(store, "t", "u", [*items, item("3", "new")]) == (1, 0, 3)
    assert encoder.calls == [3, 1]


@pytest.mark.parametrize(
    "other", [item("1", "other"), item("1", answer="3"), item("1", answer=None), item("1", day=date(1999, 1, 1))]
)
def test_add_known_id_with_other_content_replaces_the_item(store: HistoryStore, other: HistoryItem) -> None:
    add(store, "t", "u", [item("0"), item("1"), item("2")])
    version = store.version("t", "u")
    assert add(store, "t", "u", [other]) == (0, 1, 0)
    assert sorted(item_ids(store)) == ["0", "1", "2"]
    assert store.version("t", "u") > version
    assert len(store.load_history("t", "u")) == 3


def test_add_replaced_item_keeps_position(store: HistoryStore) -> None:
    add(store, "t", "u", [item("0"), item("1"), item("2")])
    before = store.list_items("t", "u")[1].arrived
    add(store, "t", "u", [item("1", "other")])
    assert item_ids(store) == ["0", "1", "2"]
    again = store.list_items("t", "u")[1]
    assert (again.arrived, again.fields[0]) == (before, ("text", "other"))
    expected = ENCODER.encode([item("1", "other").text])[0].astype(np.float16)
    np.testing.assert_array_equal(store.load_history("t", "u").vectors[1], expected)


def test_add_duplicate_id_keeps_later_item(store: HistoryStore) -> None:
    assert add(store, "t", "u", [item("0", "first"), item("1"), item("0", "second")]) == (2, 0, 1)
    assert store.list_items("t", "u")[0].fields[0] == ("text", "second")


def test_add_encoded_many_users_stores_all(place: Place) -> None:
    store = place.open(keep_text=False)
    users = [f"u{i % 50}" for i in range(1000)]
    names = [f"i{i}" for i in range(1000)]
    assert add_encoded(store, "t", encoded(users, names)) == (1000, 0, 0)
    assert add_encoded(store, "t", encoded(users, names)) == (0, 0, 1000)
    for i in (0, 7, 49):
        own = names[i::50]
        history = store.load_history("t", f"u{i}")
        np.testing.assert_array_equal(history.vectors, np.stack([vector_of(name) for name in own]).astype(np.float16))
        assert history.label_ids.tolist() == [len(name) % 3 for name in own]
        assert item_ids(store, user=f"u{i}") == own


def test_add_encoded_other_values_replace_the_item(place: Place) -> None:
    store = place.open(keep_text=False)
    add_encoded(store, "t", encoded(["u"], ["a"]))
    for change in ("vectors", "label_ids", "style"):
        other = encoded(["u"], ["a"])
        getattr(other, change)[0] += 1
        assert add_encoded(store, "t", other) == (0, 1, 0), change
        assert add_encoded(store, "t", other) == (0, 0, 1), change
        add_encoded(store, "t", encoded(["u"], ["a"]))


def test_add_no_items_changes_nothing(store: HistoryStore) -> None:
    assert add(store, "t", "u", []) == (0, 0, 0)
    assert store.version("t", "u") == 0


def test_any_text_survives_a_round_trip(store: HistoryStore) -> None:
    texts = ["", "\0", "broken \ud83d", "a film 🙂", "'; DROP TABLE items_0000; --", "x" * 100_000]
    add(store, "t", "u", [item(str(i), text, answer=text) for i, text in enumerate(texts)])
    assert [stored.fields for stored in store.list_items("t", "u")] == [(("text", t), ("score", t)) for t in texts]


def test_version_grows_only_with_changes(store: HistoryStore) -> None:
    versions = [store.version("t", "u")]

    def has_grown() -> bool:
        versions.append(store.version("t", "u"))
        return versions[-1] > versions[-2]

    add(store, "t", "u", [item("a"), item("b")])
    assert has_grown()
    add(store, "t", "u", [item("c")])
    assert has_grown()
    add(store, "t", "u", [item("c", "other")])
    assert has_grown()
    store.delete_item("t", "u", "a")
    assert has_grown()
    add(store, "t", "u", [item("b")])
    add(store, "t", "other", [item("b")])
    add(store, "other", "u", [item("b")])
    assert not has_grown()
    assert store.load_history("t", "u").version == versions[-1]


def test_version_after_erasure_is_never_reused(store: HistoryStore) -> None:
    add(store, "t", "u", [item("a")])
    before = store.version("t", "u")
    store.erase_user("t", "u")
    assert store.version("t", "u") == 0
    add(store, "t", "u", [item("a")])
    assert store.version("t", "u") > before


def test_version_grows_even_if_the_clock_is_set_back(store: HistoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    add(store, "t", "u", [item("a")])
    before = store.version("t", "u")
    monkeypatch.setattr(writes, "now_in_microseconds", lambda: 10**15)
    add(store, "t", "u", [item("b")])
    assert store.version("t", "u") > before
    assert item_ids(store) == ["a", "b"]


def test_export_contains_everything(store: HistoryStore) -> None:
    add(store, "t", "u", [item("a", "A film!", answer="1", day=date(2020, 5, 17)), item("b", answer=None)])
    exported = json.loads("".join(store.export("t", "u")))
    assert (exported["tenant"], exported["user"], exported["version"]) == ("t", "u", store.version("t", "u"))
    assert (exported["encoder"], exported["labels"]) == (ENCODER.identity.to_dict(), list(LABELS))
    first, second = exported["items"]
    assert (first["id"], first["date"], first["label_id"], first["answer_name"]) == ("a", "2020-05-17", 0, "score")
    assert first["fields"] == [["text", "A film!"], ["score", "1"]]
    assert (second["date"], second["answer_name"]) == (None, None)
    assert abs(datetime.fromisoformat(second["arrived"]) - datetime.now(UTC)) < timedelta(minutes=5)
    np.testing.assert_array_equal(np.array(first["vector"], np.float16), store.load_history("t", "u").vectors[0])
    np.testing.assert_array_equal(np.array(first["style"], np.float16), text_style("1"))


def test_export_in_pages_equals_export_at_once(store: HistoryStore) -> None:
    add(store, "t", "u", [item(str(i), day=date(2020, 1, 1 + i % 3)) for i in range(7)])
    whole = json.loads("".join(store.export("t", "u")))
    assert [each["id"] for each in whole["items"]] == item_ids(store)
    for size in (1, 2, 7, 8):
        pages = list(store.export("t", "u", items_per_page=size))
        assert json.loads("".join(pages)) == whole
        assert len(pages) == 2 + -(-7 // size)


def test_export_includes_later_changes_and_stops_after_an_erasure(store: HistoryStore) -> None:
    add(store, "t", "u", [item(str(i)) for i in range(4)])
    pages = store.export("t", "u", items_per_page=2)
    first_pages = [next(pages), next(pages)]
    store.delete_item("t", "u", "0")
    add(store, "t", "u", [item("later")])
    whole = json.loads("".join([*first_pages, *pages]))
    assert [each["id"] for each in whole["items"]] == ["0", "1", "2", "3", "later"]
    pages = store.export("t", "u", items_per_page=2)
    next(pages), next(pages)
    store.erase_user("t", "u")
    add(store, "t", "u", [item(str(i)) for i in range(4)])
    with pytest.raises(UserErased):
        list(pages)


def test_count_is_the_number_of_items(store: HistoryStore) -> None:
    assert store.count("t", "u") == 0
    add(store, "t", "u", [item("a"), item("b"), item("a", "other")])
    assert store.count("t", "u") == 2
    add(store, "t", "u", [item("b", "replaced"), item("c")])
    store.delete_item("t", "u", "a")
    assert store.count("t", "u") == 2


def test_delete_item_removes_item_and_vector(store: HistoryStore) -> None:
    add(store, "t", "u", [item("a", "one"), item("b", "two"), item("c", "three")])
    store.delete_item("t", "u", "b")
    assert item_ids(store) == ["a", "c"]
    assert len(store.load_history("t", "u")) == 2
    assert add(store, "t", "u", [item("b", "two")]) == (1, 0, 0)
    assert item_ids(store) == ["a", "c", "b"], "a deleted item that returns counts as new"


def test_tenants_share_no_data(place: Place) -> None:
    # With one shard, only the queries separate the tenants.
    store = place.open(settings=StoreSettings(labels=LABELS, keep_text=True, shards=1))
    add(store, "one", "u", [item("a", "planted by one", answer="1"), item("b", "of one")])
    add(store, "two", "u", [item("a", "planted by two", answer="3")])
    assert [stored.fields[0][1] for stored in store.list_items("two", "u")] == ["planted by two"]
    assert store.load_history("two", "u").label_ids.tolist() == [2]
    assert "of one" not in "".join(store.export("two", "u"))
    assert store.list_items("three", "u") == []
    with pytest.raises(MissingData):
        store.export("three", "u")
    with pytest.raises(MissingData):
        store.delete_item("two", "u", "b")
    add(store, "one", "u", [item("c", "of one too")])
    versions = store.version("one", "u")
    add(store, "two", "u", [item("b", "of two")])
    store.delete_item("two", "u", "a")
    store.erase_user("two", "u")
    assert store.version("one", "u") == versions
    assert [stored.fields[0][1] for stored in store.list_items("one", "u")] == [
        "planted by one",
        "of one",
        "of one too",
    ]


def test_retention_max_items_keeps_newest(place: Place) -> None:
    store = place.open(retention=Retention(max_items=3))
    add(store, "t", "u", [item(str(i), f"text {i}") for i in range(5)])
    assert item_ids(store) == ["2", "3", "4"]
    add(store, "t", "u", [item("old", day=date(2000, 1, 1)), item("5")])
    assert item_ids(store) == ["3", "4", "5"]
    assert len(store.load_history("t", "u")) == 3
    assert add(store, "t", "v", [item("a")]) == (1, 0, 0)


def test_retention_max_days_deletes_older(place: Place) -> None:
    today = datetime.now(UTC).date()
    store = place.open(retention=Retention(max_days=10))
    days = {"edge": 10, "too old": 11, "new": 0}
    add(store, "t", "u", [item(name, day=today - timedelta(days=age)) for name, age in days.items()])
    add(store, "t", "u", [item("undated")])
    assert item_ids(store) == ["edge", "new", "undated"]


@pytest.mark.parametrize("values", [{"max_items": 0}, {"max_days": 0}, {"max_days": -1}])
def test_retention_below_one_raises(values: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="must be 1 to"):
        Retention(**values)
