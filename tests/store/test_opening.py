"""Opening and creating stores: settings, secrets, locations, damaged files."""

from __future__ import annotations

import multiprocessing
import sqlite3
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest
from markdown_code import code_in
from stores import ENCODER, LABELS, Place, add, add_encoded, encoded, item, item_ids

from personaplug.encoders import HashEncoder
from personaplug.errors import ConfigError, EncoderMismatch, MissingData, StorageError, StoreConflict, UserError
from personaplug.store.history_store import HistoryStore
from personaplug.store.schema import StoreSettings

PLACES: list[Place] = []


def test_open_existing_store_keeps_items_and_settings(place: Place) -> None:
    add(place.open(), "t", "u", [item("a", day=date(2020, 5, 17))])
    again = place.open(encoder=None, settings=StoreSettings(labels=LABELS, keep_text=True, shards=2))
    (stored,) = again.list_items("t", "u")
    assert (stored.id, stored.date, stored.label_id, stored.answer_name) == ("a", date(2020, 5, 17), 1, "score")
    assert len(again.load_history("t", "u")) == 1
    assert HistoryStore.open(place.where, secret=b"sixteen bytes and more").settings == again.settings


def test_open_other_encoder_raises(place: Place) -> None:
    store = place.open()
    with pytest.raises(EncoderMismatch, match=r"hash:32.*hash:64"):
        place.open(HashEncoder(64))
    with pytest.raises(EncoderMismatch):
        place.open(HashEncoder(32, seed=1))
    with pytest.raises(EncoderMismatch):
        add_encoded(store, "t", encoded(["u"], ["a"], encoder=HashEncoder(32, seed=1)))
    assert store.list_items("t", "u") == []


@pytest.mark.parametrize(
    "other",
    [{"labels": ("1",)}, {"keep_text": False}, {"encodes_answers": False}, {"shards": 3}],
)
def test_open_other_settings_raises(place: Place, other: dict[str, object]) -> None:
    place.open()
    with pytest.raises(StoreConflict, match=next(iter(other))):
        place.open(settings=StoreSettings(**({"labels": LABELS, "keep_text": True, "shards": 2} | other)))  # type: ignore[arg-type]


def test_open_other_secret_raises(place: Place) -> None:
    place.open()
    with pytest.raises(StoreConflict, match="secret"):
        place.open(secret=b"another secret, as long")
    with pytest.raises(ConfigError, match="16 bytes"):
        place.open(secret=b"short")


def test_open_without_secret_creates_file_beside_database(tmp_path: Path) -> None:
    place = Place(str(tmp_path / "new" / "store.db"))
    add(place.open(secret=None), "t", "u", [item("a")])
    secret_file = tmp_path / "new" / "store.db.secret"
    assert secret_file.stat().st_mode & 0o777 == 0o600
    assert len(bytes.fromhex(secret_file.read_text())) == 32
    assert add(place.open(secret=None), "t", "u", [item("a")]) == (0, 0, 1)
    secret_file.rename(tmp_path / "moved")
    with pytest.raises(MissingData, match="name it with --secret"):
        place.open(secret=None)
    assert place.open(secret=tmp_path / "moved").version("t", "u") > 0


def test_open_postgres_without_secret_raises() -> None:
    with pytest.raises(ConfigError, match="secret"):
        HistoryStore.open("postgresql://nobody@localhost/nothing", ENCODER)


@pytest.mark.parametrize("where", ["sqlite://", "sqlite:///:memory:", "mysql://x/y", "://", "nonsense://a"])
def test_open_unsupported_location_raises(where: str) -> None:
    with pytest.raises(ConfigError, match=r"a path, sqlite:///FILE or postgresql://"):
        HistoryStore.open(where, ENCODER)


def test_open_sqlite_url_equals_path(tmp_path: Path) -> None:
    add(HistoryStore.open(f"sqlite:///{tmp_path}/s.db", ENCODER), "t", "u", [item("a")])
    assert HistoryStore.open(tmp_path / "s.db").version("t", "u") > 0


def test_open_refuses_a_folder_and_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("user,title,stars\n", encoding="utf-8")
    for path, message in ((tmp_path, "is a folder"), (tmp_path / "log.csv", "is no history store")):
        with pytest.raises(ConfigError, match=message):
            HistoryStore.open(path)


