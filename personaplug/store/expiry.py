"""Remove expired items, and their bytes from the database's files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from personaplug.store.database import Connection, Database, execute, for_update, lock_table
from personaplug.store.schema import Shard
from personaplug.store.secure_delete import rewrite_shard
from personaplug.store.writes import USER_COLUMNS, UserRow, delete_user, mark_for_rewrite, remove_items

_USERS_PER_TRANSACTION = 200


def remove_expired(database: Database, shard: Shard, *, first_day: int) -> Iterator[None]:
    """Remove the items before `first_day` of a shard, of some users at a time; yield after each transaction.

    A user without other items is removed too. `finish_rewrites` removes the bytes from the files.
    """
    # Only each user's oldest item is looked up, in an index. A search by day alone would read all items.
    oldest = f"SELECT day FROM {shard.items} WHERE user_no = u.no ORDER BY day LIMIT 1"
    sql = f"SELECT no FROM {shard.users} u WHERE no > :last AND ({oldest}) < :first_day ORDER BY no LIMIT :limit"
    parameters = {"last": 0, "first_day": first_day, "limit": _USERS_PER_TRANSACTION}
    while numbers := _numbers(database, sql, parameters):
        _remove_from_users(database, shard, numbers, first_day=first_day)
        parameters["last"] = numbers[-1]
        yield


def _numbers(database: Database, sql: str, parameters: dict[str, int]) -> Sequence[int]:
    with database.read_transaction() as connection:
        return execute(connection, sql, parameters).scalars().all()


def _remove_from_users(database: Database, shard: Shard, numbers: Sequence[int], *, first_day: int) -> None:
    with database.write_transaction() as connection:
        lock_table(connection, shard.users)
        select = f"SELECT {USER_COLUMNS} FROM {shard.users} WHERE no IN :numbers ORDER BY no{for_update(connection)}"
        for row in execute(connection, select, {"numbers": numbers}, expand="numbers").all():
            _remove_from(connection, shard, UserRow.of(row, tenant=row.tenant, user=row.user_id), first_day=first_day)
        mark_for_rewrite(connection, shard)


def finish_rewrites(database: Database) -> None:
    """Rewrite the shards from which expired items were removed, so that no file contains their bytes."""
    with database.read_transaction() as connection:
        rows = execute(connection, "SELECT shard, removed_at FROM history_rewrites ORDER BY shard").all()
    for row in rows:
        rewrite_shard(database, Shard(row.shard))
        with database.write_transaction() as connection:  # the row stays if further items were removed meanwhile
            sql = "DELETE FROM history_rewrites WHERE shard = :shard AND removed_at = :removed_at"
            execute(connection, sql, dict(row._mapping))


def _remove_from(connection: Connection, shard: Shard, user: UserRow, *, first_day: int) -> None:
    select = f"SELECT key FROM {shard.items} WHERE user_no = :no AND day < :first_day"
    keys = execute(connection, select, {"no": user.no, "first_day": first_day}).scalars().all()
    if len(keys) == user.items:
        delete_user(connection, shard, user.no)
        return
    remove_items(connection, shard, user, keys)
