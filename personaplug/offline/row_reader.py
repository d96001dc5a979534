"""Read blocks of rows from Parquet files. Memory does not depend on the sizes of files and row groups."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from personaplug.data.parquet_files import batch_records, import_pyarrow
from personaplug.errors import RecordError
from personaplug.offline.input_files import parquet_errors

_BATCH_ROWS = 64  # a row may contain a whole history
_BUFFER_BYTES = 1 << 20  # of a column, instead of all its values in a row group


class RowReader:
    """Reads blocks of rows. A block that follows the last one is read on from there; others start at a row group."""

    def __init__(self, columns: Sequence[str]) -> None:
        self._columns = list(columns)
        self._path: Path | None = None
        self._next = 0  # number of the first row in `_rest`
        self._rest: Any = None  # rows that were decoded, but not returned
        self._batches: Iterator[Any] = iter(())

    def read(self, path: Path, *, first: int, rows: int) -> list[Mapping[str, object]]:
        """Return `rows` rows of a file from row `first` on, counted from 0.

        Raises:
            RecordError: if the file has fewer rows or cannot be read.
        """
        with parquet_errors(path, f"rows {first + 1} to {first + rows}"):
            if path != self._path or first < self._next:
                self._open(path, first)
            return [record for part in self._parts(first, rows) for record in batch_records(part)]  # type: ignore[misc]

    def _open(self, path: Path, first: int) -> None:
        """Start at the row group of a row."""
        _, parquet = import_pyarrow()
        file = parquet.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False)
        group, start = 0, 0
        while group < file.num_row_groups - 1 and start + file.metadata.row_group(group).num_rows <= first:
            start += file.metadata.row_group(group).num_rows
            group += 1
        groups = range(group, file.num_row_groups)
        self._path, self._next, self._rest = path, start, None
        self._batches = file.iter_batches(_BATCH_ROWS, row_groups=groups, columns=self._columns)

    def _parts(self, first: int, rows: int) -> Iterator[Any]:
        while rows:
            while self._rest is None or not self._rest.num_rows:
                self._rest = next(self._batches, None)
                if self._rest is None:
                    raise RecordError(str(self._path), f"row {first + 1}", reason="the file has fewer rows than before")
            skipped = min(first - self._next, self._rest.num_rows)
            taken = min(rows, self._rest.num_rows - skipped)
            if taken:
                yield self._rest.slice(skipped, taken)
            self._rest = self._rest.slice(skipped + taken)
            self._next += skipped + taken
            first, rows = first + taken, rows - taken
