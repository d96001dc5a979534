"""Load histories from files into a store, many users at a time; skip items that are already stored."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from personaplug.data.records import HistoryItem, Sample
from personaplug.encoders.item_parts import named_by_id
from personaplug.errors import ConfigError, PartError, UserErased
from personaplug.store import writes
from personaplug.store.database import Connection, execute
from personaplug.store.history_store import AddResult, HistoryStore
from personaplug.store.tickets import Ticket, chunks

_USERS_AT_ONCE = 64
_USERS_WITH_PICTURES_AT_ONCE = 4  # else a transaction with many megabytes would keep other writers waiting
_ROW_ID = re.compile(r"row-\d+(/.*)?", re.ASCII)

History = tuple[str, Sequence[HistoryItem]]
"""A user and the user's items."""


@dataclass(frozen=True)
class LoadResult:
    """Numbers of users and items.

    Attributes:
        erased: users who were skipped because they were erased from the store.
    """

    users: int
    erased: int
    items: AddResult


def load_histories(
    store: HistoryStore,
    tenant: str,
    histories: Mapping[str, Sequence[HistoryItem]],
    *,
    include_erased: bool = False,
    progress: Callable[[int], object] = lambda _: None,
) -> LoadResult:
    """Add the items of users, in transactions of several users. After an interruption, repeat the call to continue.

    If an id is only the row's number in a file, it is replaced by an id computed from the item's content, because the
    number differs in the next file. Erased users are skipped, because the files may be older than the erasure.

    Args:
        progress: called with the number of users read since its last call.
    """
    users, erased, total = 0, 0, AddResult(0, 0, 0)
    named = [(user, _with_stable_ids(store, items)) for user, items in histories.items() if items]
    for batch in chunks(named, _USERS_WITH_PICTURES_AT_ONCE if store.settings.keep_pictures else _USERS_AT_ONCE):
        allowed, result = _load(store, tenant, batch, include_erased=include_erased)
        users, erased = users + allowed, erased + len(batch) - allowed
        total = AddResult(*(old + new for old, new in zip(total, result, strict=True)))
        progress(len(batch))
    return LoadResult(users, erased, total)


def histories_of(samples: Iterable[Sample]) -> Mapping[str, Sequence[HistoryItem]]:
    """Return the items of each user, from the histories of all the user's samples, in their order."""
    items: dict[str, dict[str, HistoryItem]] = {}
    for sample in samples:
        if sample.user_id is None:
            raise ConfigError("The data has no user ids, so a store cannot assign its histories. Add user ids.")
        items.setdefault(sample.user_id, {}).update((item.id, item) for item in sample.history)
    return {user: list(items_by_id.values()) for user, items_by_id in items.items()}


def _with_stable_ids(store: HistoryStore, items: Sequence[HistoryItem]) -> Sequence[HistoryItem]:
    """Return the items with ids that do not depend on the file, each id once."""
    stable = [replace(item, id=store.content_id(item)) if _ROW_ID.fullmatch(item.id) else item for item in items]
    return list({item.id: item for item in stable}.values())


def _load(store: HistoryStore, tenant: str, batch: Sequence[History], *, include_erased: bool) -> tuple[int, AddResult]:
    """Add the items of some users, all or none, and return the number of loaded users."""
    while True:
        ticket = store.admit(tenant, *(user for user, _ in batch))
        allowed = [
            (user, items)
            for user, items in batch
            if include_erased or ticket.hashed_users[user] not in ticket.last_erasures
        ]
        changed = _changed_items(store, tenant, allowed)
        try:
            result = _add(store, ticket, changed)
        except UserErased:  # the next ticket includes the erasure
            continue
        same = sum(len(items) for _, items in allowed) - len(changed)
        return len(allowed), result._replace(same=result.same + same)


def _changed_items(store: HistoryStore, tenant: str, batch: Sequence[History]) -> list[tuple[str, HistoryItem]]:
    """Return the items that are new or differ from the stored ones, each with its user."""
    with store.database.read_transaction() as connection:
        stored = {user: _digests(connection, store, tenant, user, items) for user, items in batch}
    key = store.secret.item_key
    return [
        (user, item)
        for user, items in batch
        for item in items
        if stored[user].get(item.id) != writes.digest_of(item, key=key)
    ]


def _digests(
    connection: Connection, store: HistoryStore, tenant: str, user: str, items: Sequence[HistoryItem]
) -> dict[str, bytes]:
    shard = store.shard_of(tenant, user)
    sql = f"SELECT no FROM {shard.users} WHERE tenant = :tenant AND user_id = :user"
    number = execute(connection, sql, {"tenant": tenant, "user": user}).scalar_one_or_none()
    if number is None:
        return {}
    rows = writes.find_items(connection, shard, [(number, item.id) for item in items])
    return {item_id: bytes(row.digest) for (_, item_id), row in rows.items()}


def _add(store: HistoryStore, ticket: Ticket, changed: Sequence[tuple[str, HistoryItem]]) -> AddResult:
    if not changed:
        return AddResult(0, 0, 0)
    users, items = [user for user, _ in changed], [item for _, item in changed]
    try:
        encoded = store.encode(users, items)
    except PartError as error:
        raise named_by_id(error, items) from None
    return store.add_encoded(ticket, encoded)
