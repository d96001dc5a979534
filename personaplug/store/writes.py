"""Items into a store: what is new, what replaces something, what is there already; and what is kept no longer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import numpy as np

from personaplug.data.records import HistoryItem
from personaplug.encoders import EncoderIdentity
from personaplug.encoders.base import Vectors
from personaplug.encoders.embedding_store import Float16Array
from personaplug.encoders.encoded_sample import Places, label_ids, style_of_answers
from personaplug.encoders.style_features import FEATURES, StyleArray
from personaplug.errors import ConfigError, ItemError, ShapeMismatch
from personaplug.store.database import Connection, insert_rows, mark_of, sa
from personaplug.store.schema import ITEMS_PER_USER, Shard, State, day_of, now_in_microseconds
from personaplug.store.vector_codec import packed, split_rows

LONGEST_ID = 255

T = TypeVar("T")
_AT_ONCE = 500
_MOST_PARAMETERS = 30_000  # of one statement, in SQLite


class Stored(NamedTuple):
    """What adding did: items that are new, that replaced one of the same id, and that were there as they are."""

    new: int
    replaced: int
    same: int


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class EncodedItems:
    """Items of one or many users with their vectors, as columns.

    Attributes:
        users: (n) whose each item is.
        items: (n) the items; of a store that keeps no text, they need no fields.
        vectors: (n, E) their vectors.
        made_by: the encoder that made these.
        answers: (n,) place of each answer in the store's labels, -1 for none; None = read from the items.
        forms: (n, F) form of each answer; None = read from the items.
    """

    users: Sequence[str]
    items: Sequence[HistoryItem]
    vectors: Vectors | Float16Array
    made_by: EncoderIdentity
    answers: Places | None = None
    forms: StyleArray | None = None

    def __repr__(self) -> str:
        return f"EncodedItems({len(self.items)} items)"


@dataclass(frozen=True)
class Retention:
    """What is kept of a user; None = everything.

    Attributes:
        max_items: so many items, the latest.
        max_days: items that are no older, by their date or, without one, by the day they came.
    """

    max_items: int | None = None
    max_days: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_items", "max_days"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is 1 or more, not {value}; None keeps everything.")


class Row(NamedTuple):
    """One item, checked and ready for the tables."""

    user: str
    id: str
    day: int | None
    answer: int
    digest: bytes
    form: bytes
    vector: bytes
    fields: bytes | None


def check_id(value: str, *, what: str) -> None:
    """Refuse what cannot be an id.

    Raises:
        ItemError: if it is empty, too long or no proper text; it is not shown, since an id may be personal.
    """
    if not isinstance(value, str) or not 0 < len(value) <= LONGEST_ID:
        found = f"{len(value)} characters" if isinstance(value, str) else f"a {type(value).__name__}"
        raise ItemError(f"The id of {what} is a text of 1 to {LONGEST_ID} characters; found {found}.")
    if not value.isprintable() and ("\0" in value or any("\ud800" <= sign <= "\udfff" for sign in value)):
        raise ItemError(f"The id of {what} holds a zero or half of a surrogate pair, which no database keeps.")


def digest_of(item: HistoryItem, *, key: bytes) -> bytes:
    """16 bytes that stand for what an item says; without the key nobody can try texts against them."""
    said = json.dumps([item.fields, item.answer_name, item.date and item.date.toordinal()])
    return hashlib.blake2b(said.encode("ascii"), digest_size=16, key=key).digest()


def rows_of(encoded: EncodedItems, state: State, *, key: bytes) -> list[Row]:
    """Check and pack items.

    Args:
        encoded: from the caller.
        state: of the store that they go to.
        key: for their digests.
    Raises:
        ItemError: if an id, a vector or a form cannot be stored, or a text is missing that has to be kept.
        ShapeMismatch: if columns have different lengths or vectors another width.
    """
    settings, items = state.settings, encoded.items
    _check_ids(encoded)
    answers = label_ids(items, settings.labels) if encoded.answers is None else encoded.answers
    forms = style_of_answers(items) if encoded.forms is None else encoded.forms
    _check_columns(encoded, answers, forms, labels=len(settings.labels))
    if settings.keep_text and not all(item.fields for item in items):
        raise ItemError("The store keeps texts, and there are items without fields; nothing was stored.")
    vectors = packed(encoded.vectors, state.encoder.width, precision=settings.precision)
    columns = zip(encoded.users, items, answers.tolist(), split_rows(forms.astype("<f2")), vectors, strict=True)
    return [
        Row(
            user=user,
            id=item.id,
            day=item.date.toordinal() if item.date else None,
            answer=answer,
            digest=_digest(item, answer, form + vector, key=key),
            form=form,
            vector=vector,
            fields=_fields(item) if settings.keep_text else None,
        )
        for user, item, answer, form, vector in columns
    ]


def write_rows(
    connection: Connection, shard: Shard, rows: Sequence[Row], *, tenant: str, state: State, retention: Retention
) -> Stored:
    """Put items of users of one shard into it, within the caller's transaction.

    An item that replaces one keeps its place in the order of arrival. Of two with the same id, the later one counts.

    Raises:
        ItemError: if more items came for a user than a store can number.
    """
    latest = {(row.user, row.id): row for row in rows}
    users = lock_users(connection, shard.users, tenant=tenant, names={row.user for row in rows})
    found = stored_items(connection, shard.items, [(users[user].no, item) for user, item in latest if users[user].came])
    changes = _Changes(state)
    for row in latest.values():
        changes.take(row, users[row.user], found.get((users[row.user].no, row.id)))
    remove(connection, shard, changes.gone)
    changes.write(connection, shard)
    for no in changes.users:
        retain(connection, shard, no, retention=retention)
    return Stored(changes.new, len(changes.gone), len(rows) - changes.new - len(changes.gone))


def remove(connection: Connection, shard: Shard, gone: Sequence[tuple[int, str, int]]) -> None:
    """Remove items, given by user number, item id and key, with everything of theirs."""
    if not gone:
        return
    values = [{"no_": no, "id_": item, "key_": key} for no, item, key in gone]
    same = (shard.items.c.user_no == sa.bindparam("no_")) & (shard.items.c.item_id == sa.bindparam("id_"))
    connection.execute(shard.items.delete().where(same), values)
    for table in (shard.texts, *shard.vectors):
        connection.execute(table.delete().where(table.c.key == sa.bindparam("key_")), values)


def retain(connection: Connection, shard: Shard, no: int, *, retention: Retention) -> int:
    """Remove what is kept of a user no longer; return how many items that are."""
    items = shard.items
    columns = sa.select(items.c.user_no, items.c.item_id, items.c.key).where(items.c.user_no == no)
    gone: set[tuple[int, str, int]] = set()
    if retention.max_days is not None:
        first_day = day_of(now_in_microseconds()) - retention.max_days
        gone |= {(a, b, c) for a, b, c in connection.execute(columns.where(items.c.day < first_day))}
    if retention.max_items is not None:
        latest_first = columns.order_by(items.c.day.desc(), items.c.key.desc())
        gone |= {(a, b, c) for a, b, c in connection.execute(latest_first.offset(retention.max_items))}
    remove(connection, shard, sorted(gone))
    return len(gone)


def touch(connection: Connection, shard: Shard, no: int, *, state: State) -> None:
    """Let a user's version say that something changed."""
    users = shard.users
    version = connection.execute(sa.select(users.c.version).where(users.c.no == no).with_for_update()).scalar_one()
    connection.execute(users.update().where(users.c.no == no).values(version=_next_version(version, state)))


