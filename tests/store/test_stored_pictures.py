"""Items with pictures and vectors from elsewhere in the store: kept or not, replaced, deleted, erased and restored."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import pytest
from drawn_pictures import noise_png
from picture_rows import data_url
from stores import LABELS, Place, add, add_encoded

from personaplug.cli.histories import histories_of_data
from personaplug.config import Config
from personaplug.data.lamp_writer import write_lamp
from personaplug.data.parsing import vector_of
from personaplug.data.pictures import Picture
from personaplug.data.records import HistoryItem, Sample
from personaplug.data.task import Task
from personaplug.encoders import HashEncoder, open_encoder
from personaplug.encoders.base import encode_items
from personaplug.errors import ItemError, MissingData, StorageError, StoreConflict
from personaplug.run import Run
from personaplug.store.backup import back_up, restore
from personaplug.store.database import execute
from personaplug.store.history_store import EncodedItems, HistoryStore, Retention, StoreSettings
from personaplug.store.loading import load_histories
from personaplug.store.refill import open_target, refill
from personaplug.store.schema import Shard

ENCODER = open_encoder("hash:16+pictures:pixels+vectors:catalogue:8")
SETTINGS = StoreSettings(labels=LABELS, keep_text=True, keep_pictures=True, shards=1)
TASK = Task("Things", "label", ("text", "score"), "score", ("accuracy",), labels=LABELS, image_field="photo")


def pictured(
    name: str,
    text: str = "a thing",
    *,
    seed: int | None = 1,
    numbers: list[float] | None = None,
    day: date | None = None,
) -> HistoryItem:
    """Return an item with a picture of noise unless `seed` is None, and with a vector if `numbers` are given."""
    picture = None if seed is None else Picture(noise_png(seed))
    vector = None if numbers is None else vector_of(numbers, "its vector")
    return HistoryItem(name, (("text", text), ("score", "2")), "score", day, picture=picture, vector=vector)


def numbers_of(seed: int) -> list[float]:
    return [float(number) for number in np.random.default_rng(seed).standard_normal(8)]


def traces(item: HistoryItem) -> list[bytes]:
    """Return the bytes to search for an item: parts of its picture, its joint vector, its vector from elsewhere."""
    vectors = encode_items(ENCODER, [item.encoded(with_answer=True)])
    found = [vectors.astype("<f2").tobytes()]
    if item.picture:
        content = item.picture.read()
        found += [content[start : start + 64] for start in (60, len(content) // 2, len(content) - 128)]
    if item.vector:
        found += [item.vector, vectors[:, -8:].astype("<f2").tobytes()]
    return found


def count_pictures(store: HistoryStore) -> int:
    with store.database.read_transaction() as connection:
        return int(execute(connection, f"SELECT count(*) FROM {Shard(0).pictures}").scalar_one())


def test_kept_picture_is_returned_with_its_bytes(place: Place) -> None:
    store = place.open(ENCODER, settings=SETTINGS)
    items = [pictured("both", numbers=numbers_of(1)), pictured("picture", " "), pictured("text", seed=None)]
    assert add(store, "t", "u", items) == (3, 0, 0)
    expected = encode_items(ENCODER, [item.encoded(with_answer=True) for item in items]).astype(np.float16)
    np.testing.assert_array_equal(store.load_history("t", "u").vectors, expected)
    both, picture, text = store.list_items("t", "u")
    assert (both.parts, picture.parts, text.parts) == (("picture", "vector"), ("picture",), ())
    assert (both.picture_bytes, text.picture_bytes) == (len(noise_png(1)), None)
    assert both.picture is None, "a list does not load pictures"
    assert store.load_picture("t", "u", "both").read() == noise_png(1)
    for user, item, message in (
        ("u", "text", "has no picture"),
        ("u", "x", "no item"),
        ("nobody", "x", "no such user"),
    ):
        with pytest.raises(MissingData, match=message):
            store.load_picture("t", user, item)


def test_store_without_keep_pictures_holds_no_byte_of_them(place: Place) -> None:
    store = place.open(ENCODER, settings=replace(SETTINGS, keep_pictures=False))
    item = pictured("a", seed=100, numbers=numbers_of(100))
    add(store, "t", "u", [item])
    joint, *of_picture, raw, _ = traces(item)
    files = place.files()
    assert joint in files
    assert not any(trace in files for trace in [*of_picture, raw])
    (stored,) = store.list_items("t", "u")
    assert (stored.parts, stored.picture_bytes) == (("picture", "vector"), None)
    assert add(store, "t", "u", [item]) == (0, 0, 1)
    assert add(store, "t", "u", [pictured("a", seed=101, numbers=numbers_of(100))]) == (0, 1, 0)
    with pytest.raises(MissingData, match="keeps no pictures"):
        store.load_picture("t", "u", "a")


def test_pictures_are_kept_without_texts(place: Place) -> None:
    store = place.open(ENCODER, settings=replace(SETTINGS, keep_text=False))
    add(store, "t", "u", [pictured("a", "a secret text")])
    assert b"a secret text" not in place.files()
    assert store.list_items("t", "u")[0].fields == ()
    assert store.load_picture("t", "u", "a").read() == noise_png(1)


def test_same_id_with_another_picture_or_vector_replaces_the_item(place: Place) -> None:
    store = place.open(ENCODER, settings=SETTINGS)
    first = pictured("a", numbers=numbers_of(1))
    add(store, "t", "u", [first])
    assert add(store, "t", "u", [pictured("a", numbers=numbers_of(1))]) == (0, 0, 1)
    assert add(store, "t", "u", [pictured("a", seed=2, numbers=numbers_of(1))]) == (0, 1, 0)
    assert store.load_picture("t", "u", "a").read() == noise_png(2)
    before = store.load_history("t", "u").vectors
    assert add(store, "t", "u", [pictured("a", seed=2, numbers=numbers_of(2))]) == (0, 1, 0)
    assert not np.array_equal(store.load_history("t", "u").vectors, before)
    assert add(store, "t", "u", [pictured("a", seed=None)]) == (0, 1, 0)
    assert (store.list_items("t", "u")[0].parts, count_pictures(store)) == ((), 0)


def test_encoded_item_without_fields_is_replaced_by_one_with_another_picture(place: Place) -> None:
    store = place.open(ENCODER, settings=replace(SETTINGS, keep_text=False))
    vectors = encode_items(ENCODER, ["a text"])
    for seed, counts in ((1, (1, 0, 0)), (1, (0, 0, 1)), (2, (0, 1, 0))):
        item = HistoryItem("a", (), picture=Picture(noise_png(seed)))
        assert add_encoded(store, "t", EncodedItems(["u"], [item], vectors, ENCODER.identity)) == counts
    assert store.load_picture("t", "u", "a").read() == noise_png(2)


def test_deleted_and_expired_items_take_their_pictures_along(place: Place) -> None:
    store = place.open(ENCODER, settings=SETTINGS, retention=Retention(max_items=2))
    add(store, "t", "u", [pictured(name, name, seed=seed) for seed, name in enumerate("abc")])
    assert count_pictures(store) == 2
    store.delete_item("t", "u", "b")
    assert count_pictures(store) == 1
    store.close()
    store = place.open(ENCODER, settings=SETTINGS, retention=Retention(max_days=30))
    add(store, "t", "old", [pictured("a", day=date(2020, 1, 1))])
    assert count_pictures(store) == 1
    assert store.load_picture("t", "u", "c").read() == noise_png(2)


def test_expired_picture_is_not_returned_before_it_is_removed(place: Place) -> None:
    store = place.open(ENCODER, settings=SETTINGS)
    old = pictured("old", seed=201, day=date(2020, 1, 1))
    add(store, "t", "u", [old, pictured("new", seed=202)])
    store.retention = Retention(max_days=30)
    assert count_pictures(store) == 2
    with pytest.raises(MissingData, match="no item"):
        store.load_picture("t", "u", "old")
    assert all(trace in place.files() for trace in traces(old))
    store.maintain()
    assert count_pictures(store) == 1
    assert not any(trace in place.files() for trace in traces(old))


def test_erasure_leaves_no_byte_of_pictures_and_vectors(place: Place) -> None:
    store = place.open(ENCODER, settings=SETTINGS)
    mine = [pictured(str(seed), seed=seed, numbers=numbers_of(seed)) for seed in range(1, 6)]
    others = [pictured(str(seed), seed=seed, numbers=numbers_of(seed)) for seed in range(6, 9)]
    for turn in range(5):  # in turn, so that the rows of both users share pages
        add(store, "t", "erased", [mine[turn]])
        add(store, "t", "kept", others[turn : turn + 1])
    replaced, removed = pictured("1", seed=11), pictured("removed", seed=12)
    add(store, "t", "erased", [replaced, removed])
    store.delete_item("t", "erased", "removed")
    own_traces = [trace for item in (*mine[1:], replaced) for trace in traces(item)[:-2]]
    files = place.files()
    assert all(trace in files for trace in own_traces), "the search finds stored items"

    receipt = store.erase_user("t", "erased")

    assert receipt.wiped == ("tables", "log")
    files = place.files()
    assert not any(trace in files for item in (*mine, replaced, removed) for trace in traces(item))
    assert all(traces(item)[1] in files for item in others)
    assert store.load_picture("t", "kept", "6").read() == noise_png(6)


def test_export_has_kept_pictures_as_data_urls(place: Place) -> None:
    store = place.open(ENCODER, settings=SETTINGS)
    add(store, "t", "u", [pictured(f"{n}", f"text {n}", seed=n or None, numbers=numbers_of(n)) for n in range(5)])
    exported = json.loads("".join(store.export("t", "u")))["items"]
    urls = [data_url(noise_png(n)) if n else None for n in range(5)]
    assert [item["picture"] for item in exported] == urls
    assert [item["parts"] for item in exported] == [["vector"], *[["picture", "vector"]] * 4]
    assert {len(item["vector"]) for item in exported} == {ENCODER.width}


def test_item_with_a_part_that_the_encoder_does_not_read_is_refused(place: Place) -> None:
    store = place.open(HashEncoder(16), settings=SETTINGS)
    for item in (pictured("a"), pictured("a", seed=None, numbers=[1.0, 2.0])):
        with pytest.raises(ItemError, match=r"a part for it.*Nothing was stored"):
            add(store, "t", "u", [pictured("text", seed=None), item])
    assert store.version("t", "u") == 0


def test_loading_names_the_item_with_a_vector_of_another_width(place: Place) -> None:
    store = place.open(ENCODER, settings=SETTINGS)
    items = [pictured("right", numbers=numbers_of(1)), pictured("narrow", numbers=[1.0, 2.0])]
    with pytest.raises(ItemError, match=r"^item narrow: .* each; found 2\. No item of its batch was stored\."):
        load_histories(store, "t", {"u": items})
    assert store.version("t", "u") == 0


def test_backup_has_the_pictures_and_finds_a_damaged_one(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    with closing(Place(str(path)).open(ENCODER, settings=SETTINGS, secret=None)) as store:
        add(store, "t", "u", [pictured("a"), pictured("b", seed=2)])
        back_up(store, tmp_path / "backup")
        restore(tmp_path / "backup", tmp_path / "new.db", secret=None, current=store)
    with closing(HistoryStore.open(tmp_path / "new.db", ENCODER)) as restored:
        assert restored.load_picture("t", "u", "b").read() == noise_png(2)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE pictures_0000 SET body = ?", [noise_png(1).replace(b"IEND", b"IENE")])
    with closing(HistoryStore.open(path, ENCODER)) as store:
        assert len(store.list_items("t", "u")) == 2
        with pytest.raises(StorageError, match="a picture differs"):
            store.load_picture("t", "u", "a")
        with pytest.raises(StorageError, match="a picture differs"):
            back_up(store, tmp_path / "another")
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("DELETE FROM pictures_0000")
    with closing(HistoryStore.open(path, ENCODER)) as store, pytest.raises(StorageError, match="an item differs"):
        store.list_items("t", "u")


def test_refill_encodes_kept_pictures_again(place: Place, tmp_path: Path) -> None:
    source, other = place.open(ENCODER, settings=SETTINGS), open_encoder("hash:32+pictures:pixels")
    items = [pictured(f"{n}", f"text {n}", seed=n or None) for n in range(4)]
    add(source, "t", "u", items)
    target = open_target(source, tmp_path / "new.db", other, settings=StoreSettings(labels=LABELS), save_secret=False)
    assert refill(source, target) == 1
    expected = encode_items(other, [item.encoded(with_answer=True) for item in items]).astype(np.float16)
    np.testing.assert_array_equal(target.load_history("t", "u").vectors, expected)
    assert target.load_picture("t", "u", "3").read() == noise_png(3)
    assert add(target, "t", "u", items) == (0, 0, 4)


@pytest.mark.parametrize(
    ("item", "message"),
    [(pictured("a"), "keeps no pictures"), (pictured("a", seed=None, numbers=numbers_of(1)), "vector from elsewhere")],
)
def test_refill_refuses_parts_that_are_not_kept(tmp_path: Path, item: HistoryItem, message: str) -> None:
    source = Place(str(tmp_path / "old.db")).open(ENCODER, settings=replace(SETTINGS, keep_pictures=False))
    add(source, "t", "u", [item])
    other, settings = open_encoder("hash:32+pictures:pixels+vectors:catalogue:8"), StoreSettings(labels=LABELS)
    target = open_target(source, tmp_path / "new.db", other, settings=settings, save_secret=False)
    with pytest.raises(StoreConflict, match=message):
        refill(source, target)
    assert target.version("t", "u") == 0
    of_texts = open_target(source, tmp_path / "text.db", HashEncoder(32), settings=settings, save_secret=False)
    assert refill(source, of_texts) == 1, "an encoder of texts needs no other part"
    expected = HashEncoder(32).encode([item.text]).astype(np.float16)
    np.testing.assert_array_equal(of_texts.load_history("t", "u").vectors, expected)
    assert of_texts.list_items("t", "u")[0].parts == ()


def test_refill_for_an_encoder_of_texts_drops_kept_pictures(tmp_path: Path) -> None:
    source = Place(str(tmp_path / "old.db")).open(ENCODER, settings=SETTINGS)
    add(source, "t", "u", [pictured("a")])
    settings = StoreSettings(labels=LABELS)
    target = open_target(source, tmp_path / "new.db", HashEncoder(32), settings=settings, save_secret=False)
    assert refill(source, target) == 1
    assert (target.list_items("t", "u")[0].parts, count_pictures(target)) == ((), 0)


def test_data_folder_with_pictures_loads_into_a_store(place: Place, tmp_path: Path) -> None:
    items = tuple(pictured(f"i{n}", f"thing {n}", seed=n) for n in range(3))
    write_lamp([Sample("s", "ann", "thing", "thing", "2", items)], tmp_path / "data", "train", task=TASK)
    histories = histories_of_data(tmp_path / "data", Run(tmp_path, Config(), TASK, tmp_path))
    store = place.open(ENCODER, settings=SETTINGS)
    assert load_histories(store, "t", histories).items == (3, 0, 0)
    assert load_histories(store, "t", histories).items == (0, 0, 3)
    assert store.load_picture("t", "ann", "i2").read() == noise_png(2)
    expected = encode_items(ENCODER, [item.encoded(with_answer=True) for item in items]).astype(np.float16)
    np.testing.assert_array_equal(store.load_history("t", "ann").vectors, expected)
