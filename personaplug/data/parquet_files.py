"""Read Parquet files and Arrow tables. A value that cannot be converted to Python becomes a Flaw."""

from __future__ import annotations

import gzip
import importlib
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from personaplug.data.class_names import name_classes, names_in_metadata
from personaplug.data.delimited_files import NumberedRecord, check_columns
from personaplug.data.values import Flaw, plain_value
from personaplug.errors import MissingExtra, RecordError


def parquet_records(path: Path, columns: Sequence[str]) -> Iterator[NumberedRecord]:
    """Yield the rows of a file *.parquet or *.parquet.gz."""
    pyarrow, parquet = import_pyarrow()
    number = 0
    try:
        # Parquet is read from its end, so a gzipped file is unpacked in memory.
        source = pyarrow.BufferReader(gzip.decompress(path.read_bytes())) if path.suffix == ".gz" else path
        with parquet.ParquetFile(source) as file:
            names = file.schema_arrow.names
            check_columns(path, names, columns or names)
            # A row with all columns may contain a whole history or pictures, so batches of such rows are small.
            is_flat = columns and not any(_is_large(file.schema_arrow.field(name).type) for name in columns)
            batches = file.iter_batches(1 << 16 if is_flat else 64, columns=list(columns) or None)
            for batch in batches:
                for values in batch_records(batch):
                    number += 1
                    yield f"row {number}", number, values
    except (pyarrow.ArrowException, OSError, EOFError, zlib.error, UnicodeDecodeError):
        raise RecordError(path, f"after row {number}", reason="the file is not valid Parquet from here on") from None


def _is_large(kind: Any) -> bool:
    """Return whether a value of a type may be a picture or a list."""
    pyarrow, _ = import_pyarrow()
    types = pyarrow.types
    return bool(types.is_nested(kind) or types.is_binary(kind) or types.is_large_binary(kind))


def batch_records(batch: Any) -> Iterator[object]:
    """Yield the rows of a pyarrow.RecordBatch, with the class names of a Hugging Face data set."""
    names, columns = batch.schema.names, [_values(column) for column in batch.columns]
    records = (dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True))
    classes = names_in_metadata(batch.schema.metadata)
    return name_classes(records, classes) if classes else records


def _values(column: Any) -> Sequence[object]:
    pyarrow, _ = import_pyarrow()
    kind = column.type
    if pyarrow.types.is_timestamp(kind) and kind.unit == "ns":
        # Python's datetime has microseconds, and pyarrow does not round finer timestamps by default.
        column = column.cast(pyarrow.timestamp("us", tz=kind.tz), safe=False)
    try:
        values: list[object] = column.to_pylist()
    except (ValueError, OverflowError, LookupError, pyarrow.ArrowException):
        return [_value(scalar) for scalar in column]
    if pyarrow.types.is_float32(kind) or pyarrow.types.is_float16(kind):
        single = kind.to_pandas_dtype()
        return [None if value is None else plain_value(single(value)) for value in values]
    return values


def _value(scalar: Any) -> object:
    try:
        return scalar.as_py()
    except Exception as error:
        return Flaw(f"is a {scalar.type} that cannot be read: {type(error).__name__}")


def import_pyarrow() -> tuple[Any, Any]:
    """Return the modules pyarrow and pyarrow.parquet; raise MissingExtra without them."""
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ModuleNotFoundError:
        raise MissingExtra("Reading Parquet", extra="parquet") from None
