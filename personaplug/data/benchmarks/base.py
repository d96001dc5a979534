"""Benchmarks' files as their publishers lay them out: found by split, read record by record.

A file is a JSON list (*.json), one JSON object a line (*.jsonl), both also *.gz, or Parquet, whole or in the shards
`train-00000-of-00007.parquet` of the Hugging Face hub. Splits go by this project's names; a publisher's "val" and
"validation" are "dev".
"""

from __future__ import annotations

import importlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from personaplug.data.json_stream import json_lines, stream_values
from personaplug.data.parsing import Flaw, as_record, short_id
from personaplug.data.records import HistoryItem, Sample
from personaplug.data.task import ReadReport, Task, check_max_history, check_skip_bad, latest_items
from personaplug.errors import ConfigError, MissingData, MissingExtra, RecordError

SPLITS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"train": ("train",), "dev": ("dev", "val", "validation"), "test": ("test",)}
)
"""This project's names of the splits, with what publishers call them."""

PublishedRecord = tuple[Path, str, Mapping[str, Any] | Flaw]
"""A file, the place in it in words, and what stands there."""


def check_split(split: str) -> str:
    """Return `split` if it is one of SPLITS.

    Raises:
        ConfigError: if it is another.
    """
    if split not in SPLITS:
        raise ConfigError(f"A benchmark's splits are {', '.join(SPLITS)}; found {split!r}.")
    return split


def split_files(path: str | Path, split: str) -> tuple[Path, ...]:
    """Find the files of a split.

    Args:
        path: the split's file, which is taken as it is, or a folder. There, or in its `data` or a folder of the
            split's name, `{split}.json`, `{anything}_{split}.json` and the like are looked for.
        split: one of SPLITS.

    Raises:
        MissingData: if nothing is there, or a shard is missing.
        MissingExtra: if it is Parquet and pyarrow is not installed.
        ConfigError: if the split is unknown, a file of no known kind, or several could be the split.
    """
    path, names = Path(path), SPLITS[check_split(split)]
    if path.is_file():
        files: tuple[Path, ...] = (path,)
    elif path.is_dir():
        files = _found_in(path, names)
    else:
        raise MissingData(f"There is no file or folder {path}.")
    for file in files:
        _source(file)
    return files


def published_records(files: Sequence[Path]) -> Iterator[PublishedRecord]:
    """Yield the records of files that belong together; a Flaw in a broken one's place.

    Raises:
        RecordError: where a file breaks off; the rest of it is lost, so it is never skipped.
    """
    for file in files:
        for where, value in _source(file)(file):
            try:
                record: Mapping[str, Any] | Flaw = value if isinstance(value, Flaw) else as_record(value)
            except Flaw as flaw:
                record = flaw
            yield file, where, record


class PublishedReader(ABC):
    """A split whose records are samples one for one, streamed; a subclass says what a record holds.

    Attributes:
        task: what is asked.
        report: what the last (or current) pass met.
    """

    def __init__(self, files: Sequence[Path], *, task: Task, skip_bad: int, max_history: int) -> None:
        """Check the settings; the samples are read later.

        Raises:
            ConfigError: if a setting is out of range.
        """
        self._files, self.task = tuple(files), task
        self._skip_bad, self._max_history = check_skip_bad(skip_bad), check_max_history(max_history)
        self.report = ReadReport()

    def __iter__(self) -> Iterator[Sample]:
        """Yield the samples in file order.

        Raises:
            RecordError: for the first broken record beyond `skip_bad`, and always where a file breaks off.
        """
        self.report = ReadReport()
        seen: set[str] = set()
        for number, (file, where, record) in enumerate(published_records(self._files), 1):
            try:
                if isinstance(record, Flaw):
                    raise record
                sample_id = self._id(record, number)
                where = f"{where} (id {short_id(sample_id)})"
                if sample_id in seen:
                    raise Flaw("its id is another record's too")
                seen.add(sample_id)
                sample = self._sample(record, sample_id)
            except Flaw as flaw:
                self.report.skip(RecordError(file, where, reason=str(flaw)), allowed=self._skip_bad)
            else:
                yield self.report.add(sample)

    @abstractmethod
    def _id(self, record: Mapping[str, Any], number: int) -> str:
        """Return the record's id; `number` counts the split's records from 1."""

    @abstractmethod
    def _sample(self, record: Mapping[str, Any], sample_id: str) -> Sample:
        """Make a sample of a record, its history last, so that nothing of a broken record is counted."""

    def _history(
        self, profile: object, parse: Callable[[Mapping[str, Any], int], tuple[datetime | None, HistoryItem]]
    ) -> tuple[HistoryItem, ...]:
        if not isinstance(profile, list):
            raise Flaw("its 'profile' is not a list")
        items = []
        for number, item in enumerate(profile, 1):
            try:
                items.append(parse(as_record(item), number))
            except Flaw as flaw:
                raise Flaw(f"item {number} of its profile: {flaw}") from None
        return latest_items(items, max_history=self._max_history, report=self.report)


