"""The work of a call does not grow with the number of users: its statements find rows with an index."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.engine import Engine
from stores import Place, add, item

from personaplug.store import secure_delete
from personaplug.store.history_store import HistoryStore, Retention
from personaplug.store.user_list import list_users

TODAY = datetime.now(UTC).date()

CALLS: dict[str, Callable[[HistoryStore], object]] = {
    "open": lambda store: HistoryStore.open(store.database.file or "", secret=store.secret.key),
    "admit": lambda store: store.admit("t", "u"),
    "version": lambda store: store.version("t", "u"),
    "load_history": lambda store: store.load_history("t", "u", latest=2),
    "list_items": lambda store: store.list_items("t", "u"),
    "list_preferences": lambda store: store.list_preferences("t", "u"),
    "export": lambda store: list(store.export("t", "u")),
    "add": lambda store: add(store, "t", "u", [item("new")]),
    "delete_item": lambda store: store.delete_item("t", "u", "i0"),
    "list_users": lambda store: list_users(store, tenant="t", limit=2),
    "erase_user": lambda store: store.erase_user("t", "u"),
    "maintain": lambda store: store.maintain(),
}


@contextmanager
def executed() -> Iterator[list[tuple[str, Any]]]:
    """Record the statements that SQLAlchemy executes, with their parameters."""
    statements: list[tuple[str, Any]] = []

    def record(_: object, __: object, statement: str, parameters: Any, ___: object, is_many: bool) -> None:
        statements.append((statement, parameters[0] if is_many else parameters))

    event.listen(Engine, "before_cursor_execute", record)
    try:
        yield statements
    finally:
        event.remove(Engine, "before_cursor_execute", record)


def filled(place: Place, *, retention: Retention | None = None) -> HistoryStore:
    store = place.open(retention=retention)
    for user in ("u", "v", "w"):
        add(store, "t", user, [item(f"i{number}", day=TODAY) for number in range(5)])
    return store


def plans(store: HistoryStore, statements: list[tuple[str, Any]]) -> list[str]:
    """Return the steps of SQLite's plans for the statements that read or change single rows."""
    steps = []
    with store.database.read_transaction() as connection:
        for statement, parameters in dict(statements).items():
            if statement.startswith(("SELECT", "UPDATE", "DELETE")) and "sqlite_master" not in statement:
                rows = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters).all()
                steps += [f"{row.detail} <- {statement}" for row in rows]
    return steps


@pytest.mark.parametrize("call", CALLS)
def test_no_call_searches_all_rows_of_a_table(tmp_path: Path, call: str) -> None:
    store = filled(Place(str(tmp_path / "store.db")))
    with executed() as statements:
        CALLS[call](store)
    steps = plans(store, statements)
    assert steps
    tables = ("SCAN users", "SCAN items", "SCAN texts", "SCAN history_erasures")
    full = [step for step in steps if step.startswith(tables) and "USING INDEX history_erasures" not in step]
    assert full == []


def on_items(steps: list[str]) -> list[str]:
    """Return the steps that read items."""
    return [step.split(" <- ")[0] for step in steps if " items_0" in step.split(" <- ")[0]]


def test_expiry_looks_up_the_oldest_item_of_each_user_in_an_index(tmp_path: Path) -> None:
    store = filled(Place(str(tmp_path / "store.db")), retention=Retention(max_days=30))
    with executed() as statements:
        CALLS["open"](store)
    steps = on_items(plans(store, statements))
    assert len(steps) == store.settings.shards
    assert all(step.startswith("SEARCH") and "COVERING INDEX items_by_day" in step for step in steps)


def test_expiry_continues_after_the_last_user(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("personaplug.store.expiry._USERS_PER_TRANSACTION", 2)
    store = place.open()
    for number in range(12):
        add(store, "t", f"u{number}", [item("old", day=TODAY - timedelta(days=40 * (number % 3))), item("new")])
    store.retention = Retention(max_days=30)
    store.remove_expired(seconds=60)
    assert {user.user: user.items for user in list_users(store)} == {
        f"u{number}": 1 if number % 3 else 2 for number in range(12)
    }
    store.retention = Retention()
    assert sum(user.items for user in list_users(store)) == 4 * 2 + 8


def test_list_users_reads_indexes_but_no_items(tmp_path: Path) -> None:
    store = filled(Place(str(tmp_path / "store.db")))
    with executed() as statements:
        assert [user.items for user in list_users(store, tenant="t")] == [5, 5, 5]
    steps = on_items(plans(store, statements))
    assert len(steps) == 3 * store.settings.shards
    covering = [step for step in steps if "COVERING INDEX" in step]
    assert len(covering) == 2 * store.settings.shards
    assert all("INDEX preferences_0" in step for step in set(steps) - set(covering))  # these rows alone are read


def test_one_rewriting_finishes_all_erasures_of_a_shard(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    store = place.open()
    users = [f"user {number}" for number in range(8)]
    for user in users:
        add(store, "t", user, [item("i")])

    def interrupted(*_: object) -> tuple[str, ...]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(secure_delete, "rewrite_shard", interrupted)
        for user in users:
            with pytest.raises(KeyboardInterrupt):
                store.erase_user("t", user)
    rewritten, rewrite = list[int](), secure_delete.rewrite_shard

    def counted(database: Any, shard: Any) -> tuple[str, ...]:
        rewritten.append(shard.number)
        return rewrite(database, shard)

    monkeypatch.setattr(secure_delete, "rewrite_shard", counted)
    store.finish_erasures()
    assert sorted(rewritten) == sorted({store.shard_of("t", user).number for user in users}) == [0, 1]
    store.finish_erasures()
    assert len(rewritten) == 2