def test_open_without_encoder_creates_no_store(place: Place, tmp_path: Path) -> None:
    with pytest.raises(MissingData, match="give an encoder"):
        place.open(encoder=None)
    assert not list(tmp_path.iterdir())
    place.open()
    with pytest.raises(UserError, match="without an encoder"):
        add(place.open(encoder=None), "t", "u", [item("a")])


def test_open_unreachable_server_raises_without_password() -> None:
    with pytest.raises(StorageError) as raised:
        HistoryStore.open("postgresql://me:hidden@127.0.0.1:1/x", ENCODER, secret=b"0" * 16)
    assert "hidden" not in str(raised.value)


def test_open_damaged_database_raises(tmp_path: Path) -> None:
    (tmp_path / "store.db").write_bytes(b"this is not a database, but it is as long as a database" * 500)
    (tmp_path / "store.db.secret").write_text("00" * 32)
    with pytest.raises(StorageError, match="damaged"):
        HistoryStore.open(tmp_path / "store.db", ENCODER)


def test_load_history_damaged_vector_raises(tmp_path: Path) -> None:
    place = Place(str(tmp_path / "store.db"))
    store = place.open(settings=StoreSettings(shards=1))
    add(store, "t", "u", [item("a"), item("b")])
    with sqlite3.connect(place.where) as connection:
        connection.execute("UPDATE items_0000 SET body = x'00' WHERE key = (SELECT min(key) FROM items_0000)")
    with pytest.raises(StorageError, match="damaged"):
        store.load_history("t", "u")


def test_open_later_format_raises(tmp_path: Path) -> None:
    place = Place(str(tmp_path / "store.db"))
    place.open().close()
    with sqlite3.connect(place.where) as connection:
        connection.execute("UPDATE history_store SET format = 6")
    with pytest.raises(UserError, match="format 6; this version reads format 5"):
        place.open()


@pytest.mark.parametrize("settings", [{"shards": 0}, {"shards": 2000}])
def test_settings_out_of_range_raise(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        StoreSettings(**settings)  # type: ignore[arg-type]


def test_package_import_needs_no_sqlalchemy() -> None:
    code = (
        "import sys; sys.modules['sqlalchemy'] = None\n"
        "import personaplug, personaplug.cli.main, personaplug.encoders.encoded_sample, personaplug.plug.personalizer\n"
        "from personaplug.errors import MissingExtra\n"
        "try: import personaplug.store.history_store\n"
        "except MissingExtra as error: print(error)\n"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (
        process.stdout.strip()
        == "the store of histories needs the extra 'serve'. Install it: pip install 'personaplug[serve]'"
    )


def test_docs_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "store.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    exec(code_in(page, "python")[0], {})


def test_open_by_several_processes_creates_one_store(place: Place) -> None:
    PLACES[:] = [place]
    with multiprocessing.get_context("fork").Pool(3) as pool:
        assert pool.map_async(open_and_add, range(3)).get(timeout=120) == [(1, 0, 0)] * 3
    assert sorted(item_ids(place.open())) == ["0", "1", "2"]


def test_sqlite_pragmas_are_durable_and_secure(tmp_path: Path) -> None:
    store = Place(str(tmp_path / "store.db")).open()
    with store.database.write_transaction() as connection:
        pragmas = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "secure_delete")
        }
    assert pragmas == {"journal_mode": "wal", "synchronous": 2, "secure_delete": 1}


def open_and_add(number: int) -> tuple[int, int, int]:
    return add(PLACES[0].open(), "t", "u", [item(str(number))])


@pytest.mark.parametrize("is_replaced", [False, True])
def test_store_whose_file_was_removed_or_replaced_is_not_used(tmp_path: Path, is_replaced: bool) -> None:
    # SQLite continues with the old file, so items would be lost, and an erased user would stay in the new file.
    store = Place(str(tmp_path / "store.db")).open()
    add(store, "t", "u", [item("a")])
    content = (tmp_path / "store.db").read_bytes()
    (tmp_path / "store.db").rename(tmp_path / "old.db")
    if is_replaced:
        (tmp_path / "store.db").write_bytes(content)
    calls = (
        lambda: add(store, "t", "u", [item("b")]),
        lambda: store.erase_user("t", "u"),
        lambda: store.count("t", "u"),
        store.ping,
    )
    for call in calls:
        with pytest.raises(StorageError, match="was replaced" if is_replaced else "FileNotFoundError"):
            call()
    assert (tmp_path / "store.db").exists() == is_replaced
    (tmp_path / "old.db").replace(tmp_path / "store.db")
    assert add(store, "t", "u", [item("b")]) == (1, 0, 0)
    store.ping()
