"""HistoryStore: users' live histories, which can be read and changed at the same time.

Logs and errors contain no user text. Without `keep_text`, the database contains no user text either.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from itertools import chain
from pathlib import Path

from personaplug.data.pictures import Picture
from personaplug.data.records import HistoryItem
from personaplug.encoders import Encoder, EncoderIdentity
from personaplug.encoders.base import encode_items
from personaplug.errors import (
    ConfigError,
    EncoderMismatch,
    ItemError,
    MissingData,
    PartError,
    StorageError,
    StoreConflict,
    UserError,
)
from personaplug.store import expiry, reads, secure_delete, writes
from personaplug.store.database import WAIT_S, Connection, Database, execute, for_update, lock_table
from personaplug.store.file_checks import check_is_database, check_not_emptied
from personaplug.store.reads import StoredHistory, StoredItem, Window
from personaplug.store.receipts import Receipt, Secret
from personaplug.store.row_checksums import damaged
from personaplug.store.schema import Retention, Shard, StoreSettings, check_settings, load_or_create
from personaplug.store.tickets import TICKET_LIFE_S, Ticket, last_erasures
from personaplug.store.writes import (
    USER_COLUMNS,
    AddResult,
    EncodedItems,
    PackedItem,
    ReplaceResult,
    UserRow,
    check_id,
)

__all__ = ["AddResult", "EncodedItems", "HistoryStore", "Receipt", "ReplaceResult", "Retention", "StoreSettings"]
__all__ += ["StoredHistory", "StoredItem", "Ticket"]

_OPENING_S = 2.0  # the longest time that `open` spends on the removal of expired items

_UserInTransaction = tuple[Connection, Shard, UserRow | None]


@dataclass(eq=False, repr=False)
class HistoryStore:
    """Histories of the users of tenants, in SQLite or PostgreSQL, shared by threads and processes; use `open`.

    Each call is one transaction unless its docstring says otherwise. Changes are on disk when the call returns, and an
    error leaves no changes. All calls raise StorageError if the database cannot be used, and ItemError if an id is
    invalid. `latest` is the largest number of items in a result: stated preferences first, then the latest other items;
    None = all.
    """

    database: Database
    secret: Secret
    settings: StoreSettings
    identity: EncoderIdentity  # of the encoder of the stored vectors
    encoder: Encoder | None  # None = only encoded items can be added
    retention: Retention
    _swept_day: int = field(default=-1, init=False)  # `first_day` of the last complete removal of expired items

    @classmethod
    def open(
        cls,
        location: str | Path,
        encoder: Encoder | None = None,
        *,
        settings: StoreSettings | None = None,
        retention: Retention | None = None,
        secret: bytes | Path | None = None,
        create: bool = True,
        connections: int = 8,
        wait_s: float = WAIT_S,
    ) -> HistoryStore:
        """Open a store, or create it, and finish interrupted erasures.

        Args:
            location: a path or `sqlite:///…` URL of a file, or a `postgresql://…` URL.
            encoder: the encoder of the store's vectors; creating a store needs one.
            settings: of a new store; an existing store must have the same. None = the store's settings or the defaults.
            retention: which items the store keeps from now on. None = the stored retention; a new store keeps all.
            secret: at least 16 bytes, or a file of hex digits, created if missing. None = a file beside SQLite's file.
            create: create a store that does not exist, if an encoder is given.
            connections: see `Database`.
            wait_s: see `Database`.
        Raises:
            EncoderMismatch, StoreConflict: if the store has another encoder, other settings or another secret.
            MissingData: if the store or its secret does not exist and cannot be created.
        """
        database = Database(location, connections=connections, wait_s=wait_s)
        is_new_file = database.file is not None and not database.file.exists()
        identity = encoder.identity if encoder else None
        identity_of_new = identity if create else None
        if is_new_file and identity_of_new is None:
            raise MissingData(
                f"There is no history store at {database.file}. Check the path. `personaplug load` creates a store; in "
                f"Python, give an encoder."
            )
        check_is_database(database)
        check_not_emptied(database)
        key = _open_secret(secret, database, create=is_new_file or database.file is None)
        secret_hash = key.hash("store")
        with database.write_transaction() as connection:
            info = load_or_create(
                connection, settings, encoder=identity_of_new, secret_hash=secret_hash, retention=retention
            )
        if info.secret_hash != secret_hash:
            raise StoreConflict(
                "The secret belongs to another store. Give the secret that this store was created with."
            )
        check_settings(info.settings, settings or info.settings)
        _check_encoder(info.encoder, identity)
        for number in range(info.settings.shards):
            if not database.indexes_fit(Shard(number).users):  # an index without a user would create the user again
                raise damaged("the index of users")
        store = cls(database, key, info.settings, info.encoder, encoder, info.retention)
        with suppress(StorageError):  # a reader may block this; the store opens anyway, and the next `open` retries
            store.finish_erasures()
            store.remove_expired(seconds=_OPENING_S)
        return store

    def admit(self, tenant: str, *users: str) -> Ticket:
        """Return a ticket that permits storing items of the users; call this when a request arrives.

        If a user is erased later, the ticket is no longer valid for that user.
        """
        check_id(tenant, owner="a tenant")
        for user in users:
            check_id(user, owner="a user")
        with self.database.read_transaction() as connection:
            return self._ticket(connection, tenant, users)

    def check(self, ticket: Ticket) -> None:
        """Raise UserErased if a user was erased after the ticket was taken."""
        with self.database.read_transaction() as connection:
            ticket.check(connection, ticket.hashed_users)

    def add(self, ticket: Ticket, items: Sequence[HistoryItem]) -> AddResult:
        """Encode items of the ticket's user, in order of arrival, and store them; skip unchanged items.

        An item whose id is already stored replaces that item and keeps its position. On an error, nothing is stored.

        Raises:
            ItemError, ShapeMismatch: if an item or a vector is invalid.
            UserErased: if the user was erased after the ticket was taken.
        """
        for item in items:
            check_id(item.id, owner="an item")
        distinct = {item.id: item for item in items}
        with self._user(ticket.tenant, ticket.user) as (connection, shard, row):
            ids = [(row.no, item_id) for item_id in distinct] if row else []
            digests = {item_id: old.digest for (_, item_id), old in writes.find_items(connection, shard, ids).items()}
            ticket.check(connection, [ticket.user])
        changed = [i for i in distinct.values() if digests.get(i.id) != writes.digest_of(i, key=self.secret.item_key)]
        if not changed:
            return AddResult(0, 0, len(items))
        result = self.add_encoded(ticket, self.encode([ticket.user] * len(changed), changed))
        return result._replace(same=len(items) - result.new - result.replaced)

    def replace_items(self, ticket: Ticket, items: Sequence[HistoryItem], *, ids: Sequence[str]) -> ReplaceResult:
        """Store items of the ticket's user, and remove the user's items with one of `ids` that are not among them.

        Unchanged items are encoded too, because another call may remove the stored ones. Errors are as in `add`.
        """
        return self._replace(ticket, items, ids=ids)

    def replace_preferences(self, ticket: Ticket, items: Sequence[HistoryItem]) -> ReplaceResult:
        """Store the items, and remove all other stated preferences of the ticket's user; see `replace_items`."""
        return self._replace(ticket, items, ids=None)

    def _replace(self, ticket: Ticket, items: Sequence[HistoryItem], *, ids: Sequence[str] | None) -> ReplaceResult:
        packed = self.pack(self.encode([ticket.user] * len(items), items)) if items else []
        new_ids = {item.id for item in items}
        with self._user(ticket.tenant, ticket.user, lock=True) as (connection, shard, row):
            ticket.check(connection, [ticket.user])
            old = writes.find_old_items(connection, shard, row.no, ids=ids) if row else {}
            keys = [stored.key for (_, item_id), stored in old.items() if item_id not in new_ids]
            if row and keys:
                writes.remove_items(connection, shard, row, keys)
            result = writes.write_items(connection, shard, packed, ticket=ticket, retention=self.retention)
        return ReplaceResult(*result, removed=len(keys))

    def encode(self, users: Sequence[str], items: Sequence[HistoryItem]) -> EncodedItems:
        """Encode items of users; raise ItemError if a part of an item cannot be encoded."""
        if self.encoder is None:
            raise UserError("The store was opened without an encoder: open it with one, or add encoded items.")
        contents = [item.encoded(with_answer=self.settings.encodes_answers) for item in items]
        try:
            vectors = encode_items(self.encoder, contents)
        except ConfigError as error:  # the encoder reads no pictures, or no vectors
            raise ItemError(f"{error} Nothing was stored.") from None
        except PartError as error:
            raise PartError(f"{error} No item of its batch was stored.", error.part) from None
        return EncodedItems(users, items, vectors, self.encoder.identity)

    def add_encoded(self, ticket: Ticket, encoded: EncodedItems) -> AddResult:
        """Store items of the ticket's users with their vectors, all or none.

        Raises:
            EncoderMismatch: if the vectors are from another encoder.
            UserErased: if one of the users was erased after the ticket was taken.
        """
        items_by_shard: dict[Shard, list[PackedItem]] = defaultdict(list)
        shards = {user: self.shard_of(ticket.tenant, user) for user in set(encoded.users)}
        for item in self.pack(encoded):
            items_by_shard[shards[item.user]].append(item)
        with self.database.write_transaction() as connection:
            results = [
                writes.write_items(connection, shard, items, ticket=ticket, retention=self.retention)
                for shard, items in sorted(items_by_shard.items())
            ]
        return AddResult(*(sum(counts) for counts in zip((0, 0, 0), *results, strict=True)))

    def load_history(self, tenant: str, user: str, *, latest: int | None = None) -> StoredHistory:
        """Load a user's items as arrays, oldest first: by date, then by arrival. A missing date is the arrival day."""
        with self._user(tenant, user) as (connection, shard, row):
            return reads.load_history(connection, shard, row, width=self.identity.width, window=self.window(latest))

    def version(self, tenant: str, user: str) -> int:
        """Return a number that increases with every change, and does not restart after an erasure; 0 = no such user."""
        with self._user(tenant, user) as (_, _, row):
            return row.version if row else 0

    def list_items(self, tenant: str, user: str, *, latest: int | None = None) -> list[StoredItem]:
        """Return a user's items without their vectors, oldest first."""
        with self._user(tenant, user) as (connection, shard, row):
            return reads.list_items(connection, shard, row, window=self.window(latest)) if row else []

    def load_picture(self, tenant: str, user: str, item_id: str) -> Picture:
        """Return the kept picture of an item; raise MissingData if there is none."""
        check_id(item_id, owner="an item")
        with self._user(tenant, user) as (connection, shard, row):
            return reads.load_picture(connection, shard, existing(row), item_id, first_day=self.retention.first_day())

    def list_preferences(self, tenant: str, user: str) -> list[StoredItem]:
        """Return a user's stated preferences without their vectors, oldest first."""
        with self._user(tenant, user) as (connection, shard, row):
            return reads.list_preferences(connection, shard, row, window=self.window(None)) if row else []

    def count(self, tenant: str, user: str) -> int:
        """Return the number of a user's items."""
        with self._user(tenant, user) as (connection, shard, row):
            return reads.count_items(connection, shard, row, first_day=self.retention.first_day()) if row else 0

    def export(self, tenant: str, user: str, *, items_per_page: int | None = None) -> Iterator[str]:
        """Return the pages of a JSON object with everything that is stored of a user.

        A page is read when the iterator reaches it, in a separate transaction. So a slow reader blocks nobody, and only
        one page is in memory. The export contains items that are added before their page is read.

        Args:
            items_per_page: None = 100 or, if the store keeps pictures, 2.

        Raises:
            MissingData: if the tenant has no such user; raised before the first page.
            UserErased: from a later page, if the user is erased during the export.
        """
        with self._user(tenant, user) as (connection, _, row):
            version, ticket = existing(row).version, self._ticket(connection, tenant, [user])
        head = {"tenant": tenant, "user": user, "version": version, "encoder": self.identity.to_dict()}
        start = json.dumps(head | {"labels": self.settings.labels}).removesuffix("}")
        items_per_page = items_per_page or (2 if self.settings.keep_pictures else 100)
        pages = self._export_items(ticket, version, items_per_page=items_per_page)
        return chain([f'{start}, "items": ['], pages, ["]}"])

    def _export_items(self, ticket: Ticket, version: int, *, items_per_page: int) -> Iterator[str]:
        window, count = Window(self.retention.first_day(), items_per_page), 0
        place: tuple[int, int] | None = reads.FIRST_PLACE
        while place:
            with self._user(ticket.tenant, ticket.user) as (connection, shard, row):
                ticket.check(connection, [ticket.user])
                if row is None:  # all items have expired
                    return
                items, place = reads.read_page(
                    connection, shard, row, width=self.identity.width, window=window, place=place
                )
            if items:
                yield (", " if count else "") + json.dumps(items).removeprefix("[").removesuffix("]")
            count += len(items)
            if not place and row.version == version:
                Window(window.first_day).check_count(row, count)

    def window(self, latest: int | None) -> Window:
        """Return the window of the latest items that have not expired, even if the expired items are still stored."""
        return Window(self.retention.first_day(), latest)

    def delete_item(self, tenant: str, user: str, *item_ids: str) -> None:
        """Delete the items with these ids; raise MissingData if the user does not exist or has none of the items.

        The items' bytes stay in the files until the next erasure rewrites the shard.
        """
        for item_id in item_ids:
            check_id(item_id, owner="an item")
        with self._user(tenant, user, lock=True) as (connection, shard, row):
            user_row = existing(row)
            stored = writes.find_items(connection, shard, [(user_row.no, item_id) for item_id in item_ids])
            if not stored:
                raise MissingData("The user has no item with this id.")
            writes.remove_items(connection, shard, user_row, [item.key for item in stored.values()])

    def content_id(self, item: HistoryItem) -> str:
        """Return an id for an item without one. Equal items get equal ids, so a repeated item is stored once.

        The id of a preference does not depend on its date. Only with the store's secret can a text be tested against an
        id.
        """
        is_preference = item.kind == "preference"
        digest = writes.digest_of(replace(item, date=None) if is_preference else item, key=self.secret.item_key)
        return f"{'preference' if is_preference else 'item'}-{digest.hex()}"

    def erase_user(self, tenant: str, user: str) -> Receipt:
        """Delete all data of a user, including the id, and remove the bytes from the database's files.

        All processes refuse the user's earlier tickets from now on. The call takes several transactions, and locks the
        user's shard while it rewrites the shard.

        Raises:
            MissingData: if the tenant has no such user. The user's earlier tickets are refused nevertheless.
            StorageError: if the bytes cannot be removed. The rows are deleted; repeat the call to get the receipt.
        """
        hashed_user = self.hash_user(tenant, user)
        with self._user(tenant, user, lock=True, alone=True) as (connection, shard, row):
            erasure = {"tenant": tenant, "hashed_user": hashed_user, "shard": shard.number, "wiped": None}
            erasure["erased_at"] = datetime.now(UTC).isoformat(timespec="microseconds")
            if row:
                erasure["items"] = writes.delete_user(connection, shard, row.no)
                secure_delete.record_erasure(connection, erasure)
            else:
                secure_delete.record_erasure_of_nobody(connection, erasure)
            unfinished = secure_delete.unfinished_erasures(connection)
        numbers = [number for number, hashed in unfinished.items() if hashed == hashed_user]
        if not numbers:
            raise MissingData("The tenant has no such user; nothing was erased.")
        return self.secret.sign(secure_delete.finish_erasure(self.database, numbers[-1]))

    def finish_erasures(self) -> None:
        """Finish interrupted erasures: remove the bytes from the files."""
        with self.database.read_transaction() as connection:
            unfinished = secure_delete.unfinished_erasures(connection)
        for number in unfinished:
            secure_delete.finish_erasure(self.database, number)

    def remove_expired(self, *, seconds: float) -> None:
        """Remove expired items, for about `seconds` at most; the next call continues."""
        deadline, first_day = time.monotonic() + seconds, self.retention.first_day()
        is_swept = self.retention.max_days is None or self._swept_day == first_day
        for shard in map(Shard, range(0 if is_swept else self.settings.shards)):
            for _ in expiry.remove_expired(self.database, shard, first_day=first_day):
                if time.monotonic() > deadline:
                    return
            expiry.finish_rewrites(self.database)
        expiry.finish_rewrites(self.database)  # for items that had expired when they were added
        self._swept_day = first_day

    def maintain(self) -> None:
        """Finish interrupted erasures, and remove expired items and old records. A server calls this periodically."""
        self.finish_erasures()
        self.remove_expired(seconds=60)
        oldest_ticket = datetime.now(UTC) - 2 * timedelta(seconds=TICKET_LIFE_S)
        secure_delete.forget_erasures_of_nobody(self.database, before=oldest_ticket.isoformat())

    def ping(self, *, timeout_s: float = 3) -> None:
        """Raise StorageError unless the database answers in time."""
        self.database.ping(timeout_s=timeout_s)

    def erased_at(self, tenant: str, user: str) -> datetime | None:
        """Return when the user with this id was last erased; None = never."""
        with self.database.read_transaction() as connection:
            erased_at = secure_delete.last_erasure(connection, self.hash_user(tenant, user))
        return datetime.fromisoformat(erased_at) if erased_at else None

    def has_issued(self, receipt: Receipt, *, tenant: str | None = None, user: str | None = None) -> bool:
        """Return whether this store issued the receipt without changes; with ids, also whether it names that user."""
        is_about_user = user is None or receipt.user == self.hash_user(tenant or receipt.tenant, user)
        return is_about_user and tenant in (None, receipt.tenant) and self.secret.has_signed(receipt)

    def close(self) -> None:
        self.database.close()

    def pack(self, encoded: EncodedItems) -> list[PackedItem]:
        _check_encoder(self.identity, encoded.encoder)
        return writes.pack_items(encoded, self.settings, width=self.identity.width, digest_key=self.secret.item_key)

    def hash_user(self, tenant: str, user: str) -> str:
        """Return the hash of a user in receipts and in the list of erasures."""
        return self.secret.hash("user", tenant, user)

    def shard_of(self, tenant: str, user: str) -> Shard:
        """Return the shard of a user's rows."""
        digest = hashlib.blake2b(json.dumps([tenant, user]).encode(), digest_size=8).digest()
        return Shard(int.from_bytes(digest, "little") % self.settings.shards)

    def _ticket(self, connection: Connection, tenant: str, users: Sequence[str]) -> Ticket:
        hashed_users = {user: self.hash_user(tenant, user) for user in users}
        return Ticket(tenant, hashed_users, last_erasures(connection, list(hashed_users.values())))

    @contextmanager
    def _user(self, tenant: str, user: str, *, lock: bool = False, alone: bool = False) -> Iterator[_UserInTransaction]:
        """Open a transaction and find the user's shard and row.

        `lock` prevents other changes to the user; with `alone`, it prevents all other writes to the shard.
        """
        check_id(tenant, owner="a tenant")
        check_id(user, owner="a user")
        shard, database = self.shard_of(tenant, user), self.database
        sql = f"SELECT {USER_COLUMNS} FROM {shard.users} WHERE tenant = :tenant AND user_id = :user"
        with database.write_transaction() if lock else database.read_transaction() as connection:
            if lock:
                lock_table(connection, shard.users, alone=alone)
                sql += for_update(connection)
            row = execute(connection, sql, {"tenant": tenant, "user": user}).one_or_none()
            yield connection, shard, UserRow.of(row, tenant=tenant, user=user) if row else None


def existing(row: UserRow | None) -> UserRow:
    if row is None:
        raise MissingData("The tenant has no such user.")
    return row


def _open_secret(secret: bytes | Path | None, database: Database, *, create: bool) -> Secret:
    if isinstance(secret, bytes):
        return Secret(secret)
    path = secret or database.secret_file
    if path is None:
        raise ConfigError("A store in PostgreSQL needs a secret: give it as bytes or as the path of a file.")
    return Secret.from_file(path, create=create)


def _check_encoder(expected: EncoderIdentity, given: EncoderIdentity | None) -> None:
    if given is not None and not expected.same_items_as(given):
        raise EncoderMismatch("The history store", expected=expected.describe(), found=given.describe())