class User(NamedTuple):
    """A user's row: number, version, and how many items ever came."""

    no: int
    version: int
    came: int


def lock_users(connection: Connection, users: sa.Table, *, tenant: str, names: set[str]) -> dict[str, User]:
    """The rows of some users, made where absent; nobody else changes these users until the transaction ends."""
    found: dict[str, User] = {}
    mark = mark_of(connection)
    # An erasure may remove a row between the two statements; then it is made again.
    while missing := sorted(names - found.keys()):
        values = f"({mark}, {mark}, 0, 0, 0) ON CONFLICT DO NOTHING"
        statement = f"INSERT INTO {users.name} (tenant, user_id, version, came, ready) VALUES {values}"
        connection.exec_driver_sql(statement, [(tenant, name) for name in missing])
        for part in chunks(missing, _MOST_PARAMETERS):
            columns = sa.select(users.c.user_id, users.c.no, users.c.version, users.c.came)
            # Everybody locks in the order of numbers, so that no two wait for each other.
            theirs = columns.where(users.c.tenant == tenant, users.c.user_id.in_(part)).order_by(users.c.no)
            found |= {name: User(*rest) for name, *rest in connection.execute(theirs.with_for_update())}
    return found


def chunks(values: Iterable[T], size: int) -> Iterator[list[T]]:
    """The values in lists of so many; the last may be short."""
    stream = iter(values)
    while part := list(islice(stream, size)):
        yield part


