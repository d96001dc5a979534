"""Read rows in memory: DataFrames, Arrow tables, Hugging Face data sets, and iterables of mappings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from personaplug.data.class_names import name_classes, names_in_features
from personaplug.data.delimited_files import NumberedRecord, check_columns
from personaplug.data.parquet_files import batch_records
from personaplug.errors import ConfigError


class Table:
    """Rows in memory that can be read more than once. DataFrame libraries are not imported."""

    def __init__(self, source: object) -> None:
        """Check a source: a DataFrame of pandas or Polars, a pyarrow.Table, or an iterable of mappings."""
        self.name = f"the {type(source).__name__}"
        if isinstance(source, Mapping):
            keys = ", ".join(sorted(map(str, source))[:10])
            raise ConfigError(
                f"Rows should be an iterable of mappings, or a DataFrame; found one mapping with the keys {keys}."
            )
        if isinstance(source, (str, bytes)) or not (isinstance(source, Iterable) or hasattr(source, "to_batches")):
            raise ConfigError(f"Rows should be a file, a DataFrame or an iterable of mappings; found {self.name}.")
        # An iterator yields its rows once, but a reader may be read again.
        rows: Any = source
        is_spent = isinstance(rows, Iterator) or (_has_only_iter(rows) and iter(rows) is iter(rows))
        self._source: Any = list(rows) if is_spent else rows
        if hasattr(source, "to_table"):  # a pyarrow.dataset.Dataset
            self._source = source.to_table()

    def records(self, columns: Sequence[str]) -> Iterator[NumberedRecord]:
        """Yield the rows with these columns (without any, all columns)."""
        for number, values in enumerate(self._rows(columns), 1):
            yield f"row {number}", number, values

    def _rows(self, columns: Sequence[str]) -> Iterable[object]:
        source = self._source
        if hasattr(source, "itertuples"):
            return self._pandas_rows(columns)
        if hasattr(source, "iter_rows"):
            check_columns(self.name, source.columns, columns)
            rows: Iterable[object] = source.select(columns or source.columns).iter_rows(named=True)
            return rows
        if hasattr(source, "to_batches"):
            check_columns(self.name, source.column_names, columns or source.column_names)
            table = source.select(list(columns or source.column_names))
            return (row for batch in table.to_batches(max_chunksize=1 << 16) for row in batch_records(batch))
        names = names_in_features(getattr(source, "features", None))
        return name_classes(source, names) if names else source

    def _pandas_rows(self, columns: Sequence[str]) -> Iterator[Mapping[str, object]]:
        frame = self._source
        named = [level for level in frame.index.names if level is not None and level not in frame.columns]
        levels = [level for level in named if level in columns or not columns]
        frame = frame.reset_index(levels) if levels else frame
        header = [*map(str, frame.columns)]
        check_columns(self.name, header, columns or header)
        names = list(columns or header)
        series = [frame.iloc[:, header.index(name)] for name in names]
        # NaN, NaT and NA all stand for a missing value.
        values = [each.astype(object).where(each.notna(), None) for each in series]
        return (dict(zip(names, row, strict=True)) for row in zip(*values, strict=True))


def _has_only_iter(source: object) -> bool:
    """True for an object that is neither a sequence nor a table; it may return the same iterator each time."""
    return not any(hasattr(source, name) for name in ("__len__", "to_batches", "itertuples", "iter_rows", "to_table"))
