"""Refill: copy a store, user by user, into a new store with the vectors of another encoder.

A copied user has the version of the original. So a later run copies only the users that have changed since.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from personaplug.encoders import Encoder
from personaplug.encoders.base import Vectors, encode_items
from personaplug.errors import ConfigError, StoreConflict
from personaplug.store.database import Connection, Database, execute, lock_table, sa
from personaplug.store.history_store import EncodedItems, HistoryStore, StoredItem, StoreSettings
from personaplug.store.reads import list_items
from personaplug.store.schema import Shard
from personaplug.store.secure_delete import last_erasure, record_erasure
from personaplug.store.writes import (
    USER_COLUMNS,
    UserRow,
    delete_all_items,
    delete_user,
    insert_items,
    lock_users,
    update_users,
)

_USERS_PER_PAGE = 64


def open_target(
    source: HistoryStore, location: str | Path, encoder: Encoder, *, settings: StoreSettings, save_secret: bool
) -> HistoryStore:
    """Open or create the store to fill, with the source's secret and number of shards.

    Args:
        save_secret: write the secret to a file beside a target in SQLite.
    Raises:
        StoreConflict, EncoderMismatch: if the source keeps no texts, or the target has other settings or vectors.
    """
    if not source.settings.keep_text:
        raise StoreConflict(
            "The source keeps no texts, so it cannot be encoded again. Load the histories into a new store."
        )
    database = Database(location)
    if database.url == source.database.url:
        raise ConfigError("The source and the target are the same store: name another target.")
    if save_secret and database.secret_file:
        source.secret.save(database.secret_file)
    settings = replace(settings, keep_text=True, shards=source.settings.shards)
    return HistoryStore.open(location, encoder, settings=settings, secret=source.secret.key)


def refill(source: HistoryStore, target: HistoryStore, *, progress: Callable[[int], object] = lambda _: None) -> int:
    """Copy the users and erasures that the target lacks, and return the number of users copied.

    Users who were erased from one of the stores are not copied. A newer history in the target stays unchanged.

    Args:
        target: from `open_target`.
        progress: called with the number of users examined since its last call.
    """
    copy_erasures(source, target)
    count = _copy_users(source, target, progress)
    while copy_erasures(source, target):  # users were erased while they were copied
        count += _copy_users(source, target, progress)
    return count


def copy_erasures(source: HistoryStore, target: HistoryStore) -> int:
    """Apply the source's erasures that the target lacks to the target, and return their number.

    Raises:
        StoreConflict: if the stores have different secrets or numbers of shards.
    """
    if source.secret.key != target.secret.key or source.settings.shards != target.settings.shards:
        raise StoreConflict(
            "The stores have different secrets or numbers of shards, so neither is a copy of the other. Name a copy."
        )
    select = "SELECT * FROM history_erasures WHERE wiped IS NULL OR wiped <> '' ORDER BY number"
    present = {(row.hashed_user, row.erased_at) for row in _rows(target, select)}
    missing: dict[Shard, list[sa.Row[Any]]] = defaultdict(list)
    for row in _rows(source, select):
        if (row.hashed_user, row.erased_at) not in present:
            missing[Shard(row.shard)].append(row)
    for shard, erasures in missing.items():
        with target.database.write_transaction() as connection:
            _erase_in_shard(connection, target, shard, erasures)
    target.finish_erasures()
    return sum(map(len, missing.values()))


def _erase_in_shard(
    connection: Connection, target: HistoryStore, shard: Shard, erasures: Sequence[sa.Row[Any]]
) -> None:
    """Record the erasures of users of one shard, and delete the users."""
    lock_table(connection, shard.users, alone=True)
    hashed_users, deleted = {row.hashed_user for row in erasures}, set[str]()
    for user in execute(connection, f"SELECT no, tenant, user_id FROM {shard.users}").all():
        hashed_user = target.hash_user(user.tenant, user.user_id)
        if hashed_user in hashed_users:
            delete_user(connection, shard, user.no)
            deleted.add(hashed_user)
    for row in erasures:
        record_erasure(connection, row._asdict() | ({"wiped": None} if row.hashed_user in deleted else {}))


def _copy_users(source: HistoryStore, target: HistoryStore, progress: Callable[[int], object]) -> int:
    assert target.encoder is not None
    with_answer, count = target.settings.encodes_answers, 0
    for shard, users in user_pages(source):
        # The version is read before the items. If the items change in between, the next run copies the user again.
        stale = [user for user in users if target.version(user.tenant, user.user_id) < user.version]
        with source.database.read_transaction() as connection:
            window = source.window(None)
            rows = [UserRow.of(user, tenant=user.tenant, user=user.user_id) for user in stale]
            histories = [list_items(connection, shard, row, window=window, by_arrival=True) for row in rows]
        contents = [item.encoded(with_answer=with_answer) for items in histories for item in items]
        vectors = encode_items(target.encoder, contents)
        for user, items in zip(stale, histories, strict=True):
            count += _copy_user(source, target, user, items, vectors[: len(items)])
            vectors = vectors[len(items) :]
        progress(len(users))
    return count


def user_pages(store: HistoryStore) -> Iterator[tuple[Shard, Sequence[sa.Row[Any]]]]:
    """Yield the rows of all users in pages, each with its shard."""
    for shard in map(Shard, range(store.settings.shards)):
        sql, last = f"SELECT {USER_COLUMNS} FROM {shard.users} WHERE no > :last ORDER BY no LIMIT {_USERS_PER_PAGE}", 0
        while users := _rows(store, sql, last=last):
            yield shard, users
            last = users[-1].no


def _rows(store: HistoryStore, sql: str, **parameters: int) -> Sequence[sa.Row[Any]]:
    with store.database.read_transaction() as connection:
        return execute(connection, sql, parameters).all()


def _copy_user(
    source: HistoryStore, target: HistoryStore, user: sa.Row[Any], items: Sequence[StoredItem], vectors: Vectors
) -> bool:
    """Replace a user's rows in the target unless they are newer or the user was erased; return whether it happened."""
    shard, hashed_user = target.shard_of(user.tenant, user.user_id), source.hash_user(user.tenant, user.user_id)
    packed = target.pack(EncodedItems([user.user_id] * len(items), items, vectors, target.identity))
    with source.database.read_transaction() as connection:
        erased_at = last_erasure(connection, hashed_user)
    with target.database.write_transaction() as connection:
        lock_table(connection, shard.users)
        copy = lock_users(connection, shard, tenant=user.tenant, names={user.user_id})[user.user_id]
        if copy.version >= user.version:
            return False
        if last_erasure(connection, hashed_user) > erased_at:
            if not copy.version:  # `lock_users` has created the row
                delete_user(connection, shard, copy.no)
            return False
        delete_all_items(connection, shard, copy.no)
        copy.version, copy.items_received, copy.items = user.version, 0, 0
        arrivals = [round(item.arrived.timestamp() * 1e6) for item in items]
        insert_items(connection, shard, [(copy.next_key(), *pair) for pair in zip(arrivals, packed, strict=True)])
        update_users(connection, shard, [copy])
    return True