class _Changes:
    """What a batch of items changes in a shard."""

    def __init__(self, state: State) -> None:
        self.state, self.new = state, 0
        self.gone = list[tuple[int, str, int]]()
        self.users = dict[int, User]()
        self._items, self._texts, self._vectors = (list[tuple[Any, ...]]() for _ in range(3))

    def take(self, row: Row, user: User, stored: sa.Row[Any] | None) -> None:
        """Note what one item changes for a user who had this under its id."""
        if stored is not None and stored.digest == row.digest:
            return
        if user.no not in self.users:
            self.users[user.no] = user._replace(version=_next_version(user.version, self.state))
        user = self.users[user.no]
        if stored is not None:
            key, arrived = stored.key, stored.arrived
            self.gone.append((user.no, row.id, key))
        else:
            key, arrived = user.no * ITEMS_PER_USER + user.came, user.version
            self.new += 1
            self.users[user.no] = user._replace(came=user.came + 1)
            if user.came == ITEMS_PER_USER - 1:
                raise ItemError(f"More than {ITEMS_PER_USER} items came for one user, whom the store cannot number.")
        self._put(row, user.no, key=key, arrived=arrived)

    def write(self, connection: Connection, shard: Shard) -> None:
        """Write it, but for what is gone."""
        current = shard.vectors[self.state.generation % 2]
        for table, rows in ((shard.items, self._items), (current, self._vectors), (shard.texts, self._texts)):
            insert_rows(connection, table, rows)
        if self.users:
            values = [{"no_": no, "version_": user.version, "came_": user.came} for no, user in self.users.items()]
            changed = shard.users.update().where(shard.users.c.no == sa.bindparam("no_"))
            connection.execute(
                changed.values(
                    version=sa.bindparam("version_"),
                    came=sa.bindparam("came_"),
                    ready=self.state.generation,  # vectors of an encoder to come are missing again
                ),
                values,
            )

    def _put(self, row: Row, no: int, *, key: int, arrived: int) -> None:
        day, dated = (day_of(arrived), False) if row.day is None else (row.day, True)
        self._items.append((no, day, key, row.id, dated, arrived, row.answer, row.digest, row.form))
        self._vectors.append((key, row.vector))
        if row.fields is not None:
            self._texts.append((key, row.fields))


def _next_version(version: int, state: State) -> int:
    # A time, so that a user who was erased and comes back has none of the versions that caches may remember.
    return max(version + 1, state.switched + 1, now_in_microseconds())


def stored_items(
    connection: Connection, items: sa.Table, wanted: Sequence[tuple[int, str]]
) -> dict[tuple[int, str], sa.Row[Any]]:
    """What is stored under some (user number, item id): key, arrival and digest."""
    named = sa.tuple_(items.c.user_no, items.c.item_id)
    columns: sa.Select[Any] = sa.select(items.c.user_no, items.c.item_id, items.c.key, items.c.arrived, items.c.digest)
    return {
        (row.user_no, row.item_id): row
        for part in chunks(wanted, _AT_ONCE)
        for row in connection.execute(columns.where(named.in_(part)))
    }


def _check_ids(encoded: EncodedItems) -> None:
    if len(encoded.users) != len(encoded.items):
        raise ShapeMismatch(f"{len(encoded.users)} users were given for {len(encoded.items)} items.")
    for user in set(encoded.users):
        check_id(user, what="a user")
    for item in encoded.items:
        check_id(item.id, what="an item")


def _check_columns(encoded: EncodedItems, answers: Places, forms: StyleArray, *, labels: int) -> None:
    count = len(encoded.items)
    if len(encoded.vectors) != count or answers.shape != (count,) or forms.shape != (count, len(FEATURES)):
        raise ShapeMismatch(
            f"{count} items came with vectors {encoded.vectors.shape}, answers {answers.shape} and forms "
            f"{forms.shape}; expected ({count}, E), ({count},) and ({count}, {len(FEATURES)})."
        )
    if count and not -1 <= int(answers.min()) <= int(answers.max()) < labels:
        raise ItemError(f"Answers are places among {labels} labels, or -1; found {answers.min()} to {answers.max()}.")
    if not np.isfinite(forms.astype(np.float16)).all():
        raise ItemError("A form holds NaN or infinite values; nothing was stored.")


def _digest(item: HistoryItem, answer: int, values: bytes, *, key: bytes) -> bytes:
    """Of the item's own words where it has them; else of what was made of them."""
    if item.fields:
        return digest_of(item, key=key)
    bare = f"{item.date and item.date.toordinal()} {answer} ".encode("ascii") + values
    return hashlib.blake2b(bare, digest_size=16, key=key).digest()


def _fields(item: HistoryItem) -> bytes:
    said = json.dumps([item.fields, item.answer_name], ensure_ascii=False)
    return said.encode("utf-8", "surrogatepass")


def item_fields(body: bytes) -> tuple[tuple[tuple[str, str], ...], str | None]:
    """An item's fields and which of them is the answer, as they were written."""
    fields, answer_name = json.loads(body.decode("utf-8", "surrogatepass"))
    return tuple((name, value) for name, value in fields), answer_name
