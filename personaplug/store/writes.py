"""Write items: check and pack them, insert or replace the changed ones, and apply the retention."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from personaplug.data.ids import as_id
from personaplug.data.pictures import Picture
from personaplug.data.records import HistoryItem
from personaplug.data.values import Flaw
from personaplug.encoders import EncoderIdentity
from personaplug.encoders.base import Vectors
from personaplug.encoders.embedding_store import Float16Array
from personaplug.encoders.encoded_sample import PREFERENCE_KIND, kind_ids, label_ids, style_of_answers
from personaplug.encoders.joint import OUTSIDE, PICTURE
from personaplug.encoders.style_features import FEATURES, StyleArray
from personaplug.errors import ItemError, ShapeMismatch
from personaplug.store.database import Connection, execute, for_update, insert_rows, lock_table, sa
from personaplug.store.row_checksums import checksum, damaged
from personaplug.store.schema import MAX_ITEMS_PER_USER, Retention, Shard, StoreSettings, day_of, now_in_microseconds
from personaplug.store.tickets import Ticket, chunks
from personaplug.store.vector_codec import LITTLE_ENDIAN_HALF, encode_bodies, encode_vectors, split_rows

LabelIds = npt.NDArray[np.int16]

USER_COLUMNS = "no, tenant, user_id, version, items_received, items, checksum"
_PARTS = (PICTURE, OUTSIDE)
_FOUND = "SELECT user_no, item_id, key, arrived, digest FROM"
_ITEMS_PER_QUERY = 500
_USERS_PER_QUERY = 30_000  # SQLite limits the parameters of a statement


MAX_PREFERENCES = 100
"""The largest number of stated preferences of a user. In a long history they come before all other items."""


class AddResult(NamedTuple):
    """Numbers of items that were new, that replaced an item with the same id, and that were unchanged."""

    new: int
    replaced: int
    same: int


class ReplaceResult(NamedTuple):
    """The numbers of an AddResult, and the number of removed items."""

    new: int
    replaced: int
    same: int
    removed: int


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class EncodedItems:
    """Items of one or more users with their vectors, as columns.

    Attributes:
        users: (n) user of each item.
        items: (n); an item needs no fields if the store keeps no text.
        vectors: (n, E).
        label_ids: (n,) index of each answer in the store's labels, -1 = no label; None = computed from the items.
        style: (n, F) style features of each answer; None = computed from the items.
    """

    users: Sequence[str]
    items: Sequence[HistoryItem]
    vectors: Vectors | Float16Array
    encoder: EncoderIdentity
    label_ids: LabelIds | None = None
    style: StyleArray | None = None


class PackedItem(NamedTuple):
    """An item, checked and packed for the tables."""

    user: str
    id: str
    day: int | None
    label_id: int
    kind_id: int
    digest: bytes
    style: bytes
    vector: bytes
    text: bytes | None
    part_ids: int
    picture: Picture | None  # None unless the store keeps pictures


@dataclass(slots=True)
class UserRow:
    """A user's row; `items_received` counts deleted items too."""

    no: int
    tenant: str
    user_id: str
    version: int = 0
    items_received: int = 0
    items: int = 0

    @classmethod
    def of(cls, row: sa.Row[Any], *, tenant: str, user: str) -> UserRow:
        """Return the row of a user; raise StorageError if it is damaged or belongs to another user."""
        stored = cls(row.no, tenant, user, row.version, row.items_received, row.items)
        if row.checksum != stored.checksum:
            raise damaged("the row of a user")
        return stored

    @property
    def checksum(self) -> int:
        if not self.version:
            return 0  # a new row: the database assigns its number, so there is no checksum yet
        return checksum(self.no, self.tenant, self.user_id, self.version, self.items_received, self.items)

    def next_key(self) -> int:
        """Count a new item and return its key."""
        if self.items_received == MAX_ITEMS_PER_USER:
            raise ItemError(f"A user can receive at most {MAX_ITEMS_PER_USER} items; nothing was stored.")
        self.items_received += 1
        self.items += 1
        return self.no * MAX_ITEMS_PER_USER + self.items_received - 1

    def increase_version(self) -> None:
        # Versions are times, so that the version of a user who returns after an erasure does not restart.
        self.version = max(self.version + 1, now_in_microseconds())


def check_id(value: str, *, owner: str) -> None:
    """Raise ItemError if a value is not a valid id. The message does not contain the value, which may be personal."""
    if not isinstance(value, str):  # a number may have lost digits or zeros of the original id
        raise ItemError(f"The id of {owner} must be text; found a {type(value).__name__}.")
    try:
        as_id(value, f"The id of {owner}")
    except Flaw as flaw:
        raise ItemError(f"{flaw}; nothing was stored.") from None


