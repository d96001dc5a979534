"""store.py: histories that change while they are read; the same tests for SQLite and PostgreSQL."""

from __future__ import annotations

import json
import logging
import multiprocessing
import re
import sqlite3
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from cheap_encoder import CheapEncoder
from stores import ENCODER, LABELS, Place, encoded, item, vector_of

from personaplug.data.records import HistoryItem
from personaplug.encoders import HashEncoder
from personaplug.encoders.style_features import text_style
from personaplug.errors import (
    ConfigError,
    EncoderMismatch,
    ItemError,
    MissingData,
    PersonaPlugError,
    ShapeMismatch,
    StorageError,
    StoreConflict,
    UserError,
)
from personaplug.store import writes as store_writing
from personaplug.store.database import Database
from personaplug.store.history_store import HistoryStore, Retention
from personaplug.store.schema import StoreSettings

SECRET_TEXT = "the text of a user"


@pytest.fixture
def store(place: Place) -> Iterator[HistoryStore]:
    store = place.open()
    yield store
    store.close()


def ids(store: HistoryStore, tenant: str = "t", user: str = "u") -> list[str]:
    return [found.id for found in store.list_items(tenant, user)]


# Adding and reading


def test_a_history_comes_back_as_arrays(store: HistoryStore) -> None:
    items = [item("a", "A film!", answer="1"), item("b", "a book", answer=" 3 "), item("c", answer="other")]
    assert store.add("t", "u", [*items, item("d", answer=None)]) == (4, 0, 0)
    history = store.read("t", "u")
    expected = ENCODER.encode([one.text for one in [*items, item("d", answer=None)]])
    assert history.vectors.dtype == history.forms.dtype == np.float16
    assert history.vectors.shape == (4, 32)
    np.testing.assert_array_equal(history.vectors, expected.astype(np.float16))
    assert history.answers.dtype == np.int16
    assert history.answers.tolist() == [0, 2, -1, -1]
    np.testing.assert_array_equal(history.forms[0], text_style("1"))
    assert len(history) == 4


def test_without_the_answers_they_are_not_encoded(place: Place) -> None:
    store = place.open(settings=StoreSettings(encodes_answers=False, shards=1))
    store.add("t", "u", [item("a", answer="1"), item("b", answer="2")])
    one, other = store.read("t", "u").vectors
    np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(one, ENCODER.encode([item("a").content])[0].astype(np.float16))


def test_the_latest_items_are_listed_oldest_first(store: HistoryStore) -> None:
    store.add("t", "u", [item(name) for name in "abcde"])
    assert [one.id for one in store.list_items("t", "u", latest=2)] == ["d", "e"]
    assert [one.id for one in store.list_items("t", "u")] == list("abcde")
    assert store.list_items("t", "nobody", latest=2) == []


def test_an_unknown_user_has_an_empty_history(store: HistoryStore) -> None:
    history = store.read("t", "nobody")
    assert (history.vectors.shape, history.answers.shape, history.forms.shape) == ((0, 32), (0,), (0, 20))
    assert history.version == 0 == store.version("t", "nobody")
    assert store.list_items("t", "nobody") == []


def test_order_is_by_date_and_then_by_arrival(store: HistoryStore) -> None:
    today = datetime.now(UTC).date()
    store.add("t", "u", [item("undated 1"), item("late", day=date(2020, 3, 1)), item("early", day=date(2019, 1, 1))])
    store.add("t", "u", [item("undated 2"), item("to come", day=today + timedelta(days=2))])
    store.add("t", "u", [item("early too", day=date(2019, 1, 1)), item("long ago", day=date(1, 1, 1))])
    expected = ["long ago", "early", "early too", "late", "undated 1", "undated 2", "to come"]
    assert ids(store) == expected


def test_arrays_and_list_are_in_the_same_order(store: HistoryStore) -> None:
    names = [f"{i}" for i in range(20)]
    store.add("t", "u", [item(name, f"text {name}", day=date(2020, 1, 1 + i * 7 % 20)) for i, name in enumerate(names)])
    texts = [f"text: text {name} score: 2" for name in ids(store)]
    np.testing.assert_array_equal(store.read("t", "u").vectors, ENCODER.encode(texts).astype(np.float16))


