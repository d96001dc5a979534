"""Read histories as arrays for the plug, and as items for people and exports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from operator import attrgetter
from typing import Any

import numpy as np

from personaplug.data.pictures import Picture
from personaplug.data.records import ITEM_KINDS, HistoryItem
from personaplug.encoders.encoded_sample import PREFERENCE_KIND, EncodedHistory, latest_items
from personaplug.encoders.joint import PICTURE
from personaplug.errors import MissingData
from personaplug.store.database import Connection, execute, sa
from personaplug.store.row_checksums import checksum, damaged
from personaplug.store.schema import MAX_ITEMS_PER_USER, Shard
from personaplug.store.vector_codec import Bodies, decode_bodies
from personaplug.store.writes import UserRow, checksum_of_item, parts_of, unpack_text

FIRST_PLACE = (-1, -1)
"""The place before all items."""

_COLUMNS = (
    "i.key, i.day, i.dated, i.arrived, i.label_id, i.kind_id, i.part_ids, i.item_id, i.checksum, t.body, "
    "length(p.body) AS picture_bytes"
)
_BY_DATE = "i.day DESC, i.key DESC"
_IS_PREFERENCE = f" AND i.kind_id = {PREFERENCE_KIND}"


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class StoredHistory(EncodedHistory):
    """A user's items as arrays, with a version that increases with every change; 0 = no such user."""

    version: int


@dataclass(frozen=True, slots=True, repr=False, kw_only=True)
class StoredItem(HistoryItem):
    """An item as stored; without fields if the store keeps no text, and without vector.

    Attributes:
        picture: None unless the store keeps pictures, and the reading function loads them.
        arrived: when the store first received the item, in UTC.
        label_id: index of the item's answer in the store's labels; -1 if the answer is not one of them.
        parts: the parts that the item was stored with besides its text: "picture", "vector".
        picture_bytes: size of the kept picture; None if there is none.
    """

    arrived: datetime
    label_id: int
    parts: tuple[str, ...] = ()
    picture_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "id": self.id,
            "date": self.date.isoformat() if self.date else None,
            "arrived": self.arrived.isoformat(),
            "kind": self.kind,
            "label_id": self.label_id,
            "answer_name": self.answer_name,
            "fields": [list(field) for field in self.fields],
            "parts": list(self.parts),
            "picture": self.picture.to_url() if self.picture else None,
        }


@dataclass(frozen=True, slots=True)
class Window:
    """The items to read: the latest items from `first_day` on; `latest` None = all."""

    first_day: int
    latest: int | None = None

    @property
    def limit(self) -> int:
        return MAX_ITEMS_PER_USER if self.latest is None else max(0, min(self.latest, MAX_ITEMS_PER_USER))

    def check_count(self, user: UserRow, count: int) -> None:
        """Raise StorageError if a damaged index misses items."""
        expected = min(user.items, self.limit)
        if count > expected or (count < expected and not self.first_day):
            raise damaged("the number of a user's items")


def load_history(
    connection: Connection, shard: Shard, user: UserRow | None, *, width: int, window: Window
) -> StoredHistory:
    """Return a user's items in the window as arrays, oldest first; see `latest_items`."""
    select = f"SELECT i.day, i.key, i.kind_id, i.body FROM {shard.items} i"
    rows = _used_rows(connection, select, user, window=window) if user else []
    bodies = _decode([row.body for row in rows], user, width=width)
    if bodies["kind_id"].tolist() != [row.kind_id for row in rows]:
        raise damaged("an item")
    return StoredHistory(
        vectors=bodies["vector"].astype(np.float16),
        label_ids=bodies["label_id"].astype(np.int16),
        style=bodies["style"].astype(np.float16),
        kind_ids=bodies["kind_id"].astype(np.int8),
        version=user.version if user else 0,
    )


def list_items(
    connection: Connection,
    shard: Shard,
    user: UserRow,
    *,
    window: Window,
    by_arrival: bool = False,
    with_pictures: bool = False,
) -> list[StoredItem]:
    """Return a user's items in the window without their vectors, oldest first by date, or by arrival.

    Args:
        with_pictures: load the kept pictures.
    """
    select = _select_items(shard)
    if by_arrival:
        rows = _latest_rows(connection, select, user, window=window, order="i.key DESC")
    else:
        rows = _used_rows(connection, select, user, window=window)
    return _with_pictures(connection, shard, rows) if with_pictures else [_stored_item(row) for row in rows]


def list_preferences(connection: Connection, shard: Shard, user: UserRow, *, window: Window) -> list[StoredItem]:
    """Return a user's stated preferences, oldest first."""
    rows = _rows(connection, _select_items(shard), user, window=window, condition=_IS_PREFERENCE)
    return [_stored_item(row) for row in rows[::-1]]


def load_picture(connection: Connection, shard: Shard, user: UserRow, item_id: str, *, first_day: int) -> Picture:
    """Return the kept picture of an item from `first_day` on; raise MissingData if there is none."""
    sql = f"{_select_items(shard)} WHERE i.user_no = :no AND i.item_id = :item AND i.day >= :first_day"
    rows = execute(connection, sql, {"no": user.no, "item": item_id, "first_day": first_day}).all()
    if not rows:
        raise MissingData("The user has no item with this id.")
    (item,) = _with_pictures(connection, shard, rows)
    if item.picture is None:
        raise MissingData("The store keeps no pictures." if PICTURE in item.parts else "The item has no picture.")
    return item.picture


