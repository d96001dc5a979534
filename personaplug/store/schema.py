"""The tables of a store of histories, and what the store says of itself.

Everything of a user lies in one shard, a handful of tables that are small enough to be written anew when somebody is
erased: neither SQLite nor PostgreSQL can be trusted to leave no copy of a removed row in the pages that it was in.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass, fields
from datetime import date
from functools import lru_cache
from typing import NamedTuple

from personaplug.encoders import EncoderIdentity
from personaplug.errors import ConfigError, MissingData, StoreConflict, UserError
from personaplug.store.database import Connection, sa
from personaplug.store.vector_codec import Precision

FORMAT = 1

ITEMS_PER_USER = 2**24
"""So many items may ever come for a user; an item's key is its user's number times this, plus its own."""

_Number = sa.BigInteger().with_variant(sa.Integer, "sqlite")  # in SQLite, what is no INTEGER is no row number


@dataclass(frozen=True)
class StoreSettings:
    """What a store is made with and keeps.

    Attributes:
        labels: the task's closed set of answers, if it has one.
        encodes_answers: vectors are of whole items (PPlug's Table 7), else of items without the user's answer.
        precision: how vectors are kept.
        keep_text: keep the items' fields; without, no text of a user ever reaches the database.
        shards: parts that are written anew when a user is erased, so an erasure costs one of so many parts.
    """

    labels: tuple[str, ...] = ()
    encodes_answers: bool = True
    precision: Precision = "float16"
    keep_text: bool = False
    shards: int = 64

    def __post_init__(self) -> None:
        if not 1 <= self.shards <= 1024:
            raise ConfigError(f"A store has 1 to 1024 shards, not {self.shards}.")
        if self.precision not in ("float16", "int8"):
            raise ConfigError(f"A store keeps vectors as float16 or int8, not {self.precision!r}.")


class Shard(NamedTuple):
    """The tables that hold some of the users, with everything of theirs.

    Attributes:
        number: which of the shards it is.
        users, items, texts: one row a user, an item, an item's fields.
        vectors: one row an item, in two tables; the store's generation says which is current.
    """

    number: int
    users: sa.Table
    items: sa.Table
    texts: sa.Table
    vectors: tuple[sa.Table, sa.Table]

    @property
    def tables(self) -> tuple[sa.Table, ...]:
        """All of them."""
        return (self.users, self.items, self.texts, *self.vectors)


class Tables(NamedTuple):
    """All tables of a store.

    Attributes:
        metadata: what makes them.
        store: one row, what the store says of itself.
        erasures: one row for each user that was erased, without the user's id.
        shards: where the users are.
    """

    metadata: sa.MetaData
    store: sa.Table
    erasures: sa.Table
    shards: tuple[Shard, ...]

    def shard_of(self, tenant: str, user: str) -> Shard:
        """Where a user's rows are, if there are any."""
        named = json.dumps([tenant, user]).encode("ascii")
        digest = hashlib.blake2b(named, digest_size=8).digest()
        return self.shards[int.from_bytes(digest, "little") % len(self.shards)]


class State(NamedTuple):
    """What the store's one row says.

    Attributes:
        settings: as at its making.
        secret: a hash of the secret it belongs to.
        encoder: who made the current vectors.
        generation: how many encoders it had before this one; its parity says which table of vectors is current.
        switched: when this encoder's vectors became current, in microseconds since 1970.
        next_encoder: to whose vectors the store is being moved, if it is.
    """

    settings: StoreSettings
    secret: str
    encoder: EncoderIdentity
    generation: int
    switched: int
    next_encoder: EncoderIdentity | None


@lru_cache(maxsize=8)
def tables_of(shards: int) -> Tables:
    """The tables of a store with so many shards."""
    metadata = sa.MetaData()
    return Tables(metadata, _store(metadata), _erasures(metadata), tuple(_shard(metadata, i) for i in range(shards)))


def create_store(
    connection: Connection, settings: StoreSettings, *, encoder: EncoderIdentity | None, secret: str
) -> None:
    """Make the tables and the store's row, unless another process was faster.

    Raises:
        MissingData: if there is no store and no encoder to make one for.
    """
    if sa.inspect(connection).has_table("history_store"):
        return
    if encoder is None:
        raise MissingData("There is no store of histories yet, and making one needs an encoder.")
    tables = tables_of(settings.shards)
    tables.metadata.create_all(connection)
    if connection.dialect.name == "postgresql":
        _keep_out_of_statistics(connection, tables)
    connection.execute(
        tables.store.insert().values(
            single=0,
            format=FORMAT,
            settings=json.dumps(asdict(settings)),
            secret=secret,
            encoder=json.dumps(encoder.to_dict()),
            generation=0,
            switched=0,
        )
    )


def read_state(connection: Connection) -> State:
    """What the store says of itself.

    Raises:
        UserError: if another version of this package made it.
    """
    row = connection.execute(_STATE).one()
    if row.format != FORMAT:
        raise UserError(
            f"The store has format {row.format}; this version reads format {FORMAT}. Use the version that made it."
        )
    return _parsed(row.settings, row.secret, row.encoder, row.generation, row.switched, row.next_encoder)


def check_settings(made_with: StoreSettings, given: StoreSettings) -> None:
    """Refuse settings other than those a store was made with.

    Raises:
        StoreConflict: if one differs.
    """
    differing = [
        field.name for field in fields(StoreSettings) if getattr(made_with, field.name) != getattr(given, field.name)
    ]
    if differing:
        found = ", ".join(f"{name}={getattr(made_with, name)!r}" for name in differing)
        wanted = ", ".join(f"{name}={getattr(given, name)!r}" for name in differing)
        raise StoreConflict(f"The store was made with {found}; given is {wanted}. Give the same, or make a new store.")


def now_in_microseconds() -> int:
    """Microseconds since 1970."""
    return time.time_ns() // 1000


def day_of(microseconds: int) -> int:
    """The day, as `date.toordinal` counts them, in UTC."""
    return microseconds // 86_400_000_000 + date(1970, 1, 1).toordinal()


@lru_cache(maxsize=32)
def _parsed(
    settings: str, secret: str, encoder: str, generation: int, switched: int, next_encoder: str | None
) -> State:
    values = json.loads(settings)
    return State(
        settings=StoreSettings(**(values | {"labels": tuple(values["labels"])})),
        secret=secret,
        encoder=EncoderIdentity.from_dict(json.loads(encoder)),
        generation=generation,
        switched=switched,
        next_encoder=EncoderIdentity.from_dict(json.loads(next_encoder)) if next_encoder else None,
    )


def _keep_out_of_statistics(connection: Connection, tables: Tables) -> None:
    """Let PostgreSQL keep no samples of users' values among its statistics, where no erasure would find them."""
    for table in (table for shard in tables.shards for table in shard.tables):
        for column in table.columns:
            if isinstance(column.type, sa.Text | sa.LargeBinary):
                connection.execute(sa.text(f"ALTER TABLE {table.name} ALTER COLUMN {column.name} SET STATISTICS 0"))


def _store(metadata: sa.MetaData) -> sa.Table:
    return sa.Table(
        "history_store",
        metadata,
        sa.Column("single", sa.Integer, sa.CheckConstraint("single = 0"), primary_key=True, autoincrement=False),
        sa.Column("format", sa.Integer, nullable=False),
        sa.Column("settings", sa.Text, nullable=False),
        sa.Column("secret", sa.Text, nullable=False),
        sa.Column("encoder", sa.Text, nullable=False),
        sa.Column("generation", sa.Integer, nullable=False),
        sa.Column("switched", sa.BigInteger, nullable=False),
        sa.Column("next_encoder", sa.Text),
    )


def _erasures(metadata: sa.MetaData) -> sa.Table:
    return sa.Table(
        "history_erasures",
        metadata,
        sa.Column("number", _Number, primary_key=True),
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("hashed_user", sa.Text, nullable=False),
        sa.Column("items", sa.Integer, nullable=False),
        sa.Column("erased_at", sa.Text, nullable=False),
        sa.Column("shard", sa.Integer, nullable=False),
        sa.Column("wiped", sa.Text),
        sa.Index("history_erasures_by_user", "hashed_user"),
    )


def _shard(metadata: sa.MetaData, number: int) -> Shard:
    users = sa.Table(
        f"users_{number:04d}",
        metadata,
        sa.Column("no", _Number, primary_key=True),
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("user_id", sa.Text, nullable=False),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("came", sa.Integer, nullable=False),
        sa.Column("ready", sa.Integer, nullable=False),
        sa.UniqueConstraint("tenant", "user_id"),
        sa.Index(f"ready_{number:04d}", "ready"),
    )
    items = sa.Table(
        f"items_{number:04d}",
        metadata,
        sa.Column("user_no", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("day", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("key", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("item_id", sa.Text, nullable=False),
        sa.Column("dated", sa.Boolean, nullable=False),
        sa.Column("arrived", sa.BigInteger, nullable=False),
        sa.Column("answer", sa.SmallInteger, nullable=False),
        sa.Column("digest", sa.LargeBinary, nullable=False),
        sa.Column("form", sa.LargeBinary, nullable=False),
        sa.UniqueConstraint("user_no", "item_id"),
        sqlite_with_rowid=False,  # rows in the order in which they are read
    )
    texts, even, odd = (_bodies(metadata, f"{name}_{number:04d}") for name in ("texts", "vectors_even", "vectors_odd"))
    return Shard(number, users, items, texts, (even, odd))


def _bodies(metadata: sa.MetaData, name: str) -> sa.Table:
    return sa.Table(
        name,
        metadata,
        sa.Column("key", _Number, primary_key=True, autoincrement=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
    )


_STATE = sa.select(tables_of(1).store)  # its row looks the same whatever the number of shards