@pytest.mark.parametrize("latest", [0, 1, 3, 100])
def test_the_latest_items(store: HistoryStore, latest: int) -> None:
    store.add("t", "u", [item(str(i), f"text {i}", answer=LABELS[i % 3]) for i in range(6)])
    full, history = store.read("t", "u"), store.read("t", "u", latest=latest)
    assert len(history) == min(latest, 6)
    np.testing.assert_array_equal(history.vectors, full.vectors[max(6 - latest, 0) :])
    np.testing.assert_array_equal(history.answers, full.answers[max(6 - latest, 0) :])


def test_the_same_item_again_is_neither_stored_nor_encoded(place: Place) -> None:
    encoder = CheapEncoder(32)
    store = place.open(encoder)
    items = [item(str(i), f"text {i}") for i in range(3)]
    store.add("t", "u", items)
    version = store.version("t", "u")
    assert store.add("t", "u", items[1:]) == (0, 0, 2)
    assert (encoder.calls, store.version("t", "u")) == ([3], version)
    assert store.add("t", "u", [*items, item("3", "new")]) == (1, 0, 3)
    assert encoder.calls == [3, 1]


@pytest.mark.parametrize(
    "other", [item("1", "other"), item("1", answer="3"), item("1", answer=None), item("1", day=date(1999, 1, 1))]
)
def test_an_item_with_other_content_replaces_the_one_of_its_id(store: HistoryStore, other: HistoryItem) -> None:
    store.add("t", "u", [item("0"), item("1"), item("2")])
    version = store.version("t", "u")
    assert store.add("t", "u", [other]) == (0, 1, 0)
    assert sorted(ids(store)) == ["0", "1", "2"]
    assert store.version("t", "u") > version
    assert len(store.read("t", "u")) == 3


def test_a_replaced_item_keeps_its_place(store: HistoryStore) -> None:
    store.add("t", "u", [item("0"), item("1"), item("2")])
    before = store.list_items("t", "u")[1].arrived
    store.add("t", "u", [item("1", "other")])
    assert ids(store) == ["0", "1", "2"]
    again = store.list_items("t", "u")[1]
    assert (again.arrived, again.fields[0]) == (before, ("text", "other"))
    expected = ENCODER.encode([item("1", "other").text])[0].astype(np.float16)
    np.testing.assert_array_equal(store.read("t", "u").vectors[1], expected)


def test_of_two_with_one_id_the_later_counts(store: HistoryStore) -> None:
    assert store.add("t", "u", [item("0", "first"), item("1"), item("0", "second")]) == (2, 0, 1)
    assert store.list_items("t", "u")[0].fields[0] == ("text", "second")


def test_many_users_at_once(place: Place) -> None:
    store = place.open(keep_text=False)
    users = [f"u{i % 50}" for i in range(1000)]
    names = [f"i{i}" for i in range(1000)]
    assert store.add_encoded("t", encoded(users, names)) == (1000, 0, 0)
    assert store.add_encoded("t", encoded(users, names)) == (0, 0, 1000)
    for i in (0, 7, 49):
        own = names[i::50]
        history = store.read("t", f"u{i}")
        np.testing.assert_array_equal(history.vectors, np.stack([vector_of(name) for name in own]).astype(np.float16))
        assert history.answers.tolist() == [len(name) % 3 for name in own]
        assert ids(store, user=f"u{i}") == own


def test_encoded_items_with_other_values_replace(place: Place) -> None:
    store = place.open(keep_text=False)
    store.add_encoded("t", encoded(["u"], ["a"]))
    for change in ("vectors", "answers", "forms"):
        other = encoded(["u"], ["a"])
        getattr(other, change)[0] += 1
        assert store.add_encoded("t", other) == (0, 1, 0), change
        assert store.add_encoded("t", other) == (0, 0, 1), change
        store.add_encoded("t", encoded(["u"], ["a"]))


def test_no_items(store: HistoryStore) -> None:
    assert store.add("t", "u", []) == (0, 0, 0)
    assert store.version("t", "u") == 0


