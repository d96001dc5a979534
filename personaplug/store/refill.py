"""Refill: copy a store into a new one whose vectors another encoder makes, user by user.

A copy has the version of the original, so a later run copies only the users that have changed since.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from personaplug.encoders import Encoder
from personaplug.errors import ConfigError, StoreConflict
from personaplug.store.database import Database, execute, sa
from personaplug.store.history_store import EncodedItems, HistoryStore, StoredItem, StoreSettings
from personaplug.store.reads import item_columns, stored_item
from personaplug.store.schema import Shard
from personaplug.store.secure_delete import last_erasure, record_erasure
from personaplug.store.writes import delete_all_items, delete_user, insert_items, lock_users, update_users

_USERS_PER_PAGE = 64
_EPOCH = datetime.fromtimestamp(0, UTC)


def open_target(
    source: HistoryStore, location: str | Path, encoder: Encoder, *, settings: StoreSettings, save_secret: bool
) -> HistoryStore:
    """Open or create the store to fill, with the source's secret and number of shards.

    Args:
        save_secret: write the secret to a file beside a target in SQLite.
    Raises:
        ConfigError: if both stores are the same.
        StoreConflict: if the source keeps no texts, or the target has other settings or another secret.
        EncoderMismatch: if the target has another encoder.
    """
    if not source.settings.keep_text:
        raise StoreConflict("The source keeps no texts to encode again. Add the histories to a new store instead.")
    database = Database(location)
    if database.url == source.database.url:
        raise ConfigError("The source and the target are the same store: name another target.")
    if save_secret and database.secret_file:
        source.secret.save(database.secret_file)
    settings = replace(settings, keep_text=True, shards=source.settings.shards)
    return HistoryStore.open(location, encoder, settings=settings, secret=source.secret.key)


def refill(source: HistoryStore, target: HistoryStore, *, progress: Callable[[int], object] = lambda _: None) -> int:
    """Copy the users and erasures that the target lacks, and return the number of users copied.

    Users who were erased from either store are not copied. A newer history in the target is left as it is.

    Args:
        target: from `open_target`.
        progress: called with the number of users examined since its last call.
    """
    _copy_erasures(source, target)
    count = _copy_users(source, target, progress)
    while _copy_erasures(source, target):  # users were erased while they were copied
        count += _copy_users(source, target, progress)
    return count


def _copy_erasures(source: HistoryStore, target: HistoryStore) -> bool:
    """Repeat in the target the erasures that it lacks; return whether there were any."""
    present = {(row.hashed_user, row.erased_at) for row in _erasures(target)}
    missing = [row for row in _erasures(source) if (row.hashed_user, row.erased_at) not in present]
    for erasure in missing:
        values, shard = erasure._asdict(), Shard(erasure.shard)
        with target.database.write_transaction() as connection:
            for user in execute(connection, f"SELECT * FROM {shard.users}").all():
                if target.hash_user(user.tenant, user.user_id) == erasure.hashed_user:
                    delete_user(connection, shard, user.no)
                    values["wiped"] = None
            record_erasure(connection, values)
    target.finish_erasures()
    return bool(missing)


def _erasures(store: HistoryStore) -> Sequence[sa.Row[Any]]:
    with store.database.read_transaction() as connection:
        return execute(connection, "SELECT * FROM history_erasures ORDER BY number").all()


def _copy_users(source: HistoryStore, target: HistoryStore, progress: Callable[[int], object]) -> int:
    encoder, with_answer, count = target.encoder, target.settings.encodes_answers, 0
    assert encoder is not None
    for shard in map(Shard, range(source.settings.shards)):
        for users in _pages(source, shard):
            # Items are read after the version: if they change in between, the next run copies them again.
            stale = [user for user in users if target.version(user.tenant, user.user_id) < user.version]
            histories = [_items_by_arrival(source, shard, user.no) for user in stale]
            texts = [item.encoded(with_answer=with_answer) for items in histories for item in items]
            vectors = encoder.encode(texts)
            for user, items in zip(stale, histories, strict=True):
                encoded = EncodedItems([user.user_id] * len(items), items, vectors[: len(items)], encoder.identity)
                count += _copy_user(source, target, user, encoded, [item.arrived for item in items])
                vectors = vectors[len(items) :]
            progress(len(users))
    return count


def _pages(store: HistoryStore, shard: Shard) -> Iterator[Sequence[sa.Row[Any]]]:
    sql, last = f"SELECT * FROM {shard.users} WHERE no > :last ORDER BY no LIMIT {_USERS_PER_PAGE}", 0
    while True:
        with store.database.read_transaction() as connection:
            rows = execute(connection, sql, {"last": last}).all()
        if not rows:
            return
        yield rows
        last = rows[-1].no


def _items_by_arrival(store: HistoryStore, shard: Shard, user_no: int) -> list[StoredItem]:
    sql = f"{item_columns(shard)} WHERE user_no = :no ORDER BY i.key"
    with store.database.read_transaction() as connection:
        return [stored_item(row) for row in execute(connection, sql, {"no": user_no})]


def _copy_user(
    source: HistoryStore, target: HistoryStore, user: sa.Row[Any], encoded: EncodedItems, arrivals: Sequence[datetime]
) -> bool:
    """Replace a user's rows in the target by the source's, unless the target's are newer or the user was erased."""
    items, shard = target.pack(encoded), target.shard_of(user.tenant, user.user_id)
    hashed_user = source.hash_user(user.tenant, user.user_id)
    with source.database.read_transaction() as connection:
        erased_at = last_erasure(connection, hashed_user)
    with target.database.write_transaction() as connection:
        copy = lock_users(connection, shard, tenant=user.tenant, names={user.user_id})[user.user_id]
        if copy.version >= user.version:
            return False
        if last_erasure(connection, hashed_user) > erased_at:
            if not copy.version:  # the row was created above
                delete_user(connection, shard, copy.no)
            return False
        delete_all_items(connection, shard, copy.no)
        copy.version, copy.items_received = user.version, 0
        keyed = [(copy.next_key(), (at - _EPOCH) // timedelta(microseconds=1)) for at in arrivals]
        insert_items(connection, shard, [(*key, item) for key, item in zip(keyed, items, strict=True)])
        update_users(connection, shard, [copy])
    return True
