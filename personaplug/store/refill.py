"""Refill: copy a store, user by user, into a new store with the vectors of another encoder.

A copied user has the version of the original. So a later run copies only the users that have changed since.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from personaplug.encoders import Encoder
from personaplug.encoders.base import Vectors
from personaplug.encoders.embedding_store import Float16Array
from personaplug.encoders.joint import OUTSIDE, PICTURE
from personaplug.errors import ConfigError, StoreConflict
from personaplug.store.database import Connection, Database, execute, lock_table, sa
from personaplug.store.history_store import EncodedItems, HistoryStore, StoredItem, StoreSettings
from personaplug.store.reads import list_items
from personaplug.store.schema import Shard
from personaplug.store.secure_delete import last_erasure, record_erasure
from personaplug.store.tickets import chunks
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
    old = source.settings
    settings = replace(settings, keep_text=True, keep_pictures=old.keep_pictures, shards=old.shards)
    return HistoryStore.open(location, encoder, settings=settings, secret=source.secret.key)


def refill(source: HistoryStore, target: HistoryStore, *, progress: Callable[[int], object] = lambda _: None) -> int:
    """Copy the users and erasures that the target lacks, and return the number of users copied.

    Users who were erased from one of the stores are not copied. A newer history in the target stays unchanged. An item
    loses a part, such as its picture, that the target's encoder does not read.

    Args:
        target: from `open_target`.
        progress: called with the number of users examined since its last call.
    Raises:
        StoreConflict: if the target's encoder reads a part of an item that the source does not keep.
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
    count, users_at_once = 0, 1 if source.settings.keep_pictures else _USERS_PER_PAGE
    for shard, users in user_pages(source):
        # The version is read before the items. If the items change in between, the next run copies the user again.
        stale = [user for user in users if target.version(user.tenant, user.user_id) < user.version]
        for group in chunks(stale, users_at_once):
            count += _copy_group(source, target, shard, group)
        progress(len(users))
    return count


def _copy_group(source: HistoryStore, target: HistoryStore, shard: Shard, users: Sequence[sa.Row[Any]]) -> int:
    """Encode the items of users at once, and copy the users; return the number of users copied."""
    parts, count = [name for name, _ in target.identity.parts], 0
    with source.database.read_transaction() as connection:
        rows = [UserRow.of(user, tenant=user.tenant, user=user.user_id) for user in users]
        read = partial(list_items, connection, shard, window=source.window(None), by_arrival=True, with_pictures=True)
        histories = [[_with_parts(item, parts) for item in read(row)] for row in rows]
    names = [user.user_id for user, items in zip(users, histories, strict=True) for _ in items]
    vectors = target.encode(names, list(chain.from_iterable(histories))).vectors
    for user, items in zip(users, histories, strict=True):
        count += _copy_user(source, target, user, items, vectors[: len(items)])
        vectors = vectors[len(items) :]
    return count


def _with_parts(item: StoredItem, parts: Sequence[str]) -> StoredItem:
    """Return an item without the parts that the target's encoder does not read."""
    if PICTURE in item.parts and PICTURE in parts and item.picture is None:
        raise StoreConflict(
            "An item of the source had a picture, but the source keeps no pictures, so the item cannot be encoded "
            "again. Send the items with their pictures to a new store."
        )
    if OUTSIDE in item.parts and OUTSIDE in parts:
        raise StoreConflict(
            "An item of the source came with a vector from elsewhere. A store keeps only its encoded form, so the item "
            "cannot be encoded again. Send the items with their vectors to a new store."
        )
    return item if PICTURE in parts else replace(item, picture=None)


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
    source: HistoryStore,
    target: HistoryStore,
    user: sa.Row[Any],
    items: Sequence[StoredItem],
    vectors: Vectors | Float16Array,
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
