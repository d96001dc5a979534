"""The input of a job: Parquet files, their columns, and the ids of their rows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from personaplug.data.ids import as_id
from personaplug.data.parquet_files import batch_records, import_pyarrow
from personaplug.data.values import Flaw
from personaplug.errors import ConfigError, MissingData, RecordError

ID, USER, PROMPT, HISTORY = "id", "user_id", "prompt", "history"
COLUMNS = (ID, USER, PROMPT, HISTORY)
"""The columns of the input that a job reads. Other columns are allowed and ignored."""


@dataclass(frozen=True)
class InputFile:
    """A Parquet file of the input.

    Attributes:
        name: path relative to the input folder.
        digest: hash of the bytes.
        state: size and time of the last change, to notice a change during the job.
    """

    path: Path
    name: str
    rows: int
    digest: str
    state: tuple[int, int]

    def is_unchanged(self) -> bool:
        """Return whether size and time of the last change are as at the start of the job."""
        return self.path.exists() and _state(self.path) == self.state


@dataclass(frozen=True)
class Input:
    """The files of a job, in the order of their names, and the known columns that all of them have."""

    files: tuple[InputFile, ...]
    columns: tuple[str, ...]

    @property
    def rows(self) -> int:
        return sum(file.rows for file in self.files)


def read_input(source: Path) -> Input:
    """Describe a Parquet file, or all Parquet files below a folder, and check the ids of the rows.

    Names that begin with a dot or an underscore are skipped, as Spark and pyarrow do.

    Raises:
        MissingData: if there is no Parquet file with rows.
        ConfigError: if the files have different columns.
        RecordError: if a file is not Parquet, or an id is missing, invalid or not unique.
    """
    paths = _find(source)
    root = source if source.is_dir() else source.parent
    described = [_describe(path, root) for path in paths]
    files, columns = tuple(file for file, _ in described), _common_columns(described)
    if not sum(file.rows for file in files):
        raise MissingData(f"{source} contains no *.parquet file with rows.")
    if ID in columns:
        _check_ids(files)
    return Input(files, columns)


@contextmanager
def parquet_errors(path: Path, position: str) -> Iterator[None]:
    """Convert errors of pyarrow, which may quote values, to a RecordError."""
    pyarrow, _ = import_pyarrow()
    try:
        yield
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError):
        raise RecordError(path, position, reason="the file is not valid Parquet or cannot be read") from None


def _find(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise MissingData(f"There is no file or folder {source}. --input takes a folder of *.parquet files.")
    found = sorted(source.rglob("*.parquet"))
    return [path for path in found if not any(part[0] in "._" for part in path.relative_to(source).parts)]


def _describe(path: Path, root: Path) -> tuple[InputFile, tuple[str, ...]]:
    """Return a file, and its columns among `COLUMNS`."""
    _, parquet = import_pyarrow()
    with parquet_errors(path, "footer"), parquet.ParquetFile(path) as file:
        rows, names = file.metadata.num_rows, file.schema_arrow.names
    with path.open("rb") as opened:
        digest = hashlib.file_digest(opened, "blake2b").hexdigest()[:32]
    described = InputFile(path.absolute(), path.relative_to(root).as_posix(), rows, digest, _state(path))
    return described, tuple(name for name in COLUMNS if name in names)


def _state(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _common_columns(described: Sequence[tuple[InputFile, tuple[str, ...]]]) -> tuple[str, ...]:
    columns = described[0][1] if described else ()
    for file, others in described:
        if others != columns:
            raise ConfigError(
                f"All files of the input need the same columns among {', '.join(COLUMNS)}. {described[0][0].name} has "
                f"{', '.join(columns) or 'none'}; {file.name} has {', '.join(others) or 'none'}."
            )
    return columns


def _check_ids(files: Sequence[InputFile]) -> None:
    """Raise RecordError unless all ids are valid and different, because answers are joined to rows by their ids."""
    hashes = np.fromiter((each for file in files for each in _id_hashes(file)), dtype=np.uint64)
    order = np.argsort(hashes, kind="stable")
    repeated = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
    if len(repeated):
        first, second = (_position(files, int(order[repeated[0] + offset])) for offset in (0, 1))
        raise RecordError(second[0].path, f"row {second[1]}", reason=f"its id is also the id of row {first[1]} of "
                          f"{first[0].name}. Give each row its own id, or remove the column id.")  # fmt: skip


def _id_hashes(file: InputFile) -> Iterator[int]:
    for number, value in enumerate(_column(file, ID), start=1):
        try:
            name = as_id(value, "its 'id'")
        except Flaw as flaw:
            raise RecordError(file.path, f"row {number}", reason=str(flaw)) from None
        yield int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest())


def _column(file: InputFile, name: str) -> Iterator[Any]:
    _, parquet = import_pyarrow()
    with parquet_errors(file.path, f"column {name}"), parquet.ParquetFile(file.path) as opened:
        for batch in opened.iter_batches(1 << 14, columns=[name]):
            for record in batch_records(batch):
                yield dict(record)[name]  # type: ignore[call-overload]  # a record is a mapping


def _position(files: Sequence[InputFile], index: int) -> tuple[InputFile, int]:
    """Return the file and the number, from 1, of the row with this index in the whole input."""
    for file in files:
        if index < file.rows:
            return file, index + 1
        index -= file.rows
    raise IndexError(index)
