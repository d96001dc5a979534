"""Re-encoding: a store's vectors made anew by another encoder while it is in use.

Each shard has two tables of vectors. The next encoder's fill the one that is not current, user by user; whoever changes
a user meanwhile sends that user back to be done again. When nobody is left, one row changes, and with it whose vectors
everybody reads. All of it is in the database, so a migration that was stopped goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from personaplug.data.records import HistoryItem
from personaplug.encoders import Encoder, EncoderIdentity
from personaplug.errors import StoreConflict
from personaplug.store.database import Connection, Database, insert_rows, sa
from personaplug.store.schema import Shard, State, Tables, now_in_microseconds, read_state
from personaplug.store.vector_codec import packed
from personaplug.store.writes import item_fields


def re_encode(
    database: Database,
    tables: Tables,
    encoder: Encoder,
    *,
    progress: Callable[[int], None] | None = None,
    batch_size: int = 64,
    users_at_once: int = 64,
) -> int:
    """Make all vectors anew and switch to them; return how many were made by this call.

    With the encoder that the store already has, a migration to another one is given up.

    Args:
        database: of the store.
        tables: of the store.
        encoder: whose vectors it shall have.
        progress: called after each group of users with the number of items done so far.
        batch_size: texts that the encoder takes at once.
        users_at_once: users whose items are read, encoded and committed together.
    Raises:
        StoreConflict: if the store keeps no texts, or is being moved to a third encoder.
        UserError, StorageError: as the encoder's and the database's.
    """
    done = 0
    state = _begin(database, tables, encoder.identity)
    while state.next_encoder is not None:
        for shard in tables.shards:
            while users := _to_do(database, shard, state, count=users_at_once):
                done += _encode_users(database, shard, state, users=users, encoder=encoder, batch_size=batch_size)
                if progress:
                    progress(done)
        state = _switch(database, tables)
    for shard in tables.shards:
        with database.writing() as connection:
            state = read_state(connection)
            if state.next_encoder is None:  # else the table is in use by the next migration already
                connection.execute(_other(shard, state).delete())
    return done


def _begin(database: Database, tables: Tables, wanted: EncoderIdentity) -> State:
    """Note where the store is going, with nobody there yet; or find that it is on its way, or there."""
    with database.writing(alone=True) as connection:
        state = read_state(connection)
        if not state.settings.keep_text:
            raise StoreConflict(
                "This store keeps no texts (keep_text = false), so its vectors cannot be made anew: fill a new store "
                "from the histories themselves."
            )
        if state.next_encoder and state.next_encoder.same_items_as(wanted):
            return state
        arrived = state.encoder.same_items_as(wanted)
        if state.next_encoder and not arrived:
            raise StoreConflict(
                f"The store is being moved to {state.next_encoder.describe()}; finish that, or give it up by "
                f"re-encoding with the encoder that the store has."
            )
        said = None if arrived else json.dumps(wanted.to_dict())
        connection.execute(tables.store.update().values(next_encoder=said))
        for shard in tables.shards if state.next_encoder or not arrived else ():
            users = shard.users
            behind = users.update().where(users.c.ready != state.generation)
            connection.execute(behind.values(ready=state.generation))
            connection.execute(_other(shard, state).delete())
        return read_state(connection)


def _to_do(database: Database, shard: Shard, state: State, *, count: int) -> Sequence[sa.Row[Any]]:
    users = shard.users
    with database.reading() as connection:
        waiting: sa.Select[Any] = sa.select(users.c.no, users.c.version).where(users.c.ready <= state.generation)
        return connection.execute(waiting.limit(count)).all()


def _encode_users(
    database: Database, shard: Shard, state: State, *, users: Sequence[sa.Row[Any]], encoder: Encoder, batch_size: int
) -> int:
    """Make what some users lack, and note those as ready who did not change meanwhile."""
    with database.reading() as connection:
        rows = connection.execute(_lacking(shard, state, [user.no for user in users])).all()
    texts = [_text(row.body, encodes_answers=state.settings.encodes_answers) for row in rows]
    vectors = encoder.encode(texts, batch_size=batch_size)
    bodies = packed(vectors, encoder.width, precision=state.settings.precision)
    with database.writing() as connection:
        now = read_state(connection)
        if now.generation != state.generation:
            return 0  # another process brought it to its end
        if now.next_encoder != state.next_encoder:
            raise StoreConflict("The re-encoding was given up by another process.")
        same = _unchanged(connection, shard.users, users, state=state)
        made = [(row.key, body) for row, body in zip(rows, bodies, strict=True) if row.user_no in same]
        insert_rows(connection, _other(shard, state), made)
        ready = shard.users.update().where(shard.users.c.no.in_(same))
        connection.execute(ready.values(ready=state.generation + 1))
    return len(made)


def _lacking(shard: Shard, state: State, users: Sequence[int]) -> sa.Select[Any]:
    items, texts, other = shard.items, shard.texts, _other(shard, state)
    columns = sa.select(items.c.user_no, items.c.key, texts.c.body)
    joined = columns.join_from(items, texts, items.c.key == texts.c.key)
    lacking = joined.join(other, other.c.key == items.c.key, isouter=True).where(other.c.key.is_(None))
    return lacking.where(items.c.user_no.in_(users))


def _unchanged(connection: Connection, users: sa.Table, known: Sequence[sa.Row[Any]], *, state: State) -> set[int]:
    """Numbers of the users who are still as they were and still wait, locked so that they stay so."""
    columns = sa.select(users.c.no, users.c.version).where(users.c.no.in_([user.no for user in known]))
    waiting = columns.where(users.c.ready <= state.generation)
    found = {(row.no, row.version) for row in connection.execute(waiting.order_by(users.c.no).with_for_update())}
    return {user.no for user in known if (user.no, user.version) in found}


def _switch(database: Database, tables: Tables) -> State:
    """Make the next encoder's vectors the current ones, unless there are users who still wait."""
    with database.writing(alone=True) as connection:
        state = read_state(connection)
        if state.next_encoder and not any(_waiting(connection, shard, state) for shard in tables.shards):
            values = {
                "encoder": json.dumps(state.next_encoder.to_dict()),
                "next_encoder": None,
                "generation": state.generation + 1,
                "switched": max(now_in_microseconds(), state.switched + 1),
            }
            connection.execute(tables.store.update().values(values))
        return read_state(connection)


def _waiting(connection: Connection, shard: Shard, state: State) -> bool:
    users = shard.users
    return bool(connection.execute(sa.select(users.c.no).where(users.c.ready <= state.generation).limit(1)).first())


def _other(shard: Shard, state: State) -> sa.Table:
    """The table of vectors that nobody reads."""
    return shard.vectors[(state.generation + 1) % 2]


def _text(body: bytes, *, encodes_answers: bool) -> str:
    fields, answer_name = item_fields(body)
    return HistoryItem("", fields, answer_name).encoded(with_answer=encodes_answers)