def digest_of(item: HistoryItem, *, key: bytes) -> bytes:
    """Return 16 bytes that identify an item's content; only with the key can contents be tested against them."""
    day = item.date and item.date.toordinal()
    more = [item.picture and item.picture.digest.hex(), item.vector and item.vector.hex()]
    return _digest(json.dumps([item.kind, item.fields, item.answer_name, day, *more]).encode(), key)


def pack_items(encoded: EncodedItems, settings: StoreSettings, *, width: int, digest_key: bytes) -> list[PackedItem]:
    items = encoded.items
    if len(encoded.users) != len(items):
        raise ShapeMismatch(f"Each item needs a user; found {len(encoded.users)} users and {len(items)} items.")
    for user in set(encoded.users):
        check_id(user, owner="a user")
    for item in items:
        check_id(item.id, owner="an item")
    labels = label_ids(items, settings.labels) if encoded.label_ids is None else encoded.label_ids
    style = style_of_answers(items) if encoded.style is None else encoded.style
    _check_columns(encoded, labels, style, label_count=len(settings.labels))
    if settings.keep_text and not all(item.fields for item in items):
        raise ItemError("The store keeps texts, so each item needs fields; nothing was stored.")
    vectors, style_rows = encode_vectors(encoded.vectors, width=width), split_rows(style.astype(LITTLE_ENDIAN_HALF))
    packed = []
    columns = zip(encoded.users, items, labels.tolist(), kind_ids(items).tolist(), style_rows, vectors, strict=True)
    for user, item, label_id, kind_id, style_row, vector in columns:
        day = item.date.toordinal() if item.date else None
        content = f"{day} {label_id} {kind_id} ".encode() + style_row + vector
        content += item.picture.digest if item.picture else b""
        digest = digest_of(item, key=digest_key) if item.fields else _digest(content, digest_key)
        text = pack_text(item) if settings.keep_text else None
        picture = item.picture if settings.keep_pictures else None
        parts = part_ids_of(item)
        packed.append(
            PackedItem(user, item.id, day, label_id, kind_id, digest, style_row, vector, text, parts, picture)
        )
    return packed


def write_items(
    connection: Connection, shard: Shard, items: Sequence[PackedItem], *, ticket: Ticket, retention: Retention
) -> AddResult:
    """Write items of users of one shard in the caller's transaction; see `HistoryStore.add_encoded`.

    A replaced item keeps its position in the order of arrival. If two items have the same id, the later one is stored.
    """
    latest = {(item.user, item.id): item for item in items}
    names = {item.user for item in items}
    lock_table(connection, shard.users)  # blocks erasures, so that the ticket stays valid until the transaction ends
    ticket.check(connection, names)  # must come before the first write
    users = lock_users(connection, shard, tenant=ticket.tenant, names=names)
    ids = [(users[name].no, item_id) for name, item_id in latest if users[name].items_received]
    stored = find_items(connection, shard, ids)
    changed: dict[str, UserRow] = {}
    inserts, replaced = list[tuple[int, int, PackedItem]](), list[int]()
    for (name, item_id), item in latest.items():
        user = users[name]
        old = stored.get((user.no, item_id))
        if old is not None and old.digest == item.digest:
            continue
        if name not in changed:
            user.increase_version()
            changed[name] = user
        if old is None:
            inserts.append((user.next_key(), user.version, item))
        else:
            replaced.append(old.key)
            inserts.append((old.key, old.arrived, item))
    delete_items(connection, shard, replaced)
    insert_items(connection, shard, inserts)
    with_new_preferences = {item.user for _, _, item in inserts if item.kind_id == PREFERENCE_KIND}
    for name, user in changed.items():
        if name in with_new_preferences:
            _check_preferences(connection, shard, user.no)
        user.items -= _apply_retention(connection, shard, user.no, retention=retention)
        if not user.items:  # all items have expired
            delete_user(connection, shard, user.no)
    if changed:
        update_users(connection, shard, list(changed.values()))
    return AddResult(len(inserts) - len(replaced), len(replaced), len(items) - len(inserts))