def test_int8_keeps_vectors_nearly(place: Place) -> None:
    store = place.open(settings=StoreSettings(precision="int8", shards=1))
    store.add("t", "u", [item("a")])
    (found,) = store.read("t", "u").vectors.astype(np.float32)
    expected = ENCODER.encode([item("a").text])[0]
    assert not np.array_equal(found, expected.astype(np.float16))
    assert found @ expected / np.linalg.norm(found) > 0.9995


def test_any_text_comes_back(store: HistoryStore) -> None:
    texts = ["", "\0", "broken \ud83d", "a film 🙂", "'; DROP TABLE items_0000; --", "x" * 100_000]
    store.add("t", "u", [item(str(i), text, answer=text) for i, text in enumerate(texts)])
    assert [found.fields for found in store.list_items("t", "u")] == [(("text", t), ("score", t)) for t in texts]


# Settings and opening


def test_a_store_is_opened_again(place: Place) -> None:
    place.open().add("t", "u", [item("a", day=date(2020, 5, 17))])
    again = place.open(encoder=None, settings=StoreSettings(labels=LABELS, keep_text=True, shards=2))
    (found,) = again.list_items("t", "u")
    assert (found.id, found.date, found.answer, found.answer_name) == ("a", date(2020, 5, 17), 1, "score")
    assert len(again.read("t", "u")) == 1
    assert HistoryStore.open(place.where, secret=b"sixteen bytes and more").settings == again.settings


def test_another_encoder_is_refused(place: Place) -> None:
    store = place.open()
    with pytest.raises(EncoderMismatch, match=r"hash:32.*hash:64"):
        place.open(HashEncoder(64))
    with pytest.raises(EncoderMismatch):
        place.open(HashEncoder(32, seed=1))
    with pytest.raises(EncoderMismatch):
        store.add_encoded("t", encoded(["u"], ["a"], encoder=HashEncoder(32, seed=1)))
    assert store.list_items("t", "u") == []


@pytest.mark.parametrize(
    "other",
    [{"labels": ("1",)}, {"keep_text": False}, {"precision": "int8"}, {"encodes_answers": False}, {"shards": 3}],
)
def test_other_settings_are_refused(place: Place, other: dict[str, object]) -> None:
    place.open()
    with pytest.raises(StoreConflict, match=next(iter(other))):
        place.open(settings=StoreSettings(**({"labels": LABELS, "keep_text": True, "shards": 2} | other)))  # type: ignore[arg-type]


def test_another_stores_secret_is_refused(place: Place) -> None:
    place.open()
    with pytest.raises(StoreConflict, match="secret"):
        place.open(secret=b"another secret, as long")
    with pytest.raises(ConfigError, match="16 bytes"):
        place.open(secret=b"short")


def test_the_secret_lies_beside_the_database(tmp_path: Path) -> None:
    place = Place(str(tmp_path / "new" / "store.db"))
    place.open(secret=None).add("t", "u", [item("a")])
    beside = tmp_path / "new" / "store.db.secret"
    assert beside.stat().st_mode & 0o777 == 0o600
    assert len(bytes.fromhex(beside.read_text())) == 32
    assert place.open(secret=None).add("t", "u", [item("a")]) == (0, 0, 1)
    beside.rename(tmp_path / "moved")
    with pytest.raises(MissingData, match="put it back"):
        place.open(secret=None)
    assert place.open(secret=tmp_path / "moved").version("t", "u") > 0


def test_postgres_needs_a_secret() -> None:
    with pytest.raises(ConfigError, match="secret"):
        HistoryStore.open("postgresql://nobody@localhost/nothing", ENCODER)


@pytest.mark.parametrize("where", ["sqlite://", "sqlite:///:memory:", "mysql://x/y", "://", "nonsense://a"])
def test_other_places_are_refused(where: str) -> None:
    with pytest.raises(ConfigError, match=r"a path, sqlite:///FILE or postgresql://"):
        HistoryStore.open(where, ENCODER)


