"""Helpers for tests of the store: locations, items, and the bytes of the database files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import numpy.typing as npt
from postgres_server import PostgresServer

from personaplug.data.records import HistoryItem
from personaplug.encoders import Encoder, HashEncoder
from personaplug.encoders.style_features import FEATURES
from personaplug.store.history_store import AddResult, EncodedItems, HistoryStore, Retention
from personaplug.store.schema import StoreSettings

LABELS = ("1", "2", "3")
SECRET = b"sixteen bytes and more"
ENCODER = HashEncoder(32)


@dataclass
class Place:
    """A location for a store: a PostgreSQL server, or a SQLite file without a server."""

    where: str
    server: PostgresServer | None = None

    def open(
        self,
        encoder: Encoder | None = ENCODER,
        *,
        settings: StoreSettings | None = None,
        retention: Retention | None = None,
        keep_text: bool = True,
        secret: bytes | Path | None = SECRET,
        connections: int = 4,
        wait_s: float = 10,
    ) -> HistoryStore:
        """Open the store, or create it with two shards."""
        settings = settings or StoreSettings(labels=LABELS, keep_text=keep_text, shards=2)
        return HistoryStore.open(
            self.where,
            encoder,
            settings=settings,
            retention=retention,
            secret=secret,
            connections=connections,
            wait_s=wait_s,
        )

    def files(self, *, log: bool = True) -> bytes:
        """Return the bytes of the database files."""
        if self.server is None:
            return b"".join(path.read_bytes() for path in Path(self.where).parent.iterdir() if path.is_file())
        self.server.execute("CHECKPOINT")
        folders = [f"base/{self.server.number_of(self.where)}", *(["pg_wal"] if log else [])]
        paths = [path for name in folders for path in (self.server.folder / name).rglob("*")]
        return b"".join(map(_bytes_of, paths))


def _bytes_of(path: Path) -> bytes:
    """Return the bytes of a file; the server may remove a file of its own, such as pg_internal.init, at any time."""
    try:
        return path.read_bytes() if path.is_file() else b""
    except FileNotFoundError:
        return b""


def item(name: str, text: str = "a film", *, answer: str | None = "2", day: date | None = None) -> HistoryItem:
    """Return an item with a text and, unless it is None, an answer."""
    fields = (("text", text), *([("score", answer)] if answer is not None else []))
    return HistoryItem(name, fields, answer_name="score" if answer is not None else None, date=day)


def vector_of(name: str, width: int = 32) -> npt.NDArray[np.float32]:
    """Return a unit vector that differs for each name."""
    raw = np.random.default_rng(list(name.encode())).standard_normal(width).astype(np.float32)
    return np.asarray(raw / np.linalg.norm(raw), dtype=np.float32)


def encoded(users: Sequence[str], names: Sequence[str], *, encoder: Encoder = ENCODER) -> EncodedItems:
    """Return items without text, with the vectors of their names."""
    return EncodedItems(
        users=users,
        items=[HistoryItem(name, ()) for name in names],
        vectors=np.stack([vector_of(name, encoder.width) for name in names]),
        encoder=encoder.identity,
        label_ids=np.array([len(name) % 3 for name in names], dtype=np.int16),
        style=np.zeros((len(names), len(FEATURES)), dtype=np.float16),
    )


def add(store: HistoryStore, tenant: str, user: str, items: Sequence[HistoryItem]) -> AddResult:
    """Add items in a new request."""
    return store.add(store.admit(tenant, user), items)


def add_encoded(store: HistoryStore, tenant: str, encoded: EncodedItems) -> AddResult:
    """Add encoded items in a new request."""
    return store.add_encoded(store.admit(tenant, *set(encoded.users)), encoded)


def item_ids(store: HistoryStore, tenant: str = "t", user: str = "u") -> list[str]:
    """Return the ids of a user's items, oldest first."""
    return [item.id for item in store.list_items(tenant, user)]
