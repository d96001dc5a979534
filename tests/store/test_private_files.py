"""Only their owner may read a store's files, independent of the umask."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from stores import ENCODER, add, item

from personaplug.store.backup import back_up
from personaplug.store.history_store import HistoryStore
from personaplug.store.private_files import ensure_private


@pytest.fixture(params=[0, 0o022, 0o777])
def umask(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}


def test_new_files_and_folders_are_private(tmp_path: Path, umask: int) -> None:
    folder = tmp_path / "new" / "inner"
    if umask == 0o777:  # a new folder with this umask cannot be entered
        folder = tmp_path
    store = HistoryStore.open(folder / "s.db", ENCODER)
    add(store, "t", "u", [item("a")])
    names = {"s.db", "s.db-wal", "s.db-shm", "s.db.secret"}
    assert modes(folder) == dict.fromkeys(names, 0o600)
    if folder != tmp_path:
        back_up(store, folder / "backup")
        assert modes(folder)["backup"] == 0o600
        assert {path.stat().st_mode & 0o777 for path in (folder, folder.parent)} == {0o700}


def test_files_that_others_may_read_are_closed_to_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = HistoryStore.open(tmp_path / "s.db", ENCODER)
    add(store, "t", "u", [item("a")])
    for name in modes(tmp_path):
        (tmp_path / name).chmod(0o644)
    HistoryStore.open(tmp_path / "s.db", ENCODER)
    assert set(modes(tmp_path).values()) == {0o600}
    assert caplog.text.count("Other users of this machine could open") == 4
    HistoryStore.open(tmp_path / "s.db", ENCODER)
    assert caplog.text.count("Other users of this machine could open") == 4


def test_pipes_and_devices_keep_their_rights(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    pipe.chmod(0o666)
    ensure_private(pipe)
    assert pipe.stat().st_mode & 0o777 == 0o666
