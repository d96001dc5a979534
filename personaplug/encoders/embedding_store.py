"""EmbeddingStore: the items' vectors on disk, and samples whose histories are rows of it.

A table is a folder: `table.json` (format and encoder), `vectors.f16` (raw float16 rows, memory-mapped) and
`index.sqlite` (a hash of each text -> its row). Vectors are found by content, never by a running offset, so a
text that stands in many histories is encoded and kept once. No text is written to disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from personaplug.encoders import Encoder, EncoderIdentity
from personaplug.errors import EncoderMismatch, MissingData, ShapeMismatch, StorageError, UserError
from personaplug.infra.atomic_io import write_json

FORMAT = 1

T = TypeVar("T")
Rows = npt.NDArray[np.int64]
Halves = npt.NDArray[np.float16]

_KEYS_PER_QUERY = 500
_SCHEMA = """
CREATE TABLE IF NOT EXISTS items (key BLOB PRIMARY KEY, row INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS extent (only INTEGER PRIMARY KEY CHECK (only = 0), rows INTEGER NOT NULL);
INSERT OR IGNORE INTO extent VALUES (0, 0);
"""


class Added(NamedTuple):
    """What `EmbeddingStore.add` did: texts encoded now, and texts that were there already or came twice."""

    new: int
    seen: int


class EmbeddingStore:
    """Item vectors of one encoder in a folder; any number of readers, one writer at a time.

    A writer appends and syncs vectors first and commits their keys second, so whatever stops it, the index
    never points at a vector that is not there. Nothing but the memory map is held open: a table may be used
    by several threads, and by processes that are forked or spawned from this one.

    Attributes:
        folder: where it is.
        encoder: who encodes what is missing.
        width: values in a vector (E).
    """

    def __init__(self, folder: Path, encoder: Encoder) -> None:
        """Wrap a folder that is known to be a table of this encoder; use `open`."""
        self.folder, self.encoder, self.width = folder, encoder, encoder.width
        self._map: Halves = np.zeros((0, self.width), dtype=np.float16)

    @classmethod
    def open(cls, folder: str | Path, encoder: Encoder, *, create: bool = True) -> EmbeddingStore:
        """Open the table in a folder, or make an empty one.

        Args:
            folder: where it is or shall be.
            encoder: must be the one that made the table; its name and the prompt of queries may differ.
            create: make the table if it is not there.
        Raises:
            EncoderMismatch: if another encoder made the table.
            MissingData: if it is not there and shall not be made.
            UserError: if its files do not fit together.
            StorageError: if it cannot be written.
        """
        folder = Path(folder)
        if not (folder / "table.json").is_file():
            if not create:
                raise MissingData(f"There is no vector table in {folder}: encode the items first.")
            _create(folder, encoder.identity)
        _check_encoder(folder, encoder.identity)
        table = cls(folder, encoder)
        table._committed()
        return table

    @property
    def identity(self) -> EncoderIdentity:
        """The encoder whose vectors these are."""
        return self.encoder.identity

    def __len__(self) -> int:
        """Rows in the table."""
        return self._committed()

    def __repr__(self) -> str:
        return f"EmbeddingStore({str(self.folder)!r}, encoder={self.identity.name!r}, rows={len(self)})"

    def __getstate__(self) -> dict[str, Any]:
        # A pickled memory map would carry all its vectors along.
        return self.__dict__ | {"_map": np.zeros((0, self.width), dtype=np.float16)}

    def add(
        self,
        texts: Iterable[str],
        *,
        progress: Callable[[int], None] | None = None,
        batch_size: int = 64,
        chunk: int = 4096,
    ) -> Added:
        """Encode the texts that are missing; only one chunk of them is in memory at a time.

        Each chunk is complete on disk before the next one begins, so an interrupted call loses one chunk at
        most and the same call goes on from there. If nothing is missing, nothing is written or locked.

        Args:
            texts: may be a generator of any length.
            progress: called after each chunk with the number of texts done so far.
            batch_size: texts that the encoder takes at once.
            chunk: texts that are read, encoded and committed together.
        Raises:
            UserError: if another process is writing, or the encoder gives NaN.
            StorageError: if the disk is full; the chunks before stay.
        """
        new = done = 0
        with contextlib.ExitStack() as stack:
            lock: sqlite3.Connection | None = None
            for part in _chunks(texts, chunk):
                missing = self._missing(part)
                if missing and lock is None:
                    lock = stack.enter_context(_writer_lock(self.folder))
                    missing = self._missing(part)  # another writer may have been at it until now
                self._append(missing, batch_size=batch_size)
                new, done = new + len(missing), done + len(part)
                if progress:
                    progress(done)
        return Added(new=new, seen=done - new)

    def rows(self, texts: Sequence[str]) -> Rows:
        """Return the (n,) rows of n texts.

        Raises:
            UserError: if one of them was never added; the text is not shown.
        """
        keys = [content_key(text) for text in texts]
        found = self._lookup(set(keys))
        unknown = sum(key not in found for key in keys)
        if unknown:
            raise UserError(
                f"{unknown} of {len(keys)} texts are not in the vector table {self.folder}: add them first."
            )
        return np.fromiter((found[key] for key in keys), dtype=np.int64, count=len(keys))

    def gather(self, rows: Rows) -> Halves:
        """Return the (n, E) float16 vectors of n rows; only these are read from disk.

        Raises:
            UserError: if there is no such row.
        """
        rows = np.asarray(rows, dtype=np.int64)
        if rows.size == 0:
            return np.zeros((*rows.shape, self.width), dtype=np.float16)
        if int(rows.max()) >= len(self._map):
            self._map = self._mapped()  # rows may have come since
        if int(rows.min()) < 0 or int(rows.max()) >= len(self._map):
            raise UserError(
                f"Rows {rows.min()} to {rows.max()} were asked for; the vector table {self.folder} has "
                f"rows 0 to {len(self._map) - 1}. Look rows up in the table that they are gathered from."
            )
        return np.asarray(self._map)[rows]

    def _mapped(self) -> Halves:
        rows = self._committed()
        if rows == 0:
            return np.zeros((0, self.width), dtype=np.float16)
        return np.memmap(self.folder / "vectors.f16", dtype="<f2", mode="r", shape=(rows, self.width))

    def _committed(self) -> int:
        """How many rows the index has committed; that many are checked to be there."""
        with _index(self.folder) as index:
            (rows,) = index.execute("SELECT rows FROM extent").fetchone() or (0,)
            vectors = self.folder / "vectors.f16"
            found = vectors.stat().st_size // (2 * self.width) if vectors.exists() else 0
        if found < rows:
            raise UserError(
                f"The vector table {self.folder} is damaged: its index has {rows} rows and vectors.f16 has "
                f"{found}. Delete the folder and encode again."
            )
        return int(rows)

    def _missing(self, texts: Sequence[str]) -> dict[bytes, str]:
        keyed = {content_key(text): text for text in texts}
        for key in self._lookup(keyed):
            del keyed[key]
        return keyed

    def _lookup(self, keys: Iterable[bytes]) -> dict[bytes, int]:
        found: dict[bytes, int] = {}
        with _index(self.folder) as index:
            # In key order, neighbours in the index are read together.
            for part in _chunks(sorted(keys), _KEYS_PER_QUERY):
                marks = ",".join("?" * len(part))
                found.update(index.execute(f"SELECT key, row FROM items WHERE key IN ({marks})", part))
        return found

    def _append(self, missing: Mapping[bytes, str], *, batch_size: int) -> None:
        if not missing:
            return
        vectors = self._encoded(list(missing.values()), batch_size=batch_size)
        start = self._committed()
        with _writing(self.folder):
            _write_rows(self.folder / "vectors.f16", vectors, start=start)
        with _index(self.folder) as index, index:
            numbered = zip(missing, range(start, start + len(missing)), strict=True)
            index.executemany("INSERT INTO items VALUES (?, ?)", numbered)
            index.execute("UPDATE extent SET rows = ?", (start + len(missing),))

    def _encoded(self, texts: Sequence[str], *, batch_size: int) -> Halves:
        vectors = self.encoder.encode(texts, batch_size=batch_size)
        if vectors.shape != (len(texts), self.width):
            raise ShapeMismatch(
                f"The encoder {self.identity.name} returned shape {vectors.shape} for {len(texts)} texts; "
                f"expected ({len(texts)}, {self.width})."
            )
        with np.errstate(over="ignore"):
            halves: Halves = vectors.astype("<f2")
        bad = int((~np.isfinite(halves).all(axis=1)).sum())
        if bad:
            raise UserError(
                f"The encoder {self.identity.name} gave NaN or infinite values for {bad} of {len(texts)} "
                f"texts; none of them was kept. Run it in float32, or use another encoder."
            )
        return halves


def _chunks(values: Iterable[T], size: int) -> Iterator[list[T]]:
    stream = iter(values)
    while part := list(islice(stream, size)):
        yield part


def content_key(text: str) -> bytes:
    """16 bytes that stand for a text; among 10 million texts two share them with a chance below 1e-24."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _create(folder: Path, identity: EncoderIdentity) -> None:
    """Make an empty table; `table.json` comes last, so where it stands the rest stands too."""
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with _writer_lock(folder, wait_s=30), _writing(folder):
        if (folder / "table.json").is_file():  # another process was faster
            return
        if (folder / "vectors.f16").is_file() and (folder / "vectors.f16").stat().st_size:
            raise UserError(f"{folder} holds vectors but no table.json that says whose. Delete the folder.")
        (folder / "vectors.f16").touch()
        with contextlib.closing(sqlite3.connect(folder / "index.sqlite")) as index:
            index.executescript(_SCHEMA)
        _write_description(folder, identity)


def _write_description(folder: Path, identity: EncoderIdentity) -> None:
    described = {"format": FORMAT, "encoder": identity.to_dict(), "width": identity.width}
    write_json(folder / "table.json", described)


def _check_encoder(folder: Path, given: EncoderIdentity) -> None:
    try:
        described = json.loads((folder / "table.json").read_text(encoding="utf-8"))
        made_by = EncoderIdentity.from_dict(described["encoder"])
        found_format = described["format"]
    except (ValueError, KeyError, TypeError, UserError) as error:
        raise UserError(f"{folder / 'table.json'} describes no vector table. Delete the folder.") from error
    if found_format != FORMAT:
        raise UserError(
            f"The vector table {folder} has format {found_format}; this version reads format {FORMAT}. "
            f"Use the version that made it, or encode again in a new folder."
        )
    if not made_by.same_items_as(given):
        owner = f"The vector table {folder}"
        raise EncoderMismatch(owner, expected=made_by.describe(), found=given.describe())


def _write_rows(file: Path, vectors: Halves, *, start: int) -> None:
    """Put vectors behind the first `start` rows; what an interrupted writer left there goes."""
    with file.open("r+b") as stream:
        stream.truncate(start * vectors.shape[1] * 2)
        stream.seek(0, os.SEEK_END)
        stream.write(vectors.tobytes())
        stream.flush()
        os.fsync(stream.fileno())


@contextlib.contextmanager
def _index(folder: Path) -> Iterator[sqlite3.Connection]:
    """The index, for one operation: a connection that is kept would not survive a fork or another thread."""
    # mode=rw never creates the file; SQLite itself falls back to reading where writing is not allowed.
    path = (folder / "index.sqlite").absolute().as_uri() + "?mode=rw"
    with _writing(folder), contextlib.closing(sqlite3.connect(path, uri=True, timeout=30)) as connection:
        yield connection


@contextlib.contextmanager
def _writer_lock(folder: Path, *, wait_s: float = 1) -> Iterator[sqlite3.Connection]:
    """The right to write, which SQLite takes portably and the system gives back whatever ends the process."""
    with _writing(folder):
        lock = sqlite3.connect(folder / "writer.lock", timeout=wait_s, isolation_level=None)
    with contextlib.closing(lock):
        with _writing(folder):
            lock.execute("BEGIN EXCLUSIVE")
        yield lock


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise _index_error(folder, error) from error
    except OSError as error:
        raise StorageError(
            f"The vector table {folder} cannot be read or written ({error.strerror or error}). "
            f"What was complete before stays; make room or give leave to write, then run the same again."
        ) from error


def _index_error(folder: Path, error: sqlite3.Error) -> UserError | StorageError:
    name = getattr(error, "sqlite_errorname", "")
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return UserError(f"Another process is writing to the vector table {folder}. Try again after it.")
    if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")) or not (folder / "index.sqlite").exists():
        return UserError(f"The index of the vector table {folder} is damaged. Delete it and encode again.")
    return StorageError(
        f"The index of the vector table {folder} cannot be read or written ({error}). "
        f"What was complete before stays; make room or give leave to write, then run the same again."
    )