def check_pictures(connection: Connection, shard: Shard, user: UserRow) -> None:
    """Read the kept pictures of a user one by one; raise StorageError if one is damaged."""
    keys = {"first": user.no * MAX_ITEMS_PER_USER, "last": (user.no + 1) * MAX_ITEMS_PER_USER - 1}
    sql = f"SELECT key FROM {shard.pictures} WHERE key BETWEEN :first AND :last"
    for key in execute(connection, sql, keys).scalars().all():
        _load_picture(connection, shard, key)


def read_page(
    connection: Connection, shard: Shard, user: UserRow, *, width: int, window: Window, place: tuple[int, int]
) -> tuple[list[dict[str, Any]], tuple[int, int] | None]:
    """Return the next items after `place` with all stored values as JSON, oldest first, and the next place.

    A place is the day and the key of the last item of a page; None = there are no more items.
    """
    sql = (
        f"{_select_items(shard, 'i.body AS item_body')} WHERE i.user_no = :no AND i.day >= :first_day "
        "AND (i.day, i.key) > (:day, :key) ORDER BY i.day, i.key LIMIT :limit"
    )
    parameters = {"no": user.no, "first_day": window.first_day, "limit": window.limit}
    rows = execute(connection, sql, parameters | {"day": place[0], "key": place[1]}).all()
    bodies = _decode([row.item_body for row in rows], user, width=width)
    columns = zip(
        _with_pictures(connection, shard, rows), bodies["vector"].tolist(), bodies["style"].tolist(), strict=True
    )
    items = [item.to_dict() | {"vector": vector, "style": style} for item, vector, style in columns]
    return items, (rows[-1].day, rows[-1].key) if len(rows) == window.limit else None


def count_items(connection: Connection, shard: Shard, user: UserRow, *, first_day: int) -> int:
    if not first_day:
        return user.items
    sql = f"SELECT count(*) FROM {shard.items} WHERE user_no = :no AND day >= :first_day"
    return int(execute(connection, sql, {"no": user.no, "first_day": first_day}).scalar_one())


def _decode(rows: Sequence[bytes], user: UserRow | None, *, width: int) -> Bodies:
    return decode_bodies(rows, width=width, user_no=user.no if user else 0, items_per_user=MAX_ITEMS_PER_USER)


def _select_items(shard: Shard, *more: str) -> str:
    columns = ", ".join([_COLUMNS, *more])
    joins = f"LEFT JOIN {shard.texts} t ON t.key = i.key LEFT JOIN {shard.pictures} p ON p.key = i.key"
    return f"SELECT {columns} FROM {shard.items} i {joins}"


def _stored_item(row: sa.Row[Any]) -> StoredItem:
    key, day, dated, arrived, label_id, kind_id, part_ids, item_id, check, body, picture_bytes = tuple(row)[:11]
    columns = (key, day, dated, arrived, label_id, kind_id, part_ids, item_id)
    if checksum_of_item(*columns, picture_bytes=picture_bytes, text=body) != check:
        raise damaged("an item")
    fields, answer_name, labels = unpack_text(body) if body is not None else ((), None, None)
    return StoredItem(
        id=item_id,
        fields=fields,
        answer_name=answer_name,
        date=date.fromordinal(day) if dated else None,
        arrived=datetime.fromtimestamp(arrived / 1e6, UTC),
        label_id=label_id,
        kind=ITEM_KINDS[kind_id],
        answer_labels=labels,
        parts=parts_of(part_ids),
        picture_bytes=picture_bytes,
    )


def _with_pictures(connection: Connection, shard: Shard, rows: Sequence[sa.Row[Any]]) -> list[StoredItem]:
    """Return the items of rows, with their kept pictures."""
    items = []
    for row in rows:
        item = _stored_item(row)
        has_picture = item.picture_bytes is not None
        items.append(replace(item, picture=_load_picture(connection, shard, row.key)) if has_picture else item)
    return items


def _load_picture(connection: Connection, shard: Shard, key: int) -> Picture:
    row = execute(connection, f"SELECT checksum, body FROM {shard.pictures} WHERE key = :key", {"key": key}).one()
    if checksum(key, text=row.body) != row.checksum:
        raise damaged("a picture")
    return Picture(row.body)


def _used_rows(connection: Connection, select: str, user: UserRow, *, window: Window) -> Sequence[sa.Row[Any]]:
    """Return the rows of the items in the window, latest last; see `latest_items`."""
    rows = _latest_rows(connection, select, user, window=window)
    if user.items == len(rows):
        return rows
    preferences = _rows(connection, select, user, window=window, condition=_IS_PREFERENCE)
    rows = sorted({row.key: row for row in (*rows, *preferences)}.values(), key=attrgetter("day", "key"))
    indices = latest_items(np.array([row.kind_id for row in rows], dtype=np.int8), window.limit)
    return [rows[index] for index in indices]


def _latest_rows(
    connection: Connection, select: str, user: UserRow, *, window: Window, order: str = _BY_DATE
) -> Sequence[sa.Row[Any]]:
    """Return the rows of the latest items, whatever their kind, latest last."""
    rows = _rows(connection, select, user, window=window, order=order)[::-1]
    window.check_count(user, len(rows))
    return rows


def _rows(
    connection: Connection, select: str, user: UserRow, *, window: Window, condition: str = "", order: str = _BY_DATE
) -> Sequence[sa.Row[Any]]:
    sql = f"{select} WHERE i.user_no = :no AND i.day >= :first_day{condition} ORDER BY {order} LIMIT :limit"
    return execute(connection, sql, {"no": user.no, "first_day": window.first_day, "limit": window.limit}).all()
