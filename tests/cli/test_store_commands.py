"""The store commands: backup, restore, replayed erasures and stated preferences."""

from __future__ import annotations

import json
import shutil
from datetime import date
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from stores import ENCODER, add, item

from personaplug.cli.main import main
from personaplug.data.simulation import SimulationConfig, write_simulation
from personaplug.store.history_store import HistoryStore, StoreSettings


def call(*words: object) -> Result:
    return CliRunner().invoke(main, list(map(str, words)))


def test_erased_user_stays_erased_after_backup_and_restore(tmp_path: Path) -> None:
    store = HistoryStore.open(tmp_path / "h.db", ENCODER)
    for user in ("ann", "bob"):
        add(store, "default", user, [item("1")])
    done = call("backup", "--store", tmp_path / "h.db", "--to", tmp_path / "backup")
    assert done.exit_code == 0, done.output
    store.erase_user("default", "ann")
    for name in ("late.db", "now.db"):
        shutil.copy(tmp_path / "h.db.secret", tmp_path / f"{name}.secret")
    words = ("restore", "--from", tmp_path / "backup", "--to")
    done = call(*words, tmp_path / "now.db", "--current", tmp_path / "h.db")
    assert (done.exit_code, "replay-erasures" in done.output) == (0, False)
    assert HistoryStore.open(tmp_path / "now.db").count("default", "ann") == 0
    done = call(*words, tmp_path / "late.db")
    assert (done.exit_code, "replay-erasures" in done.output) == (0, True)
    assert HistoryStore.open(tmp_path / "late.db").count("default", "ann") == 1
    done = call("replay-erasures", "--from", tmp_path / "h.db", "--to", tmp_path / "late.db")
    assert (done.exit_code, done.output) == (0, "1 erasures replayed\n")
    restored = HistoryStore.open(tmp_path / "late.db")
    assert [restored.count("default", user) for user in ("ann", "bob")] == [0, 1]


def test_a_long_id_does_not_widen_the_table_of_users(tmp_path: Path) -> None:
    store = HistoryStore.open(tmp_path / "h.db", ENCODER)
    long, ids = "u" * 255, ("ann", "ann ", "bob  b", '"q"')
    for user in (*ids, long):
        add(store, "default", user, [item("1", day=date(2024, 1, 5))])
    add(store, "t" * 41, long, [item("1", day=date(2024, 1, 5))])
    lines = call("users", "--store", tmp_path / "h.db").output.splitlines()
    counts = "1      2024-01-05  0"
    assert lines[0] == "tenant   user      items  last        preferences"
    assert lines[1:] == [
        f'default  "\\"q\\""   {counts}',
        f"default  ann       {counts}",
        f'default  "ann "    {counts}',
        f'default  "bob  b"  {counts}',
        f"default  {long}",
        f"                   {counts}",
        "t" * 41,
        f"         {long}",
        f"                   {counts}",
    ]
    stored = json.loads(call("users", "--store", tmp_path / "h.db", "--json").output)
    assert [user["user"] for user in stored] == ['"q"', "ann", "ann ", "bob  b", long, long]


def test_restore_names_the_secret_with_which_the_store_opens_and_verifies_receipts(tmp_path: Path) -> None:
    store = HistoryStore.open(tmp_path / "h.db", ENCODER)
    for user in ("ann", "bob"):
        add(store, "default", user, [item("1")])
    receipt = tmp_path / "receipt.json"
    receipt.write_text(json.dumps(store.erase_user("default", "ann").to_dict()))
    done = call("backup", "--store", tmp_path / "h.db", "--to", tmp_path / "backup")
    assert f"Keep {tmp_path / 'h.db.secret'} too" in done.output
    kept = (tmp_path / "h.db.secret").rename(tmp_path / "kept")
    words, new = ("restore", "--from", tmp_path / "backup", "--to", tmp_path / "new.db"), tmp_path / "new.db"

    done = call(*words)
    assert done.exit_code == 2
    assert f"The secret {new}.secret is missing" in done.output
    assert "--secret" in done.output
    assert sorted(path.name for path in tmp_path.glob("new*")) == []

    done = call(*words, "--secret", kept)
    assert done.exit_code == 0, done.output
    assert f"Give --secret {kept} to each command, or copy this file to {new}.secret." in done.output
    assert f"--to {new} --secret {kept}" in done.output
    verify = ("verify-receipt", receipt, "--store", new, "--user", "ann")
    done = call(*verify)
    assert (done.exit_code, "--secret" in done.output) == (2, True)
    assert call(*verify, "--secret", kept).output == "valid\n"
    shutil.copy(kept, f"{new}.secret")
    assert call(*verify).output == "valid\n"
    assert [user["user"] for user in json.loads(call("users", "--store", new, "--json").output)] == ["bob"]


