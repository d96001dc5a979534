"""Read histories: as arrays for the plug, and as items for people and exports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any

import numpy as np

from personaplug.data.records import HistoryItem
from personaplug.encoders.encoded_sample import EncodedHistory
from personaplug.encoders.style_features import FEATURES
from personaplug.store.database import Connection, execute, sa
from personaplug.store.schema import MAX_ITEMS_PER_USER, Shard
from personaplug.store.vector_codec import LITTLE_ENDIAN_HALF, decode_vectors
from personaplug.store.writes import UserRow, unpack_text

_BY_DATE = "day DESC, i.key DESC"


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class StoredHistory(EncodedHistory):
    """A user's items as arrays, with a version that grows with every change; 0 for an unknown user."""

    version: int


@dataclass(frozen=True, slots=True, repr=False, kw_only=True)
class StoredItem(HistoryItem):
    """An item as stored; without fields if the store keeps no text.

    Attributes:
        arrived: when the store first received it, in UTC.
        label_id: index of its answer in the store's labels; -1 if the answer is none of them.
    """

    arrived: datetime
    label_id: int

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "id": self.id,
            "date": self.date.isoformat() if self.date else None,
            "arrived": self.arrived.isoformat(),
            "label_id": self.label_id,
            "answer_name": self.answer_name,
            "fields": [list(field) for field in self.fields],
        }


def load_history(
    connection: Connection, shard: Shard, user: UserRow | None, *, width: int, latest: int | None
) -> StoredHistory:
    """Return a user's latest items as arrays, oldest first."""
    select = f"SELECT label_id, style, vector FROM {shard.items} i"
    rows = _latest_rows(connection, select, user.no, latest=latest) if user else []
    labels, style, vectors = zip(*rows, strict=True) if rows else ((), (), ())
    style_values = np.frombuffer(b"".join(style), dtype=LITTLE_ENDIAN_HALF).astype(np.float16)
    return StoredHistory(
        vectors=decode_vectors(vectors, width=width),
        label_ids=np.array(labels, dtype=np.int16),
        style=style_values.reshape(len(rows), len(FEATURES)),
        version=user.version if user else 0,
    )


def list_items(
    connection: Connection, shard: Shard, user_no: int, *, latest: int | None = None, by_arrival: bool = False
) -> list[StoredItem]:
    """Return a user's latest items without their vectors, oldest first: by date, or else by arrival."""
    columns = "item_id, dated, day, arrived, label_id, body"
    select = f"SELECT {columns} FROM {shard.items} i LEFT JOIN {shard.texts} t ON t.key = i.key"
    order = "i.key DESC" if by_arrival else _BY_DATE
    return [_stored_item(row) for row in _latest_rows(connection, select, user_no, latest=latest, order=order)]


def _stored_item(row: sa.Row[Any]) -> StoredItem:
    fields, answer_name = unpack_text(row.body) if row.body is not None else ((), None)
    return StoredItem(
        id=row.item_id,
        fields=fields,
        answer_name=answer_name,
        date=date.fromordinal(row.day) if row.dated else None,
        arrived=datetime.fromtimestamp(row.arrived / 1e6, UTC),
        label_id=row.label_id,
    )


def _latest_rows(
    connection: Connection, select: str, user_no: int, *, latest: int | None, order: str = _BY_DATE
) -> Sequence[sa.Row[Any]]:
    """Return rows of items, latest last."""
    sql = f"{select} WHERE user_no = :no ORDER BY {order} LIMIT :latest"
    limit = MAX_ITEMS_PER_USER if latest is None else latest
    return execute(connection, sql, {"no": user_no, "latest": limit}).all()[::-1]