def test_an_sqlite_url_is_its_path(tmp_path: Path) -> None:
    HistoryStore.open(f"sqlite:///{tmp_path}/s.db", ENCODER).add("t", "u", [item("a")])
    assert HistoryStore.open(tmp_path / "s.db").version("t", "u") > 0


def test_without_an_encoder_no_store_is_made(place: Place, tmp_path: Path) -> None:
    with pytest.raises(MissingData, match="needs an encoder"):
        place.open(encoder=None)
    assert not list(tmp_path.iterdir())
    place.open()
    with pytest.raises(UserError, match="without an encoder"):
        place.open(encoder=None).add("t", "u", [item("a")])


def test_a_server_that_is_not_there_is_a_storage_error() -> None:
    with pytest.raises(StorageError) as raised:
        HistoryStore.open("postgresql://me:hidden@127.0.0.1:1/x", ENCODER, secret=b"0" * 16)
    assert "hidden" not in str(raised.value)


def test_a_damaged_database_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "store.db").write_bytes(b"no database at all, but long enough to be read as one" * 500)
    (tmp_path / "store.db.secret").write_text("00" * 32)
    with pytest.raises(StorageError, match="damaged"):
        HistoryStore.open(tmp_path / "store.db", ENCODER)


def test_vectors_of_the_wrong_size_on_disk_are_a_storage_error(tmp_path: Path) -> None:
    place = Place(str(tmp_path / "store.db"))
    store = place.open(settings=StoreSettings(shards=1))
    store.add("t", "u", [item("a"), item("b")])
    with sqlite3.connect(place.where) as connection:
        connection.execute("UPDATE vectors_even_0000 SET body = x'00' WHERE key = (SELECT min(key) FROM items_0000)")
    with pytest.raises(StorageError, match="damaged"):
        store.read("t", "u")


def test_a_later_format_is_refused(tmp_path: Path) -> None:
    place = Place(str(tmp_path / "store.db"))
    place.open().close()
    with sqlite3.connect(place.where) as connection:
        connection.execute("UPDATE history_store SET format = 2")
    with pytest.raises(UserError, match="format 2; this version reads format 1"):
        place.open()


