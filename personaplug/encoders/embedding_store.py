"""EmbeddingStore: item embeddings on disk, deduplicated by the content of the item.

A store is a folder with four files. `table.json` has the format, the encoder and the salt. `vectors.f16` has raw
float16 rows and is memory-mapped. `checks.u64` has a checksum of each row. `index.sqlite` maps the hash of a content to
its row id, with a checksum of both.

A content in many histories is encoded and stored once. The store contains no text and no picture. The first read of a
row detects a damaged row and a row of another store, because every checksum depends on the salt.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import sqlite3
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from personaplug.data.records import Content
from personaplug.encoders import Encoder, EncoderIdentity
from personaplug.encoders.base import encode_items
from personaplug.encoders.row_checks import Checks, RowHash, key_checks
from personaplug.errors import DamagedFile, EncoderMismatch, ShapeMismatch, StorageError, UserError
from personaplug.infra.atomic_io import write_checked_json
from personaplug.infra.checksums import check_json
from personaplug.infra.locks import acquire_lock

FORMAT = 3

T = TypeVar("T")
RowIds = npt.NDArray[np.int64]
Float16Array = npt.NDArray[np.float16]

_KEYS_PER_QUERY = 500
_SCHEMA = """
CREATE TABLE IF NOT EXISTS items (key BLOB PRIMARY KEY, row INTEGER NOT NULL, seal INTEGER NOT NULL) WITHOUT ROWID;
"""
_INSERT = "INSERT OR REPLACE INTO items VALUES (?, ?, ?)"
_EXTENT = b"number of rows.."  # the key of the row count; 16 bytes that are the hash of no text
_STORAGE_TROUBLE = ("SQLITE_CANTOPEN", "SQLITE_FULL", "SQLITE_IOERR", "SQLITE_NOMEM", "SQLITE_PERM", "SQLITE_READONLY")
_LENGTH_TOLERANCE = 0.02  # of a vector's length; rounding to bfloat16 changes it by 0.004
_REMEDY = "Delete the folder and encode again."


class EmbeddingStore:
    """Item embeddings of one encoder in a folder. Use `open` to create an instance.

    A store allows any number of readers and one writer at a time. A writer syncs the vectors before it commits their
    keys, so a crash never leaves a key without its vector. Each thread of each process has its own connection to the
    index, so a store may be forked and pickled.
    """

    def __init__(self, folder: Path, encoder: Encoder, *, salt: int) -> None:
        self.folder, self.encoder, self.width = folder, encoder, encoder.width
        self._vectors: Float16Array = np.zeros((0, self.width), dtype=np.float16)
        self._checks: Checks = np.zeros(0, dtype=np.uint64)
        self._is_checked = np.zeros(0, dtype=np.bool_)
        self._salt, self._hash = salt, RowHash(self.width, salt=salt)
        self._connection = _Connection(folder)

    @classmethod
    def open(cls, folder: str | Path, encoder: Encoder) -> EmbeddingStore:
        """Open the store in a folder, or create an empty one.

        Args:
            encoder: the encoder that created the store; its name and query prompt may differ.
        Raises:
            EncoderMismatch: if another encoder created the store.
            DamagedFile: if its files are damaged.
        """
        folder = Path(folder)
        if not (folder / "table.json").is_file():
            _create(folder, encoder.identity)
        store = cls(folder, encoder, salt=_check_description(folder, encoder.identity))
        len(store)  # checks the files
        return store

    def __len__(self) -> int:
        """Return the number of committed rows and check that their vectors exist."""
        with self._index():
            rows = self._look_up([_EXTENT]).get(_EXTENT)
            stored = min(_size(self.folder / name) // width for name, width in self._row_bytes.items())
        if rows is None:
            raise DamagedFile(self.folder / "index.sqlite", reason="its number of rows is missing", remedy=_REMEDY)
        if stored < rows:
            reason = f"index.sqlite has {rows} rows, vectors.f16 or checks.u64 has {stored}"
            raise DamagedFile(self.folder, reason=reason, remedy=_REMEDY)
        return rows

    def __repr__(self) -> str:
        return f"EmbeddingStore({str(self.folder)!r}, encoder={self.encoder.identity.name!r}, rows={len(self)})"

    def __reduce__(self) -> tuple[Any, ...]:
        # Leave out the mapped vectors and the connection.
        return partial(type(self), salt=self._salt), (self.folder, self.encoder)

    def add(self, contents: Iterable[Content], *, chunk: int = 4096) -> RowIds:
        """Encode the missing contents and return the row ids of all contents, (n,).

        Only one chunk of the contents is in memory. A chunk is complete on disk before the next one starts, so an
        interrupted call loses at most one chunk. Repeat the call to resume. If none is missing, the call neither
        writes nor locks.

        Raises:
            UserError: if another process is writing, or the encoder returns NaN.
            StorageError: if the disk is full; earlier chunks stay.
        """
        row_ids = [np.zeros(0, dtype=np.int64)]
        is_locked = False
        with contextlib.ExitStack() as lock:
            for part in _chunks(contents, chunk):
                keys = {content: content_key(content) for content in dict.fromkeys(part)}
                rows = self._look_up(keys.values())
                if len(rows) < len(keys) and not is_locked:
                    lock.enter_context(_writer_lock(self.folder))
                    is_locked = True
                    rows = self._look_up(keys.values())  # another writer may have added some before the lock
                rows |= self._append({key: content for content, key in keys.items() if key not in rows})
                row_ids.append(np.array([rows[keys[content]] for content in part], dtype=np.int64))
        return np.concatenate(row_ids)

    def gather(self, row_ids: RowIds) -> Float16Array:
        """Return the vectors of rows, (n, E) float16. Only these rows are read from disk.

        Raises:
            DamagedFile: if a row is damaged. A row is checked at its first read.
        """
        row_ids = np.asarray(row_ids, dtype=np.int64)
        if row_ids.size == 0:
            return np.zeros((*row_ids.shape, self.width), dtype=np.float16)
        if int(row_ids.max()) >= len(self._vectors) and (rows := len(self)):
            self._map(rows)
        if int(row_ids.min()) < 0 or int(row_ids.max()) >= len(self._vectors):
            raise UserError(
                f"Row ids must be from this embedding store: {self.folder} has rows 0 to {len(self._vectors) - 1}; "
                f"found {row_ids.min()} to {row_ids.max()}."
            )
        vectors: Float16Array = np.asarray(self._vectors)[row_ids]
        self._check(row_ids.ravel(), vectors.reshape(-1, self.width))
        return vectors

    def _map(self, rows: int) -> None:
        self._vectors = np.memmap(self.folder / "vectors.f16", dtype="<f2", mode="r", shape=(rows, self.width))
        checks = np.memmap(self.folder / "checks.u64", dtype="<u8", mode="r", shape=(rows,))
        self._checks = np.asarray(checks)  # a memmap itself is slower to index
        self._is_checked = np.pad(self._is_checked, (0, rows - len(self._is_checked)))

    def _check(self, row_ids: RowIds, vectors: Float16Array) -> None:
        """Compare rows with their checksums at their first read."""
        is_checked = self._is_checked[row_ids]
        if is_checked.all():
            return
        if is_checked.any():
            row_ids, vectors = row_ids[~is_checked], vectors[~is_checked]
        wrong = self._hash(vectors, row_ids) != self._checks[row_ids]
        if wrong.any():
            raise DamagedFile(
                self.folder / "vectors.f16",
                reason=f"row {row_ids[wrong][0]} does not match its checksum in this store",
                remedy=_REMEDY,
            )
        self._is_checked[row_ids] = True

    @property
    def _row_bytes(self) -> dict[str, int]:
        """Bytes of a row in each file of rows."""
        return {"vectors.f16": 2 * self.width, "checks.u64": 8}

    @contextlib.contextmanager
    def _index(self) -> Iterator[sqlite3.Connection]:
        with _storage_errors(self.folder):
            yield self._connection.get()

    def _look_up(self, keys: Collection[bytes]) -> dict[bytes, int]:
        rows: dict[bytes, int] = {}
        with self._index() as index:
            # Sort the keys, so that neighbors in the index are read together.
            for part in _chunks(sorted(keys), _KEYS_PER_QUERY):
                marks = ",".join("?" * len(part))
                entries = index.execute(f"SELECT key, row, seal FROM items WHERE key IN ({marks})", part).fetchall()
                rows.update(_checked_rows(entries, self.folder, salt=self._salt))
        return rows

    def _append(self, contents: Mapping[bytes, Content]) -> dict[bytes, int]:
        """Encode contents, given by key, and return the new row of each key."""
        if not contents:
            return {}
        vectors, start = self._encode(list(contents.values())), len(self)
        row_ids = np.arange(start, start + len(contents), dtype=np.int64)
        self._write("vectors.f16", vectors.tobytes(), start=start)
        self._write("checks.u64", self._hash(vectors, row_ids).astype("<u8").tobytes(), start=start)
        keys, rows = [*contents, _EXTENT], [*row_ids.tolist(), start + len(contents)]
        seals = key_checks(keys, np.array(rows, dtype=np.int64), salt=self._salt).tolist()
        with self._index() as index, index:
            index.executemany(_INSERT, zip(keys, rows, seals, strict=True))
        return dict(zip(contents, rows[:-1], strict=True))

    def _write(self, name: str, content: bytes, *, start: int) -> None:
        """Write rows from `start` on; overwrite rows that an interrupted writer may have left."""
        with _storage_errors(self.folder), (self.folder / name).open("r+b") as stream:
            stream.truncate(start * self._row_bytes[name])
            stream.seek(0, os.SEEK_END)
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())

    def _encode(self, contents: Sequence[Content]) -> Float16Array:
        count, vectors = len(contents), encode_items(self.encoder, contents)
        shape = getattr(vectors, "shape", type(vectors).__name__)
        if not isinstance(vectors, np.ndarray) or shape != (count, self.width):
            raise ShapeMismatch(
                f"The encoder {self.encoder.identity.name} returned shape {shape} for {count} items; "
                f"expected a numpy array of shape ({count}, {self.width})."
            )
        with np.errstate(over="ignore"):
            rounded: Float16Array = vectors.astype("<f2")
        if invalid := int((~np.isfinite(rounded).all(axis=1)).sum()):
            raise UserError(
                f"The encoder {self.encoder.identity.name} returned NaN or infinite values for {invalid} of "
                f"{count} items, so this chunk was not stored. Run the encoder in float32, or use another encoder."
            )
        lengths = np.linalg.norm(rounded.astype(np.float32), axis=1)
        if wrong := int((np.abs(lengths - 1) > _LENGTH_TOLERANCE).sum()):
            raise UserError(
                f"The encoder {self.encoder.identity.name} must return vectors of length 1; found lengths from "
                f"{lengths.min():.3g} to {lengths.max():.3g}, wrong for {wrong} of {count} items. This chunk was "
                f"not stored. Normalize the vectors, and use a fixed unit vector for texts without features."
            )
        return rounded


class _Connection(threading.local):
    """A connection to the index for each thread of each process; `__init__` runs once in each thread."""

    def __init__(self, folder: Path) -> None:
        # mode=rw never creates the file. SQLite falls back to read-only access if it may not write.
        self._uri = (folder / "index.sqlite").absolute().as_uri() + "?mode=rw"
        # One per process, because a forked process may neither use nor close its parent's SQLite connection.
        self._by_process: dict[int, sqlite3.Connection] = {}

    def get(self) -> sqlite3.Connection:
        if os.getpid() not in self._by_process:
            self._by_process[os.getpid()] = sqlite3.connect(self._uri, uri=True, timeout=30)
        return self._by_process[os.getpid()]


def _chunks(values: Iterable[T], size: int) -> Iterator[list[T]]:
    stream = iter(values)
    while part := list(islice(stream, size)):
        yield part


def _checked_rows(entries: Sequence[tuple[bytes, int, int]], folder: Path, *, salt: int) -> Iterator[tuple[bytes, int]]:
    """Compare index entries with their checksums and return their keys and rows."""
    if not entries:
        return iter(())
    keys, rows, seals = zip(*entries, strict=True)
    try:
        checks = key_checks(keys, np.array(rows, dtype=np.int64), salt=salt)
        is_right = (checks == np.array(seals, dtype=np.int64)).all()
    except (TypeError, ValueError, OverflowError):  # a flipped bit may have changed the type of a value
        is_right = False
    if not is_right:
        reason = "a row does not match its checksum in this store"
        raise DamagedFile(folder / "index.sqlite", reason=reason, remedy=_REMEDY)
    return zip(keys, rows, strict=True)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def content_key(content: Content) -> bytes:
    """Return the 16-byte hash of a content. Among 10 million, the probability of a collision is below 1e-24."""
    if isinstance(content, str):
        return hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    picture = content.picture.digest if content.picture else b""
    parts = (content_key(content.text), picture, content.vector or b"")
    sizes = b"".join(len(part).to_bytes(8, "little") for part in parts)
    return hashlib.blake2b(sizes + b"".join(parts), digest_size=16, person=b"item content").digest()


def _create(folder: Path, identity: EncoderIdentity) -> None:
    """Create an empty store. `table.json` is written last, so its presence shows that the store is complete."""
    with _storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with _writer_lock(folder, wait_s=30), _storage_errors(folder):
        if (folder / "table.json").is_file():  # another process has created the store
            return
        if _size(folder / "vectors.f16"):
            raise UserError(
                f"{folder} has vectors but no table.json, which describes their encoder. Delete the folder."
            )
        (folder / "vectors.f16").touch()
        (folder / "checks.u64").touch()
        salt = secrets.randbits(62)
        seal = int(key_checks([_EXTENT], np.zeros(1, dtype=np.int64), salt=salt)[0])
        with contextlib.closing(sqlite3.connect(folder / "index.sqlite")) as index:
            index.executescript(_SCHEMA)
            with index:
                index.execute(_INSERT, (_EXTENT, 0, seal))
        description = {"format": FORMAT, "encoder": identity.to_dict(), "width": identity.width, "salt": salt}
        write_checked_json(folder / "table.json", description)


def _check_description(folder: Path, identity: EncoderIdentity) -> int:
    """Check a store's format and encoder, and return its salt."""
    path = folder / "table.json"
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        stored_identity, stored_format = EncoderIdentity.from_dict(description["encoder"]), description["format"]
    except (ValueError, KeyError, TypeError, UserError, RecursionError) as error:
        raise DamagedFile(path, reason="it does not describe an embedding store", remedy=_REMEDY) from error
    if stored_format != FORMAT:
        raise UserError(
            f"The embedding store {folder} has format {stored_format}; this version reads format {FORMAT}. "
            f"Use the version that created it, or encode again in a new folder."
        )
    check_json(description, path, remedy=_REMEDY)
    if not stored_identity.same_items_as(identity):
        raise EncoderMismatch(
            f"The embedding store {folder}", expected=stored_identity.describe(), found=identity.describe()
        )
    return int(description["salt"])


@contextlib.contextmanager
def _writer_lock(folder: Path, *, wait_s: float = 1) -> Iterator[None]:
    """Hold the writer lock: an SQLite lock, which the system releases even if the process is killed."""
    with _storage_errors(folder):
        lock = acquire_lock(folder / "writer.lock", wait_s=wait_s)
    with contextlib.closing(lock):
        yield


@contextlib.contextmanager
def _storage_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise _described(error, folder) from error


def _described(error: sqlite3.Error | OSError, folder: Path) -> UserError | StorageError:
    name = getattr(error, "sqlite_errorname", "")
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return UserError(f"Another process is writing to the embedding store {folder}. Try again when it has ended.")
    is_index_missing = isinstance(error, sqlite3.Error) and not (folder / "index.sqlite").exists()
    if is_index_missing or (isinstance(error, sqlite3.Error) and not name.startswith(_STORAGE_TROUBLE)):
        return DamagedFile(folder / "index.sqlite", reason=f"SQLite reports {str(error)!r}", remedy=_REMEDY)
    return StorageError(
        f"The embedding store {folder} cannot be read or written ({getattr(error, 'strerror', None) or error}). "
        f"Earlier chunks are complete. Free disk space or allow writing, then run the same command again."
    )
