"""The commands that back a store up and restore it."""

from __future__ import annotations

import shutil
from pathlib import Path

from click.testing import CliRunner, Result
from stores import ENCODER, add, item

from personaplug.cli.main import main
from personaplug.store.history_store import HistoryStore


def call(*words: object) -> Result:
    return CliRunner().invoke(main, list(map(str, words)))


def test_backup_restore_and_replay(tmp_path: Path) -> None:
    store = HistoryStore.open(tmp_path / "h.db", ENCODER)
    for user in ("ann", "bob"):
        add(store, "default", user, [item("1")])
    done = call("backup-store", "--store", tmp_path / "h.db", "--to", tmp_path / "backup")
    assert done.exit_code == 0, done.output
    store.erase_user("default", "ann")
    for name in ("late.db", "now.db"):
        shutil.copy(tmp_path / "h.db.secret", tmp_path / f"{name}.secret")
    words = ("restore-store", "--from", tmp_path / "backup", "--to")
    done = call(*words, tmp_path / "now.db", "--current", tmp_path / "h.db")
    assert (done.exit_code, done.output) == (0, "")
    assert HistoryStore.open(tmp_path / "now.db").count("default", "ann") == 0
    done = call(*words, tmp_path / "late.db")
    assert (done.exit_code, "replay-erasures" in done.output) == (0, True)
    assert HistoryStore.open(tmp_path / "late.db").count("default", "ann") == 1
    done = call("replay-erasures", "--from", tmp_path / "h.db", "--to", tmp_path / "late.db")
    assert (done.exit_code, done.output) == (0, "1 erasures repeated\n")
    restored = HistoryStore.open(tmp_path / "late.db")
    assert [restored.count("default", user) for user in ("ann", "bob")] == [0, 1]


def test_backup_that_cannot_be_used_fails_with_a_sentence(tmp_path: Path) -> None:
    HistoryStore.open(tmp_path / "h.db", ENCODER).close()
    (tmp_path / "backup").write_text("something else")
    done = call("restore-store", "--from", tmp_path / "backup", "--to", tmp_path / "new.db")
    assert done.exit_code != 0
    assert "is not a backup" in done.output
    done = call("backup-store", "--store", tmp_path / "h.db", "--to", tmp_path / "backup")
    assert (done.exit_code, "exists" in done.output) == (2, True)