@pytest.mark.parametrize("settings", [{"shards": 0}, {"shards": 2000}, {"precision": "int4"}])
def test_settings_out_of_range(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        StoreSettings(**settings)  # type: ignore[arg-type]


def test_importing_the_package_needs_no_sqlalchemy() -> None:
    code = (
        "import sys; sys.modules['sqlalchemy'] = None\n"
        "import personaplug, personaplug.cli.main, personaplug.encoders.encoded_sample, personaplug.plug.personalizer\n"
        "from personaplug.errors import MissingExtra\n"
        "try: import personaplug.store.history_store\n"
        "except MissingExtra as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "the store of histories needs: pip install 'personaplug[serve]'"


def test_the_page_on_the_store_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "store.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert code is not None
    monkeypatch.chdir(tmp_path)
    exec(code.group(1), {})


# Bad input


@pytest.mark.parametrize("bad", ["", "x" * 256, "a\0b", "\ud800", 5, None])
def test_ids_that_cannot_be(store: HistoryStore, bad: str) -> None:
    good = item("a")
    for call in (
        lambda: store.add("t", "u", [good, item(bad)]),
        lambda: store.add("t", bad, [good]),
        lambda: store.add(bad, "u", [good]),
        lambda: store.add_encoded("t", encoded(["u", bad], ["a", "b"])),
        lambda: store.read(bad, "u"),
        lambda: store.read("t", bad),
        lambda: store.delete_item("t", "u", bad),
        lambda: store.erase_user("t", bad),
        lambda: store.version("t", bad),
    ):
        with pytest.raises(ItemError, match="The id of") as raised:
            call()
        assert not isinstance(bad, str) or not bad or bad not in str(raised.value)
    assert store.list_items("t", "u") == []


def test_the_longest_ids(store: HistoryStore) -> None:
    longest = "🙂" * 255
    store.add(longest, longest, [item(longest)])
    assert ids(store, longest, longest) == [longest]


@pytest.mark.parametrize(
    ("column", "value", "error"),
    [
        ("vectors", np.full((2, 32), np.nan), ItemError),
        ("vectors", np.full((2, 32), 1e6), ItemError),
        ("vectors", np.zeros((2, 31)), ShapeMismatch),
        ("vectors", np.zeros((3, 32)), ShapeMismatch),
        ("vectors", np.zeros(32), ShapeMismatch),
        ("answers", np.array([0, 3], dtype=np.int16), ItemError),
        ("answers", np.array([-2, 0], dtype=np.int16), ItemError),
        ("answers", np.zeros(1, dtype=np.int16), ShapeMismatch),
        ("forms", np.zeros((2, 19), dtype=np.float16), ShapeMismatch),
        ("forms", np.full((2, 20), np.nan, dtype=np.float16), ItemError),
        ("users", ["u"], ShapeMismatch),
    ],
)
def test_columns_that_cannot_be(place: Place, column: str, value: object, error: type[UserError]) -> None:
    store, given = place.open(keep_text=False), encoded(["u", "u"], ["a", "b"])
    object.__setattr__(given, column, value)
    with pytest.raises(error):
        store.add_encoded("t", given)
    assert store.list_items("t", "u") == []
    assert store.version("t", "u") == 0


def test_a_store_that_keeps_texts_wants_them(store: HistoryStore) -> None:
    with pytest.raises(ItemError, match="without fields"):
        store.add_encoded("t", encoded(["u"], ["a"]))


def test_an_encoder_that_gives_nan_stores_nothing_and_tells_no_text(place: Place) -> None:
    class Broken(CheapEncoder):
        def encode(self, texts: Sequence[str], *, batch_size: int = 64) -> npt.NDArray[np.float32]:
            vectors = super().encode(texts)
            vectors[[SECRET_TEXT in text for text in texts]] = np.nan
            return vectors

    store = place.open(Broken())
    with pytest.raises(ItemError, match="1 of 2 vectors hold NaN") as raised:
        store.add("t", "u", [item("a"), item("b", SECRET_TEXT)])
    assert SECRET_TEXT not in str(raised.value)
    assert store.version("t", "u") == 0


def test_deleting_what_is_not_there(store: HistoryStore) -> None:
    for call in (
        lambda: store.delete_item("t", "u", "a"),
        lambda: store.erase_user("t", "u"),
        lambda: store.export("t", "u"),
    ):
        with pytest.raises(MissingData, match="no such user"):
            call()
    store.add("t", "u", [item("a")])
    version = store.version("t", "u")
    with pytest.raises(MissingData, match="no item of this id"):
        store.delete_item("t", "u", "b")
    assert store.version("t", "u") == version, "nothing changed"


# No text where none belongs


def test_without_keep_text_no_text_reaches_the_database(place: Place) -> None:
    store = place.open(keep_text=False)
    store.add("t", "u", [item("a", SECRET_TEXT, answer=SECRET_TEXT + "!")])
    store.add("t", "u", [item("a", SECRET_TEXT + " twice")])
    (found,) = store.list_items("t", "u")
    assert (found.fields, found.answer_name, found.answer) == ((), None, 1)
    files = place.files()
    assert ENCODER.encode([item("a", SECRET_TEXT + " twice").text]).astype("<f2").tobytes() in files, "files are read"
    assert SECRET_TEXT.encode() not in files


def test_errors_of_the_database_show_no_text(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    store = place.open()
    store.add("t", "u", [item("a", SECRET_TEXT)])

    def broken(row: store_writing.Row) -> store_writing.Row:
        # What PostgreSQL's driver quotes, SQLite would take for a number's place.
        return row._replace(answer=SECRET_TEXT if place.server else None)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patched:
        rows_of = store_writing.rows_of
        patched.setattr(
            "personaplug.store.history_store.rows_of", lambda *a, **k: [broken(row) for row in rows_of(*a, **k)]
        )
        with pytest.raises(StorageError) as raised:
            store.add("t", "u", [item("b", SECRET_TEXT), item("c", SECRET_TEXT)])
    shown = "".join(traceback.format_exception(raised.value)) + caplog.text
    assert SECRET_TEXT not in shown
    assert SECRET_TEXT.encode().hex() not in shown
    assert ids(store) == ["a"]


def test_no_repr_shows_a_text(store: HistoryStore) -> None:
    store.add("t", "u", [item("a", SECRET_TEXT)])
    shown = repr([store, store.read("t", "u"), store.list_items("t", "u"), encoded(["u"], ["a"])])
    assert SECRET_TEXT not in shown
    assert "StoredHistory(1 items" in shown


# Versions, export, deleting


def test_a_version_grows_with_every_change_and_with_nothing_else(store: HistoryStore) -> None:
    seen = [store.version("t", "u")]

    def grown() -> bool:
        seen.append(store.version("t", "u"))
        return seen[-1] > seen[-2]

    store.add("t", "u", [item("a"), item("b")])
    assert grown()
    store.add("t", "u", [item("c")])
    assert grown()
    store.add("t", "u", [item("c", "other")])
    assert grown()
    store.delete_item("t", "u", "a")
    assert grown()
    store.add("t", "u", [item("b")])
    store.add("t", "other", [item("b")])
    store.add("other", "u", [item("b")])
    store.prune()
    assert not grown()
    assert store.read("t", "u").version == seen[-1]


def test_versions_are_not_given_again_after_an_erasure(store: HistoryStore) -> None:
    store.add("t", "u", [item("a")])
    before = store.version("t", "u")
    store.erase_user("t", "u")
    assert store.version("t", "u") == 0
    store.add("t", "u", [item("a")])
    assert store.version("t", "u") > before


def test_a_clock_that_goes_back_changes_neither_versions_nor_order(
    store: HistoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.add("t", "u", [item("a")])
    before = store.version("t", "u")
    monkeypatch.setattr(store_writing, "now_in_microseconds", lambda: 10**15)
    store.add("t", "u", [item("b")])
    assert store.version("t", "u") > before
    assert ids(store) == ["a", "b"]


def test_an_export_has_everything(store: HistoryStore) -> None:
    store.add("t", "u", [item("a", "A film!", answer="1", day=date(2020, 5, 17)), item("b", answer=None)])
    told = json.loads(json.dumps(store.export("t", "u")))
    assert (told["tenant"], told["user"], told["version"]) == ("t", "u", store.version("t", "u"))
    assert (told["encoder"], told["labels"]) == (ENCODER.identity.to_dict(), list(LABELS))
    first, second = told["items"]
    assert (first["id"], first["date"], first["answer"], first["answer_name"]) == ("a", "2020-05-17", 0, "score")
    assert first["fields"] == [["text", "A film!"], ["score", "1"]]
    assert (second["date"], second["answer_name"]) == (None, None)
    assert abs(datetime.fromisoformat(second["arrived"]) - datetime.now(UTC)) < timedelta(minutes=5)
    np.testing.assert_array_equal(np.array(first["vector"], np.float16), store.read("t", "u").vectors[0])
    np.testing.assert_array_equal(np.array(first["form"], np.float16), text_style("1"))


def test_an_item_is_deleted_with_everything_of_it(store: HistoryStore) -> None:
    store.add("t", "u", [item("a", "one"), item("b", "two"), item("c", "three")])
    store.delete_item("t", "u", "b")
    assert ids(store) == ["a", "c"]
    assert len(store.read("t", "u")) == 2
    assert store.add("t", "u", [item("b", "two")]) == (1, 0, 0)
    assert ids(store) == ["a", "c", "b"], "it comes anew"


# Tenants


def test_tenants_do_not_see_each_other(place: Place) -> None:
    # One shard, so that nothing but the queries keeps them apart.
    store = place.open(settings=StoreSettings(labels=LABELS, keep_text=True, shards=1))
    store.add("one", "u", [item("a", "planted by one", answer="1"), item("b", "of one")])
    store.add("two", "u", [item("a", "planted by two", answer="3")])
    assert [found.fields[0][1] for found in store.list_items("two", "u")] == ["planted by two"]
    assert store.read("two", "u").answers.tolist() == [2]
    assert "of one" not in json.dumps(store.export("two", "u"))
    assert store.list_items("three", "u") == []
    with pytest.raises(MissingData):
        store.export("three", "u")
    with pytest.raises(MissingData):
        store.delete_item("two", "u", "b")
    store.add("one", "u", [item("c", "of one too")])
    versions = store.version("one", "u")
    store.add("two", "u", [item("b", "of two")])
    store.delete_item("two", "u", "a")
    store.erase_user("two", "u")
    assert store.version("one", "u") == versions
    assert [found.fields[0][1] for found in store.list_items("one", "u")] == ["planted by one", "of one", "of one too"]


# Retention


def test_the_latest_items_are_kept(place: Place) -> None:
    store = place.open(retention=Retention(max_items=3))
    store.add("t", "u", [item(str(i), f"text {i}") for i in range(5)])
    assert ids(store) == ["2", "3", "4"]
    store.add("t", "u", [item("old", day=date(2000, 1, 1)), item("5")])
    assert ids(store) == ["3", "4", "5"]
    assert len(store.read("t", "u")) == 3
    assert store.add("t", "v", [item("a")]) == (1, 0, 0)


def test_items_that_are_too_old_are_not_kept(place: Place) -> None:
    today = datetime.now(UTC).date()
    store = place.open(retention=Retention(max_days=10))
    days = {"edge": 10, "too old": 11, "new": 0}
    store.add("t", "u", [item(name, day=today - timedelta(days=age)) for name, age in days.items()])
    store.add("t", "u", [item("undated")])
    assert ids(store) == ["edge", "new", "undated"]


def test_pruning_applies_a_new_retention_to_everybody(place: Place) -> None:
    today = datetime.now(UTC).date()
    before = place.open()
    for user in ("u", "v", "w"):
        before.add("t", user, [item("old", day=today - timedelta(days=30)), *(item(str(i)) for i in range(4))])
    before.add("t", "fine", [item("0")])
    versions = {user: before.version("t", user) for user in ("u", "fine")}
    after = place.open(retention=Retention(max_items=2, max_days=20))
    assert after.prune() == 9
    assert [ids(after, user=user) for user in "uvw"] == [["2", "3"]] * 3
    assert after.version("t", "u") > versions["u"]
    assert after.version("t", "fine") == versions["fine"]
    assert after.prune() == 0
    assert place.open().prune() == 0


@pytest.mark.parametrize("values", [{"max_items": 0}, {"max_days": 0}, {"max_days": -1}])
def test_a_retention_that_keeps_nothing_is_refused(values: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="1 or more"):
        Retention(**values)


# Several at once


def test_threads_add_to_one_user_and_to_their_own(place: Place) -> None:
    store = place.open(keep_text=False, connections=2)

    def work(number: int) -> None:
        for i in range(8):
            store.add_encoded("t", encoded(["shared", f"own {number}"], [f"{number}-{i}", f"{i}"]))
            assert len(store.read("t", f"own {number}")) == i + 1

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    history, names = store.read("t", "shared"), ids(store, user="shared")
    assert sorted(names) == sorted(f"{n}-{i}" for n in range(6) for i in range(8))
    np.testing.assert_array_equal(history.vectors, np.stack([vector_of(name) for name in names]).astype(np.float16))


def test_bulks_that_overlap_do_not_wait_for_each_other_for_ever(place: Place) -> None:
    store = place.open(keep_text=False)
    users = [f"u{i}" for i in range(60)]

    def work(number: int) -> None:
        mine = users if number % 2 else users[::-1]
        for i in range(5):
            store.add_encoded("t", encoded(mine, [f"{number}-{i}"] * len(mine)))
            store.prune()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert {len(store.read("t", user)) for user in users} == {20}


def test_one_item_added_by_many_is_new_once(place: Place) -> None:
    store, barrier = place.open(keep_text=False), threading.Barrier(4)

    def work(_: int) -> tuple[int, int, int]:
        barrier.wait()
        return store.add_encoded("t", encoded(["u"], ["a"]))

    with ThreadPoolExecutor(4) as pool:
        done = sorted(pool.map(work, range(4)))
    assert done == [(0, 0, 1)] * 3 + [(1, 0, 0)]


STORES: list[HistoryStore] = []


def add_in_child(number: int) -> int:
    (store,) = STORES  # the parent's own object, connections and all, as a fork finds it
    for i in range(5):
        store.add_encoded("t", encoded(["u"], [f"{number}-{i}"]))
    return len(store.read("t", "u"))


def test_a_store_goes_through_a_fork(place: Place) -> None:
    store = place.open(keep_text=False)
    store.add_encoded("t", encoded(["u"], ["before"]))
    STORES[:] = [store]
    with multiprocessing.get_context("fork").Pool(3) as pool:
        waiting = pool.map_async(add_in_child, range(3))
        for i in range(10):
            store.add_encoded("t", encoded(["u"], [f"parent-{i}"]))
        assert max(waiting.get(timeout=120)) >= 6
    assert len(store.read("t", "u")) == 1 + 15 + 10


def test_several_processes_make_one_store(place: Place) -> None:
    places[:] = [place]
    with multiprocessing.get_context("fork").Pool(3) as pool:
        assert pool.map_async(open_and_add, range(3)).get(timeout=120) == [(1, 0, 0)] * 3
    assert sorted(ids(place.open())) == ["0", "1", "2"]


def test_processes_that_turn_to_the_log_at_one_moment_wait_for_each_other(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        for i in range(30):
            given = [(tmp_path / f"{i}.db", time.time() + 0.02)] * 4
            assert pool.map_async(begin_at, given, chunksize=1).get(timeout=120) == [True] * 4


def begin_at(given: tuple[Path, float]) -> bool:
    path, moment = given
    while time.time() < moment:
        pass
    with Database(path).writing() as connection:
        return bool(connection.exec_driver_sql("SELECT 1").scalar())


places: list[Place] = []


def open_and_add(number: int) -> tuple[int, int, int]:
    return places[0].open().add("t", "u", [item(str(number))])


def test_a_writer_that_keeps_the_lock_is_a_storage_error_and_nothing_is_written(tmp_path: Path) -> None:
    place = Place(str(tmp_path / "store.db"))
    store = place.open(wait_s=0.2)
    with sqlite3.connect(place.where, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StorageError, match="try again"):
            store.add("t", "u", [item("a")])
        assert store.read("t", "u").version == 0, "readers are not disturbed"
        other.execute("ROLLBACK")
    assert store.add("t", "u", [item("a")]) == (1, 0, 0)


def test_connections_are_bounded(place: Place) -> None:
    store = place.open(connections=2, wait_s=0.2)
    with store._database.reading(), store._database.reading(), pytest.raises(StorageError, match="TimeoutError"):
        store.version("t", "u")
    assert store.version("t", "u") == 0


def test_commits_wait_for_the_disk(tmp_path: Path) -> None:
    store = Place(str(tmp_path / "store.db")).open()
    with store._database.writing() as connection:
        pragmas = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "secure_delete")
        }
    assert pragmas == {"journal_mode": "wal", "synchronous": 2, "secure_delete": 1}


def test_reading_looks_rows_up_by_index(tmp_path: Path) -> None:
    place = Place(str(tmp_path / "store.db"))
    store = place.open(settings=StoreSettings(shards=1))
    store.add("t", "u", [item("a")])
    asked: list[str] = []
    with sqlite3.connect(place.where) as connection:
        from personaplug.store.reads import _history_statement, _user_statement

        shard = store._tables.shards[0]
        for statement in (_user_statement(shard.users), _history_statement(shard.items, shard.vectors[0])):
            compiled = statement.compile(store._database._current())
            plan = connection.execute(
                f"EXPLAIN QUERY PLAN {compiled}", [1] * len(compiled.positiontup or ())
            ).fetchall()
            asked += [row[3] for row in plan]
    assert asked
    assert all(step.startswith("SEARCH") for step in asked), asked


def test_nothing_but_our_own_errors_comes_out(place: Place) -> None:
    store = place.open()
    with store._database.writing() as connection:
        for number in range(2):
            connection.exec_driver_sql(f"DROP TABLE items_{number:04d}")
    with pytest.raises(PersonaPlugError):
        store.add("t", "u", [item("a")])
