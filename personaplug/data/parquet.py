"""Stream the rows of a Parquet file."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from personaplug.errors import ConfigError, MissingExtra, RecordError, nearest


def check_pyarrow() -> None:
    """Check that Parquet can be read."""
    _pyarrow()


def parquet_rows(
    path: Path, *, columns: Sequence[str] | None = None, batch_size: int = 1 << 16
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows as dictionaries, numbered from 1.

    Args:
        path: a Parquet file.
        columns: the columns to read; None for all.
        batch_size: the maximum number of rows in memory.
    """
    pyarrow, parquet = _pyarrow()
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            check_columns(path, file.schema_arrow.names, columns or ())
            for batch in file.iter_batches(batch_size=batch_size, columns=None if columns is None else list(columns)):
                for values in _microseconds(pyarrow, batch).to_pylist():
                    number += 1
                    yield number, values
    except (pyarrow.ArrowException, OSError):
        raise RecordError(path, f"after row {number}", reason="the file is not valid Parquet from here on") from None


def check_columns(path: Path, header: Sequence[str], columns: Sequence[str]) -> None:
    """Check that a table has each column once."""
    for column in columns:
        if header.count(column) != 1:
            raise ConfigError(f"{path} has {header.count(column)} columns {column!r}; {nearest(column, header)}")


def _microseconds(pyarrow: Any, batch: Any) -> Any:
    # Python's datetime has microseconds, and pyarrow refuses to round finer timestamps by itself.
    types = [
        pyarrow.timestamp("us", tz=field.type.tz) if pyarrow.types.is_timestamp(field.type) else field.type
        for field in batch.schema
    ]
    arrays = [column.cast(kind, safe=False) for column, kind in zip(batch.columns, types, strict=True)]
    return pyarrow.RecordBatch.from_arrays(arrays, names=batch.schema.names)


def _pyarrow() -> tuple[Any, Any]:
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ModuleNotFoundError:
        raise MissingExtra("Reading Parquet", extra="parquet") from None
