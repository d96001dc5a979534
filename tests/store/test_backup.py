"""Backups of a store in use: damaged backups are refused, and users who were erased later are not restored."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from stores import ENCODER, Place, add, item, item_ids

from personaplug.errors import ConfigError, MissingData, StorageError, StoreConflict
from personaplug.store.backup import back_up, restore
from personaplug.store.database import execute
from personaplug.store.history_store import HistoryStore
from personaplug.store.refill import copy_erasures


@pytest.fixture
def store(tmp_path: Path) -> HistoryStore:
    store = Place(str(tmp_path / "store.db")).open(secret=None)
    for number in range(30):
        add(store, "t", f"u{number}", [item("a", f"text of u{number}")])
    return store


@pytest.fixture
def backup(tmp_path: Path, store: HistoryStore) -> Path:
    back_up(store, tmp_path / "backup")
    return tmp_path / "backup"


def users(store: HistoryStore) -> list[str]:
    return [f"u{number}" for number in range(30) if item_ids(store, user=f"u{number}")]


def test_copy_of_the_open_database_file_without_its_log_has_all_users(tmp_path: Path, store: HistoryStore) -> None:
    for name in ("store.db", "store.db.secret"):
        shutil.copy(tmp_path / name, tmp_path / f"copy{name.removeprefix('store')}")
    assert len(users(HistoryStore.open(tmp_path / "copy.db", ENCODER))) == 30


def test_backup_of_store_in_use_restores_everything(tmp_path: Path, store: HistoryStore, backup: Path) -> None:
    with store.database.write_transaction() as connection:  # another writer at the same time
        execute(connection, "DELETE FROM history_rewrites")
        back_up(store, tmp_path / "second")
    assert backup.stat().st_mode & 0o777 == 0o600
    restore(backup, tmp_path / "new" / "copy.db", secret=tmp_path / "store.db.secret", current=None)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["copy.db"]
    assert (tmp_path / "new" / "copy.db").stat().st_mode & 0o777 == 0o600
    restored = HistoryStore.open(tmp_path / "new" / "copy.db", ENCODER, secret=tmp_path / "store.db.secret")
    for user in users(store):
        assert restored.list_items("t", user) == store.list_items("t", user)
    assert len(users(restored)) == 30
    assert add(restored, "t", "u1", [item("b")]) == (1, 0, 0)


@pytest.mark.parametrize("offset", [0, 30, 200, -1, 50_000])
def test_restore_of_changed_backup_raises(tmp_path: Path, backup: Path, offset: int) -> None:
    content = bytearray(backup.read_bytes())
    content[offset] ^= 4
    backup.write_bytes(content)
    with pytest.raises(StorageError, match="damaged"):
        restore(backup, tmp_path / "copy.db", secret=tmp_path / "store.db.secret", current=None)
    assert not list(tmp_path.glob("*copy*"))


@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 5000, b"9" * 5000 + b"\n", b"SQLite format 3\0"])
def test_restore_of_other_file_raises(tmp_path: Path, store: HistoryStore, content: bytes) -> None:
    (tmp_path / "backup").write_bytes(content)
    with pytest.raises(StorageError, match="is not a backup"):
        restore(tmp_path / "backup", tmp_path / "copy.db", secret=tmp_path / "store.db.secret", current=None)


def test_restore_of_truncated_or_missing_backup_raises(tmp_path: Path, backup: Path) -> None:
    secret = tmp_path / "store.db.secret"
    backup.write_bytes(backup.read_bytes()[:-100])
    with pytest.raises(StorageError, match="damaged"):
        restore(backup, tmp_path / "copy.db", secret=secret, current=None)
    for name in ("nowhere/file", "."):
        with pytest.raises(MissingData, match="no backup"):
            restore(tmp_path / name, tmp_path / "copy.db", secret=secret, current=None)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("ending", ["-wal", "-journal", "-shm"])
def test_restore_beside_the_log_of_an_earlier_store_raises(tmp_path: Path, backup: Path, ending: str) -> None:
    # SQLite would apply the log to the restored file, and erased users would return.
    log = tmp_path / f"copy.db{ending}"
    log.write_bytes(b"frames of another file")
    with pytest.raises(ConfigError, match="exists"):
        restore(backup, tmp_path / "copy.db", secret=tmp_path / "store.db.secret", current=None)
    assert not (tmp_path / "copy.db").exists()
    assert log.read_bytes() == b"frames of another file"


def test_users_erased_since_the_backup_do_not_return(tmp_path: Path, store: HistoryStore, backup: Path) -> None:
    receipt = store.erase_user("t", "u7")
    with pytest.raises(MissingData):
        store.erase_user("t", "nobody")
    restore(backup, tmp_path / "copy.db", secret=tmp_path / "store.db.secret", current=store)
    restored = HistoryStore.open(tmp_path / "copy.db", secret=tmp_path / "store.db.secret")
    assert len(users(restored)) == 29
    assert restored.has_issued(receipt, user="u7")
    assert restored.erased_at("t", "u7") == store.erased_at("t", "u7")
    assert b"text of u7" not in (tmp_path / "copy.db").read_bytes()
    assert b"text of u8" in (tmp_path / "copy.db").read_bytes()


def test_erasures_are_copied_in_both_databases(tmp_path: Path, place: Place) -> None:
    current = Place(str(tmp_path / "current.db")).open()
    restored = place.open()
    for user in ("u1", "u2", "u3"):
        for each in (current, restored):
            add(each, "t", user, [item("a")])
    current.erase_user("t", "u2")
    assert copy_erasures(current, restored) == 1
    assert copy_erasures(current, restored) == 0
    assert users(restored) == ["u1", "u3"]
    other = Place(str(tmp_path / "other.db")).open(secret=b"another secret, as long")
    with pytest.raises(StoreConflict, match="different secrets"):
        copy_erasures(current, other)


def test_backup_of_damaged_store_raises_and_writes_no_file(tmp_path: Path, store: HistoryStore) -> None:
    with store.database.write_transaction() as connection:
        execute(connection, f"UPDATE {store.shard_of('t', 'u3').items} SET label_id = 2")
    with pytest.raises(StorageError, match="damaged"):
        back_up(store, tmp_path / "backup")
    assert not list(tmp_path.glob("*backup*"))


def test_backup_and_restore_replace_no_file(tmp_path: Path, store: HistoryStore, backup: Path) -> None:
    with pytest.raises(ConfigError, match="exists"):
        back_up(store, backup)
    with pytest.raises(ConfigError, match="exists"):
        restore(backup, tmp_path / "store.db", secret=None, current=None)
    with pytest.raises(MissingData, match="secret"):
        restore(backup, tmp_path / "copy.db", secret=None, current=None)


def test_backup_of_postgres_names_pg_dump(place: Place, tmp_path: Path) -> None:
    if place.server is None:
        pytest.skip("only in PostgreSQL")
    with pytest.raises(ConfigError, match="pg_dump"):
        back_up(place.open(), tmp_path / "backup")
