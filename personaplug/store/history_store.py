"""HistoryStore: the live histories of a service. Items come, change and go while others read them.

A file beside SQLite's, or a given secret, keeps receipts and hashes from being guessed. No user's text is in any log or
message, and without `keep_text` none is in the database.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from personaplug.data.records import HistoryItem
from personaplug.encoders import Encoder, EncoderIdentity
from personaplug.errors import ConfigError, EncoderMismatch, MissingData, StorageError, StoreConflict, UserError
from personaplug.store.database import Connection, Database, sa
from personaplug.store.reads import (
    StoredHistory,
    StoredItem,
    as_json,
    find_user,
    list_items,
    read_history,
    version_of,
)
from personaplug.store.receipts import Receipt, Secret
from personaplug.store.reencode import re_encode
from personaplug.store.schema import (
    ITEMS_PER_USER,
    Shard,
    State,
    StoreSettings,
    check_settings,
    create_store,
    read_state,
    tables_of,
)
from personaplug.store.secure_delete import wipe_shard
from personaplug.store.writes import (
    EncodedItems,
    Retention,
    Row,
    Stored,
    check_id,
    chunks,
    digest_of,
    remove,
    retain,
    rows_of,
    stored_items,
    touch,
    write_rows,
)

__all__ = [
    "EncodedItems",
    "HistoryStore",
    "Receipt",
    "Retention",
    "StoreSettings",
    "Stored",
    "StoredHistory",
    "StoredItem",
]


class HistoryStore:
    """The histories of users of tenants, in SQLite or PostgreSQL; for several threads and processes at once.

    Every call is one transaction or says otherwise: what it returned from is on disk, what it raised from left nothing.
    All calls raise StorageError if the database cannot be used. Calls that take ids raise ItemError for an unfit id.

    Attributes:
        settings: what the store was made with.
        retention: what this object keeps of a user whenever it adds.
        encoder: who encodes what is added, if anybody.
    """

    def __init__(
        self,
        database: Database,
        secret: Secret,
        *,
        settings: StoreSettings,
        encoder: Encoder | None,
        retention: Retention,
    ) -> None:
        """Wrap a database that is known to hold a store of these settings; use `open`."""
        self.settings, self.encoder, self.retention = settings, encoder, retention
        self._database, self._secret, self._tables = database, secret, tables_of(settings.shards)
        self._digest_key = secret.derived("items")

    @classmethod
    def open(
        cls,
        where: str | Path,
        encoder: Encoder | None = None,
        *,
        settings: StoreSettings | None = None,
        retention: Retention | None = None,
        secret: bytes | Path | None = None,
        connections: int = 8,
        wait_s: float = 30,
    ) -> HistoryStore:
        """Open a store, or make an empty one; finish erasures that were interrupted.

        Args:
            where: a path or `sqlite:///…` URL of a file, or a `postgresql://…` URL.
            encoder: the one that makes the store's vectors. Without one, a store is not made, nothing is encoded and
                reading does not check whose vectors it gets.
            settings: to make a store with; of one that is there, they have to be its own. None = its own, or defaults.
            retention: what is kept of a user; None = everything.
            secret: 16 bytes or more, or a file of hex digits, made where absent. None = a file beside SQLite's.
            connections: to the database, at most so many at once.
            wait_s: how long a call waits for others, in seconds.
        Raises:
            EncoderMismatch: if another encoder made the store's vectors.
            StoreConflict: if the store has other settings or another secret.
            MissingData: if there is no store, or no secret of the one that is there.
            ConfigError: if an argument is out of range, or PostgreSQL is given no secret.
        """
        database = Database(where, connections=connections, wait_s=wait_s)
        new = database.file is not None and not database.file.exists()
        if new and encoder is None:
            raise MissingData(f"There is no store of histories at {database.file}, and making one needs an encoder.")
        keeper = _secret(secret, database, create=new or database.file is None)
        with database.writing(alone=True) as connection:
            mark = keeper.hashed("store")
            identity = encoder.identity if encoder else None
            create_store(connection, settings or StoreSettings(), encoder=identity, secret=mark)
            state = read_state(connection)
        if state.secret != mark:
            raise StoreConflict("The secret given is another store's: with it, no earlier receipt could be verified.")
        check_settings(state.settings, settings or state.settings)
        _check_encoder(state, identity)
        kept = retention or Retention()
        store = cls(database, keeper, settings=state.settings, encoder=encoder, retention=kept)
        store._finish_erasures()
        return store

    def add(self, tenant: str, user: str, items: Sequence[HistoryItem], *, batch_size: int = 64) -> Stored:
        """Encode a user's items and store them; what is there already is neither encoded nor stored again.

        Args:
            tenant: whose user it is.
            user: whose items these are.
            items: in the order in which they came. An id that is known gets the new content and keeps its place.
            batch_size: texts that the encoder takes at once.
        Raises:
            UserError: if the store was opened without an encoder.
            EncoderMismatch: if the store has another encoder by now.
            ItemError, ShapeMismatch: if an item or its vector cannot be stored; then none of them is.
        """
        if self.encoder is None:
            raise UserError("The store was opened without an encoder, which adding needs; or add encoded items.")
        check_id(tenant, what="a tenant")
        check_id(user, what="a user")
        for item in items:
            check_id(item.id, what="an item")
        fresh = self._fresh(tenant, user, list({item.id: item for item in items}.values()))
        if not fresh:
            return Stored(0, 0, len(items))
        texts = [item.encoded(with_answer=self.settings.encodes_answers) for item in fresh]
        vectors = self.encoder.encode(texts, batch_size=batch_size)
        encoded = EncodedItems([user] * len(fresh), fresh, vectors, made_by=self.encoder.identity)
        done = self.add_encoded(tenant, encoded)
        return done._replace(same=len(items) - done.new - done.replaced)

    def add_encoded(self, tenant: str, encoded: EncodedItems) -> Stored:
        """Store items of one or many users whose vectors are known, all of them or none.

        Raises:
            EncoderMismatch: if another encoder made the vectors.
            ItemError, ShapeMismatch: if an item or its vector cannot be stored; then none of them is.
        """
        check_id(tenant, what="a tenant")
        with self._database.reading() as connection:
            rows = rows_of(encoded, self._state(connection, encoded.made_by), key=self._digest_key)
        shards = {user: self._tables.shard_of(tenant, user).number for user in set(encoded.users)}
        grouped: dict[int, list[Row]] = {}
        for row in rows:
            grouped.setdefault(shards[row.user], []).append(row)
        done = Stored(0, 0, 0)
        with self._database.writing() as connection:
            state = self._state(connection, encoded.made_by)
            for number, group in sorted(grouped.items()):
                shard = self._tables.shards[number]
                part = write_rows(connection, shard, group, tenant=tenant, state=state, retention=self.retention)
                done = Stored(*map(sum, zip(done, part, strict=True)))
        return done

    def read(self, tenant: str, user: str, *, latest: int | None = None) -> StoredHistory:
        """A user's items as arrays, oldest first: by date (the day of arrival where none is known), then by arrival.

        Args:
            tenant: whose user it is.
            user: whose items are wanted; an unknown one has none.
            latest: at most so many, the latest; None = all.
        Raises:
            EncoderMismatch: if the store has another encoder than the one it was opened with by now: open it again with
                that encoder, and a plug that was trained with it.
        """
        shard = self._shard(tenant, user)
        with self._database.reading() as connection:
            state = self._state(connection, self.encoder.identity if self.encoder else None)
            row = find_user(connection, shard, tenant=tenant, user=user)
            return read_history(connection, shard, row, state=state, latest=latest)

    def version(self, tenant: str, user: str) -> int:
        """A number that grows with every change of what `read` gives for a user; 0 for an unknown one.

        A user who is erased and comes back has none of the numbers of before.
        """
        shard = self._shard(tenant, user)
        with self._database.reading() as connection:
            row = find_user(connection, shard, tenant=tenant, user=user)
            return version_of(row, read_state(connection))

    def list_items(self, tenant: str, user: str, *, latest: int | None = None) -> list[StoredItem]:
        """A user's items without their vectors, oldest first; none for an unknown user.

        Args:
            latest: at most so many, the latest; None = all.
        """
        shard = self._shard(tenant, user)
        with self._database.reading() as connection:
            row = find_user(connection, shard, tenant=tenant, user=user)
            return list_items(connection, shard, row.no, latest=latest) if row else []

    def export(self, tenant: str, user: str) -> dict[str, Any]:
        """Everything that is known of a user, as JSON can hold it: the items, with vectors and forms as numbers.

        Raises:
            MissingData: if the tenant has no such user.
        """
        shard = self._shard(tenant, user)
        with self._database.reading() as connection:
            state, row = read_state(connection), self._known(connection, shard, tenant=tenant, user=user)
            history = read_history(connection, shard, row, state=state, latest=None)
            items = list_items(connection, shard, row.no)
        columns = zip(items, history.vectors.tolist(), history.forms.tolist(), strict=True)
        return {
            "tenant": tenant,
            "user": user,
            "version": history.version,
            "encoder": state.encoder.to_dict(),
            "labels": [*self.settings.labels],
            "items": [as_json(item) | {"vector": vector, "form": form} for item, vector, form in columns],
        }

    def delete_item(self, tenant: str, user: str, item: str) -> None:
        """Remove one item. Its bytes leave the files when its shard is next written anew; see `erase_user`, `wipe`.

        Raises:
            MissingData: if there is no such user or item.
        """
        check_id(item, what="an item")
        shard = self._shard(tenant, user)
        with self._database.writing() as connection:
            no = self._known(connection, shard, tenant=tenant, user=user).no
            touch(connection, shard, no, state=read_state(connection))
            items = shard.items
            key = sa.select(items.c.key).where(items.c.user_no == no, items.c.item_id == item)
            found = connection.execute(key).scalar_one_or_none()
            if found is None:
                raise MissingData("The user has no item of this id.")
            remove(connection, shard, [(no, item, found)])

    def erase_user(self, tenant: str, user: str) -> Receipt:
        """Remove everything of a user, the id included, and clear the files of its bytes; several transactions.

        The part of the database that the user was in is written anew, during which it is locked.

        Raises:
            MissingData: if the tenant has no such user.
            StorageError: if the files could not be cleared. The rows are gone then; repeat the call for the receipt.
        """
        shard, hashed = self._shard(tenant, user), self._secret.hashed("user", tenant, user)
        with self._database.writing() as connection:
            row = find_user(connection, shard, tenant=tenant, user=user, lock=True)
            if row:
                number = self._erase_rows(connection, shard, row.no, tenant=tenant, hashed=hashed)
            else:
                number = self._unfinished(connection, hashed)
        return self._finish_erasure(number)

    def erased_at(self, tenant: str, user: str) -> datetime | None:
        """When a user of this id was last erased; None = never."""
        erasures, hashed = self._tables.erasures, self._secret.hashed("user", tenant, user)
        with self._database.reading() as connection:
            latest = sa.select(sa.func.max(erasures.c.erased_at)).where(erasures.c.hashed_user == hashed)
            found = connection.execute(latest).scalar_one_or_none()
        return datetime.fromisoformat(found) if found else None

    def verify(self, receipt: Receipt, *, tenant: str | None = None, user: str | None = None) -> bool:
        """Whether this store gave the receipt as it is; and, with a tenant and user, whether it is about that user."""
        about = user is None or receipt.user == self._secret.hashed("user", tenant or receipt.tenant, user)
        return about and tenant in (None, receipt.tenant) and self._secret.verifies(receipt)

    def prune(self) -> int:
        """Remove what the retention no longer keeps, shard by shard; return how many items that were."""
        gone = 0
        for shard in self._tables.shards:
            users = shard.users
            with self._database.reading() as connection:
                numbers = connection.execute(sa.select(users.c.no)).scalars().all()
            for part in chunks(numbers, 100):  # others wait no longer than for so many
                with self._database.writing() as connection:
                    state = read_state(connection)
                    theirs = sa.select(users.c.no).where(users.c.no.in_(part)).order_by(users.c.no)
                    for no in connection.execute(theirs.with_for_update()).scalars().all():
                        if removed := retain(connection, shard, no, retention=self.retention):
                            touch(connection, shard, no, state=state)
                            gone += removed
        return gone

    def wipe(self) -> None:
        """Clear the files of everything that was removed so far, shard by shard; it costs writing all of them anew."""
        for shard in self._tables.shards:
            wipe_shard(self._database, shard)

    def re_encode(
        self, encoder: Encoder, *, progress: Callable[[int], None] | None = None, batch_size: int = 64
    ) -> int:
        """Move the store to another encoder while it is in use; return how many vectors were made by this call.

        Others read and add with the old encoder until the switch, which is one row; then their calls raise
        EncoderMismatch. Stopped, it goes on where it was; with the encoder that the store has, it is given up.

        Args:
            encoder: whose vectors the store shall have; this object's from then on.
            progress: called after each group of users with the number of items done so far.
            batch_size: texts that the encoder takes at once.
        Raises:
            StoreConflict: if the store keeps no texts, or is being moved to a third encoder.
        """
        done = re_encode(self._database, self._tables, encoder, progress=progress, batch_size=batch_size)
        self.encoder = encoder
        return done

    @property
    def identity(self) -> EncoderIdentity:
        """The encoder whose vectors are read now."""
        with self._database.reading() as connection:
            return read_state(connection).encoder

    def close(self) -> None:
        """Close the connections that are not in use."""
        self._database.close()

    def __repr__(self) -> str:
        return f"HistoryStore({str(self._database.url)!r})"

    def _shard(self, tenant: str, user: str) -> Shard:
        check_id(tenant, what="a tenant")
        check_id(user, what="a user")
        return self._tables.shard_of(tenant, user)

    def _state(self, connection: Connection, encoder: EncoderIdentity | None) -> State:
        state = read_state(connection)
        _check_encoder(state, encoder)
        return state

    def _known(self, connection: Connection, shard: Shard, *, tenant: str, user: str) -> sa.Row[Any]:
        row = find_user(connection, shard, tenant=tenant, user=user)
        if row is None:
            raise MissingData("The tenant has no such user.")
        return row

    def _fresh(self, tenant: str, user: str, items: list[HistoryItem]) -> list[HistoryItem]:
        """Those of a user's items that are not stored as they are."""
        shard = self._tables.shard_of(tenant, user)
        with self._database.reading() as connection:
            self._state(connection, self.encoder.identity if self.encoder else None)
            row = find_user(connection, shard, tenant=tenant, user=user)
            wanted = [(row.no, item.id) for item in items] if row else []
            stored = {key[1]: old.digest for key, old in stored_items(connection, shard.items, wanted).items()}
        return [item for item in items if stored.get(item.id) != digest_of(item, key=self._digest_key)]

    def _erase_rows(self, connection: Connection, shard: Shard, no: int, *, tenant: str, hashed: str) -> int:
        """Remove a user's rows and note, without the id, that files are to be cleared; return the note's number."""
        removed = connection.execute(shard.items.delete().where(shard.items.c.user_no == no)).rowcount
        for table in (shard.texts, *shard.vectors):
            theirs = table.c.key.between(no * ITEMS_PER_USER, (no + 1) * ITEMS_PER_USER - 1)
            connection.execute(table.delete().where(theirs))
        connection.execute(shard.users.delete().where(shard.users.c.no == no))
        note = self._tables.erasures.insert().values(
            tenant=tenant,
            hashed_user=hashed,
            items=removed,
            erased_at=datetime.now(UTC).isoformat(timespec="seconds"),
            shard=shard.number,
        )
        return int(connection.execute(note.returning(self._tables.erasures.c.number)).scalar_one())

    def _unfinished(self, connection: Connection, hashed: str) -> int:
        """The number of a user's erasure whose files were not cleared yet.

        Raises:
            MissingData: if there is none.
        """
        erasures = self._tables.erasures
        theirs = sa.select(erasures.c.number).where(erasures.c.hashed_user == hashed, erasures.c.wiped.is_(None))
        number = connection.execute(theirs.order_by(erasures.c.number.desc()).limit(1)).scalar_one_or_none()
        if number is None:
            raise MissingData("The tenant has no such user; nothing was erased.")
        return int(number)

    def _finish_erasure(self, number: int) -> Receipt:
        """Clear the files, unless another process was faster, and write the receipt."""
        erasures = self._tables.erasures
        this = erasures.c.number == number
        with self._database.reading() as connection:
            note = connection.execute(sa.select(erasures).where(this)).one()
        wiped = note.wiped
        if wiped is None:
            wiped = " ".join(wipe_shard(self._database, self._tables.shards[note.shard]))
            with self._database.writing() as connection:
                connection.execute(erasures.update().where(this).values(wiped=wiped))
        return self._secret.signed(
            Receipt(note.tenant, note.hashed_user, note.items, note.erased_at, wiped=tuple(wiped.split()))
        )

    def _finish_erasures(self) -> None:
        """Clear the files of whatever was erased when a process was stopped before it could."""
        erasures = self._tables.erasures
        with self._database.reading() as connection:
            numbers = connection.execute(sa.select(erasures.c.number).where(erasures.c.wiped.is_(None))).scalars().all()
        for number in numbers:
            with suppress(
                StorageError
            ):  # a reader that holds on is no reason not to open; whoever opens next tries again
                self._finish_erasure(number)


def _secret(given: bytes | Path | None, database: Database, *, create: bool) -> Secret:
    if isinstance(given, bytes):
        return Secret(given)
    if given is None and database.file is None:
        raise ConfigError("A store in PostgreSQL has no place for its secret: give one, as bytes or as a file's path.")
    beside = database.file and database.file.with_name(f"{database.file.name}.secret")
    return Secret.of_file(Path(given or beside or ""), create=create)


def _check_encoder(state: State, given: EncoderIdentity | None) -> None:
    if given is not None and not state.encoder.same_items_as(given):
        raise EncoderMismatch("The store of histories", expected=state.encoder.describe(), found=given.describe())
