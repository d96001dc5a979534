"""HistoryStore: users' live histories. Items are added, replaced and deleted while others read them.

No user text appears in logs or errors, and without `keep_text` none is in the database.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from personaplug.data.records import HistoryItem
from personaplug.encoders import Encoder, EncoderIdentity
from personaplug.errors import ConfigError, EncoderMismatch, MissingData, StorageError, StoreConflict, UserError
from personaplug.store import reads, secure_delete, writes
from personaplug.store.database import Connection, Database, execute, for_update
from personaplug.store.reads import StoredHistory, StoredItem
from personaplug.store.receipts import Receipt, Secret
from personaplug.store.schema import Shard, StoreSettings, check_settings, load_or_create
from personaplug.store.writes import AddResult, EncodedItems, PackedItem, Retention, UserRow, check_id

__all__ = ["AddResult", "EncodedItems", "HistoryStore", "Receipt", "Retention", "StoreSettings"]
__all__ += ["StoredHistory", "StoredItem"]

_UserInTransaction = tuple[Connection, Shard, UserRow | None]


@dataclass(eq=False, repr=False)
class HistoryStore:
    """Histories of the users of tenants, in SQLite or PostgreSQL, shared by threads and processes; use `open`.

    Each call is one transaction unless it says otherwise: its result is on disk when it returns, and an error leaves no
    trace. All calls raise StorageError if the database cannot be used, and ItemError if an id is invalid. `latest`
    limits a result to the latest items; None = all.
    """

    database: Database
    secret: Secret
    settings: StoreSettings
    identity: EncoderIdentity  # of the encoder of the stored vectors
    encoder: Encoder | None  # None = only encoded items can be added
    retention: Retention  # applied to a user whenever items are added

    @classmethod
    def open(
        cls,
        location: str | Path,
        encoder: Encoder | None = None,
        *,
        settings: StoreSettings | None = None,
        retention: Retention | None = None,
        secret: bytes | Path | None = None,
        connections: int = 8,
        wait_s: float = 30,
    ) -> HistoryStore:
        """Open a store, or create it, and finish erasures that were interrupted.

        Args:
            location: a path or `sqlite:///…` URL of a file, or a `postgresql://…` URL.
            encoder: the encoder of the store's vectors; creating a store needs one.
            settings: for a new store; an existing store must have the same. None = its own, or the defaults.
            secret: 16 bytes or more, or a file of hex digits, created if missing. None = a file beside SQLite's.
            connections, wait_s: see `Database`.
        Raises:
            EncoderMismatch, StoreConflict: if the store has another encoder, other settings or another secret.
            MissingData: if the store or its secret does not exist and is not created.
        """
        database = Database(location, connections=connections, wait_s=wait_s)
        is_new_file = database.file is not None and not database.file.exists()
        if is_new_file and encoder is None:
            raise MissingData(f"There is no history store at {database.file}; creating one needs an encoder.")
        key = _open_secret(secret, database, create=is_new_file or database.file is None)
        identity, secret_hash = encoder.identity if encoder else None, key.hash("store")
        with database.write_transaction() as connection:
            info = load_or_create(connection, settings, encoder=identity, secret_hash=secret_hash)
        if info.secret_hash != secret_hash:
            raise StoreConflict("The secret belongs to another store; earlier receipts could not be verified with it.")
        check_settings(info.settings, settings or info.settings)
        _check_encoder(info.encoder, identity)
        store = cls(database, key, info.settings, info.encoder, encoder, retention or Retention())
        with suppress(StorageError):  # a reader may block it; the store opens anyway, and the next `open` tries again
            store.finish_erasures()
        return store

    def add(self, tenant: str, user: str, items: Sequence[HistoryItem]) -> AddResult:
        """Encode a user's items, in order of arrival, and store them; skip items that are stored already.

        An item with a known id replaces the stored item and keeps its position. An invalid item or vector raises
        ItemError or ShapeMismatch, and then nothing is stored.
        """
        if self.encoder is None:
            raise UserError("The store was opened without an encoder: open it with one, or add encoded items.")
        for item in items:
            check_id(item.id, owner="an item")
        distinct = {item.id: item for item in items}
        with self._user(tenant, user) as (connection, shard, row):
            ids = [(row.no, item_id) for item_id in distinct] if row else []
            digests = {item_id: old.digest for (_, item_id), old in writes.find_items(connection, shard, ids).items()}
        fresh = [i for i in distinct.values() if digests.get(i.id) != writes.digest_of(i, key=self.secret.item_key)]
        if not fresh:
            return AddResult(0, 0, len(items))
        vectors = self.encoder.encode([item.encoded(with_answer=self.settings.encodes_answers) for item in fresh])
        result = self.add_encoded(tenant, EncodedItems([user] * len(fresh), fresh, vectors, self.encoder.identity))
        return result._replace(same=len(items) - result.new - result.replaced)

    def add_encoded(self, tenant: str, encoded: EncodedItems) -> AddResult:
        """Store items of users with their vectors, all or none; another encoder's vectors raise EncoderMismatch."""
        check_id(tenant, owner="a tenant")
        items_by_shard: dict[Shard, list[PackedItem]] = defaultdict(list)
        shards = {user: self.shard_of(tenant, user) for user in set(encoded.users)}
        for item in self.pack(encoded):
            items_by_shard[shards[item.user]].append(item)
        with self.database.write_transaction() as connection:
            results = [
                writes.write_items(connection, shard, items, tenant=tenant, retention=self.retention)
                for shard, items in sorted(items_by_shard.items())
            ]
        return AddResult(*(sum(counts) for counts in zip((0, 0, 0), *results, strict=True)))

    def load_history(self, tenant: str, user: str, *, latest: int | None = None) -> StoredHistory:
        """Load a user's items as arrays, oldest first: by date (or else day of arrival), then by arrival."""
        with self._user(tenant, user) as (connection, shard, row):
            return reads.load_history(connection, shard, row, width=self.identity.width, latest=latest)

    def version(self, tenant: str, user: str) -> int:
        """Return a number that grows with every change, even after an erasure; 0 for an unknown user."""
        with self._user(tenant, user) as (_, _, row):
            return row.version if row else 0

    def list_items(self, tenant: str, user: str, *, latest: int | None = None) -> list[StoredItem]:
        """Return a user's items without their vectors, oldest first."""
        with self._user(tenant, user) as (connection, shard, row):
            return reads.list_items(connection, shard, row.no, latest=latest) if row else []

    def export(self, tenant: str, user: str) -> dict[str, Any]:
        """Return everything that is stored of a user as JSON values; raise MissingData for an unknown user."""
        with self._user(tenant, user) as (connection, shard, row):
            items = reads.list_items(connection, shard, _existing(row).no)
            history = reads.load_history(connection, shard, row, width=self.identity.width, latest=None)
        columns = zip(items, history.vectors.tolist(), history.style.tolist(), strict=True)
        return {
            "tenant": tenant,
            "user": user,
            "version": history.version,
            "encoder": self.identity.to_dict(),
            "labels": [*self.settings.labels],
            "items": [item.to_dict() | {"vector": vector, "style": style} for item, vector, style in columns],
        }

    def delete_item(self, tenant: str, user: str, item_id: str) -> None:
        """Delete an item; raise MissingData for an unknown user or item.

        The item's bytes leave the files when the next erasure rewrites its shard.
        """
        check_id(item_id, owner="an item")
        with self._user(tenant, user, lock=True) as (connection, shard, row):
            user_row = _existing(row)
            stored = writes.find_items(connection, shard, [(user_row.no, item_id)])
            if not stored:
                raise MissingData("The user has no item of this id.")
            writes.delete_items(connection, shard, [item.key for item in stored.values()])
            user_row.increase_version()
            writes.update_users(connection, shard, [user_row])

    def erase_user(self, tenant: str, user: str) -> Receipt:
        """Delete everything of a user, the id included, and clear the files of the bytes.

        This takes several transactions, and locks the user's shard while it rewrites the shard.

        Raises:
            MissingData: if the tenant has no such user.
            StorageError: if the files cannot be cleared. The rows are deleted then; repeat the call for the receipt.
        """
        hashed_user = self.hash_user(tenant, user)
        with self._user(tenant, user, lock=True) as (connection, shard, row):
            if row:
                erasure = {"tenant": tenant, "hashed_user": hashed_user, "shard": shard.number, "wiped": None}
                erasure["erased_at"] = datetime.now(UTC).isoformat(timespec="seconds")
                erasure["items"] = writes.delete_user(connection, shard, row.no)
                secure_delete.record_erasure(connection, erasure)
            unfinished = secure_delete.unfinished_erasures(connection)
        numbers = [number for number, hashed in unfinished.items() if hashed == hashed_user]
        if not numbers:
            raise MissingData("The tenant has no such user; nothing was erased.")
        return self.secret.sign(secure_delete.finish_erasure(self.database, numbers[-1]))

    def finish_erasures(self) -> None:
        """Clear the files for erasures that were interrupted."""
        with self.database.read_transaction() as connection:
            unfinished = secure_delete.unfinished_erasures(connection)
        for number in unfinished:
            secure_delete.finish_erasure(self.database, number)

    def erased_at(self, tenant: str, user: str) -> datetime | None:
        """Return when a user of this id was last erased; None = never."""
        with self.database.read_transaction() as connection:
            erased_at = secure_delete.last_erasure(connection, self.hash_user(tenant, user))
        return datetime.fromisoformat(erased_at) if erased_at else None

    def has_issued(self, receipt: Receipt, *, tenant: str | None = None, user: str | None = None) -> bool:
        """Return whether this store issued the receipt exactly as it is; with ids, whether it is about that user."""
        is_about_user = user is None or receipt.user == self.hash_user(tenant or receipt.tenant, user)
        return is_about_user and tenant in (None, receipt.tenant) and self.secret.has_signed(receipt)

    def close(self) -> None:
        self.database.close()

    def pack(self, encoded: EncodedItems) -> list[PackedItem]:
        _check_encoder(self.identity, encoded.encoder)
        return writes.pack_items(encoded, self.settings, width=self.identity.width, digest_key=self.secret.item_key)

    def hash_user(self, tenant: str, user: str) -> str:
        """Return the hash that stands for a user in receipts."""
        return self.secret.hash("user", tenant, user)

    def shard_of(self, tenant: str, user: str) -> Shard:
        """Return the shard that holds a user's rows, if the user exists."""
        digest = hashlib.blake2b(json.dumps([tenant, user]).encode(), digest_size=8).digest()
        return Shard(int.from_bytes(digest, "little") % self.settings.shards)

    @contextmanager
    def _user(self, tenant: str, user: str, *, lock: bool = False) -> Iterator[_UserInTransaction]:
        """Open a transaction and find the user's shard and row; `lock` keeps others from changing the user."""
        check_id(tenant, owner="a tenant")
        check_id(user, owner="a user")
        shard, database = self.shard_of(tenant, user), self.database
        sql = f"SELECT no, version, items_received FROM {shard.users} WHERE tenant = :tenant AND user_id = :user"
        with database.write_transaction() if lock else database.read_transaction() as connection:
            sql += for_update(connection) if lock else ""
            row = execute(connection, sql, {"tenant": tenant, "user": user}).one_or_none()
            yield connection, shard, UserRow(**row._mapping) if row else None


def _existing(row: UserRow | None) -> UserRow:
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
