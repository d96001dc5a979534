"""Find and read the files of published benchmarks.

A file is a JSON list (*.json) or has one JSON object per line (*.jsonl), both also with .gz. It may also be Parquet,
whole or in shards with names as on the Hugging Face hub (`train-00000-of-00007.parquet`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from personaplug.data.parsing import id_of, name_of, target_of, text_of
from personaplug.data.record_files import record_source
from personaplug.data.record_reader import Limits, PositionedRecord, RecordReader
from personaplug.data.records import Sample
from personaplug.data.task import Task
from personaplug.errors import ConfigError, MissingData

SPLITS: Mapping[str, tuple[str, ...]] = {"train": ("train",), "dev": ("dev", "val", "validation"), "test": ("test",)}
"""The names of the splits, each with the names that publishers use."""

_KINDS = (".json", ".jsonl", ".parquet")
_SHARD = re.compile(r"-(\d+)-of-(\d+)\.parquet")


@dataclass(frozen=True)
class Layout:
    """The columns of a benchmark's records; "" stands for a missing column.

    Attributes:
        instruction: the text before the input in a prompt; not a column.
        id: the record's id; without it, the id is the number of the record in the split ("row-1").
        user: the user's id.
        output: the target.
        item_id: an item's id; without it, the id is the number of the item in its profile.
    """

    task: Task
    input: str
    instruction: str = ""
    id: str = ""
    user: str = ""
    output: str = ""
    item_id: str = ""
    item_date: str = ""


class PublishedReader(RecordReader):
    """Stream a split with one sample per record, whose "profile" is the list of items."""

    def __init__(self, files: Sequence[Path], layout: Layout, **limits: Unpack[Limits]) -> None:
        super().__init__(layout.task, origin=files[0], **limits)
        self._files, self._layout = tuple(files), layout

    def _samples(self) -> Iterator[Sample]:
        return self._parsed(published_records(self._files), parse_id=self._id, parse=self._sample)

    def _id(self, record: Mapping[str, Any], number: int) -> str:
        return id_of(record, self._layout.id) if self._layout.id else f"row-{number}"

    def _sample(self, record: Mapping[str, Any], sample_id: str) -> Sample:
        layout = self._layout
        prompt = layout.instruction + name_of(record, layout.input)
        user = id_of(record, layout.user) if layout.user else None
        target = target_of(self.task, text_of(record, layout.output)) if layout.output else None
        items = self._items(record, id_key=layout.item_id, date_key=layout.item_date)
        return self._sample_of(sample_id, user, prompt, target=target, items=items)


def check_split(split: str) -> str:
    """Return the name of a split if it exists, else raise ConfigError."""
    if split not in SPLITS:
        raise ConfigError(f"A benchmark's splits are {', '.join(SPLITS)}; found {split!r}.")
    return split


def split_files(path: str | Path, split: str) -> tuple[Path, ...]:
    """Find the files of a split; `path` is the split's file, or a folder.

    Search the folder, its folder `data` and its folder with the split's name for `{split}.json`,
    `{anything}_{split}.json` and similar names.
    """
    path, names = Path(path), SPLITS[check_split(split)]
    if not path.exists():
        raise MissingData(f"There is no file or folder {path}.")
    files = _files_in(path, names) if path.is_dir() else (path,)
    for file in files:
        record_source(file, kinds=_KINDS)
    return files


def published_records(files: Sequence[Path]) -> Iterator[PositionedRecord]:
    """Yield the records of a split's files."""
    for file in files:
        for position, _, record in record_source(file, kinds=_KINDS).read(()):
            yield file, position, record


def _files_in(path: Path, names: tuple[str, ...]) -> tuple[Path, ...]:
    pattern = re.compile(rf"(?:.+_)?(?:{'|'.join(names)})(?:\.jsonl?(?:\.gz)?|(?:-\d+-of-\d+)?\.parquet)")
    for folder in (path, path / "data", *(path / name for name in names)):
        files = sorted(file for file in folder.glob("*") if file.is_file() and pattern.fullmatch(file.name))
        if not files:
            continue
        shards = [match for file in files if (match := _SHARD.search(file.name))]
        if len(files) > 1 and (len(shards) < len(files) or len({m.string[: m.start()] for m in shards}) > 1):
            file_names = ", ".join(file.name for file in files)
            raise ConfigError(
                f"{folder} has several files of this split: {file_names}. Choose one of them as the path."
            )
        if any(int(match[2]) != len(shards) for match in shards):
            raise MissingData(f"{folder} has {len(shards)} shards of this split, but their names say {shards[0][2]}.")
        return tuple(files)
    raise MissingData(
        f"{path} has no file of the split {names[0]!r}: expected {' or '.join(names)} as *.json[.gz], *.jsonl[.gz] "
        f"or *.parquet, in the folder itself or in its folder 'data' or {' or '.join(map(repr, names))}. "
        f"Or give the path of the file."
    )