# ---- which files

_SHARD = re.compile(r"-(\d+)-of-(\d+)\.parquet")


def _found_in(path: Path, names: tuple[str, ...]) -> tuple[Path, ...]:
    wanted = re.compile(rf"(?:.+_)?(?:{'|'.join(names)})(?:\.jsonl?(?:\.gz)?|(?:-\d+-of-\d+)?\.parquet)")
    for folder in (path, path / "data", *(path / name for name in names)):
        found = sorted(file for file in folder.glob("*") if file.is_file() and wanted.fullmatch(file.name))
        if found:
            return _complete(found, folder)
    raise MissingData(
        f"{path} holds no file of the split {names[0]!r}: expected {' or '.join(names)} as *.json[.gz], *.jsonl[.gz] "
        f"or *.parquet there or in a folder 'data' or {' or '.join(map(repr, names))}. Name the file itself."
    )


def _complete(found: Sequence[Path], folder: Path) -> tuple[Path, ...]:
    shards = [match for file in found if (match := _SHARD.search(file.name))]
    stems = {file.name[: match.start()] for file, match in zip(found, shards, strict=False)}
    if len(found) > 1 and (len(shards) < len(found) or len(stems) > 1):
        raise ConfigError(f"{folder} holds several files of that split: {', '.join(f.name for f in found)}. Name one.")
    if shards and any(int(match[2]) != len(shards) for match in shards):
        raise MissingData(f"{folder} holds {len(shards)} shards of that split, their names say {shards[0][2]}.")
    return tuple(found)


# ---- what stands in a file

_Values = Iterator[tuple[str, object]]


def _source(path: Path) -> Callable[[Path], _Values]:
    name = path.name.lower()
    if name.endswith(".parquet"):
        _parquet()
        return _parquet_values
    if name.endswith((".jsonl", ".jsonl.gz")):
        return _line_values
    if name.endswith((".json", ".json.gz")):
        return _list_values
    raise ConfigError(f"{path}: a benchmark's file is one of *.json, *.jsonl, both also *.gz, *.parquet.")


def _list_values(path: Path) -> _Values:
    for number, value in stream_values(path, "item", opening=b"[", unit="record"):
        yield f"record {number}", value


def _line_values(path: Path) -> _Values:
    for number, value in json_lines(path):
        yield f"line {number}", value


def _parquet_values(path: Path) -> _Values:
    parquet, broken = _parquet()
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            # A row may hold a whole history, so few of them are in memory at once.
            for batch in file.iter_batches(batch_size=64):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
    except (broken, OSError):
        raise RecordError(path, f"after row {number}", reason="the file is not valid Parquet from here on") from None


def _parquet() -> tuple[Any, type[Exception]]:
    try:
        broken: type[Exception] = importlib.import_module("pyarrow").ArrowException
        return importlib.import_module("pyarrow.parquet"), broken
    except ModuleNotFoundError:
        raise MissingExtra("Reading Parquet", extra="parquet") from None