def insert_items(connection: Connection, shard: Shard, entries: Sequence[tuple[int, int, PackedItem]]) -> None:
    """Insert items, given with their keys and times of arrival. An item without a date gets the day of its arrival."""
    keys, arrivals, items = zip(*sorted(entries, key=itemgetter(0)), strict=True) if entries else ((), (), ())
    days = [day_of(arrived) if item.day is None else item.day for arrived, item in zip(arrivals, items, strict=True)]
    bodies = encode_bodies(
        keys,
        days,
        label_ids=[item.label_id for item in items],
        kind_ids=[item.kind_id for item in items],
        styles=[item.style for item in items],
        vectors=[item.vector for item in items],
    )
    rows, texts = [], []
    for key, day, arrived, item, body in zip(keys, days, arrivals, items, bodies, strict=True):
        picture_bytes = _insert_picture(connection, shard, key, item.picture) if item.picture else None
        meta = (item.day is not None, arrived, item.label_id, item.kind_id, item.part_ids, item.id)
        check = checksum_of_item(key, day, *meta, picture_bytes=picture_bytes, text=item.text)
        rows.append((key, key // MAX_ITEMS_PER_USER, day, *meta, item.digest, check, body))
        if item.text is not None:
            texts.append((key, item.text))
    insert_rows(connection, shard.items, rows)
    insert_rows(connection, shard.texts, texts)


def checksum_of_item(
    key: int,
    day: int,
    dated: bool,
    arrived: int,
    label_id: int,
    kind_id: int,
    part_ids: int,
    item_id: str,
    *,
    picture_bytes: int | None,
    text: bytes | None,
) -> int:
    """Return a checksum of an item's columns, except the body, of its text, and of the size of its kept picture."""
    return checksum(key, day, bool(dated), arrived, label_id, kind_id, part_ids, item_id, picture_bytes, text=text)


def _insert_picture(connection: Connection, shard: Shard, key: int, picture: Picture) -> int:
    """Insert one picture, so that only one is in memory; return its number of bytes."""
    content = picture.read()
    insert_rows(connection, shard.pictures, [(key, checksum(key, text=content), content)])
    return len(content)


def remove_items(connection: Connection, shard: Shard, user: UserRow, keys: Sequence[int]) -> None:
    """Delete items of a locked user, and update the user's version and number of items."""
    delete_items(connection, shard, keys)
    user.items -= len(keys)
    user.increase_version()
    update_users(connection, shard, [user])


def delete_items(connection: Connection, shard: Shard, keys: Sequence[int]) -> None:
    for table in shard.tables_of_items if keys else ():
        execute(connection, f"DELETE FROM {table} WHERE key = :key", [{"key": key} for key in keys])


def delete_all_items(connection: Connection, shard: Shard, user_no: int) -> int:
    """Delete all items of a user and return their number."""
    keys = {"first": user_no * MAX_ITEMS_PER_USER, "last": (user_no + 1) * MAX_ITEMS_PER_USER - 1}
    for table in (shard.texts, shard.pictures):
        execute(connection, f"DELETE FROM {table} WHERE key BETWEEN :first AND :last", keys)
    return execute(connection, f"DELETE FROM {shard.items} WHERE key BETWEEN :first AND :last", keys).rowcount


def delete_user(connection: Connection, shard: Shard, user_no: int) -> int:
    """Delete a user's row and items, and return the number of items."""
    execute(connection, f"DELETE FROM {shard.users} WHERE no = :no", {"no": user_no})
    return delete_all_items(connection, shard, user_no)


def mark_for_rewrite(connection: Connection, shard: Shard) -> None:
    """Record that a shard has to be rewritten because expired items were deleted; see `expiry.finish_rewrites`."""
    sql = "INSERT INTO history_rewrites VALUES (:shard, :now) ON CONFLICT (shard) DO UPDATE SET removed_at = :now"
    execute(connection, sql, {"shard": shard.number, "now": now_in_microseconds()})


def _apply_retention(connection: Connection, shard: Shard, user_no: int, *, retention: Retention) -> int:
    """Delete the user's items that exceed the retention, and return their number."""
    select, expired = f"SELECT key FROM {shard.items} WHERE user_no = :no", set[int]()
    if retention.max_days is not None:
        sql = f"{select} AND day < :first_day"
        expired.update(execute(connection, sql, {"no": user_no, "first_day": retention.first_day()}).scalars())
    if expired:
        mark_for_rewrite(connection, shard)
    if retention.max_items is not None:
        # Like `latest_items`, the retention prefers stated preferences. Without preferences, the index has this order.
        others_last = f"kind_id <> {PREFERENCE_KIND}, " if count_preferences(connection, shard, user_no) else ""
        sql = f"{select} ORDER BY {others_last}day DESC, key DESC LIMIT {MAX_ITEMS_PER_USER} OFFSET :max_items"
        expired.update(execute(connection, sql, {"no": user_no, "max_items": retention.max_items}).scalars())
    delete_items(connection, shard, sorted(expired))
    return len(expired)


def lock_users(connection: Connection, shard: Shard, *, tenant: str, names: set[str]) -> dict[str, UserRow]:
    """Lock users' rows until the transaction ends, and return them by name; create missing rows."""
    rows: dict[str, UserRow] = {}
    insert = (
        f"INSERT INTO {shard.users} (tenant, user_id, version, items_received, items, checksum) "
        "VALUES (:tenant, :name, 0, 0, 0, 0) ON CONFLICT DO NOTHING"
    )
    # All writers lock rows in the order of their numbers, to avoid deadlocks.
    select = f"SELECT {USER_COLUMNS} FROM {shard.users} WHERE tenant = :tenant AND user_id IN :names ORDER BY no"
    # A row may be deleted between the two statements; the next iteration creates it again.
    while missing := sorted(names - rows.keys()):
        execute(connection, insert, [{"tenant": tenant, "name": name} for name in missing])
        for chunk in chunks(missing, _USERS_PER_QUERY):
            parameters = {"tenant": tenant, "names": chunk}
            for row in execute(connection, select + for_update(connection), parameters, expand="names"):
                rows[row.user_id] = UserRow.of(row, tenant=tenant, user=row.user_id)
    return rows


def update_users(connection: Connection, shard: Shard, rows: Sequence[UserRow]) -> None:
    names = ("version", "items_received", "items", "checksum")
    changes = ", ".join(f"{name} = :{name}" for name in names)
    values = [{"no": row.no} | {name: getattr(row, name) for name in names} for row in rows]
    execute(connection, f"UPDATE {shard.users} SET {changes} WHERE no = :no", values)


def find_items(
    connection: Connection, shard: Shard, ids: Sequence[tuple[int, str]]
) -> dict[tuple[int, str], sa.Row[Any]]:
    """Return the key, arrival and digest of stored items, by (user number, item id)."""
    sql = f"{_FOUND} {shard.items} WHERE (user_no, item_id) IN :ids"
    return {
        (row.user_no, row.item_id): row
        for chunk in chunks(ids, _ITEMS_PER_QUERY)
        for row in execute(connection, sql, {"ids": chunk}, expand="ids")
    }


def find_old_items(
    connection: Connection, shard: Shard, user_no: int, *, ids: Sequence[str] | None
) -> dict[tuple[int, str], sa.Row[Any]]:
    """Return a user's items with these ids in the form of `find_items`; None = the user's stated preferences."""
    if ids is not None:
        return find_items(connection, shard, [(user_no, item_id) for item_id in ids])
    sql = f"{_FOUND} {shard.items} WHERE user_no = :no AND kind_id = {PREFERENCE_KIND}"
    return {(row.user_no, row.item_id): row for row in execute(connection, sql, {"no": user_no})}


def count_preferences(connection: Connection, shard: Shard, user_no: int) -> int:
    sql = f"SELECT count(*) FROM {shard.items} WHERE user_no = :no AND kind_id = {PREFERENCE_KIND}"
    return int(execute(connection, sql, {"no": user_no}).scalar_one())


def _check_preferences(connection: Connection, shard: Shard, user_no: int) -> None:
    count = count_preferences(connection, shard, user_no)
    if count > MAX_PREFERENCES:
        raise ItemError(
            f"A user can have at most {MAX_PREFERENCES} preferences; found {count}. Nothing was stored; remove some "
            f"preferences first."
        )


def part_ids_of(item: HistoryItem) -> int:
    """Return which parts besides its text an item has, as a sum of powers of two."""
    has_part = {PICTURE: item.picture is not None, OUTSIDE: item.vector is not None}
    return sum(has_part[name] << index for index, name in enumerate(_PARTS))


def parts_of(part_ids: int) -> tuple[str, ...]:
    """Invert `part_ids_of`: return the names of the parts."""
    return tuple(name for index, name in enumerate(_PARTS) if part_ids >> index & 1)


def pack_text(item: HistoryItem) -> bytes:
    is_text = item.answer_labels == ()
    content = [item.fields, item.answer_name, *([False] if is_text else [])]
    return json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass")


def unpack_text(text: bytes) -> tuple[tuple[tuple[str, str], ...], str | None, tuple[str, ...] | None]:
    """Return the fields, the answer name, and the labels of the answer: () for free text, None if unknown."""
    fields, answer_name, *is_text = json.loads(text.decode("utf-8", "surrogatepass"))
    return tuple((name, value) for name, value in fields), answer_name, () if is_text else None


def _digest(content: bytes, key: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16, key=key).digest()


def _check_columns(encoded: EncodedItems, labels: LabelIds, style: StyleArray, *, label_count: int) -> None:
    count = len(encoded.items)
    if len(encoded.vectors) != count or labels.shape != (count,) or style.shape != (count, len(FEATURES)):
        raise ShapeMismatch(
            f"{count} items need vectors ({count}, E), label_ids ({count},) and style ({count}, {len(FEATURES)}); "
            f"found {encoded.vectors.shape}, {labels.shape} and {style.shape}."
        )
    if count and not -1 <= int(labels.min()) <= int(labels.max()) < label_count:
        raise ItemError(
            f"label_ids must be -1 or indices of {label_count} labels; found {labels.min()} to {labels.max()}."
        )
    if not np.isfinite(style.astype(np.float16)).all():
        raise ItemError("A style vector has NaN or infinite values; nothing was stored.")
