"""Invalid input and failures: nothing is stored, and no message contains user text."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pytest
from cheap_encoder import CheapEncoder
from stores import ENCODER, Place, add, add_encoded, encoded, item, item_ids

from personaplug.encoders.style_features import FEATURES
from personaplug.errors import ItemError, MissingData, PersonaPlugError, ShapeMismatch, StorageError, UserError
from personaplug.store import writes
from personaplug.store.history_store import HistoryStore

SECRET_TEXT = "the text of a user"


@pytest.fixture
def store(place: Place) -> Iterator[HistoryStore]:
    store = place.open()
    yield store
    store.close()


@pytest.mark.parametrize(
    "bad", ["", " \u3000 ", "x" * 256, "a\0b", "\ud800", "J\ufffdrgen", "a\nb", "a\u202eb", "a\x85", 5, 2**64, None]
)
def test_invalid_id_raises_without_showing_it(store: HistoryStore, bad: str) -> None:
    good = item("a")
    for call in (
        lambda: add(store, "t", "u", [good, item(bad)]),
        lambda: add(store, "t", bad, [good]),
        lambda: add(store, bad, "u", [good]),
        lambda: add_encoded(store, "t", encoded(["u", bad], ["a", "b"])),
        lambda: store.load_history(bad, "u"),
        lambda: store.load_history("t", bad),
        lambda: store.delete_item("t", "u", bad),
        lambda: store.erase_user("t", bad),
        lambda: store.version("t", bad),
    ):
        with pytest.raises(ItemError, match="The id of") as raised:
            call()
        assert not isinstance(bad, str) or not bad or bad not in str(raised.value)
    assert store.list_items("t", "u") == []


def test_longest_id_is_accepted(store: HistoryStore) -> None:
    longest = "🙂" * 255
    add(store, longest, longest, [item(longest)])
    assert item_ids(store, longest, longest) == [longest]


@pytest.mark.parametrize(
    ("column", "value", "error"),
    [
        ("vectors", np.full((2, 32), np.nan), ItemError),
        ("vectors", np.full((2, 32), 1e6), ItemError),
        ("vectors", np.zeros((2, 31)), ShapeMismatch),
        ("vectors", np.zeros((3, 32)), ShapeMismatch),
        ("vectors", np.zeros(32), ShapeMismatch),
        ("label_ids", np.array([0, 3], dtype=np.int16), ItemError),
        ("label_ids", np.array([-2, 0], dtype=np.int16), ItemError),
        ("label_ids", np.zeros(1, dtype=np.int16), ShapeMismatch),
        ("style", np.zeros((2, len(FEATURES) - 1), dtype=np.float16), ShapeMismatch),
        ("style", np.full((2, len(FEATURES)), np.nan, dtype=np.float16), ItemError),
        ("users", ["u"], ShapeMismatch),
    ],
)
def test_add_encoded_invalid_column_stores_none(
    place: Place, column: str, value: object, error: type[UserError]
) -> None:
    store, items = place.open(keep_text=False), encoded(["u", "u"], ["a", "b"])
    object.__setattr__(items, column, value)
    with pytest.raises(error):
        add_encoded(store, "t", items)
    assert store.list_items("t", "u") == []
    assert store.version("t", "u") == 0


def test_add_encoded_without_fields_raises_if_texts_are_kept(store: HistoryStore) -> None:
    with pytest.raises(ItemError, match="needs fields"):
        add_encoded(store, "t", encoded(["u"], ["a"]))


def test_add_nan_vectors_stores_nothing_and_shows_no_text(place: Place) -> None:
    class Broken(CheapEncoder):
        def encode(self, texts: Sequence[str], *, batch_size: int = 64) -> npt.NDArray[np.float32]:
            vectors = super().encode(texts)
            vectors[[SECRET_TEXT in text for text in texts]] = np.nan
            return vectors

    store = place.open(Broken())
    with pytest.raises(ItemError, match="1 of 2 vectors have NaN") as raised:
        add(store, "t", "u", [item("a"), item("b", SECRET_TEXT)])
    assert SECRET_TEXT not in str(raised.value)
    assert store.version("t", "u") == 0


def test_delete_unknown_user_or_item_raises(store: HistoryStore) -> None:
    for call in (
        lambda: store.delete_item("t", "u", "a"),
        lambda: store.erase_user("t", "u"),
        lambda: store.export("t", "u"),
    ):
        with pytest.raises(MissingData, match="no such user"):
            call()
    add(store, "t", "u", [item("a")])
    version = store.version("t", "u")
    with pytest.raises(MissingData, match="no item with this id"):
        store.delete_item("t", "u", "b")
    assert store.version("t", "u") == version, "nothing changed"


def test_keep_text_false_writes_no_text(place: Place) -> None:
    store = place.open(keep_text=False)
    add(store, "t", "u", [item("a", SECRET_TEXT, answer=SECRET_TEXT + "!")])
    add(store, "t", "u", [item("a", SECRET_TEXT + " twice")])
    (stored,) = store.list_items("t", "u")
    assert (stored.fields, stored.answer_name, stored.label_id) == ((), None, 1)
    files = place.files()
    assert ENCODER.encode([item("a", SECRET_TEXT + " twice").text]).astype("<f2").tobytes() in files, (
        "the search finds stored bytes"
    )
    assert SECRET_TEXT.encode() not in files


def test_database_error_shows_no_text(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    store = place.open()
    add(store, "t", "u", [item("a", SECRET_TEXT)])

    def broken(*_: object, **__: object) -> str | None:
        # PostgreSQL's driver quotes the text in its error. SQLite would accept the text, so it gets None.
        return SECRET_TEXT if place.server else None

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(writes, "checksum_of_item", broken)
        with pytest.raises(StorageError) as raised:
            add(store, "t", "u", [item("b", SECRET_TEXT), item("c", SECRET_TEXT)])
    messages = "".join(traceback.format_exception(raised.value)) + caplog.text
    assert SECRET_TEXT not in messages
    assert SECRET_TEXT.encode().hex() not in messages
    assert item_ids(store) == ["a"]


def test_repr_shows_no_text(store: HistoryStore) -> None:
    add(store, "t", "u", [item("a", SECRET_TEXT)])
    text = repr([store, store.load_history("t", "u"), store.list_items("t", "u"), encoded(["u"], ["a"])])
    assert SECRET_TEXT not in text
    assert "StoredHistory(1 items" in text


def test_database_error_is_package_error(place: Place) -> None:
    store = place.open()
    with store.database.write_transaction() as connection:
        for number in range(2):
            connection.exec_driver_sql(f"DROP TABLE items_{number:04d}")
    with pytest.raises(PersonaPlugError):
        add(store, "t", "u", [item("a")])
