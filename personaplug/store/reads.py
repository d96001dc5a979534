"""Items out of a store: a history as arrays for the plug, a list for people, everything for an export."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from functools import cache
from typing import Any

import numpy as np

from personaplug.encoders.encoded_sample import EncodedHistory
from personaplug.encoders.style_features import FEATURES
from personaplug.store.database import Connection, sa
from personaplug.store.schema import ITEMS_PER_USER, Shard, State
from personaplug.store.vector_codec import unpacked
from personaplug.store.writes import item_fields


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class StoredHistory(EncodedHistory):
    """A user's items out of a store.

    Attributes:
        version: of the history; it grows with every change of it, and is 0 for an unknown user.
    """

    version: int


@dataclass(frozen=True, slots=True, repr=False)
class StoredItem:
    """An item without its vector.

    Attributes:
        id: as it was given.
        date: when it happened, where that was said.
        arrived: when the store got it first, in UTC.
        answer: place of its answer in the store's labels; -1 if it is none of them.
        fields: (name, value) pairs; empty if the store keeps no text.
        answer_name: which of the fields is the user's answer, if any.
    """

    id: str
    date: date | None
    arrived: datetime
    answer: int
    fields: tuple[tuple[str, str], ...] = ()
    answer_name: str | None = None

    def __repr__(self) -> str:
        return f"StoredItem(id={self.id!r}, date={self.date})"


def find_user(
    connection: Connection, shard: Shard, *, tenant: str, user: str, lock: bool = False
) -> sa.Row[Any] | None:
    """A user's row, with number and version, if there is one; nobody else changes it while it is locked."""
    statement = _user_statement(shard.users)
    named = {"tenant_": tenant, "user_": user}
    return connection.execute(statement.with_for_update() if lock else statement, named).one_or_none()


def version_of(row: sa.Row[Any] | None, state: State) -> int:
    """A history's version: when it, or the encoder of its vectors, changed last."""
    return max(row.version, state.switched) if row else 0


def read_history(
    connection: Connection, shard: Shard, row: sa.Row[Any] | None, *, state: State, latest: int | None
) -> StoredHistory:
    """A user's items as arrays, at most so many and then the latest of them, oldest first."""
    found: Sequence[sa.Row[Any]] = ()
    if row:
        statement = _history_statement(shard.items, shard.vectors[state.generation % 2])
        found = connection.execute(
            statement, {"no_": row.no, "latest_": ITEMS_PER_USER if latest is None else latest}
        ).all()
    answers, forms, vectors = zip(*reversed(found), strict=True) if found else ((), (), ())
    return StoredHistory(
        vectors=unpacked(vectors, state.encoder.width, precision=state.settings.precision),
        answers=np.array(answers, dtype=np.int16),
        forms=np.frombuffer(b"".join(forms), dtype="<f2").reshape(len(found), len(FEATURES)).astype(np.float16),
        version=version_of(row, state),
    )


def list_items(connection: Connection, shard: Shard, no: int, *, latest: int | None = None) -> list[StoredItem]:
    """A user's items without their vectors, at most so many and then the latest of them, oldest first."""
    given = {"no_": no, "latest_": ITEMS_PER_USER if latest is None else latest}
    return [_item(row) for row in reversed(connection.execute(_items_statement(shard), given).all())]


def as_json(item: StoredItem) -> dict[str, Any]:
    """An item as JSON can hold it."""
    return {
        "id": item.id,
        "date": item.date.isoformat() if item.date else None,
        "arrived": item.arrived.isoformat(),
        "answer": item.answer,
        "answer_name": item.answer_name,
        "fields": [list(field) for field in item.fields],
    }


def _item(row: sa.Row[Any]) -> StoredItem:
    fields, answer_name = item_fields(row.body) if row.body is not None else ((), None)
    return StoredItem(
        id=row.item_id,
        date=date.fromordinal(row.day) if row.dated else None,
        arrived=datetime.fromtimestamp(row.arrived / 1e6, UTC),
        answer=row.answer,
        fields=fields,
        answer_name=answer_name,
    )


# Statements are built once a shard: building one takes as long as running it.


@cache
def _user_statement(users: sa.Table) -> sa.Select[Any]:
    return sa.select(users.c.no, users.c.version).where(
        users.c.tenant == sa.bindparam("tenant_"), users.c.user_id == sa.bindparam("user_")
    )


@cache
def _history_statement(items: sa.Table, vectors: sa.Table) -> sa.Select[Any]:
    columns = sa.select(items.c.answer, items.c.form, vectors.c.body).join_from(
        items, vectors, items.c.key == vectors.c.key
    )
    theirs = columns.where(items.c.user_no == sa.bindparam("no_"))
    return theirs.order_by(items.c.day.desc(), items.c.key.desc()).limit(sa.bindparam("latest_", type_=sa.Integer))


@cache
def _items_statement(shard: Shard) -> sa.Select[Any]:
    items, texts = shard.items, shard.texts
    columns = sa.select(items.c.item_id, items.c.dated, items.c.day, items.c.arrived, items.c.answer, texts.c.body)
    joined = columns.join_from(items, texts, items.c.key == texts.c.key, isouter=True)
    theirs = joined.where(items.c.user_no == sa.bindparam("no_")).order_by(items.c.day.desc(), items.c.key.desc())
    return theirs.limit(sa.bindparam("latest_", type_=sa.Integer))