def test_restore_copies_the_secret_of_the_store_in_use(tmp_path: Path) -> None:
    store = HistoryStore.open(tmp_path / "h.db", ENCODER)
    add(store, "default", "ann", [item("1")])
    call("backup", "--store", tmp_path / "h.db", "--to", tmp_path / "backup")
    words = ("restore", "--from", tmp_path / "backup", "--to", tmp_path / "new.db", "--current", tmp_path / "h.db")
    done = call(*words)
    assert (done.exit_code, f"only with its secret {tmp_path / 'new.db.secret'}" in done.output) == (0, True)
    assert (tmp_path / "new.db.secret").read_bytes() == (tmp_path / "h.db.secret").read_bytes()
    assert (tmp_path / "new.db.secret").stat().st_mode & 0o777 == 0o600
    assert HistoryStore.open(tmp_path / "new.db").count("default", "ann") == 1


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run with the encoder of the stores in this file."""
    folder = tmp_path_factory.mktemp("run")
    config = SimulationConfig(users=8, queries_per_user=2, dev_users=4, min_items=2, max_items=5)
    write_simulation(config, folder / "data")
    toy = ["llm=toy", "encoder=hash:32", "dtype=float32", "batch_size=4", "epochs=1", "controls=false"]
    done = call("train", "--data", folder / "data", "--out", folder / "run", *toy)
    assert done.exit_code == 0, done.output
    return folder / "run"


def test_preferences_are_set_listed_and_removed(tmp_path: Path, run: Path) -> None:
    store = HistoryStore.open(tmp_path / "h.db", ENCODER, settings=StoreSettings(keep_text=True, shards=2))
    place = ("--store", tmp_path / "h.db", "--user", "ann")
    for sentences, output in (
        (["No horror.", "Old films"], "2 new, 0 as before, 0 removed\n"),
        (["Old films", "Old films", "No spoilers"], "1 new, 2 as before, 1 removed\n"),
    ):
        done = call("set-preferences", *sentences, *place, "--run", run)
        assert (done.exit_code, done.output) == (0, output)
    preferences = json.loads(call("list-preferences", *place).stdout)
    assert [each["preference"] for each in preferences] == ["Old films", "No spoilers"]
    assert store.load_history("default", "ann").kind_ids.tolist() == [2, 2]
    done = call("set-preferences", *place)
    assert (done.exit_code, done.output) == (0, "0 new, 0 as before, 2 removed\n")
    assert json.loads(call("list-preferences", *place).stdout) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["No horror."], "with --run"),
        ([" ", "--run", "RUN"], "'preference' is empty"),
        (["a\udcff", "--run", "RUN"], "not valid Unicode"),
        (["No horror.", "--run", "RUN", "--store", "nowhere.db"], "There is no history store"),
    ],
)
def test_set_preferences_refuses_invalid_input(tmp_path: Path, run: Path, words: list[str], message: str) -> None:
    HistoryStore.open(tmp_path / "h.db", ENCODER).close()
    arguments = [{"RUN": str(run), "nowhere.db": str(tmp_path / "nowhere.db")}.get(word, word) for word in words]
    done = call("set-preferences", "--store", tmp_path / "h.db", "--user", "ann", *arguments)
    assert (done.exit_code, message in done.output) == (2, True), done.output
    assert not (tmp_path / "nowhere.db").exists()


def test_restore_refuses_an_invalid_backup_and_backup_an_existing_file(tmp_path: Path) -> None:
    HistoryStore.open(tmp_path / "h.db", ENCODER).close()
    (tmp_path / "backup").write_text("something else")
    done = call("restore", "--from", tmp_path / "backup", "--to", tmp_path / "new.db")
    assert done.exit_code != 0
    assert "is not a backup" in done.output
    done = call("backup", "--store", tmp_path / "h.db", "--to", tmp_path / "backup")
    assert (done.exit_code, "exists" in done.output) == (2, True)
